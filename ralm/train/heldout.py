"""How often a retriever finds a passage that answers a held-out question, beside others, with intervals of the difference.

    held = HeldOut(read_pairs("dev.json"), more=[...])         # questions; passages to find them among
    held.figures(top_QK, {"bm25": other_QK})                   # {"top1": 61.2, ..., "top1-bm25": 3.1, "top1-bm25_low": 1.4, ...}"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from ralm.eval.interval import interval
from ralm.train.pairs import Holds, Pairs, Passage, bm25_top
from ralm.train.snapshot import best

KS = (1, 5, 20, 100)
DEPTH = max(KS)


class HeldOut:
    """Questions with answers, and the passages they are asked of: their own, and `more` that nobody asks about.

    limit: the first so many questions, evenly spread."""

    def __init__(self, pairs: Pairs, more: Iterable[Passage] = (), limit: int = 0):
        every = Pairs()
        every.take(pairs)
        for p in more:
            every.passage(*p)
        step = max(1, len(pairs.queries) // limit) if limit else 1
        rows = list(range(0, len(pairs.queries), step))[:limit or None]
        self.passages = every.passages
        self.queries, self.gold, self.answers = ([x[i] for i in rows] for x in (every.queries, every.positives, every.answers))
        self.holds = Holds(self.passages)

    def bm25(self) -> np.ndarray:
        """What our BM25 finds, int32 [Q, DEPTH]."""
        return bm25_top(self.passages, self.queries, min(DEPTH, len(self.passages)))

    def top(self, q_QD: np.ndarray, d_ND: np.ndarray) -> np.ndarray:
        """The passages of largest inner product, best first, ties by number; int32 [Q, DEPTH]."""
        return best(q_QD @ d_ND.T, DEPTH).astype(np.int32)

    def ranks(self, top_QK: np.ndarray) -> np.ndarray:
        """[Q, 2]: rank from 0 of the first passage that holds an answer (DPR), and of the first that is the question's own; DEPTH
        where there is none."""
        out = np.full((len(self.queries), 2), DEPTH)
        for n, (row, gold, answers) in enumerate(zip(top_QK.tolist(), self.gold, self.answers)):
            out[n, 1] = next((r for r, i in enumerate(row) if i in gold), DEPTH)
            out[n, 0] = min(out[n, 1], next((r for r, i in enumerate(row[:out[n, 1]]) if i >= 0 and self.holds(i, answers)), DEPTH))
        return out

    def figures(self, top_QK: np.ndarray, beside: Mapping[str, np.ndarray] | None = None) -> dict[str, float]:
        """Percent of questions: topK (a passage with an answer among the first K), goldK (their own passage), and mrr of that.
        For each system beside: the difference in topK and gold1, with the ends of its 95 % interval (paired bootstrap)."""
        ours = self._measures(top_QK)
        out = {name: float(values.mean()) for name, values in ours.items()}
        for other, top in (beside or {}).items():
            theirs = self._measures(top)
            for name in (*(f"top{k}" for k in KS), "gold1"):
                difference = ours[name] - theirs[name]
                low, high = interval(difference)
                out |= {f"{name}-{other}": float(difference.mean()), f"{name}-{other}_low": low, f"{name}-{other}_high": high}
        return out

    def _measures(self, top_QK: np.ndarray) -> dict[str, np.ndarray]:
        """Each question's share of each measure, in percent."""
        answer, gold = self.ranks(top_QK).T
        out = {f"top{k}": 100.0 * (answer < k) for k in KS} | {f"gold{k}": 100.0 * (gold < k) for k in KS}
        return out | {"mrr": np.where(gold < DEPTH, 100.0 / (1 + gold), 0.0)}
