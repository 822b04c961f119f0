"""Several retrievers as one, and re-ranking on top. `Hybrid(store, parts=("bm25", "dense"), rerank="minilm", depth=30)`

    hybrid                                    bm25 and dense, min-max normalised scores added
    hybrid:fusion=rrf                         reciprocal rank fusion
    hybrid:parts=bm25+dense,weights=2+1       parts and weights are joined by +
    hybrid:rerank=minilm,depth=30             the 30 best once more, by the cosine of MiniLM
    hybrid:parts=bm25,rerank=cross:NAME       one retriever, re-ranked by a cross-encoder
    hybrid:parts=bm25,rerank=minilm,depth=20,blend=1     the same, where the retriever's own scores keep a say

Reciprocal rank fusion (Cormack, Clarke and Buettcher, SIGIR 2009): a chunk's score is the sum over the parts that found it among
their `depth` best of weight / (k0 + rank), ranks from 1, k0 = 60. Score fusion (Fox and Shaw's CombSUM, 1994, normalised): the
sum of weight * (score - least) / (best - least) over the same lists; where all scores of a list are equal they count 1."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ralm.errors import UsageError, unknown
from ralm.index.rerank import reranker
from ralm.types import Hits, Retriever

FUSIONS = ("rrf", "score")


class Hybrid:
    """A retriever made of others over the same store.

    parts: retriever specs, or retrievers, as a sequence or one text joined by "+". fusion: score or rrf (the first
    ranks better on SQuAD and NQ passages, see docs/log.md). weights: one for each
    part (default: equal). k0: the constant of rrf. depth: how many hits of each part are fused, and how many of the fused ones are
    re-ranked; at least k always. rerank: see rerank.py. blend: with a number above 0, candidates are ranked by blend * score
    before + score of the re-ranker, both min-max normalised over the candidates. Scores are those of the last stage; chunks below
    the re-ranked ones are not given, so that a list holds scores of one kind (with rerank, k beyond depth re-ranks k).
    Raises UsageError for options that do not go together, and what the parts raise."""

    def __init__(self, store, parts: Sequence[str | Retriever] | str = ("bm25", "dense"), fusion: str = "score", k0: float = 60,
                 weights: Sequence[float] | str | float | None = None, depth: int = 100, rerank: str | None = None,
                 blend: float = 0):
        specs = parts.split("+") if isinstance(parts, str) else list(parts)
        if not specs or not all(specs):
            raise UsageError(f"parts = {parts!r} names no retriever: write parts=bm25+dense")
        if fusion not in FUSIONS:
            raise unknown("fusion", str(fusion), FUSIONS)
        if not k0 >= 0 or not isinstance(depth, int) or depth < 1:
            raise UsageError(f"k0 = {k0}, depth = {depth}: k0 is at least 0, depth a whole number from 1 on")
        self.store, self.fusion, self.k0, self.depth = store, fusion, float(k0), depth
        if not 0 <= blend < np.inf or (blend and not rerank):
            raise UsageError(f"blend = {blend}, rerank = {rerank}: blend is a number from 0 on, and needs a rerank")
        self.weights, self.blend = _weights(weights, len(specs)), float(blend)
        self.parts = [_part(p, store) for p in specs]
        self.reranker = reranker(rerank) if rerank else None

    def __repr__(self) -> str:
        stage = f", rerank={self.reranker.name}" if self.reranker else ""
        return f"Hybrid({' + '.join(map(repr, self.parts))}, {self.fusion}, depth={self.depth}{stage})"

    def search(self, queries: Sequence[str], k: int = 10, where: str | None = None, exclude: Sequence[str] = ()) -> Hits:
        """The k best chunks of each query. Returns Hits [Q, k]: ties by ascending id, padded with (-1, -inf).

        Raises UsageError for one string instead of several and for a negative k."""
        if isinstance(queries, str):
            raise UsageError("search takes a list of queries, this is one text: search([text])")
        if k < 0:
            raise UsageError(f"k = {k}: at least 0")
        if not k or not len(queries):
            return Hits.empty(len(queries), k)
        depth = max(k, self.depth)
        found = [part.search(queries, depth, where, exclude) for part in self.parts]
        hits = found[0] if len(found) == 1 else fuse(found, depth, self.fusion, self.k0, self.weights)
        if self.reranker is not None:
            return self._reranked(queries, hits, k)
        return Hits(np.ascontiguousarray(hits.ids[:, :k]), np.ascontiguousarray(hits.scores[:, :k]))

    def _reranked(self, queries: Sequence[str], hits: Hits, k: int) -> Hits:
        out = Hits.empty(len(queries), k)
        found = {q: ids[ids >= 0] for q, ids in enumerate(hits.ids) if (ids >= 0).any()}
        if found:
            scores = self.reranker.scores([queries[q] for q in found], list(found.values()), self.store)
            for (q, ids), s in zip(found.items(), scores):
                if self.blend:
                    s = (self.blend * _normalised(hits.scores[q][:len(ids)]) + _normalised(s)).astype(np.float32)
                _fill(out, q, ids, s)
        return out


def fuse(found: Sequence[Hits], k: int, fusion: str = "score", k0: float = 60, weights: Sequence[float] | None = None) -> Hits:
    """One ranking out of several of the same queries (see the module's text): Hits [Q, k]."""
    weights = [1.0] * len(found) if weights is None else weights
    out = Hits.empty(len(found[0].ids), k)
    for q in range(len(out.ids)):
        ids, worth = [], []
        for hits, weight in zip(found, weights):
            row = hits.row(q)
            ids.append(row.ids[0])
            worth.append(weight * (_normalised(row.scores[0]) if fusion == "score" else 1 / (k0 + np.arange(1, row.ids.size + 1))))
        ids, place = np.unique(np.concatenate(ids), return_inverse=True)
        total = np.zeros(len(ids))
        np.add.at(total, place, np.concatenate(worth))
        _fill(out, q, ids, total.astype(np.float32))
    return out


def _normalised(scores: np.ndarray) -> np.ndarray:
    scores = scores.astype(np.float64)
    if not len(scores) or scores.min() == scores.max():
        return np.ones(len(scores))
    return (scores - scores.min()) / (scores.max() - scores.min())


def _fill(out: Hits, q: int, ids: np.ndarray, scores: np.ndarray) -> None:
    """Row q of the hits: the best of these, ties by ascending id."""
    order = np.lexsort((ids, -scores))[:out.ids.shape[1]]
    out.ids[q, :len(order)], out.scores[q, :len(order)] = ids[order], scores[order]


def _weights(weights: Sequence[float] | str | float | None, n: int) -> list[float]:
    if weights is None:
        return [1.0] * n
    given = weights.split("+") if isinstance(weights, str) else [weights] if isinstance(weights, int | float) else list(weights)
    try:
        values = [float(w) for w in given]
    except ValueError as e:
        raise UsageError(f"weights = {weights!r} are not numbers: write weights=2+1") from e
    if len(values) != n or not all(0 <= w < np.inf for w in values) or not any(values):
        raise UsageError(f"weights = {weights!r} for {n} retrievers: one number from 0 on for each, not all 0")
    return values


def _part(part: str | Retriever, store) -> Retriever:
    if not isinstance(part, str):
        if part.store is not store:
            raise UsageError(f"{part!r} searches another datastore than the one given; build it over the same store")
        return part
    from ralm.index import retriever

    return retriever(part.strip(), store)
