"""Citations resolve to characters of stored documents, or to nothing."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ralm.how.cite import narrow, numbered_prompt, passages, resolve, sentence_around, sentences, support
from ralm.types import Citation

A = Citation("a", 100, 152, "Granite is hard. Maria Holt built the tower in 1873.", 1.0, chunk=0)
B = Citation("b", 7, 36, "Snow lies on the mountain. Now", 1.0, chunk=1)


def test_markers_are_passages_in_order_of_first_use():
    text = "Snow lies there [2]. Maria Holt built it [1][2]. Again [1]."
    out = resolve(text, [A, B])
    assert [n for n, _ in out] == [2, 1]
    assert out[0][1].quote == "Snow lies on the mountain." and (out[0][1].start, out[0][1].end) == (7, 33)
    assert out[1][1].quote == "Maria Holt built the tower in 1873." and (out[1][1].start, out[1][1].end) == (117, 152)


@pytest.mark.parametrize("marker", ["[0]", "[3]", "[-1]", "[1.5]", "[a]", "[]", "[99999999999999999999999]", "(1)", "[ 1 ]", "[٣]"])
def test_what_names_no_passage_resolves_to_nothing(marker):
    assert resolve(f"Granite is hard {marker}.", [A, B]) == []


def test_adjacent_markers_end_the_same_statement():
    assert [c.quote for _, c in resolve("Granite is hard. Snow on the mountain and granite [1][2].", [A, B])] == [
        "Granite is hard.", "Snow lies on the mountain."]


def test_a_marker_cites_for_its_own_statement_only():
    """What stands before an earlier marker has been cited already."""
    out = resolve("Granite is hard, very hard [2]. Holt built it [1].", [A, B])
    assert [(n, c.quote) for n, c in out][1] == (1, "Maria Holt built the tower in 1873.")


def test_a_statement_that_shares_nothing_cites_the_whole_passage():
    assert resolve("Quite [1]", [A])[0][1] is A
    assert support("Quite", A) is None and support("", A) is None and support("the of is", A) is None


@given(st.text("ab. !?\n\"'", max_size=40))
def test_sentences_are_disjoint_and_lose_no_letter(text):
    spans = sentences(text)
    assert all(a < b for a, b in spans) and all(x[1] <= y[0] for x, y in pairwise(spans))
    assert "".join("".join(text[a:b] for a, b in spans).split()) == "".join(text.split())


@given(st.text("ab. \n", min_size=1, max_size=40), st.data())
def test_the_sentence_around_a_span_holds_it(text, data):
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    a, b = sentence_around(text, start, end)
    assert a <= start and end <= b <= len(text)


def test_narrowing_counts_from_the_document():
    c = narrow(A, 17, 27, 0.5)
    assert (c.document, c.start, c.end, c.quote, c.score, c.chunk) == ("a", 117, 127, "Maria Holt", 0.5, 0)


def test_passages_are_the_documents_own_characters(store):
    ids = store.chunk_ids()[:5]
    found = passages(store, ids, np.arange(5.0))
    assert [c.chunk for c in found] == ids.tolist() and [c.score for c in found] == [0, 1, 2, 3, 4]
    for c in found:
        assert store.document(c.document).text[c.start:c.end] == c.quote
    assert passages(store, ids[:0], np.zeros(0)) == []


def test_the_prompt_numbers_from_one():
    prompt = numbered_prompt("Who?", [A, B])
    assert "[1] Granite" in prompt and "[2] Snow" in prompt and "[0]" not in prompt and prompt.endswith("Question: Who?")
