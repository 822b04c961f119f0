"""The compiled loops one by one, against a few lines of plain Python."""

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ralm.index import kernels

ROWS = st.lists(st.lists(st.integers(0, 6), max_size=8), max_size=12)


def flat(rows):
    ptr = np.zeros(len(rows) + 1, np.int64)
    ptr[1:] = np.cumsum([len(r) for r in rows])
    return np.array([t for r in rows for t in r], np.int32), ptr


def postings(rows, order):
    terms, ptr = flat(rows)
    seen = np.full(len(order), -1)
    row_ptr, terms, counts = kernels.count_terms(terms, ptr, seen, seen.copy(), 0)
    indptr, out, tfs = np.zeros(len(order) + 1, np.int64), np.empty(len(terms), np.int32), np.empty(len(terms), np.uint32)
    kernels.invert(row_ptr, terms, counts, order, indptr, out, tfs)
    return indptr, out, tfs, row_ptr, terms


@given(ROWS, st.permutations(range(7)))
@settings(max_examples=100, deadline=None)
def test_counting_and_inverting(rows, order):
    indptr, out, tfs, row_ptr, terms = postings(rows, np.array(order, np.int32))
    for t in range(7):
        want = [(i, Counter(r)[t]) for i, r in enumerate(rows) if t in r]
        here = slice(indptr[order[t]], indptr[order[t] + 1])
        assert list(zip(out[here].tolist(), tfs[here].tolist())) == want
    for i, r in enumerate(rows):
        assert sorted(terms[row_ptr[i]:row_ptr[i + 1]].tolist()) == sorted({order[t] for t in r})


@given(ROWS, st.data())
@settings(max_examples=100, deadline=None)
def test_document_frequency_counts_alive_rows_both_ways(rows, data):
    alive = np.array(data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows))), bool)
    indptr, out, _, row_ptr, terms = postings(rows, np.arange(7, dtype=np.int32))
    got = kernels.document_frequency(indptr, out, row_ptr, terms, alive, len(rows) - int(alive.sum()))
    assert got.tolist() == [sum(t in r for r, a in zip(rows, alive) if a) for t in range(7)]


@given(st.sets(st.binary(min_size=1, max_size=4), max_size=30), st.lists(st.binary(min_size=1, max_size=4), max_size=20))
@settings(max_examples=200, deadline=None)
def test_find_is_a_dictionary(vocabulary, wanted):
    def blob(words):
        starts = np.zeros(len(words) + 1, np.int64)
        starts[1:] = np.cumsum([len(w) for w in words])
        return np.frombuffer(bytearray(b"".join(words)), np.uint8), starts

    words = sorted(vocabulary)
    got = kernels.find(*blob(words), *blob(wanted))
    assert got.tolist() == [words.index(w) if w in vocabulary else -1 for w in wanted]


@given(st.integers(0, 2**32 - 1), st.integers(1, 300), st.integers(1, 40), st.booleans(), st.sampled_from([0.0, 0.7]))
@settings(max_examples=60, deadline=None)
def test_search_is_a_sort(seed, rows, k, ties, base):
    """Over two segments: scores, ties by ascending id, touched rows that score 0, untouched and disallowed rows left out."""
    rng = np.random.default_rng(seed)
    total, touched = np.zeros(2 * rows, np.float32), np.zeros(2 * rows, bool)
    weights, terms = rng.integers(0, 3, 4).astype(np.float32), np.array([0, 2, -1, 1], np.int32)
    places = np.empty((1, 2 * k), np.float32), np.empty((1, 2 * k), np.int64), np.zeros(1, np.int64)
    floor, allow, bits = np.zeros(1, np.float32), rng.random(2 * rows) < 0.8, kernels.accumulators()
    for part in range(2):
        holds = rng.random((3, rows)) < [[0.5], [0.1], [0.02]]
        impacts = rng.integers(0, 3, holds.sum()).astype(np.float32) if ties else rng.random(holds.sum(), dtype=np.float32)
        indptr = np.concatenate([[0], holds.sum(1).cumsum()]).astype(np.int64)
        found = np.nonzero(holds)[1].astype(np.int32)
        for t, w in zip(terms, weights):
            if t >= 0:
                at = found[indptr[t]:indptr[t + 1]] + part * rows
                total[at] += w * impacts[indptr[t]:indptr[t + 1]]
                touched[at] = True
        here = slice(part * rows, (part + 1) * rows)
        kernels.search(np.array([0, 4]), terms, weights, np.array([base], np.float32), indptr, found, impacts, allow[here],
                       np.arange(2 * rows)[here], bits, *places, floor)
        assert (bits[:-1] == kernels.UNTOUCHED).all()
    scores, ids = np.full((1, k), -np.inf, np.float32), np.full((1, k), -1, np.int64)
    kernels.finish(*places, scores, ids)
    total += np.float32(base)
    want = sorted(np.nonzero(touched & allow)[0], key=lambda i: (-total[i], i))[:k]
    assert ids[0, :len(want)].tolist() == want and (ids[0, len(want):] == -1).all()
    assert np.array_equal(scores[0, :len(want)], total[want]) and np.isneginf(scores[0, len(want):]).all()


def test_more_rows_than_a_window():
    """Windows, blocks and their last rows: every row is found once, with its own score."""
    rows = 2 * kernels.WINDOW + 70
    found, impacts = np.arange(0, rows, 3, dtype=np.int32), np.random.default_rng(0).random((rows + 2) // 3, dtype=np.float32)
    scores, ids = np.full((2, len(found)), -np.inf, np.float32), np.full((2, len(found)), -1, np.int64)
    places = np.empty((2, 2 * len(found)), np.float32), np.empty((2, 2 * len(found)), np.int64), np.zeros(2, np.int64)
    kernels.search(np.array([0, 2, 3]), np.array([0, 0, 0], np.int32), np.ones(3, np.float32), np.zeros(2, np.float32),
                   np.array([0, len(found)]), found, impacts, np.ones(rows, bool), np.arange(rows), kernels.accumulators(),
                   *places, np.zeros(2, np.float32))
    kernels.finish(*places, scores, ids)
    order = np.lexsort((found, -impacts))
    assert np.array_equal(ids[0], found[order]) and np.array_equal(ids[1], ids[0]) and np.array_equal(scores[0], 2 * scores[1])
