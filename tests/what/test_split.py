import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ralm.errors import StoreError, UsageError
from ralm.lm.bundled import PACKAGE
from ralm.what.split import split

WORDS = st.sampled_from(["a", "word", "# Head\n", "- item\n", "\n\n", "```\ncode\n```", "über", "東京都", "🙂",
                         "\x1c", "\x85", "\u3000", "x\x00y"])
TEXT = st.text(max_size=120) | st.lists(WORDS, max_size=40).map(" ".join) | st.lists(WORDS, max_size=40).map("".join)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """A byte-level BPE trained on the spot, as the bundled one is."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.train_from_iterator(["the quick brown fox", "word über 東京都"] * 9, tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    file = tmp_path_factory.mktemp("tok") / "tokenizer.json"
    made.save(str(file))
    return file


def check(splitter, text: str, overlap: bool = False) -> list[tuple[int, int]]:
    """What holds for every splitter and every text."""
    spans = splitter(text)
    covered = [0] * len(text)
    for (start, end), (after, _) in zip(spans, spans[1:] + [(len(text), 0)]):
        assert 0 <= start < end <= len(text) and start < after and (overlap or end <= after)
        assert not text[start].isspace() and not text[end - 1].isspace()
        for i in range(start, end):
            covered[i] += 1
    for c, n in zip(text, covered):
        assert c.isspace() or (n >= 1 if overlap else n == 1)
    return spans


@given(TEXT, st.integers(1, 7))
@example(" a ", 1)
def test_words(text, n):
    spans = check(split(f"words:{n}"), text)
    counts = [len(text[a:b].split()) for a, b in spans]
    assert all(c == n for c in counts[:-1]) and all(1 <= c <= n for c in counts)
    assert [w for a, b in spans for w in text[a:b].split()] == text.split()


@given(TEXT, st.integers(1, 6), st.data())
def test_words_overlap(text, n, data):
    overlap = data.draw(st.integers(0, n - 1))
    words = text.split()
    spans = check(split(f"words:{n},overlap={overlap}"), text, overlap=True)
    blocks = [text[a:b].split() for a, b in spans]
    assert blocks == [words[i:i + n] for i in range(0, max(len(words) - overlap, min(1, len(words))), n - overlap)]


@given(st.text(alphabet="ab \t\n\x1c\x85\u2003\u200b\ud800é", max_size=60), st.integers(1, 12), st.data())
@settings(max_examples=300, deadline=None)
def test_words_are_what_a_match_a_word_gives(text, n, data):
    overlap = data.draw(st.integers(0, n - 1))
    words = [m.span() for m in re.finditer(r"\S+", text)]
    blocks, first = [], 0
    while first < len(words) and (first == 0 or first + overlap < len(words)):
        blocks.append((words[first][0], words[min(first + n, len(words)) - 1][1]))
        first += n - overlap
    assert split(f"words:{n},overlap={overlap}")(text) == blocks


def test_more_words_than_can_be_counted():
    assert split(f"words:{10**12}")("one two") == split(f"words:{10**12},overlap={10**11}")("one two") == [(0, 7)]


def test_dpr_passages():
    """DPR, arXiv:2004.04906, section 4.1: disjoint blocks of 100 words."""
    text = " ".join(f"w{i}" for i in range(250))
    assert [text[a:b].split()[0] for a, b in split("words:100")(text)] == ["w0", "w100", "w200"]


@settings(deadline=None)
@given(TEXT, st.integers(1, 7))
def test_tokens(tokenizer, text, n):
    from tokenizers import Tokenizer

    spans = check(split(f"tokens:{n},tokenizer={tokenizer}"), text)
    if all(ord(c) < 128 for c in text):  # one character is one token at least; blocks end at token borders
        tokens = len(Tokenizer.from_file(str(tokenizer)).encode(text).offsets)
        assert len(spans) <= -(-tokens // n)
    check(split(f"tokens:{n + 1},overlap={n},tokenizer={tokenizer}"), text, overlap=True)


def test_tokens_are_counted_in_tokens(tokenizer):
    from tokenizers import Tokenizer

    text = "the quick brown fox and a word " * 20
    spans = split(f"tokens:8,tokenizer={tokenizer}")(text)
    sizes = [len(Tokenizer.from_file(str(tokenizer)).encode(" " + text[a:b]).ids) for a, b in spans[1:-1]]
    assert min(sizes) >= 7 and max(sizes) <= 10  # trimming the space at either end may cost or add a token


def test_tokens_of_the_bundled_model():
    if not (PACKAGE.parent / "checkpoints" / "base" / "tokenizer.json").is_file():
        with pytest.raises(StoreError, match="base"):
            split("tokens:64")("text")
        pytest.skip("the bundled model is not in this checkout")
    check(split("tokens:64"), "Retrieval is a way of remembering. " * 60)


@settings(deadline=None)
@given(TEXT, st.integers(5, 60))
def test_markdown(text, n):
    pytest.importorskip("semantic_text_splitter")
    for a, b in check(split(f"markdown:{n}"), text):
        assert b - a <= n


def test_markdown_cuts_at_headings():
    text = "# One\n\nSome words here.\n\n# Two\n\nOther words there."
    assert [text[a:b].splitlines()[0] for a, b in split("markdown:30")(text)] == ["# One", "# Two"]


@given(TEXT)
def test_none(text):
    assert [text[a:b] for a, b in check(split("none"), text)] == ([text.strip()] if text.strip() else [])


@pytest.mark.parametrize("spec, says", [("wrods:100", "Did you mean 'words'"), ("words:0", "at least 1"), ("words:x", "whole"),
                                        ("words:10,overlap=10", "below 10"), ("words:10,stride=2", "unknown option"),
                                        ("tokens:-1", "at least 1"), ("markdown:1.5", "whole"), ("none:3", "takes at most 0")])
def test_wrong_specs(spec, says):
    with pytest.raises(UsageError, match=says):
        split(spec)


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(StoreError, match="not there"):
        split(f"tokens:8,tokenizer={tmp_path}/no.json")("text")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(StoreError, match="no tokenizers JSON"):
        split(f"tokens:8,tokenizer={tmp_path}/bad.json")("text")


@pytest.mark.parametrize("spec", ["words:2", "markdown:20", "none"])
def test_lone_surrogates_count_as_one_character(spec):
    check(split(spec), "a \ud800b c \udfff d")
