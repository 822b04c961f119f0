"""RALM: one conditional distribution p(x_t | x_<t, D), read in four ways.

    ralm = RALM(lm, retriever, how="prepend", when="every:4")
    ralm.score(text).ppl()                  # what the distribution says of a text
    for event in ralm.stream(prompt): ...   # a text drawn from it
    ralm.answer(question)                   # a text drawn from it, with citations that resolve
    ralm.explain(text)                      # what retrieval changed, token by token, and which documents did it

`score` and `stream` call the same `Fusion.logprobs` with the same windows and the same segments, so they cannot disagree
(law 3). The engine owns windows, schedule, retrieval, exclusion and evidence; a fusion only turns hits into distributions."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ralm.errors import CapabilityError, UsageError
from ralm.how.output import asking, bound, innermost
from ralm.run import Run
from ralm.types import Answer, Done, Event, Evidence, Fusion, Hits, Retriever, Schedule, Scored
from ralm.when import EveryN, Never, Once, schedule

if TYPE_CHECKING:
    import torch

    from ralm.beam import Hypothesis
    from ralm.index.suffix import SuffixIndex
    from ralm.provenance import Provenance
    from ralm.what.neighbours import NeighbourStore
    from ralm.what.token_store import TokenStore


@dataclass
class RALM:
    """A language model, a retriever, how evidence enters and when it is fetched. Spec strings stand for parts.

    Raises UsageError where a part is missing, CapabilityError where the model cannot give what the method needs."""

    lm: Any
    retriever: Retriever | None = None
    how: Fusion | str = "none"
    when: Schedule | str = "once"  # of passages; neighbours of tokens are looked for at every token
    where: str | None = None  # metadata filter on everything that is retrieved
    tokens: TokenStore | None = None  # what fusions at the output ask (kNN-LM)
    suffix: SuffixIndex | None = None  # what infini-grams are counted in
    neighbours: NeighbourStore | None = None  # what RETRO reads, chunk by chunk

    def __post_init__(self):
        if isinstance(self.lm, str):
            from ralm.lm import load

            self.lm = load(self.lm)
        if isinstance(self.how, str):
            from ralm.how import fusion

            self.how = fusion(self.how)
        if isinstance(self.when, str):
            self.when = schedule(self.when)
        passages = innermost(self.how)
        if passages.how == "input" and self.retriever is None:
            raise UsageError(f"{type(passages).__name__} needs a retriever, none was given; pass one, or use how='none'")
        if passages.how == "intermediate":
            from ralm.how.intermediate import check as check_neighbours

            check_neighbours(self)
        if asking(self.how, "tokens"):
            self._check_tokens(passages)
        if asking(self.how, "suffix"):
            from ralm.how.infinigram import check

            check(self)
        if "text" in self.lm.gives and "logits" not in self.lm.gives:
            from ralm.how.cite import check_text_only

            check_text_only(self)
        elif self.how.how != "none" and not self.how.needs <= self.lm.gives:
            self._refuse(type(self.how).__name__, self.how.needs)

    def __repr__(self) -> str:
        return f"RALM(lm={self.lm!r}, retriever={self.retriever!r}, how={self.how!r}, when={self.when!r})"

    def _check_tokens(self, passages: Fusion) -> None:
        """A fusion at the output has a token store, over the datastore that passages come from, made by this model."""
        if self.tokens is None:
            raise UsageError(f"{type(self.how).__name__} needs a token store, none was given; make one (TokenStore.build, ralm "
                             "tokens) and pass tokens=…")
        if passages.how == "none" and isinstance(self.when, Once):
            self.when = EveryN(1)
        if passages.how == "none" and not isinstance(self.when, Never) and self.when != EveryN(1):
            raise UsageError(f"{self.when} is a schedule for passages; {type(self.how).__name__} looks for neighbours at every "
                             "token: leave it out (skip=0.9 passes over tokens the model is sure of)")
        if self.retriever is not None and self.retriever.store.id != self.tokens.store.id:
            raise UsageError(f"passages come from {self.retriever.store.path}, tokens from {self.tokens.store.path}; use one "
                             "datastore")
        if self.tokens.lm is None:
            raise UsageError("the token store was opened without a model, so nobody checked that it was made by this one; open it "
                             "with TokenStore(store, lm)")
        self.how = bound(self.how, self.tokens)

    @property
    def store(self):
        return next((p.store for p in (self.retriever, self.tokens, self.suffix, self.neighbours) if p is not None), None)

    def source(self, evidence: Evidence) -> Any:
        """What resolves the ids of one retrieval to chunks: the datastore, or the neighbour database."""
        return self.neighbours if evidence.kind == "neighbours" else self.store

    def _refuse(self, who: str, needs: frozenset[str]) -> None:
        missing = " and ".join(sorted(needs - self.lm.gives))
        use = "a RETRO (bundled:retro, retro:FOLDER)" if "neighbours" in needs else "a local model (bundled:base, hf:NAME)"
        raise CapabilityError(f"{who} needs {missing} from the model, '{self.lm.name}' gives "
                              f"{', '.join(sorted(self.lm.gives))} only; use {use}")

    # ---- scoring ----------------------------------------------------------------------------------------------------

    def score(self, text: str | Sequence[int], *, prompt: str | Sequence[int] = "", window: int | None = None,
              stride: int | None = None, exclude: Sequence[str] = (), query: str | None = None) -> Scored:
        """ln p(x_t | x_<t, D) for every token of `text` (given `prompt`), with the evidence used.

        window: most tokens the model sees at once (default and maximum: the model's); stride: tokens predicted per window
        after the first (default: half the room left for text). exclude: ids of documents that must not be retrieved.
        query: what to search for where the prompt ends (default: the prompt; given, it is asked even without a prompt).
        Raises UsageError for a window or stride that does not fit, CapabilityError for a model without distributions."""
        return self._score(self._run(text, prompt, window, stride, exclude, query), text)

    def _score(self, run: Run, text: str | Sequence[int]) -> Scored:
        import torch

        began, logp = time.perf_counter(), []
        with torch.inference_mode():
            for _, logp_S in run.distributions(targets=True):
                logp += logp_S.tolist()
        ids = run.ids[run.prompt:]
        under = run.under()
        at = [-1 if i < 0 else run.evidence[i].at for i in under] if run.attends else run.force
        plain = text if isinstance(text, str) else self.lm.tokenizer.decode(ids)
        return Scored(np.asarray(logp, np.float64), np.asarray(ids, np.int64), len(plain.encode("utf-8", "surrogatepass")),
                      len(plain.split()), run.evidence, run.convention(), time.perf_counter() - began,
                      np.asarray(at, np.int64), under)

    def distributions(self, text: str | Sequence[int], *, prompt: str | Sequence[int] = "", window: int | None = None,
                      stride: int | None = None, exclude: Sequence[str] = (), query: str | None = None,
                      stepwise: bool = False) -> torch.Tensor:
        """ln p(. | x_<t, D) for every token of `text`, float32 [T, V]: what `score` reads one number per token of.

        stepwise: token by token on cached prefixes, as `stream` does. Law 3 says that nothing changes."""
        import torch

        run = self._run(text, prompt, window, stride, exclude, query)
        with torch.inference_mode():
            parts = [logp_SV for _, logp_SV in run.distributions(stepwise)]
        return torch.cat(parts) if parts else torch.empty(0, self.lm.vocab)

    def _run(self, text, prompt, window, stride, exclude, query, **given) -> Run:
        if "logits" not in self.lm.gives:
            self._refuse("scoring", frozenset({"logits"}))
        before = self._encode(prompt)
        return Run(self, before + self._encode(text), len(before), window, stride, _names(exclude),
                    query or (prompt if isinstance(prompt, str) else None), **given)

    def _encode(self, text: str | Sequence[int]) -> list[int]:
        return self.lm.tokenizer.encode(text) if isinstance(text, str) else [int(i) for i in text]

    # ---- streaming --------------------------------------------------------------------------------------------------

    def stream(self, prompt: str, *, max_tokens: int = 64, temperature: float = 0.0, top_k: int | None = None,
               top_p: float | None = None, seed: int = 0, stop: Sequence[str] = (), window: int | None = None,
               stride: int | None = None, exclude: Sequence[str] = (), query: str | None = None,
               speculate: int | str = 0) -> Iterator[Event]:
        """Draw a continuation of `prompt`: Retrieved, Token, ... and one Done. temperature 0 is greedy.

        Token.logp is ln p under the whole system (not the sharpened sampling distribution). query: what to search for where
        the prompt ends (default: the prompt; given, it is asked even without a prompt). stop: texts that end the stream, not
        part of it. speculate: take so many steps on guesses and check them by one search (auto: as many as pay; speculate.py);
        tokens come in groups then, and are the same.
        Raises UsageError and CapabilityError at once, before the first event is asked for."""
        from ralm.generate import stream

        return stream(self, prompt, max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, stop=stop,
                      window=window, stride=stride, exclude=_names(exclude), query=query, speculate=speculate)

    def stream_many(self, prompts: Sequence[str], *, max_tokens: int = 64, temperature: float = 0.0, top_k: int | None = None,
                    top_p: float | None = None, seed: int = 0, stop: Sequence[str] = (), window: int | None = None,
                    stride: int | None = None, exclude: Sequence[str] = ()) -> Iterator[tuple[int, Event]]:
        """Draw a continuation of each prompt, all at once: (which prompt, event), each prompt's events as `stream` gives them.

        Every step is one forward of the model and one search for all texts that still go on. Prompt i is drawn with seed + i.
        Raises UsageError and CapabilityError at once, before the first event is asked for."""
        from ralm.generate import stream_many

        return stream_many(self, prompts, max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
                           stop=stop, window=window, stride=stride, exclude=_names(exclude))

    def beam(self, prompt: str, *, beams: int = 4, max_tokens: int = 64, length_penalty: float = 1.0, window: int | None = None,
             stride: int | None = None, exclude: Sequence[str] = (), query: str | None = None) -> list[Hypothesis]:
        """The `beams` most probable continuations that beam search finds, best first: by ln p / tokens ^ length_penalty.

        The p is that of the whole system. A beam ends with the end token or after max_tokens."""
        from ralm.beam import beam

        return beam(self, prompt, beams=beams, max_tokens=max_tokens, length_penalty=length_penalty, window=window, stride=stride,
                    exclude=_names(exclude), query=query)

    def generate(self, prompt: str, **sampling) -> str:
        """The text of `stream` in one piece."""
        return next(e for e in self.stream(prompt, **sampling) if isinstance(e, Done)).text

    def generate_many(self, prompts: Sequence[str], **sampling) -> list[str]:
        """The texts of `stream_many`, one for each prompt."""
        done = {i: e.text for i, e in self.stream_many(prompts, **sampling) if isinstance(e, Done)}
        return [done[i] for i in range(len(prompts))]

    # ---- answers and provenance ---------------------------------------------------------------------------------------

    def answer(self, question: str, *, k: int | None = None, exclude: Sequence[str] = (), max_tokens: int = 64) -> Answer:
        """Answer with citations. A reader marginalises verbatim spans over k passages and may abstain; a language model
        reads the passages as `how` says (with how="none": prepended, since an answer needs evidence) and its citations are
        resolved against them. Raises UsageError for an empty question or k < 1."""
        from ralm.how.cite import answer_with_lm, answer_with_reader

        if not question.strip():
            raise UsageError("the question is empty; ask something")
        if innermost(self.how).how == "intermediate":
            raise UsageError(f"questions are answered from passages, {self.how!r} reads neighbours of chunks of its text; use "
                             "how='prepend', or generate()")
        if self.retriever is None:
            raise UsageError("answer() needs a retriever to read from, none was given; pass one")
        if k is not None and k < 1:
            raise UsageError(f"k={k} passages give no evidence; use k >= 1")
        if "spans" in self.lm.gives:
            return answer_with_reader(self, question, k or 10, _names(exclude))
        return answer_with_lm(self, question, k, _names(exclude), max_tokens)

    def explain(self, text: str, *, prompt: str = "", window: int | None = None, stride: int | None = None,
                exclude: Sequence[str] = (), query: str | None = None, neighbours: int = 8) -> Provenance:
        """Per token: ln p of the model alone, ln p of the system, and what moved it: the passages in force, or the neighbours of
        chunks and what is copied from them; for fusions at the output the `neighbours` of largest weight; per document: what it
        contributed (provenance.py).

        The model alone sees the same windows of text as the system, so that evidence is the only difference."""
        from ralm.provenance import Provenance

        return Provenance.of(self, text, prompt=prompt, window=window, stride=stride, exclude=exclude, query=query, most=neighbours)

    def search(self, query: str, k: int, exclude: Sequence[str] = ()) -> tuple[Hits, float]:
        """One query through the retriever with this RALM's filter: hits without padding, and seconds."""
        (hits,), seconds = self._timed(self.retriever, [query], k, _names(exclude))
        return hits, seconds

    def _timed(self, finder: Any, queries: Sequence[str], k: int, exclude: tuple[str, ...]) -> tuple[list[Hits], float]:
        """Hits of each query without padding, and seconds; a blank query asks for nothing and finds nothing."""
        began = time.perf_counter()
        asked = [q for q in queries if q.strip()]
        hits = finder.search(asked, k=k, where=self.where, exclude=exclude) if asked else Hits.empty(0, k)
        rows = iter([hits.row(i) for i in range(len(asked))])
        return [next(rows) if q.strip() else Hits.empty(1, 0) for q in queries], time.perf_counter() - began


def _names(exclude: str | Sequence[str]) -> tuple[str, ...]:
    return (exclude,) if isinstance(exclude, str) else tuple(exclude)
