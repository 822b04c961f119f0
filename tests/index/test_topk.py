"""Exact top k over blocks: whatever is passed over, the hits and every digit of the scores are those of a sort of all rows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ralm.index import topk

BIG = 4 * topk.TILE * topk.BLOCK // 3


class Segment:
    """Random postings of one segment with its bounds; terms 0 .. T-1, those in `dense` with a slot."""

    def __init__(self, rng, rows, chances, ties, clustered):
        near = (np.sin(np.arange(rows) / 97) + 1) ** 4 / 8 if clustered else np.ones(rows)
        self.holds = rng.random((len(chances), rows)) < np.array(chances)[:, None] * near
        self.indptr = np.concatenate([[0], self.holds.sum(1).cumsum()]).astype(np.int64)
        self.rows, n = np.nonzero(self.holds)[1].astype(np.int32), int(self.holds.sum())
        self.impacts = rng.integers(0, 3, n).astype(np.float32) if ties else rng.random(n, dtype=np.float32) ** 3
        self.count = rows

    def summarise(self, numbers, dense, allow=None):
        """What View keeps for terms with these numbers."""
        many, blocks = int(dense.sum()), topk.blocks_of(self.count)
        self.numbers, self.tops = numbers, np.empty(len(numbers), np.float32)
        self.slots = np.where(dense, np.cumsum(dense) - 1, -1).astype(np.int32)
        self.levels, self.offsets = np.empty((many, topk.PARTS, blocks), np.uint8), np.empty((many, blocks + 1), np.int32)
        topk.summarise(numbers, self.slots, self.indptr, self.rows, self.impacts,
                       np.ones(self.count, bool) if allow is None else allow, self.tops, self.levels, self.offsets)

    def all(self, terms, weights):
        """(float32 sum for every row in the order of the terms, whether any term is there)"""
        total, touched = np.zeros(self.count, np.float32), np.zeros(self.count, bool)
        for t, w in zip(terms, weights):
            n = self.numbers[t]
            if n >= 0:
                here = slice(self.indptr[n], self.indptr[n + 1])
                total[self.rows[here]] += w * self.impacts[here]
                touched[self.rows[here]] = True
        return total, touched


def found(segments, allow, ptr, terms, weights, base, k):
    Q = len(ptr) - 1
    keys, held, floor, shift = np.empty((Q, 2 * k + topk.BLOCK), np.int64), np.zeros(Q, np.int64), np.zeros(Q, np.float32), 0
    for s, mask in zip(segments, allow):
        topk.search(ptr, terms, weights, base, s.numbers, s.slots, s.tops, s.indptr, s.rows, s.impacts, s.levels, s.offsets, mask,
                    topk.spans_of(mask), shift, keys, held, floor)
        shift += s.count
    scores, ids = np.full((Q, k), -np.inf, np.float32), np.full((Q, k), -1, np.int64)
    topk.unpack(topk.ranked(keys, held), held, np.arange(shift) * 3, scores, ids)
    return scores, ids


def check(segments, allow, ptr, terms, weights, base, k):
    scores, ids = found(segments, allow, ptr, terms, weights, base, k)
    may = np.concatenate(allow)
    for q in range(len(ptr) - 1):
        here = slice(ptr[q], ptr[q + 1])
        each = [s.all(terms[here], weights[here]) for s in segments]
        total, touched = np.concatenate([t for t, _ in each]) + base[q], np.concatenate([t for _, t in each])
        rows = np.flatnonzero(touched & may)
        want = rows[np.lexsort((rows, -total[rows]))][:k]
        assert ids[q, :len(want)].tolist() == (want * 3).tolist() and (ids[q, len(want):] == -1).all()
        assert np.array_equal(scores[q, :len(want)], total[want]) and np.isneginf(scores[q, len(want):]).all()


@given(seed=st.integers(0, 2**32 - 1), rows=st.lists(st.sampled_from([1, 15, 256, 257, 700, 9000]), min_size=1, max_size=3),
       k=st.sampled_from([1, 3, 10, 100, 5000]), ties=st.booleans(), clustered=st.booleans(), base=st.sampled_from([0.0, 0.7, 1e4]),
       share=st.sampled_from([1.0, 0.9, 0.02, 0.0]))
@settings(max_examples=100, deadline=None)
def test_search_is_a_sort(seed, rows, k, ties, clustered, base, share):
    """Over segments: scores, ties by ascending id, touched rows that score 0, untouched and disallowed rows left out."""
    rng = np.random.default_rng(seed)
    T, segments = 7, []
    allow = [np.ones(n, bool) if share == 1.0 else rng.random(n) < share for n in rows]
    for n, mask in zip(rows, allow):
        s = Segment(rng, n, [0.9, 0.4, 0.1, 0.1, 0.03, 0.01, 0.003], ties, clustered)
        s.summarise(np.where(rng.random(T) < 0.1, -1, rng.permutation(T)).astype(np.int32), rng.random(T) < 0.5,
                    mask if seed % 2 else None)
        segments.append(s)
    sizes = rng.integers(0, 6, 4)
    ptr = np.concatenate([[0], sizes.cumsum()]).astype(np.int64)
    terms = rng.integers(0, T, ptr[-1]).astype(np.int32)
    weights = (rng.integers(0, 3, ptr[-1]) if ties else rng.random(ptr[-1]) * 5).astype(np.float32)
    check(segments, allow, ptr, terms, weights, np.full(4, base, np.float32), k)


@pytest.mark.parametrize("k", [1, 100])
def test_more_blocks_than_a_tile(k):
    rng = np.random.default_rng(k)
    s = Segment(rng, BIG, [0.2, 0.05, 0.001], False, True)
    s.summarise(np.arange(3, dtype=np.int32), np.array([True, True, False]))
    ptr, terms = np.array([0, 3, 4]), np.array([2, 0, 1, 1], np.int32)
    check([s], [np.ones(BIG, bool)], ptr, terms, np.array([5, 1, 2, 1], np.float32), np.zeros(2, np.float32), k)


def test_most_rows_are_passed_over():
    """Rows beside the good ones are not even read: their postings are made unusable after the bounds are taken."""
    rows, rng = topk.BLOCK * 100, np.random.default_rng(0)
    s = Segment(rng, rows, [1.0], False, False)
    s.impacts[:] = rng.random(rows, dtype=np.float32) * 0.5
    s.impacts[topk.BLOCK * 30:topk.BLOCK * 50] += 1  # more blocks than are scored first
    s.summarise(np.zeros(1, np.int32), np.array([True]))
    s.impacts[:topk.BLOCK * 30], s.impacts[topk.BLOCK * 50:] = 1e9, 1e9
    one, none = np.ones(1, np.float32), np.zeros(1, np.float32)
    _, ids = found([s], [np.ones(rows, bool)], np.array([0, 1]), np.zeros(1, np.int32), one, none, 5)
    assert (ids // 3 >= topk.BLOCK * 30).all() and (ids // 3 < topk.BLOCK * 50).all()


@given(st.lists(st.booleans(), max_size=200))
@settings(max_examples=50, deadline=None)
def test_spans_say_where_rows_are_allowed(allow):
    spans = topk.spans_of(np.array(allow, bool))
    assert spans.dtype == np.int8 and spans.shape == (topk.PARTS, topk.blocks_of(len(allow)))
    for b in range(spans.shape[1]):
        for part in range(topk.PARTS):
            at = b * topk.BLOCK + part * topk.SPAN
            assert spans[part, b] == -any(allow[at:at + topk.SPAN])
