"""One pass over one text: windows, schedule, retrieval, exclusion and evidence. The single place where fetching happens.

A `Run` gives the distributions of a text window by window (`distributions`) or token by token (`step`); scoring, streaming, beams
and explanations are all made of it (model.py, generate.py, beam.py, provenance.py)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ralm.errors import RalmError, UsageError
from ralm.how.output import asking, innermost
from ralm.types import Evidence, Hits, Segment
from ralm.when import Never, pieces, plan, window_of, windows

if TYPE_CHECKING:
    import torch

    from ralm.how.rows import Beside
    from ralm.model import RALM
    from ralm.what.token_store import Neighbours


@dataclass
class Run:
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
    look: Callable[[Sequence[str], int], tuple[list[Hits], float]] | None = None  # neighbours of chunks, seconds (default: search)
    chunks: dict[tuple[int, int], tuple[tuple[int, ...], int]] = field(default_factory=dict)  # tokens [a, b): neighbours, evidence

    def __post_init__(self):
        r, how = self.ralm, self.ralm.how
        lm = self.lm = r.lm if self.lm is None else self.lm
        self.ask = self.ask or (lambda texts, k: r._timed(r.retriever, texts, k, self.exclude))
        self.look = self.look or (lambda texts, k: r._timed(r.neighbours, texts, k, self.exclude))
        self.find = self.find or (lambda q_ND, k: r.tokens.search(q_ND, k, where=r.where, exclude=self.exclude))
        limit = lm.window if self.window is None else self.window
        if not 2 <= limit <= lm.window:
            raise UsageError(f"window {limit} does not fit '{lm.name}', which sees 2 to {lm.window} tokens")
        self.retrieves, self.finds, self.attends = self._can_retrieve(), self._has_tokens(), self._has_neighbours()
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
        if passages.how != "input" or getattr(passages, "k", 1) == 0 or r.retriever is None or isinstance(r.when, Never):
            return False
        return bool(r.retriever.store.allow(where=r.where, exclude=self.exclude).any())

    def _has_tokens(self) -> bool:
        """Whether there is a token to find."""
        r = self.ralm
        if not asking(r.how, "tokens") or r.tokens is None or isinstance(r.when, Never):
            return False
        return r.tokens.any(r.where, self.exclude)

    def _has_neighbours(self) -> bool:
        """Whether there is a neighbour of a chunk to find."""
        r, way = self.ralm, innermost(self.ralm.how)
        if way.how != "intermediate" or way.k == 0 or r.neighbours is None or isinstance(r.when, Never):
            return False
        return bool(r.neighbours.any(r.where, self.exclude))

    def mark(self) -> tuple:
        """A point to come back to while tokens are appended and steps taken."""
        sizes = tuple(map(len, (self.ids, self.force, self.evidence, self.searched)))
        return sizes, (len(self.fetched), len(self.chunks)), self.at, self.context

    def restore(self, mark: tuple) -> None:
        """Be as at `mark`."""
        sizes, fetched, self.at, self.context = mark
        for made, n in zip((self.ids, self.force, self.evidence, self.searched), sizes):
            del made[n:]
        for found, n in zip((self.fetched, self.chunks), fetched):
            while len(found) > n:
                found.popitem()

    def fork(self) -> Run:
        """The same run, to go on by itself."""
        return replace(self, ids=list(self.ids), evidence=list(self.evidence), fetched=dict(self.fetched), force=list(self.force),
                       chunks=dict(self.chunks), searched=list(self.searched), lm=None, ask=None, find=None, look=None)

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

        passages = innermost(self.ralm.how)
        contexts = max(1, getattr(passages, "k", 1)) if passages.how == "input" else 1
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

    def _look(self, context: int, n: int, k: int) -> tuple[tuple[int, ...], ...]:
        """The k neighbours of each complete chunk of a row [BOS, n tokens from `context` on]. All that are new in one search;
        windows overlap, so chunks are remembered by their tokens."""
        from ralm.lm.chunks import complete

        m = self.ralm.lm.m
        if context + n >= self.range.stop:
            raise RalmError(f"{type(self.ralm.how).__name__} asks for neighbours of the text before token {context + n}, tokens "
                            f"{self.range.start} to {self.range.stop - 1} are computed; a fusion must fetch for the segments it "
                            "is given")
        spans = [self._chunk(context, u, m) for u in range(complete(n + 1, m))]
        if new := [s for s in spans if s not in self.chunks]:
            queries = [self.ralm.lm.tokenizer.decode(self.ids[a:b]) for a, b in new]
            found, seconds = self.look(queries, k)
            for span, query, hits in zip(new, queries, found, strict=True):
                self.chunks[span] = tuple(hits.ids[0].tolist()), len(self.evidence)
                self.evidence.append(Evidence(span[1], query, hits.ids[0], hits.scores[0], seconds / len(new), kind="neighbours"))
        return tuple(self.chunks[s][0] for s in spans)

    @staticmethod
    def _chunk(context: int, u: int, m: int) -> tuple[int, int]:
        """The tokens [a, b) of chunk u of a row that begins with BOS before token `context`."""
        return context + max(0, u * m - 1), context + (u + 1) * m - 1

    def under(self) -> np.ndarray:
        """int64 [T]: which of `evidence` is in force at each token that was scored, -1 where none."""
        if not self.attends:
            which = {e.at: i for i, e in enumerate(self.evidence)}
            return np.array([which.get(at, -1) for at in self.force], np.int64)
        from ralm.lm.chunks import attended

        out, m = [], self.ralm.lm.m
        for t in range(self.prompt, self.prompt + len(self.force)):
            context = window_of(t, self.size, self.stride)[0]
            u = attended(t - context, m)
            out.append(-1 if u < 0 else self.chunks[self._chunk(context, u, m)][1])
        return np.array(out, np.int64)

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
        retriever = {"input": r.retriever, "intermediate": r.neighbours and r.neighbours.retriever}.get(passages.how)
        of_tokens = {"tokens": repr(r.tokens), "recall": r.tokens.recall, "tokens_searched": sum(n for n, _ in self.searched),
                     "token_seconds": sum(s for _, s in self.searched)} if asking(r.how, "tokens") else {}
        if asking(r.how, "suffix"):
            of_tokens["suffix"] = repr(r.suffix)
        if passages.how == "intermediate":
            of_tokens |= {"neighbours": repr(r.neighbours), "m": r.neighbours.m, "k": passages.k,
                          "chunks_searched": len(self.chunks)}
        return {"lm": r.lm.name, "tokenizer": f"{r.lm.name}, {r.lm.vocab} tokens", "window": self.size + self.reserve,
                "stride": self.stride, "evidence_tokens": self.reserve, "passages_read": len(read), "passages_cut": cut,
                "bos": "one per window", "unit": "per token", "how": repr(r.how), "when": repr(r.when),
                "retriever": None if retriever is None else str(retriever), "where": r.where,
                "excluded": list(self.exclude), "prompt_tokens": self.prompt, **of_tokens}


class _Fetch:
    """What a fusion asks for evidence: passages by calling it, neighbours of tokens by `tokens` (None where there are none),
    counts of what followed a context by `suffix`, what a row of n text tokens is read beside by `neighbours` (k, n) -> `Beside`."""

    def __init__(self, run: Run, context: int):
        self.run, self.context = run, context
        self.tokens = _FetchTokens(run, context) if run.finds else None
        r, counts = run.ralm, asking(run.ralm.how, "suffix") and not isinstance(run.ralm.when, Never)
        self.suffix = partial(r.suffix.match, where=r.where, exclude=run.exclude) if counts else None

        self.neighbours = self._beside if run.attends else None

    def _beside(self, k: int, n: int) -> Beside:
        from ralm.how.rows import Beside

        found = self.run.ralm.neighbours
        return Beside((self.run._look(self.context, n, k),), found.gather, self.run.ralm.lm.m)

    def __call__(self, queries: Sequence[str] | None, k: int, s: Segment) -> Hits:
        return self.run._fetch(queries, k, self.context + s.at)


class _FetchTokens:
    """(states [N, D], k, positions [N]) -> Neighbours; `key` is the state to ask with, positions count from the window's begin.

    What comes of it is told back with `used`, so that it can be shown. `tokens`: the store itself, for rows that are known."""

    def __init__(self, run: Run, context: int):
        self.run, self.context, self.tokens, self.key = run, context, run.ralm.tokens, run.ralm.tokens.key

    def __call__(self, q_ND: np.ndarray, k: int, at: Sequence[int]) -> Neighbours:
        return self.run._neighbours(q_ND, k, [self.context + t for t in at])

    def used(self, found: Neighbours, at: Sequence[int]) -> None:
        self.run._used(found, [self.context + t for t in at])
