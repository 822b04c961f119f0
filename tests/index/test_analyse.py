"""The analyser: what a word is, in which languages, and that cutting in pieces changes nothing."""

import re
import unicodedata
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ralm.errors import UsageError
from ralm.index import analyse
from ralm.index.analyse import Analyser, Settings

PLAIN = Settings.of("none", "none")


def words(text, stemmer="none", stop="none"):
    return Analyser(Settings.of(stemmer, stop)).words(text)


@pytest.mark.parametrize("text, expected", [
    ("The Quick-brown fox!", ["the", "quick", "brown", "fox"]),
    ("don't O’Neill's 'quoted' dogs'", ["don't", "o'neill", "quoted", "dogs"]),
    ("3.14 1,000 1. 2, v2.0 a.b", ["3.14", "1,000", "1", "2", "v2.0", "a", "b"]),
    ("snake_case __init__ __ _", ["snake_case", "__init__"]),
    ("Straße STRASSE ﬁne", ["strasse", "strasse", "fine"]),
    ("cafe\u0301 café cafe", ["café", "café", "cafe"]),
    ("co\u00adoperate İstanbul Müller’s", ["cooperate", "istanbul", "müller"]),
    ("em—dash “quotes”… a\u00a0b x\u3000y", ["em", "dash", "quotes", "a", "b", "x", "y"]),
    ("東京 xと", ["東", "京", "東京", "x", "と"]),
    ("0\u0e31 ที่นี่", ["0\u0e31", "ที่", "นี่", "ที่นี่"]),
    ("ＡＢＣ１２ ½ ٣", ["abc12", "1", "2", "٣"]),
    ("", []), ("...", []), ("😀 \ud800 \0", []),
    ("नमस्ते привет Ελλάδας", ["नमस्ते", "привет", "ελλάδασ"]),
])
def test_words(text, expected):
    assert words(text) == expected


def test_stop_words_go_before_stemming():
    assert words("Doing the being", "english", "english") == ["do", "be"]
    assert words("Doing the being", "english", ["doing"]) == ["the", "be"]
    assert words("La maison de l’homme", "french", ["la", "de", "l"]) == ["maison", "homm"]
    assert words("relational", "porter") == ["relat"]


def test_wrong_settings_are_usage_errors():
    with pytest.raises(UsageError, match=r"unknown stemmer 'englsh'.*'english'"):
        Settings.of("englsh", None)
    with pytest.raises(UsageError, match="stop words 'french' are not known"):
        Settings.of(None, "french")
    assert Settings.of(None, "Der die das") == Settings.of("none", ["der", "die", "das"])


def slowly(text):
    """ASCII text by a regular expression, the definition in one line."""
    found = re.findall(r"(?:[a-z0-9_]|(?<=[a-z])'(?=[a-z])|(?<=[0-9])[.,](?=[0-9]))+", text.lower())
    return [w[:-2] if w.endswith("'s") else w for w in found if w.strip("_")]


@given(st.lists(st.text(st.sampled_from("ab Z09._',-'s\n"), max_size=30), max_size=5))
@settings(max_examples=200, deadline=None)
def test_ascii_is_a_regular_expression(texts):
    analyser = Analyser(PLAIN)
    terms, ptr = analyser(texts)
    got = [[analyser.terms[t] for t in terms[a:b]] for a, b in pairwise(ptr)]
    assert got == [slowly(t) for t in texts]


@given(st.text(max_size=40))
@settings(max_examples=500, deadline=None)
def test_any_text_gives_folded_words(text):
    for word in words(text):
        assert word and word == unicodedata.normalize("NFKC", word) and "\x00" not in word
        assert any(c.isalnum() for c in word)
        assert not any(unicodedata.category(c) in ("Zs", "Cc", "Cf", "Pd", "Sm") for c in word)


@given(st.text(max_size=30))
@settings(max_examples=100, deadline=None)
def test_normal_forms_are_the_same_words(text):
    assert words(unicodedata.normalize("NFD", text)) == words(unicodedata.normalize("NFC", text))


@given(st.lists(st.text(max_size=12), max_size=12), st.integers(1, 40))
@settings(max_examples=100, deadline=None)
def test_pieces_change_nothing(texts, size):
    one, many = Analyser(PLAIN), Analyser(PLAIN)
    whole, ptr = one(texts)
    before, analyse.PIECE = analyse.PIECE, size
    try:
        parts, other = many(texts)
    finally:
        analyse.PIECE = before
    assert np.array_equal(ptr, other) and [one.terms[t] for t in whole] == [many.terms[t] for t in parts]


def test_the_table_grows_and_keeps_its_numbers():
    analyser = Analyser(PLAIN)
    first, _ = analyser(["alpha beta"])
    many = [f"w{i}" for i in range(50_000)]
    terms, ptr = analyser([" ".join(many)])
    assert [analyser.terms[t] for t in terms] == many and ptr.tolist() == [0, 50_000]
    again, _ = analyser(["beta alpha w49999"])
    assert again.tolist() == [first[1], first[0], terms[-1]] and len(analyser.terms) == 50_002
