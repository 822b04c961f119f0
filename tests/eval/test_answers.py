"""Measures of one answer: cases worked by hand, properties, and a second implementation written from the definitions alone."""

import string
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ralm.errors import UsageError
from ralm.eval.answers import dpr_tokens, em_orqa, em_squad, f1_squad, has_answer, has_answer_regex, match_substring, match_tokens

WORDS = st.lists(st.sampled_from(["the", "The", "a", "cat", "Cat.", "sat", "on", "(mat)", "5", "-", "é"]), max_size=7).map(" ".join)
GOLDS = st.lists(WORDS, max_size=3)


def plain(text):
    """SQuAD's normalisation, spelled out letter by letter."""
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    word, out = "", []
    for c in kept + " ":  # a word for the article rule is a run of letters, digits and underscores
        if c.isalnum() or c == "_":
            word += c
        else:
            out += ["" if word in ("a", "an", "the") else word, c]
            word = ""
    return "".join(out).split()


def f1_plain(prediction, gold):
    p, g = plain(prediction), plain(gold)
    if not p or not g:
        return 1.0 if p == g else 0.0
    left, same = list(g), 0
    for w in p:
        if w in left:
            left.remove(w)
            same += 1
    if not same:
        return 0.0
    precision, recall = same / len(p), same / len(g)
    return 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize(("said", "golds", "em", "f1"), [
    ("The Cat.", ["cat"], 1, 1),
    ("the cat sat", ["cat"], 0, 2 / 3),  # precision 1/2, recall 1
    ("cat cat", ["cat"], 0, 2 / 3),  # a word counts as often as both have it
    ("a cat, a dog", ["dog cat"], 0, 1),  # order does not matter for F1
    ("Denver Broncos", ["Broncos", "Denver Broncos of Colorado", "Denver"], 0, 2 / 3),  # best of 2/3, 2·2/6, 2/3
    ("", ["cat"], 0, 0),
    ("", [], 1, 1),
    ("cat", [], 0, 0),
    ("the", [""], 1, 1),  # both normalise to nothing
    ("U.S.", ["us"], 1, 1),
    ("theatre", ["atre"], 0, 0),  # 'the' is an article only as a word
    ("café", ["cafe"], 0, 0),
])
def test_by_hand(said, golds, em, f1):
    assert em_squad(said, golds) == em
    assert f1_squad(said, golds) == pytest.approx(f1)


@settings(deadline=None)
@given(WORDS, GOLDS)
def test_second_implementation(said, golds):
    assert em_squad(said, golds) == max(float(plain(said) == plain(g)) for g in golds or [""])
    assert f1_squad(said, golds) == pytest.approx(max(f1_plain(said, g) for g in golds or [""]))


@settings(deadline=None)
@given(st.text(max_size=30), st.text(max_size=30))
def test_one_reference_is_symmetric_and_bounded(a, b):
    assert 0 <= f1_squad(a, [b]) <= 1
    assert f1_squad(a, [b]) == pytest.approx(f1_squad(b, [a]))
    assert em_squad(a, [b]) == em_squad(b, [a])


@settings(deadline=None)
@given(WORDS, GOLDS)
def test_exact_implies_f1_and_more_references_never_hurt(said, golds):
    if em_squad(said, golds):
        assert f1_squad(said, golds) == 1
    if golds:
        assert f1_squad(said, [*golds, "cat"]) >= f1_squad(said, golds)
        assert em_squad(said, [*golds, "cat"]) >= em_squad(said, golds)
        assert match_substring(said, golds) >= match_tokens(said, golds)


def test_substring_is_not_token():
    assert match_substring("it is Catalonia", ["cat"]) == 1
    assert match_tokens("it is Catalonia", ["cat"]) == 0
    assert match_tokens("It is the Cat, again", ["cat again"]) == 1
    assert match_substring("anything", ["the", "!"]) == match_tokens("anything", ["the", "!"]) == 0
    assert match_substring("", []) == match_tokens("", []) == 1
    assert match_substring("x", []) == match_tokens("x", []) == 0


def test_accents_composed_and_decomposed():
    composed, apart = unicodedata.normalize("NFC", "São Tomé"), unicodedata.normalize("NFD", "São Tomé")
    assert em_squad(composed, [apart]) == 0
    assert em_orqa(composed, [apart]) == 1
    assert has_answer(f"the island of {composed}.", [apart])


@pytest.mark.parametrize(("passage", "golds", "held"), [
    ("It was 14 December 1972, UTC.", ["December 1972"], True),
    ("It was December, 1972.", ["December 1972"], False),  # the comma is a token
    ("in 1956", ["5"], False),
    ("in the U.S. today", ["U.S."], True),
    ("in the US today", ["U.S."], False),
    ("Beyoncé's song", ["BEYONCÉ"], True),
    ("The dog\nand\u00a0the cat", ["dog and the cat"], True),
    ("don't", ["don ' t"], True),
    ("anything", [], False),
    ("anything", [""], False),
    ("anything", ["\u200b "], False),
    ("", ["x"], False),
])
def test_has_answer(passage, golds, held):
    assert has_answer(passage, golds) is held


@settings(deadline=None)
@given(st.text(max_size=40))
def test_tokens_are_letters_numbers_marks_or_one_visible_character(text):
    flat = unicodedata.normalize("NFD", text)
    want, run = [], ""
    for c in flat + " ":
        kind = unicodedata.category(c)[0]
        if kind in "LNM":
            run += c
            continue
        want += [run] if run else []
        run = ""
        if kind not in "ZC":
            want.append(c)
    assert dpr_tokens(text) == [w.lower() for w in want]


def test_regular_expressions():
    assert has_answer_regex("Born in 1972.\nHe died.", [r"^he\b"])
    assert not has_answer_regex("Born in 1972", [r"19[89]\d"])
    with pytest.raises(UsageError, match="not a regular expression"):
        has_answer_regex("x", ["("])
