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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ralm.errors import CapabilityError, RalmError, UsageError
from ralm.how.output import asking, bound, innermost
from ralm.types import Answer, Done, Event, Evidence, Fusion, Hits, Retriever, Schedule, Scored, Segment
from ralm.when import EveryN, Never, Once, pieces, plan, schedule, window_of, windows

if TYPE_CHECKING:
    import torch

    from ralm.beam import Hypothesis
    from ralm.index.suffix import SuffixIndex
    from ralm.provenance import Provenance
    from ralm.what.token_store import Neighbours, TokenStore


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
        if passages.how != "none" and self.retriever is None:
            raise UsageError(f"{type(passages).__name__} needs a retriever, none was given; pass one, or use how='none'")
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
        return next((part.store for part in (self.retriever, self.tokens, self.suffix) if part is not None), None)

    def _refuse(self, who: str, needs: frozenset[str]) -> None:
        missing = " and ".join(sorted(needs - self.lm.gives))
        raise CapabilityError(f"{who} needs {missing} from the model, '{self.lm.name}' gives "
                              f"{', '.join(sorted(self.lm.gives))} only; use a local model (bundled:base, hf:NAME)")

    # ---- scoring ----------------------------------------------------------------------------------------------------

    def score(self, text: str | Sequence[int], *, prompt: str | Sequence[int] = "", window: int | None = None,
              stride: int | None = None, exclude: Sequence[str] = (), query: str | None = None) -> Scored:
        """ln p(x_t | x_<t, D) for every token of `text` (given `prompt`), with the evidence used.

        window: most tokens the model sees at once (default and maximum: the model's); stride: tokens predicted per window
        after the first (default: half the room left for text). exclude: ids of documents that must not be retrieved.
        query: what to search for where the prompt ends (default: the prompt; given, it is asked even without a prompt).
        Raises UsageError for a window or stride that does not fit, CapabilityError for a model without distributions."""
        return self._score(self._run(text, prompt, window, stride, exclude, query), text)

    def _score(self, run: _Run, text: str | Sequence[int]) -> Scored:
        import torch

        began, logp = time.perf_counter(), []
        with torch.inference_mode():
            for _, logp_S in run.distributions(targets=True):
                logp += logp_S.tolist()
        ids = run.ids[run.prompt:]
        plain = text if isinstance(text, str) else self.lm.tokenizer.decode(ids)
        return Scored(np.asarray(logp, np.float64), np.asarray(ids, np.int64), len(plain.encode("utf-8", "surrogatepass")),
                      len(plain.split()), run.evidence, run.convention(), time.perf_counter() - began,
                      np.asarray(run.force, np.int64))

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

    def _run(self, text, prompt, window, stride, exclude, query, **given) -> _Run:
        if "logits" not in self.lm.gives:
            self._refuse("scoring", frozenset({"logits"}))
        before = self._encode(prompt)
        return _Run(self, before + self._encode(text), len(before), window, stride, _names(exclude),
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
        if self.retriever is None:
            raise UsageError("answer() needs a retriever to read from, none was given; pass one")
        if k is not None and k < 1:
            raise UsageError(f"k={k} passages give no evidence; use k >= 1")
        if "spans" in self.lm.gives:
            return answer_with_reader(self, question, k or 10, _names(exclude))
        return answer_with_lm(self, question, k, _names(exclude), max_tokens)

    def explain(self, text: str, *, prompt: str = "", window: int | None = None, stride: int | None = None,
                exclude: Sequence[str] = (), query: str | None = None, neighbours: int = 8) -> Provenance:
        """Per token: ln p of the model alone, ln p of the system, and what moved it: the passages in force, and for fusions at the
        output the `neighbours` of largest weight; per document: what it contributed (provenance.py).

        The model alone sees the same windows of text as the system, so that evidence is the only difference."""
        from ralm.provenance import Provenance

        return Provenance.of(self, text, prompt=prompt, window=window, stride=stride, exclude=exclude, query=query, most=neighbours)

    def search(self, query: str, k: int, exclude: Sequence[str] = ()) -> tuple[Hits, float]:
        """One query through the retriever with this RALM's filter: hits without padding, and seconds."""
        (hits,), seconds = self._timed([query], k, _names(exclude))
        return hits, seconds

    def _timed(self, queries: Sequence[str], k: int, exclude: tuple[str, ...]) -> tuple[list[Hits], float]:
        began = time.perf_counter()
        return self._search(queries, k, exclude), time.perf_counter() - began

    def _search(self, queries: Sequence[str], k: int, exclude: tuple[str, ...]) -> list[Hits]:
        """Hits of each query without padding; a blank query asks for nothing and finds nothing."""
        asked = [q for q in queries if q.strip()]
        hits = self.retriever.search(asked, k=k, where=self.where, exclude=exclude) if asked else Hits.empty(0, k)
        rows = iter([hits.row(i) for i in range(len(asked))])
        return [next(rows) if q.strip() else Hits.empty(1, 0) for q in queries]


def _names(exclude: str | Sequence[str]) -> tuple[str, ...]:
    return (exclude,) if isinstance(exclude, str) else tuple(exclude)


@dataclass
class _Run:
    """One pass over one text: its windows, its schedule, what was retrieved. The single place where fetching happens."""

    ralm: RALM
    ids: list[int]
    prompt: int  # tokens given, not scored
    window: int | None
    stride: int | None
    exclude: tuple[str, ...]
    question: str | None = None  # the query at the end of the prompt; None: its last tokens
    evidence: list[Evidence] = field(default_factory=list)
    fetched: dict[tuple[int, int], Hits] = field(default_factory=dict)
    at: int | None = None  # position of the evidence in force while stepping
    context: int | None = None  # the window being stepped through
    due: list[int] = field(default_factory=list)  # positions at which the segments now computed may retrieve
    force: list[int] = field(default_factory=list)  # per token: position of the evidence in force, -1 where none
    range: range = range(0)  # tokens whose distributions are computed now
    searched: list[tuple[int, float]] = field(default_factory=list)  # token searches: how many at once, seconds
    near: list[tuple[int, Neighbours, int]] | None = None  # (token, neighbours, row of them), where they are to be kept
    lm: Any = None  # who speaks: the model, or the model with a memory (default: the RALM's)
    ask: Callable[[Sequence[str], int], tuple[list[Hits], float]] | None = None  # passages of queries, seconds (default: search)
    find: Callable[[np.ndarray, int], Neighbours] | None = None  # tokens near states (default: the token store's search)

    def __post_init__(self):
        r, how = self.ralm, self.ralm.how
        lm = self.lm = r.lm if self.lm is None else self.lm
        self.ask = self.ask or (lambda texts, k: r._timed(texts, k, self.exclude))
        self.find = self.find or (lambda q_ND, k: r.tokens.search(q_ND, k, where=r.where, exclude=self.exclude))
        limit = lm.window if self.window is None else self.window
        if not 2 <= limit <= lm.window:
            raise UsageError(f"window {limit} does not fit '{lm.name}', which sees 2 to {lm.window} tokens")
        self.retrieves, self.finds = self._can_retrieve(), self._has_tokens()
        self.asked = bool(self.prompt or self.question)  # then retrieval is due where the prompt ends
        self.reserve = how.reserve(lm) if self.retrieves else 0
        self.size = limit - self.reserve  # room for the text itself
        if self.size < 2:
            raise UsageError(f"evidence may take {self.reserve} tokens of a window of {limit}, which leaves {self.size} for the "
                             f"text; give {type(how).__name__} fewer tokens (tokens={limit // 2}) or use a larger window")
        self.stride = max(1, self.size // 2) if self.stride is None else self.stride
        if not 1 <= self.stride <= self.size:
            raise UsageError(f"stride {self.stride} must lie between 1 and the {self.size} tokens the window leaves for the text")

    def _can_retrieve(self) -> bool:
        """Whether there is a passage to find: where there is not, evidence must not take the text's room either (law 4)."""
        r, passages = self.ralm, innermost(self.ralm.how)
        if passages.how == "none" or getattr(passages, "k", 1) == 0 or r.retriever is None or isinstance(r.when, Never):
            return False
        return bool(r.retriever.store.allow(where=r.where, exclude=self.exclude).any())

    def _has_tokens(self) -> bool:
        """Whether there is a token to find."""
        r = self.ralm
        if not asking(r.how, "tokens") or r.tokens is None or isinstance(r.when, Never):
            return False
        return r.tokens.any(r.where, self.exclude)

    def mark(self) -> tuple:
        """A point to come back to while tokens are appended and steps taken."""
        return tuple(map(len, (self.ids, self.force, self.evidence, self.searched))), len(self.fetched), self.at, self.context

    def restore(self, mark: tuple) -> None:
        """Be as at `mark`."""
        sizes, fetched, self.at, self.context = mark
        for made, n in zip((self.ids, self.force, self.evidence, self.searched), sizes):
            del made[n:]
        while len(self.fetched) > fetched:
            self.fetched.popitem()

    def fork(self) -> _Run:
        """The same run, to go on by itself."""
        return replace(self, ids=list(self.ids), evidence=list(self.evidence), fetched=dict(self.fetched), force=list(self.force),
                       searched=list(self.searched), lm=None, ask=None, find=None)

    def distributions(self, stepwise: bool = False, targets: bool = False) -> Iterator[tuple[int, torch.Tensor]]:
        """(position, logp_SV) for runs of tokens, in order: whole windows where the schedule is known in advance, token by
        token on cached prefixes where it depends on the distribution (or where that is asked for). targets: logp_S of the tokens
        that stand there, by the fusion's cheaper way where it has one."""
        if self.ralm.when.adaptive or stepwise:
            from ralm.how.rows import PrefixCache

            run = replace(self, lm=PrefixCache(self.lm))  # shares the lists of this run
            for t in range(self.prompt, len(self.ids)):
                logp_V = run.step(t)
                yield t, logp_V[self.ids[t]][None] if targets else logp_V[None]
            return
        for context, start, stop in windows(len(self.ids), self.size, self.stride):
            start = max(start, self.prompt)
            if start >= stop:
                continue
            segments = [Segment(start - context, stop - context, None)]
            if self.retrieves:
                forced = start - context if self.asked and start == self.prompt else None
                segments = plan(self.ralm.when, start - context, stop - context, forced)
            yield from self._window(context, segments, targets)

    def _window(self, context: int, segments: Sequence[Segment], targets: bool) -> Iterator[tuple[int, torch.Tensor]]:
        """One window; in pieces where its distributions (times the contexts they are mixed of) would be gigabytes, each piece
        going on from the cache of the piece before."""
        from ralm.how.rows import BATCH_LOGITS, PrefixCache

        contexts = max(1, getattr(innermost(self.ralm.how), "k", 1))
        cut = pieces(segments, max(1, BATCH_LOGITS // (self.ralm.lm.vocab * contexts)))
        run = self if len(cut) == 1 else replace(self, lm=PrefixCache(self.lm))  # shares its lists
        for piece in cut:
            for s, logp in run._logprobs(context, context + piece[-1].stop, piece, targets):
                self.force += [-1 if s.at is None else context + s.at] * (s.stop - s.start)
                yield context + s.start, logp[0]

    def step(self, t: int) -> torch.Tensor:
        """ln p(. | x_<t, D), float32 [V]; called with t = prompt, prompt + 1, ..."""
        when = self.ralm.when
        context = window_of(t, self.size, self.stride)[0]
        if context != self.context:
            self.context, self.at = context, None
        forced = self.retrieves and self.asked and t == self.prompt
        last = None if self.at is None else self.at - context
        if forced or (self.retrieves and not when.adaptive and when.due(t - context, last, None)):
            self.at = t
        logp_V = self._at(context, t)
        if self.retrieves and when.adaptive and not forced and when.due(t - context, last, float(logp_V.max().exp())):
            self.at = t
            logp_V = self._at(context, t)
        self.force.append(-1 if self.at is None else self.at)
        return logp_V

    def _at(self, context: int, t: int) -> torch.Tensor:
        at = None if self.at is None else self.at - context
        ((_, logp_1SV),) = self._logprobs(context, t + 1, [Segment(t - context, t + 1 - context, at)])
        return logp_1SV[0, -1]

    def _logprobs(self, context: int, stop: int, segments: Sequence[Segment], targets: bool = False):
        import torch

        from ralm.how.rows import targets_of

        how = self.ralm.how
        self.due = [context + s.at for s in segments if s.at is not None]
        self.range = range(context + segments[0].start, context + segments[-1].stop)
        read = targets_of(how) if targets else how.logprobs
        ids_BT = torch.tensor([self.ids[context:stop]], dtype=torch.long)
        return read(self.lm, ids_BT, segments, _Fetch(self, context), self.ralm.store)

    def _neighbours(self, q_ND: np.ndarray, k: int, at: Sequence[int]) -> Neighbours:
        """The k tokens nearest to each state; `at`: the tokens these predict, which must be among those computed now (or before
        them, for what remembers how it came there)."""
        r = self.ralm
        if wrong := [t for t in at if t >= self.range.stop]:
            raise RalmError(f"{type(r.how).__name__} asks for neighbours at token {wrong[0]}, tokens {self.range.start} to "
                            f"{self.range.stop - 1} are computed; a fusion must fetch for the segments it is given")
        began = time.perf_counter()
        found = self.find(q_ND, k)
        self.searched.append((len(at), time.perf_counter() - began))
        return found

    def _used(self, found: Neighbours, at: Sequence[int]) -> None:
        """What the tokens `at` were mixed with, kept where it is to be shown."""
        if self.near is not None:
            self.near += [(t, found, i) for i, t in enumerate(at)]

    def _fetch(self, queries: Sequence[str] | None, k: int, at: int) -> Hits:
        """Search once per position (all that are due together in one search). The query ends before `at`, so nothing that is
        to be predicted can leak into it."""
        if at not in self.due:
            raise RalmError(f"{type(self.ralm.how).__name__} asks for evidence at token {at}, retrieval is due at {self.due}; a "
                            "fusion must fetch for the segments it is given")
        if queries is not None and len(queries) != 1:
            raise RalmError(f"{type(self.ralm.how).__name__} asks {len(queries)} queries for one text; ask one, or none for its "
                            "last tokens")
        if (at, k) not in self.fetched:
            new = [at] if queries is not None else [a for a in self.due if (a, k) not in self.fetched]
            texts = list(queries) if queries is not None else [self._query(a) for a in new]
            found, seconds = self.ask(texts, k)
            prior = getattr(innermost(self.ralm.how), "log_prior", None)
            for a, query, hits in zip(new, texts, found):
                self.fetched[a, k] = hits
                weights = prior(hits.scores[0])[0].exp().numpy() if prior and hits.ids.size else None
                self.evidence.append(Evidence(a, query, hits.ids[0], hits.scores[0], seconds / len(new), weights))
        return self.fetched[at, k]

    def _query(self, at: int) -> str:
        if self.question is not None and at == self.prompt:
            return self.question
        return self.ralm.lm.tokenizer.decode(self.ids[max(0, at - self.ralm.how.query_tokens):at])

    def convention(self) -> dict[str, Any]:
        """What must be known to compare the number with another."""
        r = self.ralm
        read = sorted({int(i) for e in self.evidence for i in e.ids})
        passages = innermost(r.how)
        cut = passages.cut(r.lm, r.store, read) if read and hasattr(passages, "cut") else 0
        of_tokens = {"tokens": repr(r.tokens), "recall": r.tokens.recall, "tokens_searched": sum(n for n, _ in self.searched),
                     "token_seconds": sum(s for _, s in self.searched)} if asking(r.how, "tokens") else {}
        if asking(r.how, "suffix"):
            of_tokens["suffix"] = repr(r.suffix)
        return {"lm": r.lm.name, "tokenizer": f"{r.lm.name}, {r.lm.vocab} tokens", "window": self.size + self.reserve,
                "stride": self.stride, "evidence_tokens": self.reserve, "passages_read": len(read), "passages_cut": cut,
                "bos": "one per window", "unit": "per token", "how": repr(r.how), "when": repr(r.when),
                "retriever": repr(r.retriever) if passages.how != "none" else None, "where": r.where,
                "excluded": list(self.exclude), "prompt_tokens": self.prompt, **of_tokens}


class _Fetch:
    """What a fusion asks for evidence: passages by calling it, neighbours of tokens by `tokens` (None where there are none),
    counts of what followed a context by `suffix`."""

    def __init__(self, run: _Run, context: int):
        self.run, self.context = run, context
        self.tokens = _FetchTokens(run, context) if run.finds else None
        r, counts = run.ralm, asking(run.ralm.how, "suffix") and not isinstance(run.ralm.when, Never)
        self.suffix = partial(r.suffix.match, where=r.where, exclude=run.exclude) if counts else None

    def __call__(self, queries: Sequence[str] | None, k: int, s: Segment) -> Hits:
        return self.run._fetch(queries, k, self.context + s.at)


class _FetchTokens:
    """(states [N, D], k, positions [N]) -> Neighbours; `key` is the state to ask with, positions count from the window's begin.

    What comes of it is told back with `used`, so that it can be shown. `tokens`: the store itself, for rows that are known."""

    def __init__(self, run: _Run, context: int):
        self.run, self.context, self.tokens, self.key = run, context, run.ralm.tokens, run.ralm.tokens.key

    def __call__(self, q_ND: np.ndarray, k: int, at: Sequence[int]) -> Neighbours:
        return self.run._neighbours(q_ND, k, [self.context + t for t in at])

    def used(self, found: Neighbours, at: Sequence[int]) -> None:
        self.run._used(found, [self.context + t for t in at])
