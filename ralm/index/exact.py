"""Exact search over stored vectors, and the one way in which every hit is scored.

A score is the inner product of the query (float32) and the stored vector (float16), summed in float64 and rounded to float32. It
does not depend on what else is searched, in which blocks or by which index: equal vectors have equal scores, results are
reproducible bit by bit. Matrix products in float32 only choose the candidates, with a margin of their own rounding error."""

from __future__ import annotations

import numpy as np

BLOCK, GROUP = 32_768, 64  # rows a matrix product; at most so many are represented by their maximum in the first threshold
CACHE = 1 << 30  # bytes of float32 copies kept
QUERIES = 256  # queries a matrix product


def top(rows, q_QD: np.ndarray, k: int, allowed: np.ndarray | None, first: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(rows int64 [Q, k], scores float32 [Q, k]) of the best rows >= first among the allowed (bool [R], None for all); exact.

    Ties by ascending row, padded with (-1, -inf)."""
    out = np.full((len(q_QD), k), -1, np.int64), np.full((len(q_QD), k), -np.inf, np.float32)
    if not k:
        return out
    for a in range(0, len(q_QD), QUERIES):
        q = np.ascontiguousarray(q_QD[a:a + QUERIES], np.float32)
        at, row = _candidates(rows, q, k, allowed, first)
        for whole, piece in zip(out, _rank(rows, q, at, row, k)):
            whole[a:a + len(q)] = piece
    return out


def score(rows, q_QD: np.ndarray, near: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best of candidate rows [Q, n] (-1 for none, no row twice), exactly scored; as `top`."""
    at, column = np.nonzero(near >= 0)
    return _rank(rows, q_QD, at, near[at, column], k)


def _candidates(rows, q: np.ndarray, k: int, allowed: np.ndarray | None, first: int) -> tuple[np.ndarray, np.ndarray]:
    """(query, row) pairs that hold the k best rows of every query, and a few more."""
    slack = np.float32(2 * rows.dim * 2.0 ** -24 * 1.01)  # twice the error bound of a float32 inner product of unit vectors
    least = np.full(len(q), -np.inf, np.float32)
    pool = np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32)
    for start, row, x in _blocks(rows, allowed, first):
        s_QB = q @ x.T
        if np.isneginf(least).any() and len(x) >= 2 * k:  # the k-th best of group maxima is no better than the k-th best
            group = min(GROUP, len(x) // (2 * k))
            maxima = s_QB[:, :len(x) - len(x) % group].reshape(len(q), -1, group).max(2)
            least = np.maximum(least, np.partition(maxima, maxima.shape[1] - k, 1)[:, -k])
        at, column = np.nonzero(s_QB >= (least - slack)[:, None])
        found = at, start + column if row is None else row[column], s_QB[at, column]
        pool = tuple(np.concatenate(p) for p in zip(pool, found))
        least, keep = _threshold(pool[0], pool[2], len(q), k, slack, least)
        pool = tuple(p[keep] for p in pool)
    return pool[0], pool[1]


def _threshold(at, s, n: int, k: int, slack, least) -> tuple[np.ndarray, np.ndarray]:
    """The k-th best score of each query in the pool (what it was where there are fewer), and who is not below it."""
    order = np.lexsort((-s, at))
    begin = np.searchsorted(at[order], np.arange(n + 1))
    full = np.diff(begin) >= k
    least = least.copy()
    least[full] = np.maximum(least[full], s[order][begin[:-1][full] + k - 1])
    return least, s >= (least - slack)[at]


def _blocks(rows, allowed: np.ndarray | None, first: int):
    """(first row, rows or None for consecutive ones, float32 [n, D]): allowed rows only where they are few, else whole blocks."""
    kept = rows.__dict__.setdefault("float32", {})
    for start, vectors in rows.slices(first, len(rows), BLOCK):
        here = None if allowed is None else np.flatnonzero(allowed[start:start + len(vectors)])
        if here is not None and not len(here):
            continue
        if here is not None and len(here) < len(vectors) // 4 and start not in kept:
            yield start, start + here, vectors[here].astype(np.float32)
            continue
        x = kept.get(start)
        if x is None or len(x) != len(vectors):
            x = np.asarray(vectors, np.float32)
            if sum(b.nbytes for b in kept.values()) + x.nbytes <= CACHE:
                kept[start] = x
        if here is None or len(here) == len(vectors):
            yield start, None, x
        else:
            yield start, start + here, x[here]


def _rank(rows, q: np.ndarray, at: np.ndarray, row: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Score (query, row) pairs, sort by score and row, cut at k, pad."""
    out = np.full((len(q), k), -1, np.int64), np.full((len(q), k), -np.inf, np.float32)
    if not len(at):
        return out
    s = np.empty(len(at), np.float32)
    for a in range(0, len(at), BLOCK):
        x = rows.take(row[a:a + BLOCK]).astype(np.float64)
        x *= q[at[a:a + BLOCK]]
        s[a:a + BLOCK] = x.sum(1)
    s += np.float32(0)  # -0 is 0
    order = np.lexsort((row, -s, at))
    at, row, s = at[order], row[order], s[order]
    place = np.arange(len(at)) - np.searchsorted(at, at)
    keep = place < k
    out[0][at[keep], place[keep]], out[1][at[keep], place[keep]] = row[keep], s[keep]
    return out
