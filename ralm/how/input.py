"""HOW at the input: passages are put in front of the text, in one context (`Prepend`) or one context each (`Ensemble`).

Both read rows [BOS, evidence, x_<t]. Evidence takes at most `tokens` tokens, reserved from the window before any text is
placed, so evidence never overflows a window and never moves what the text sees (In-Context RALM, section 3.1: retrieved
tokens take the place of the oldest ones)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ralm.errors import UsageError
from ralm.registry import real, whole
from ralm.types import Hits, LanguageModel, Segment

if TYPE_CHECKING:  # the methods are named, compared and refused without torch: a remote model needs none of it
    from torch import Tensor

    Span = tuple[Segment, Tensor]


@dataclass(frozen=True)
class Plain:
    """No retrieval: the language model itself. The neutral element of every law."""

    what: ClassVar[str] = "chunks"
    how: ClassVar[str] = "none"
    needs: ClassVar[frozenset[str]] = frozenset({"logits"})
    query_tokens: ClassVar[int] = 0

    def reserve(self, lm: LanguageModel) -> int:
        return 0

    def logprobs(self, lm: LanguageModel, ids_BT: Tensor, segments: Sequence[Segment], fetch: Callable, store) -> Iterator[Span]:
        """Yield (segment, logp_BSV); one forward for all segments."""
        from ralm.how.rows import window_rows

        return window_rows(lm, ids_BT, segments)

    def targets(self, lm: LanguageModel, ids_BT: Tensor, segments: Sequence[Segment], fetch: Callable, store) -> Iterator[Span]:
        """Yield (segment, logp_BS): ln p of the tokens that stand in ids_BT."""
        from ralm.how.rows import window_targets

        return window_targets(lm, ids_BT, segments)


class Passages:
    """Token ids of passages as evidence: title, newline, text, newline; each cut to its share of the budget. Remembers them,
    in the model's own memory where it has one (`PrefixCache`: a token must not cost a read of the store); `cut` are those that
    did not fit."""

    def __init__(self, lm: LanguageModel, store, share: int):
        self.lm, self.store, self.share = lm, store, share
        self.cut: set[int] = set()
        self.seen: dict[int, list[int]] = getattr(lm, "passages", {}).setdefault((id(store), share), {})

    def __call__(self, ids: Sequence[int]) -> list[list[int]]:
        missing = [i for i in dict.fromkeys(ids) if i not in self.seen]
        for chunk in self.store.chunks(missing) if missing else ():
            head = f"{chunk.title}\n" if chunk.title else ""
            tokens = self.lm.tokenizer.encode(f"{head}{chunk.text}\n")
            if len(tokens) > self.share:  # the newline that ends a passage survives the cut
                end = self.lm.tokenizer.encode("\n")
                tokens = tokens[:max(0, self.share - len(end))] + end
                self.cut.add(chunk.id)
            self.seen[chunk.id] = tokens[:self.share]
        return [self.seen[i] for i in ids]


def _evidence(segments: Sequence[Segment], k: int, batch: int, fetch: Callable) -> list[list[Hits]]:
    """Hits per segment and batch row, padding removed; no retrieval (at is None, or k = 0) gives none."""
    out = []
    for s in segments:
        if s.at is None or k == 0:
            out.append([Hits.empty(1, 0)] * batch)
        else:
            hits = fetch(None, k, s)
            out.append([hits.row(b) for b in range(batch)])
    return out


class AtInput:
    """What the methods below share: k chunks at the input, at most `tokens` tokens of a context for them, asked for with the last
    `query` tokens before each retrieval."""

    k: int
    query: int
    tokens: int
    what: ClassVar[str] = "chunks"
    how: ClassVar[str] = "input"
    needs: ClassVar[frozenset[str]] = frozenset({"logits"})

    def __post_init__(self):
        whole(0, k=self.k)
        whole(1, query=self.query, tokens=self.tokens)

    @property
    def query_tokens(self) -> int:
        return self.query

    def reserve(self, lm: LanguageModel) -> int:
        return self.tokens if self.k else 0

    @property
    def share(self) -> int:
        """The most tokens of one passage that are read."""
        return self.tokens

    def cut(self, lm: LanguageModel, store, ids: Sequence[int]) -> int:
        """How many of these chunks have more tokens than are read of them."""
        passages = Passages(lm, store, self.share)
        passages(ids)
        return len(passages.cut)


@dataclass(frozen=True)
class Prepend(AtInput):
    """All k passages in one context, best one last (next to the text). In-Context RALM (Ram et al. 2023, eq. 3); RAG with an
    off-the-shelf LM.

    k passages share `tokens` tokens; the query is the last `query` tokens before each retrieval (the paper's l = 32).
    Consecutive segments with the same passages share one row, so a stride costs a forward only where the evidence changed."""

    k: int = 1
    query: int = 32
    tokens: int = 256

    def __post_init__(self):
        super().__post_init__()
        if self.tokens < self.k:
            raise UsageError(f"tokens={self.tokens} cannot be shared by k={self.k} passages; give at least one token each")

    @property
    def share(self) -> int:
        return self.tokens // max(1, self.k)

    def logprobs(self, lm: LanguageModel, ids_BT: Tensor, segments: Sequence[Segment], fetch: Callable, store) -> Iterator[Span]:
        """Yield (segment, logp_BSV). Rows of all segments run as batches; one row serves neighbours with equal evidence."""
        import torch

        from ralm.how.rows import logp_jobs

        ids = ids_BT.tolist()
        passages = Passages(lm, store, self.share)
        hits = _evidence(segments, self.k, len(ids), fetch)
        groups = [(g, segments[g[0]].start, segments[g[-1]].stop) for g in _runs(segments, hits)]

        def jobs():
            for group, first, stop in groups:
                found = [passages(h.ids[0].tolist()) for h in hits[group[0]]]
                rows = [[lm.bos, *(t for p in reversed(ps) for t in p), *row[:stop - 1]] for row, ps in zip(ids, found)]
                yield rows, [len(r) - (stop - 1 - first) for r in rows]

        for (group, first, _), logp in zip(groups, logp_jobs(lm, jobs())):
            for i in group:
                s = segments[i]
                yield s, torch.stack([p[s.start - first:s.stop - first] for p in logp])


@dataclass(frozen=True)
class Ensemble(AtInput):
    """One context per passage, distributions mixed. weights="prior": per-token marginal with p(z|x) (REPLUG, RAG-Token);
    "posterior": with p(z|x, y_<t) since the retrieval, which is the per-sequence marginal (RAG-Sequence).

    p(z|x) = softmax(score / temperature) over the k retrieved; BM25 scores are large, so their temperature matters. The posterior
    looks back: it holds k distributions for every token since the retrieval, which is what bounds how long a text it can mix."""

    k: int = 4
    weights: str = "prior"
    temperature: float = 1.0
    query: int = 32
    tokens: int = 256

    def __post_init__(self):
        super().__post_init__()
        if self.weights not in ("prior", "posterior"):
            raise UsageError(f"weights='{self.weights}' is neither 'prior' nor 'posterior'")
        if not real(self.temperature) or not self.temperature > 0:
            raise UsageError(f"temperature={self.temperature} cannot scale scores; use a finite value above 0")

    def log_prior(self, scores: np.ndarray) -> Tensor:
        """ln p(z|x) [1, K] of one retrieval's scores."""
        import torch

        from ralm.how.mixing import log_weights

        return log_weights(torch.from_numpy(np.ascontiguousarray(scores)).reshape(1, -1), self.temperature)

    def logprobs(self, lm: LanguageModel, ids_BT: Tensor, segments: Sequence[Segment], fetch: Callable, store) -> Iterator[Span]:
        """Yield (segment, logp_BSV); the k contexts of a segment (of all batch rows, of many segments) run as one batch."""
        import torch

        from ralm.how.rows import logp_jobs

        ids = ids_BT.tolist()
        passages = Passages(lm, store, self.share)
        hits = _evidence(segments, self.k, len(ids), fetch)
        # posterior weights look back to the retrieval: what each passage gave the tokens at .. start-1
        begins = [s.start if s.at is None or self.weights == "prior" else s.at for s in segments]

        def jobs():
            for s, found, begin in zip(segments, hits, begins):
                contexts = [passages(h.ids[0].tolist()) or [[]] for h in found]
                rows = [[lm.bos, *p, *row[:s.stop - 1]] for row, ps in zip(ids, contexts) for p in ps]
                yield rows, [len(r) - (s.stop - 1 - begin) for r in rows]

        for s, found, begin, logp in zip(segments, hits, begins, logp_jobs(lm, jobs())):
            out, at = [], 0
            for row, h in zip(ids, found):
                logp_KSV = torch.stack(logp[at:at + max(1, h.ids.size)])
                at += len(logp_KSV)
                out.append(self._mix(logp_KSV, h, row[begin:s.stop], s.start - begin))
            yield s, torch.stack(out)

    def _mix(self, logp_KSV: Tensor, hits: Hits, targets: list[int], skip: int) -> Tensor:
        """Mix the contexts of one batch row: [K, S, V] from `begin` on -> [S - skip, V]. `targets` may lack the last token."""
        import torch

        from ralm.how.mixing import log_mix_tokens, log_posterior

        if logp_KSV.shape[0] == 1:
            return logp_KSV[0, skip:]
        w = self.log_prior(hits.scores[0])
        if self.weights == "posterior":
            known = torch.tensor(targets + [0] * (logp_KSV.shape[1] - len(targets)))  # the last one changes no weight
            logp_1KS = logp_KSV.gather(2, known.expand(logp_KSV.shape[0], -1).unsqueeze(-1)).squeeze(-1)[None]
            w = log_posterior(w, logp_1KS)[:, :, skip:]
        return log_mix_tokens(logp_KSV[None, :, skip:], w)[0]


def _runs(segments: Sequence[Segment], hits: list[list[Hits]]) -> list[list[int]]:
    """Consecutive segments with equal evidence in every batch row, as lists of indices."""
    runs: list[list[int]] = []
    for i, s in enumerate(segments):
        if runs and segments[i - 1].stop == s.start and all(
                np.array_equal(a.ids, b.ids) for a, b in zip(hits[runs[-1][0]], hits[i])):
            runs[-1].append(i)
        else:
            runs.append([i])
    return runs
