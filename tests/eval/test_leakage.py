"""Longest common runs against brute force, bytes of tokens, and what is left of a result where copied chunks are left out."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ralm.errors import UsageError
from ralm.eval import leakage
from ralm.types import Document

TEXT = "Senjō no Valkyria 3 — 戦場のヴァルキュリア, naïve 🙂🙂 and a tab\t.\r\n\x00 <|endoftext|> � end"
rows = st.lists(st.integers(0, 3), max_size=9)


def brute(a, b):
    """The longest run of a that stands somewhere in b."""
    spans = [a[i:j] for i in range(len(a)) for j in range(i + 1, len(a) + 1)]
    return max((len(s) for s in spans for o in range(len(b) - len(s) + 1) if b[o:o + len(s)] == s), default=0)


def padded(lists, size, fill=-1):
    out = np.full((len(lists), size), fill, np.int64)
    for row, values in zip(out, lists):
        row[:len(values)] = values
    return out


@given(st.lists(st.tuples(rows, rows), min_size=1, max_size=6))
def test_longest_run_is_that_of_brute_force(pairs):
    """Whatever stands behind the end of a row: -1 on one side, anything masked on the other."""
    a, b = padded([a for a, _ in pairs], 9), padded([b for _, b in pairs], 9, fill=1)
    there = np.arange(9) < np.array([[len(b)] for _, b in pairs])
    run, found = leakage.longest_common(a, b, there)
    assert run.tolist() == [brute(a, b) for a, b in pairs]
    assert found.tolist() == [[t in b for t in a] + [False] * (9 - len(a)) for a, b in pairs]


def test_blocks_change_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 4, (70, 16)), rng.integers(0, 4, (70, 32))
    whole = leakage.longest_common(a, b)
    monkeypatch.setattr(leakage, "BLOCK", 8)
    assert all(np.array_equal(x, y) for x, y in zip(whole, leakage.longest_common(a, b)))
    assert whole[0].tolist() == [brute(x.tolist(), y.tolist()) for x, y in zip(a, b)]


def test_overlap_is_the_best_neighbours_and_tokens_are_of_any():
    near = np.array([[[1, 2, 9, 9], [3, 4, 5, 9]], [[7, 7, 7, 7], [8, 8, 8, 8]]])
    there = np.ones(near.shape, bool)
    there[1, 1] = False
    found = leakage.overlap([[1, 2, 3, 4], [8, 7]], near, there, m=4)
    assert found.run.tolist() == [2, 1] and found.common.tolist() == [4, 1] and found.ratio.tolist() == [0.5, 0.25]
    assert found.statistics() == {"mean_run": 0.375, "copied": 0.0, "common_tokens": 5 / 6, "chunks": 2}
    assert leakage.overlap([[9, 3, 4, 5], [8, 7]], near, there, m=4).statistics()["copied"] == 0.5
    nobody = leakage.overlap([[1, 2]], near[:1, :0], there[:1, :0], m=4)
    assert nobody.run.tolist() == [0] and nobody.statistics()["common_tokens"] == 0
    with pytest.raises(UsageError, match="more than m=4"):
        leakage.overlap([[1] * 5, [1]], near, there, m=4)
    with pytest.raises(UsageError, match="neighbours of 2"):
        leakage.overlap([[1]], near, there, m=4)


def test_what_is_left_are_sums_over_the_chunks_that_are_not_copied():
    nats, size, ratio = np.array([8.0, 2.0, 1.0]) * math.log(2), [4, 4, 2], [0.125, 0.5, 1.0]
    curve = leakage.filtered(nats, size, ratio)
    assert [p["alpha"] for p in curve] == list(leakage.ALPHAS)
    by = {p["alpha"]: p for p in curve}
    assert by[0.125] == {"alpha": 0.125, "bits_per_byte": pytest.approx(2.0), "bytes": 0.4, "chunks": 1}
    assert by[0.5]["bits_per_byte"] == pytest.approx(10 / 8) and by[1.0]["bits_per_byte"] == pytest.approx(11 / 10)
    assert by[1.0]["bytes"] == 1 and by[0.875]["chunks"] == 2
    assert math.isnan(leakage.filtered(nats, size, [1, 1, 1])[0]["bits_per_byte"])
    assert all(math.isnan(p["bits_per_byte"]) for p in leakage.filtered([], [], []))
    with pytest.raises(UsageError, match="same text"):
        leakage.filtered(nats, size, ratio[:2])


def bpe(words):
    """A byte-level BPE that learnt nothing: characters of several bytes are several tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("torch")
    from ralm.lm.gpt import BPE

    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=256 + words, show_progress=False, special_tokens=["<|endoftext|>"],
                                             initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    inner.train_from_iterator([TEXT] * 3, trainer)
    return BPE(inner)


@pytest.mark.parametrize("words", [1, 40])
def test_bytes_of_tokens_are_exact_in_byte_level_bpe(words):
    tokenizer, raw = bpe(words), TEXT.encode()
    ids, size = leakage.token_bytes(tokenizer, TEXT)
    assert ids == tokenizer.encode(TEXT) and size.sum() == len(raw) and size.min() > 0
    if words == 1:
        assert size.tolist() == [1] * len(raw)  # every byte is a token: of those of one character, each has its own
    bounds = np.cumsum(size)
    for n in range(1, len(ids)):  # a prefix that ends with a character is written by exactly these bytes
        said = tokenizer.decode(ids[:n])
        if not said.endswith("�"):
            assert raw[:bounds[n - 1]] == said.encode()


class Letters:
    """A token is a character."""

    def encode(self, text):
        return [ord(c) for c in text]

    def decode(self, ids):
        return "".join(map(chr, ids))


def test_bytes_of_tokens_add_up_where_pieces_spell_characters(lm):
    """A tokenizer that does not tell its pieces, and one whose pieces are no bytes: by characters."""
    ids, size = leakage.token_bytes(Letters(), "naïve 🙂")
    assert size.tolist() == [1, 1, 2, 1, 1, 1, 4]
    for text in ("", "plain words of a text", TEXT):
        ids, size = leakage.token_bytes(lm.tokenizer, text)
        assert len(ids) == len(size) and size.sum() == len(text.encode())


def test_own_documents_are_no_neighbours(lm, tmp_path, monkeypatch):
    """A text that is stored is copied whole, unless it is excluded or filtered away."""
    from ralm.what.datastore import Datastore
    from ralm.what.neighbours import NeighbourStore

    lamp, snow = "The lamp of the tower burns oil at night.", "Snow lies on the mountain in winter and melts in spring."
    kb = Datastore.build(tmp_path / "kb", [Document("a", lamp, metadata={"n": 1}), Document("b", snow, metadata={"n": 2})])
    near = NeighbourStore.build(kb, lm, m=4)
    texts = [Document("x", lamp), Document("y", snow), Document("z", "")]
    whole = leakage.leaks(near, lm.tokenizer, texts, {})
    ids = [lm.tokenizer.encode(t) for t in (lamp, snow)]
    own = [min(4, len(i) - n) for i in ids for n in range(0, len(i), 4)]
    first = -(-len(ids[0]) // 4)
    assert whole.overlap.tokens.tolist() == own == whole.overlap.run.tolist() == whole.overlap.common.tolist()
    assert whole.bytes.sum() == len(lamp) + len(snow)
    apart = leakage.leaks(near, lm.tokenizer, texts, {"x": ["a"]})
    assert apart.overlap.run[:first].max() < 4 and apart.overlap.run[first:].tolist() == own[first:]
    assert leakage.leaks(near, lm.tokenizer, texts, {}, where="n = 2").overlap.run.tolist() == apart.overlap.run.tolist()
    nats = np.full(len(own), math.log(2))
    assert apart.curve(nats)[-1]["bits_per_byte"] == pytest.approx(len(own) / apart.bytes.sum())
    assert apart.curve(nats)[-2]["chunks"] == sum(r < 4 for r in apart.overlap.run)
    monkeypatch.setattr(leakage, "ASKED", 1)
    assert leakage.leaks(near, lm.tokenizer, texts, {"x": ["a"]}).overlap.run.tolist() == apart.overlap.run.tolist()
    assert leakage.leaks(near, lm.tokenizer, texts[2:], {}).overlap.statistics()["chunks"] == 0
