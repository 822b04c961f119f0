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
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ralm.errors import CapabilityError, UsageError
from ralm.types import Answer, Done, Event, Evidence, Fusion, Hits, Retrieved, Retriever, Schedule, Scored, Segment, Token
from ralm.when import plan, schedule, window_of, windows

if TYPE_CHECKING:
    import torch


@dataclass
class RALM:
    """A language model, a retriever, how evidence enters and when it is fetched. Spec strings stand for parts.

    Raises UsageError where a part is missing, CapabilityError where the model cannot give what the method needs."""

    lm: Any
    retriever: Retriever | None = None
    how: Fusion | str = "none"
    when: Schedule | str = "once"
    where: str | None = None  # metadata filter on everything that is retrieved

    def __post_init__(self):
        if isinstance(self.lm, str):
            from ralm.lm import load

            self.lm = load(self.lm)
        if isinstance(self.how, str):
            from ralm.how import fusion

            self.how = fusion(self.how)
        if isinstance(self.when, str):
            self.when = schedule(self.when)
        if self.how.how != "none" and self.retriever is None:
            raise UsageError(f"{type(self.how).__name__} needs a retriever, none was given; pass one, or use how='none'")
        speaks = self.lm.gives & {"spans", "text"} and "logits" not in self.lm.gives
        if not speaks and not self.how.needs <= self.lm.gives:
            self._refuse(self.how.needs)

    def __repr__(self) -> str:
        return f"RALM(lm={self.lm.name}, retriever={self.retriever!r}, how={self.how!r}, when={self.when!r})"

    @property
    def store(self):
        return self.retriever.store if self.retriever is not None else None

    def _refuse(self, needs: frozenset[str]) -> None:
        missing = ", ".join(sorted(needs - self.lm.gives))
        raise CapabilityError(f"{type(self.how).__name__} needs {missing} from the model, '{self.lm.name}' gives "
                              f"{', '.join(sorted(self.lm.gives))} only; use a local model (bundled:base, hf:NAME) "
                              "or an input-layer method that reads text")

    # ---- scoring ----------------------------------------------------------------------------------------------------

    def score(self, text: str | Sequence[int], *, prompt: str | Sequence[int] = "", window: int | None = None,
              stride: int | None = None, exclude: Sequence[str] = ()) -> Scored:
        """ln p(x_t | x_<t, D) for every token of `text` (given `prompt`), with the evidence used.

        window: most tokens the model sees at once (default and maximum: the model's); stride: tokens predicted per window
        after the first (default: half the room left for text). exclude: ids of documents that must not be retrieved.
        Raises UsageError for a window or stride that does not fit, CapabilityError for a model without distributions."""
        import torch

        began = time.perf_counter()
        if "logits" not in self.lm.gives:
            self._refuse(frozenset({"logits"}))
        given, ids = self._encode(prompt), self._encode(text)
        run = _Run(self, given + ids, len(given), window, stride, exclude,
                   question=prompt if isinstance(prompt, str) else None)
        logp: list[float] = []
        with torch.inference_mode():
            for start, logp_SV in run.distributions():
                targets = torch.tensor(run.ids[start:start + len(logp_SV)])
                logp += logp_SV.gather(1, targets[:, None])[:, 0].tolist()
        plain = text if isinstance(text, str) else self.lm.tokenizer.decode(list(text))
        return Scored(np.asarray(logp, np.float64), np.asarray(ids, np.int64), len(plain.encode("utf-8", "surrogatepass")),
                      len(plain.split()), run.evidence, run.convention(), time.perf_counter() - began)

    def distributions(self, text: str | Sequence[int], *, prompt: str | Sequence[int] = "", window: int | None = None,
                      stride: int | None = None, exclude: Sequence[str] = ()) -> torch.Tensor:
        """ln p(. | x_<t, D) for every token of `text`, float32 [T, V]: what `score` reads one number per token of."""
        import torch

        given, ids = self._encode(prompt), self._encode(text)
        run = _Run(self, given + ids, len(given), window, stride, exclude, question=prompt if isinstance(prompt, str) else None)
        with torch.inference_mode():
            return torch.cat([logp_SV for _, logp_SV in run.distributions()])

    def _encode(self, text: str | Sequence[int]) -> list[int]:
        return self.lm.tokenizer.encode(text) if isinstance(text, str) else [int(i) for i in text]

    # ---- streaming --------------------------------------------------------------------------------------------------

    def stream(self, prompt: str, *, max_tokens: int = 64, temperature: float = 0.0, top_k: int | None = None,
               top_p: float | None = None, seed: int = 0, stop: Sequence[str] = (), window: int | None = None,
               stride: int | None = None, exclude: Sequence[str] = (), query: str | None = None) -> Iterator[Event]:
        """Draw a continuation of `prompt`: Retrieved, Token, ... and one Done. temperature 0 is greedy.

        Token.logp is ln p under the whole system (not the sharpened sampling distribution). query: what to search for at
        the end of the prompt (default: the prompt). stop: texts that end the stream, not part of it."""
        from ralm.lm.sample import check

        if max_tokens < 1:
            raise UsageError(f"max_tokens={max_tokens} asks for no token; use at least 1")
        check(temperature, top_k, top_p)
        if "logits" in self.lm.gives:
            yield from self._stream_local(prompt, max_tokens, dict(temperature=temperature, top_k=top_k, top_p=top_p), seed,
                                          stop, window, stride, exclude, query)
        elif "text" in self.lm.gives:
            from ralm.how.cite import stream_remote

            yield from stream_remote(self, prompt, max_tokens=max_tokens, temperature=temperature, stop=stop,
                                     exclude=exclude, query=query)
        else:
            self._refuse(frozenset({"text"}))

    def _stream_local(self, prompt, max_tokens, sampling, seed, stop, window, stride, exclude, query) -> Iterator[Event]:
        import torch

        from ralm.how.rows import PrefixCache
        from ralm.lm.sample import sample

        began = time.perf_counter()
        given = self._encode(prompt)
        run = _Run(replace(self, lm=PrefixCache(self.lm)), list(given), len(given), window, stride, exclude,
                   question=query or prompt)
        generator = torch.Generator().manual_seed(seed)
        shown, told, reason = "", 0, "length"
        for _ in range(max_tokens):
            with torch.inference_mode():
                logp_V = run.step(len(run.ids))
                token = int(sample(logp_V[None], generator=generator, **sampling)[0])
            for evidence in run.evidence[told:]:
                yield self._retrieved(evidence)
            told = len(run.evidence)
            if token == self.lm.eos:
                reason = "eos"
                break
            run.ids.append(token)
            text = self.lm.tokenizer.decode(run.ids[len(given):])
            piece = "" if text.endswith("�") else text[len(shown):]  # wait for the rest of a split character
            cut = min((text.find(s) for s in stop if s in text), default=-1)
            if cut >= 0:
                piece, reason = text[len(shown):cut], "stop"
            shown += piece
            if piece or cut < 0:
                yield Token(piece, token, float(logp_V[token]))
            if cut >= 0:
                break
        yield Done(shown, len(run.ids) - len(given), reason, run.evidence, time.perf_counter() - began)

    def _retrieved(self, e: Evidence) -> Retrieved:
        from ralm.how.cite import passages

        return Retrieved(e.at, e.query, passages(self.store, e.ids, e.scores), e.seconds)

    def generate(self, prompt: str, **sampling) -> str:
        """The text of `stream` in one piece."""
        return [e for e in self.stream(prompt, **sampling) if isinstance(e, Done)][0].text

    # ---- answers and provenance ---------------------------------------------------------------------------------------

    def answer(self, question: str, *, k: int | None = None, exclude: Sequence[str] = (), max_tokens: int = 64) -> Answer:
        """Answer with citations. A reader marginalises verbatim spans over k passages and may abstain; a language model
        reads the passages as `how` says and its citations are resolved against them. Raises UsageError for an empty question."""
        from ralm.how.cite import answer_with_lm, answer_with_reader

        if not question.strip():
            raise UsageError("the question is empty; ask something")
        if self.retriever is None:
            raise UsageError("answer() needs a retriever to read from, none was given")
        if "spans" in self.lm.gives:
            return answer_with_reader(self, question, k or 10, exclude)
        return answer_with_lm(self, question, k, exclude, max_tokens)

    def explain(self, text: str, *, exclude: Sequence[str] = (), **windowing) -> Provenance:
        """Per token: ln p of the model alone, ln p of the system, and the evidence in force; per document: the nats it moved."""
        system = self.score(text, exclude=exclude, **windowing)
        alone = replace(self, how="none").score(text, **windowing)
        return Provenance.of(self, system, alone)

    def search(self, query: str, k: int, exclude: Sequence[str] = ()) -> tuple[Hits, float]:
        """One query through the retriever with this RALM's filter: hits without padding, and seconds."""
        began = time.perf_counter()
        hits = self.retriever.search([query], k=k, where=self.where, exclude=exclude) if query.strip() else Hits.empty(1, k)
        return hits.row(0), time.perf_counter() - began


@dataclass
class _Run:
    """One pass over one text: its windows, its schedule, what was retrieved. The single place where fetching happens."""

    ralm: RALM
    ids: list[int]
    prompt: int  # tokens given, not scored
    window: int | None
    stride: int | None
    exclude: Sequence[str]
    question: str | None = None  # the query at the end of the prompt; None: its last tokens
    evidence: list[Evidence] = field(default_factory=list)
    fetched: dict[tuple[int, int], Hits] = field(default_factory=dict)
    at: int | None = None  # position of the evidence in force while stepping
    context: int | None = None  # the window being stepped through

    def __post_init__(self):
        how, lm, store = self.ralm.how, self.ralm.lm, self.ralm.store
        limit = self.window or lm.window
        if not 2 <= limit <= lm.window:
            raise UsageError(f"window {limit} does not fit '{lm.name}', which sees 2 to {lm.window} tokens")
        self.reserve = how.reserve(lm) if store is not None and len(store) else 0
        self.size = limit - self.reserve  # room for the text itself
        if self.size < 2:
            raise UsageError(f"evidence may take {self.reserve} tokens of a window of {limit}, which leaves {self.size} for the "
                             f"text; give {type(how).__name__} fewer tokens (tokens={limit // 2}) or use a larger window")
        self.stride = max(1, self.size // 2) if self.stride is None else self.stride
        if not 1 <= self.stride <= self.size:
            raise UsageError(f"stride {self.stride} must lie between 1 and the {self.size} tokens the window leaves for the text")

    def distributions(self) -> Iterator[tuple[int, torch.Tensor]]:
        """(position, logp_SV) for runs of tokens, in order: whole windows where the schedule is known in advance, token by
        token on cached prefixes where it depends on the distribution."""
        if self.ralm.when.adaptive:
            from ralm.how.rows import PrefixCache

            run = replace(self, ralm=replace(self.ralm, lm=PrefixCache(self.ralm.lm)))
            for t in range(self.prompt, len(self.ids)):
                yield t, run.step(t)[None]
            return
        for context, start, stop in windows(len(self.ids), self.size, self.stride):
            start = max(start, self.prompt)
            if start >= stop:
                continue
            forced = self.prompt - context if self.prompt and start == self.prompt else None
            segments = plan(self.ralm.when, start - context, stop - context, forced)
            if self.ralm.how.how == "none":
                segments = [Segment(start - context, stop - context, None)]
            for s, logp_1SV in self._logprobs(context, stop, segments):
                yield context + s.start, logp_1SV[0]

    def step(self, t: int) -> torch.Tensor:
        """ln p(. | x_<t, D), float32 [V]; called with t = prompt, prompt + 1, ..."""
        when = self.ralm.when
        context = window_of(t, self.size, self.stride)[0]
        if context != self.context:
            self.context, self.at = context, None
        forced = 0 < self.prompt == t
        last = None if self.at is None else self.at - context
        if forced or (not when.adaptive and when.due(t - context, last, None)):
            self.at = t
        logp_V = self._at(context, t)
        if when.adaptive and not forced and when.due(t - context, last, float(logp_V.max().exp())):
            self.at = t
            logp_V = self._at(context, t)
        return logp_V

    def _at(self, context: int, t: int) -> torch.Tensor:
        at = None if self.at is None or self.ralm.how.how == "none" else self.at - context
        (_, logp_1SV), = self._logprobs(context, t + 1, [Segment(t - context, t + 1 - context, at)])
        return logp_1SV[0, -1]

    def _logprobs(self, context: int, stop: int, segments: Sequence[Segment]):
        import torch

        ids_BT = torch.tensor([self.ids[context:stop]], dtype=torch.long)
        return self.ralm.how.logprobs(self.ralm.lm, ids_BT, segments,
                                      lambda queries, k, s: self._fetch(queries, k, context + s.at), self.ralm.store)

    def _fetch(self, queries: Sequence[str] | None, k: int, at: int) -> Hits:
        """Search once per position; the query ends before `at`, so nothing that is to be predicted can leak into it."""
        if (at, k) not in self.fetched:
            if queries is not None:
                query = queries[0]
            elif self.question is not None and at == self.prompt:
                query = self.question
            else:
                query = self.ralm.lm.tokenizer.decode(self.ids[max(0, at - self.ralm.how.query_tokens):at])
            hits, seconds = self.ralm.search(query, k, self.exclude)
            self.fetched[at, k] = hits
            prior = getattr(self.ralm.how, "log_prior", None)
            weights = prior(hits.scores[0])[0].exp().numpy() if prior and hits.ids.size else None
            self.evidence.append(Evidence(at, query, hits.ids[0], hits.scores[0], seconds, weights))
        return self.fetched[at, k]

    def convention(self) -> dict[str, Any]:
        """What must be known to compare the number with another."""
        r = self.ralm
        return {"lm": r.lm.name, "tokenizer": f"{r.lm.name}, {r.lm.vocab} tokens", "window": self.size + self.reserve,
                "stride": self.stride, "evidence_tokens": self.reserve, "bos": "one per window", "unit": "per token",
                "how": repr(r.how), "when": repr(r.when), "retriever": repr(r.retriever) if r.how.how != "none" else None,
                "excluded": list(self.exclude), "prompt_tokens": self.prompt}


@dataclass(frozen=True)
class Provenance:
    """What retrieval changed. `moved[doc]` sums (ln p_system - ln p_lm) over tokens, shared among the documents in force."""

    tokens: list[str]
    logp_lm: np.ndarray  # float64 [T]
    logp: np.ndarray  # float64 [T]
    at: np.ndarray  # int64 [T]: position of the retrieval in force, -1 where none
    evidence: Sequence[Evidence]
    documents: dict[str, float]

    @staticmethod
    def of(ralm: RALM, system: Scored, alone: Scored) -> Provenance:
        starts = [e.at for e in system.evidence]
        force = np.array([max((s for s in starts if s <= t), default=-1) for t in range(len(system.logp))], np.int64)
        moved: dict[str, float] = {}
        for e in system.evidence:
            gain = float((system.logp - alone.logp)[force == e.at].sum())
            weights = e.weights if e.weights is not None else np.full(len(e.ids), 1 / max(1, len(e.ids)))
            for chunk, w in zip(ralm.store.chunks(e.ids.tolist()) if len(e.ids) else (), weights):
                moved[chunk.document] = moved.get(chunk.document, 0.0) + gain * float(w)
        pieces = [ralm.lm.tokenizer.decode([t]) for t in system.tokens.tolist()]
        return Provenance(pieces, alone.logp, system.logp, force, system.evidence, moved)
