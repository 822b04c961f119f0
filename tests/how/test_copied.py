"""Copied spans against the definition, token by token."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ralm.how.copied import joined, runs


def naive(ids, i, tokens, mask, begin):
    """The longest run that ends at i, and where the first of those ends."""
    best = (0, 0, 0)
    for k, (row, there) in enumerate(zip(tokens, mask)):
        for r in range(len(row)):
            n = 0
            while i - n >= begin and r - n >= 0 and there[r - n] and row[r - n] == ids[i - n]:
                n += 1
            if n > best[0]:
                best = n, k, r
    return best


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 14), st.integers(0, 3), st.integers(1, 6))
def test_runs_are_the_longest_suffixes_that_occur(seed, T, K, R):
    rng = np.random.default_rng(seed)
    ids, tokens = rng.integers(0, 3, T), rng.integers(0, 3, (K, R))
    mask = np.arange(R) < rng.integers(0, R + 1, (K, 1))
    first = int(rng.integers(0, T))
    begin = int(rng.integers(0, first + 1))
    stop = int(rng.integers(first, T + 1))
    got = runs(ids, first, stop, tokens, mask, begin)
    assert list(zip(*(a.tolist() for a in got))) == [naive(ids, i, tokens, mask, begin) for i in range(first, stop)]


def test_a_run_reaches_back_before_the_tokens_in_question_and_over_the_end_of_a_chunk():
    ids = np.array([7, 1, 2, 3, 4, 9, 4])
    tokens = np.array([[8, 3, 4, 0], [1, 2, 3, 4]])
    mask = np.array([[True, True, True, False], [True] * 4])
    got = runs(ids, 3, 7, tokens, mask)
    assert got.length.tolist() == [3, 4, 0, 1] and got.neighbour.tolist()[:2] == [1, 1] and got.last.tolist()[:2] == [2, 3]
    assert runs(ids, 3, 7, tokens, mask, begin=2).length.tolist() == [2, 3, 0, 1]


def test_runs_go_on_where_the_document_goes_on():
    length = np.array([3, 4, 0, 1, 2, 2, 1, 1])
    place = np.array([10, 11, 0, 55, 56, 57, 90, 40])  # the sixth token was looked for elsewhere, and stands behind the fifth
    assert joined(length, place) == [(-2, 2, 0), (3, 6, 3)]
    assert joined(length, place, least=1) == [(-2, 2, 0), (3, 6, 3), (6, 7, 6), (7, 8, 7)]
    assert joined(np.array([1, 0, 0, 4, 0]), np.array([7, 0, 0, 10, 0])) == [(0, 4, 0)]  # one place, found again behind a gap
    assert joined(np.array([0, 1, 0, 4, 1]), np.array([0, 8, 0, 10, 11])) == [(0, 5, 3)]  # and further back than before
    assert joined(np.array([1, 0, 1]), np.array([7, 0, 9]), least=1) == [(0, 1, 0), (2, 3, 2)]  # the gap is none of it
    assert joined(length, place, least=4) == [(-2, 2, 0)]
    assert joined(np.array([2, 2]), np.array([5, 9])) == [(-1, 1, 0), (0, 2, 1)]  # two places
    assert joined(np.zeros(3, int), np.zeros(3, int)) == joined(np.zeros(0, int), np.zeros(0, int)) == []


def test_padding_is_no_token():
    got = runs(np.array([0, 0]), 0, 2, np.zeros((1, 3), int), np.zeros((1, 3), bool))
    assert got.length.tolist() == [0, 0]
    assert runs(np.array([0]), 0, 1, np.zeros((0, 4), int), np.zeros((0, 4), bool)).length.tolist() == [0]
