"""The compiled loops one by one, against a few lines of plain Python."""

from collections import Counter
from itertools import pairwise

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


@given(st.lists(st.dictionaries(st.binary(min_size=1, max_size=3), st.booleans(), max_size=12), max_size=4))
@settings(max_examples=200, deadline=None)
def test_merging_words_is_a_sorted_set(vocabularies):
    words = [w for v in vocabularies for w in sorted(v)]
    keep = np.array([v[w] for v in vocabularies for w in sorted(v)], bool)
    ends = np.cumsum([0, *map(len, words)])
    blob = np.frombuffer(bytearray(b"".join(words)), np.uint8)
    ptr = np.cumsum([0, *map(len, vocabularies)])
    number, out, starts = kernels.merge_words(blob, ends[:-1], ends[1:], ptr, keep)
    want = sorted({w for w, k in zip(words, keep) if k})
    assert [out[a:b].tobytes() for a, b in pairwise(starts)] == want
    assert number.tolist() == [want.index(w) if k else -1 for w, k in zip(words, keep)]
