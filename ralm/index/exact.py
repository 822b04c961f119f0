"""Exact search over stored vectors, and the one way in which every hit is scored.

A score is the inner product of the query (float32) and the stored vector (float16), summed in float64 in the order of numpy's sum
(pairwise) and rounded to float32. It does not depend on what else is searched, in which blocks or by which index: equal vectors
have equal scores, results are reproducible bit by bit. Matrix products in float32 only choose the candidates, with a margin of
their own rounding error. A query of nothing but zeros finds nothing.

Shapes: Q queries, D dimensions, R rows, B rows of a block, K hits, P (query, row) pairs, of query q at begin[q]:begin[q + 1]."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ralm.index import half
from ralm.index.compiled import compiled
from ralm.index.half import widen

BLOCK, QUERIES = 4096, 1024  # rows and queries of one matrix product: its result stays in the processor's cache
NONE, NOTHING = np.zeros(0, bool), np.uint64(0xFFFFFFFFFFFFFFFF)  # no filter; the pair that is none
NO_IDS = np.zeros(0, np.int64)
LINE = 32  # float16 numbers of one line of the processor's cache


def top(rows, q_QD: np.ndarray, k: int, allowed: np.ndarray | None, first: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(rows int64 [Q, k], scores float32 [Q, k]) of the best rows >= first among the allowed (bool [R], None for all); exact.

    Ties by ascending row, padded with (-1, -inf)."""
    out = np.full((len(q_QD), k), -1, np.int64), np.full((len(q_QD), k), -np.inf, np.float32)
    known = np.flatnonzero((q_QD != 0).any(1)) if k else NO_IDS
    for a in range(0, len(known), QUERIES):
        at = known[a:a + QUERIES]
        q = np.ascontiguousarray(q_QD[at], np.float32)
        for whole, piece in zip(out, _rank(rows, q, *_candidates(rows, q, k, allowed, first), k)):
            whole[at] = piece
    return out


def score(rows, q_QD: np.ndarray, near: np.ndarray, k: int, allowed: np.ndarray | None = None,
          ids: np.ndarray = NO_IDS) -> tuple[np.ndarray, np.ndarray, int]:
    """The k best of candidate rows [Q, n] (-1 for none, no row twice) that are allowed, exactly scored and ordered as `top` does,
    and the least number of hits that a query has. ids: int64 [R], given instead of rows; they ascend."""
    if len(rows.bits) != 1:
        return _rank(rows, q_QD, np.arange(len(near) + 1) * near.shape[1], near.reshape(-1), k, allowed, ids)
    row_QK, score_QK = np.empty((len(q_QD), k), np.int64), np.empty((len(q_QD), k), np.float32)
    found = _hits(q_QD, rows.bits[0][1], near, NONE if allowed is None else allowed, _plan(rows.dim), ids, row_QK, score_QK)
    return row_QK, score_QK, found


# ---- candidates -----------------------------------------------------------------------------------------------------


def _candidates(rows, q: np.ndarray, k: int, allowed: np.ndarray | None, first: int) -> tuple[np.ndarray, np.ndarray]:
    """(begin [Q + 1], rows [P]): the k best rows of every query, and a few more."""
    slack = np.float32(2 * rows.dim * 2.0 ** -24 * 1.01)  # twice the error bound of a float32 inner product of unit vectors
    best = np.full((len(q), k), -np.inf, np.float32)
    pool = Pool(max(8 * len(q) * k, 4 * BLOCK))
    for start, row, x, here in _blocks(rows, allowed, first):
        s_QB, done = q @ x.T, 0
        while done < len(q):
            pool.room(len(x), best, slack)
            done, pool.n = _offer(s_QB, here, start, row, slack, best, done, pool.n, pool.at, pool.row, pool.s)
    pool.prune(best, slack)
    order = np.argsort(pool.at[:pool.n], kind="stable")
    return np.searchsorted(pool.at[:pool.n][order], np.arange(len(q) + 1)), pool.row[:pool.n][order]


class Pool:
    """(query, row, score) triples that were among the best when they were found."""

    def __init__(self, size: int):
        self.n, self.at, self.row, self.s = 0, np.empty(size, np.int32), np.empty(size, np.int64), np.empty(size, np.float32)

    def room(self, n: int, best: np.ndarray, slack: np.float32) -> None:
        """Make room for n more: drop what is no longer among the best; where that is little, grow."""
        if self.n + n <= len(self.s):
            return
        self.prune(best, slack)
        if 2 * (self.n + n) > len(self.s):
            more = 2 * (self.n + n)
            self.at, self.row, self.s = (np.concatenate([x[:self.n], np.empty(more, x.dtype)]) for x in (self.at, self.row, self.s))

    def prune(self, best: np.ndarray, slack: np.float32) -> None:
        """best: [Q, K], heaps whose root is the k-th best score so far."""
        keep = self.s[:self.n] >= (best[:, 0] - slack)[self.at[:self.n]]
        n = int(np.count_nonzero(keep))
        for x in (self.at, self.row, self.s):
            x[:n] = x[:self.n][keep]
        self.n = n


def _blocks(rows, allowed: np.ndarray | None, first: int):
    """(first row, rows or none for consecutive ones, float32 [n, D], bool [n] or none); where few are allowed, only those."""
    wide = np.empty((BLOCK, rows.dim), np.float32)
    for start, vectors in rows.slices(first, len(rows), BLOCK):
        here = NONE if allowed is None else allowed[start:start + len(vectors)]
        n = len(vectors) if allowed is None else int(np.count_nonzero(here))
        if n == len(vectors):
            here = NONE
        row = NO_IDS
        if n < len(vectors) // 4:
            row = np.flatnonzero(here)
            vectors, row, here = vectors[row], start + row, NONE
        if n:
            half.widen_rows(half.bits(vectors), wide[:len(vectors)])
            yield start, row, wide[:len(vectors)], here


@compiled
def _offer(s_QB, allowed_B, first, row_B, slack, best_QK, q, n, at_P, row_P, s_P):
    """Put every score that is not below the k-th best so far (less the slack) into the pool, from query q on, while it has room.

    best: the k best scores of every query as a heap, the least of them in front, -inf where there are fewer yet.
    Returns the query to go on with, and the size of the pool."""
    Q, B = s_QB.shape
    check, listed = len(allowed_B) > 0, len(row_B) > 0
    while q < Q and n + B <= len(s_P):
        best, s_B = best_QK[q], s_QB[q]
        least = best[0] - slack
        for a in range(0, B, 128):
            stop, some = min(a + 128, B), np.int32(0)
            for s in s_B[a:stop]:  # counted with SIMD; most of the time there is none
                some += np.int32(s >= least)
            if some == 0:
                continue
            for j in range(a, stop):
                s = s_B[j]
                if s >= least and not (check and not allowed_B[j]):
                    at_P[n], row_P[n], s_P[n] = q, row_B[j] if listed else first + j, s
                    n += 1
                    if s > best[0]:
                        _sink(best, s)
                        least = best[0] - slack
        q += 1
    return q, n


@compiled
def _sink(best, s):
    """Put s in the place of the least of a heap."""
    i, K = 0, len(best)
    while True:
        child = 2 * i + 1
        if child >= K:
            break
        if child + 1 < K and best[child + 1] < best[child]:
            child += 1
        if best[child] >= s:
            break
        best[i] = best[child]
        i = child
    best[i] = s


# ---- scores ---------------------------------------------------------------------------------------------------------


def _rank(rows, q: np.ndarray, begin: np.ndarray, row: np.ndarray, k: int, allowed: np.ndarray | None = None,
          ids: np.ndarray = NO_IDS) -> tuple[np.ndarray, np.ndarray, int]:
    """Score (query, row) pairs, sort by score and row, cut at k, pad; and the least number of hits of a query."""
    keys, plan, allowed = np.full(len(row), NOTHING), _plan(rows.dim), NONE if allowed is None else allowed
    for start, bits in rows.bits:
        _score(q, bits, start, begin, row, allowed, plan, keys)
    out = np.empty((len(q), k), np.int64), np.empty((len(q), k), np.float32)
    return *out, _best(keys, begin, ids, *out)


@lru_cache
def _plan(n: int) -> np.ndarray:
    """int64 [_, 3]: how numpy sums n numbers pairwise: pieces [start, stop) of at most 128, and how many of the sums that are
    waiting are then added to the one before. (Not a compiled recursion: numba 0.68 crashes in one that comes from its cache.)"""
    def pieces(a: int, n: int, after: int) -> list[tuple[int, int, int]]:
        half = n // 2 - n // 2 % 8
        return [(a, a + n, after)] if n <= 128 else pieces(a, half, 0) + pieces(a + half, n - half, after + 1)

    return np.array(pieces(0, n, 0), np.int64)


@compiled
def _sum(x, plan, waiting):
    """The sum of x in the order of the plan; waiting: room for the sums of pieces."""
    n = 0
    for i in range(len(plan)):
        waiting[n] = _piece(x, plan[i, 0], plan[i, 1])
        n += 1
        for _ in range(plan[i, 2]):
            n -= 1
            waiting[n - 1] += waiting[n]
    return waiting[0]


@compiled
def _piece(x, a, stop):
    """The sum of x[a:stop]: eight sums in turn, as numpy does it."""
    if stop - a < 8:
        s = 0.0
        for i in range(a, stop):
            s += x[i]
        return s
    last = stop - (stop - a) % 8
    r0, r1, r2, r3, r4, r5, r6, r7 = x[a], x[a + 1], x[a + 2], x[a + 3], x[a + 4], x[a + 5], x[a + 6], x[a + 7]
    for i in range(a + 8, last, 8):
        r0 += x[i]
        r1 += x[i + 1]
        r2 += x[i + 2]
        r3 += x[i + 3]
        r4 += x[i + 4]
        r5 += x[i + 5]
        r6 += x[i + 6]
        r7 += x[i + 7]
    s = ((r0 + r1) + (r2 + r3)) + ((r4 + r5) + (r6 + r7))
    for i in range(last, stop):
        s += x[i]
    return s


@compiled
def _score(q_QD, bits_RD, first, begin_Q, row_P, allowed_R, plan, key_P):
    """Score the pairs whose row is among [first, first + R): as one integer, which orders by descending score, then by row.

    Rows: below 2^32 - 1. Pairs of a query of zeros, of row -1 and of rows that are not allowed (empty for all) are left alone.
    Returns nothing of use."""
    D, stop = q_QD.shape[1], first + bits_RD.shape[0]
    value, product, one = np.empty(D, np.float32), np.empty(D, np.float64), np.empty(1, np.float32)
    wide, bits, waiting = value.view(np.uint32), one.view(np.uint32), np.empty(len(plan), np.float64)
    check, touched = len(allowed_R) > 0, np.int64(0)
    for q in range(len(q_QD)):
        a = q_QD[q]
        if not a.any():
            continue
        for p in range(begin_Q[q], begin_Q[q + 1]):  # these come from anywhere in memory: ask for all before the first is used
            row = row_P[p]
            if first <= row < stop:
                for d in range(0, D, LINE):
                    touched += bits_RD[row - first, d]
        for p in range(begin_Q[q], begin_Q[q + 1]):
            row = row_P[p]
            if row < first or row >= stop or (check and not allowed_R[row]):
                continue
            widen(bits_RD[row - first], wide, value)
            for d in range(D):
                product[d] = np.float64(a[d]) * np.float64(value[d])
            one[0] = np.float32(0) - np.float32(_sum(product, plan, waiting))  # never -0, so that zeros tie
            b = bits[0]
            b = ~b if b >> np.uint32(31) else b | np.uint32(1 << 31)  # negative numbers order the other way round
            key_P[p] = np.uint64(b) << np.uint64(32) | np.uint64(row)
    return touched


@compiled
def _best(key_P, begin_Q, id_R, row_QK, score_QK):
    """Sort the pairs of every query, write the first k, pad. Returns the least number written."""
    K = row_QK.shape[1]
    least = K
    one = np.empty(1, np.uint32)
    value = one.view(np.float32)
    for q in range(len(row_QK)):
        keys = key_P[begin_Q[q]:begin_Q[q + 1]]
        if len(keys) > 32:
            keys.sort()
        else:  # by insertion
            for i in range(1, len(keys)):
                key, j = keys[i], i
                while j > 0 and keys[j - 1] > key:
                    keys[j] = keys[j - 1]
                    j -= 1
                keys[j] = key
        n = 0
        while n < min(K, len(keys)) and keys[n] != NOTHING:
            b = np.uint32(keys[n] >> np.uint64(32))
            one[0] = b & np.uint32(0x7FFFFFFF) if b >> np.uint32(31) else ~b
            row = np.int64(keys[n] & np.uint64(0xFFFFFFFF))
            row_QK[q, n] = id_R[row] if len(id_R) else row
            score_QK[q, n] = np.float32(0) - value[0]
            n += 1
        least = min(least, n)
        row_QK[q, n:], score_QK[q, n:] = -1, -np.inf
    return least


@compiled
def _hits(q_QD, bits_RD, near_QN, allowed_R, plan, id_R, row_QK, score_QK):
    """`_score` and `_best` of the same number of candidates for every query, in one call."""
    Q, N = near_QN.shape
    begin, key = np.arange(Q + 1) * N, np.full(Q * N, NOTHING)
    _score(q_QD, bits_RD, 0, begin, near_QN.reshape(-1), allowed_R, plan, key)
    return _best(key, begin, id_R, row_QK, score_QK)
