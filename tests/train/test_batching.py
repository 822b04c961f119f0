"""Segments and who stands with whom: every segment once an epoch, neighbours together, the same whatever happened before."""

import numpy as np
import pytest

from ralm.errors import UsageError
from ralm.lm.gpt import BPE
from ralm.train.batching import Segments, Text, consecutive, copied, neighbours, rare_words, related, scattered

TOPICS = {"sea": "reef tide gull anchor harbour mast keel", "cell": "mitochondria enzyme nucleus membrane protein ribosome lipid",
          "war": "siege cannon truce rampart cavalry sortie bastion", "star": "comet orbit nebula quasar parallax corona apogee"}


@pytest.fixture(scope="module")
def tokenizer():
    pytest.importorskip("tokenizers")
    from ralm.train.tokenizer import train_bpe

    return train_bpe([" ".join(TOPICS.values()) + " the of and in it was"] * 3, 300)


@pytest.fixture(scope="module")
def segments(tokenizer):
    """Sixty pieces of four topics, mixed: 15 of each, the topic's words drawn at random among common ones."""
    rng = np.random.default_rng(0)
    assert isinstance(tokenizer, BPE)
    rows = []
    for n in range(60):
        words = [rng.choice(list(TOPICS.values())[n % 4].split(), 6), rng.choice("the of and in it was".split(), 12)]
        row = tokenizer.encode(" ".join(np.concatenate(words).tolist()))
        rows.append(row[:24] + [0] * max(0, 24 - len(row)))
    ids = np.array(rows, np.int32).reshape(-1)
    return Segments(Text(ids, np.array([0, len(ids)])), 24, 0)


def shared(texts, groups):
    """Rare words that the segments of a group have in common, by pair."""
    rare = [set(w) for w in rare_words(texts, 20)]
    common = {w for w in set().union(*rare) if sum(w in r for r in rare) > 20}
    pairs = [len((rare[a] & rare[b]) - common) for g in groups for i, a in enumerate(g) for b in g[:i]]
    return sum(pairs) / len(pairs)


def test_grouped_segments_share_more_rare_words(segments, tokenizer, tmp_path):
    near = neighbours(segments, tokenizer, 12, tmp_path)
    assert near.shape == (60, 12) and not (near == np.arange(60)[:, None]).any()
    topic = near % 4 == np.arange(60)[:, None] % 4
    assert topic[:, :4].mean() > 0.9  # BM25 finds the topic
    texts = [tokenizer.decode(r) for r in segments.tokens_NL.tolist()]
    by_bm25, at_random = shared(texts, related(near, 5, 0, 0)), shared(texts, scattered(60, 5, 0, 0))
    assert by_bm25 > 2 * at_random
    follows = [len(set(g % 4)) for g in related(near, 5, 0, 0)]
    assert np.mean(follows) < 1.8 < np.mean([len(set(g % 4)) for g in scattered(60, 5, 0, 0)])
    assert next(tmp_path.glob("neighbours-*.npy")).is_file()
    np.testing.assert_array_equal(neighbours(segments, tokenizer, 12, tmp_path), near)


def chained(count, size, seed, epoch):
    return related(np.arange(1, count + 1)[:, None] % count, size, seed, epoch)


@pytest.mark.parametrize("how", [chained, scattered, consecutive])
@pytest.mark.parametrize(("count", "size"), [(60, 5), (61, 5), (7, 7)])
def test_an_epoch_is_every_segment_once(how, count, size):
    groups = how(count, size, 3, 1)
    assert groups.shape == (count // size, size) and len(np.unique(groups)) == groups.size
    np.testing.assert_array_equal(groups, how(count, size, 3, 1))
    if count > size:
        assert not np.array_equal(groups, how(count, size, 3, 2)) and not np.array_equal(groups, how(count, size, 4, 1))
    if how is not scattered:
        steps = np.diff(groups, axis=1) % count
        assert (steps == 1).mean() > 0.9  # each is followed by its neighbour


def test_consecutive_is_consecutive():
    assert (np.diff(consecutive(61, 4, 0, 0), axis=1) == 1).all()
    assert len({int(consecutive(61, 4, 0, e).min()) for e in range(20)}) > 1  # the left-over one is not always the same


def test_rows_begin_as_a_window_does(segments):
    rows = segments.rows([3, 1])
    assert rows.shape == (2, 25) and (rows[:, 0] == 0).all() and rows.dtype == np.int64
    np.testing.assert_array_equal(rows[:, 1:], segments.tokens_NL[[3, 1]])
    with pytest.raises(UsageError, match="shorter segments"):
        Segments(Text(np.zeros(30, np.int32), np.array([0, 30])), 24, 0)


def test_copies_are_left_out():
    """A stream whose second half repeats most of its first, at another phase of the grid."""
    rng = np.random.default_rng(0)
    first, own = rng.integers(1, 5000, 96), rng.integers(1, 5000, 48)
    ids = np.concatenate([first, own[:5], first[:70], own[5:]]).astype(np.int32)
    flags = copied(ids)
    want = [any(np.array_equal(ids[i:i + 8], ids[j:j + 8]) for j in range(i)) for i in range(len(ids) - 7)]
    assert flags[:len(want)].tolist() == want and not flags[len(want):].any()
    text = Text(ids, np.array([0, len(ids)]))
    kept = Segments(text, 24, 0, copies=0.5).tokens_NL
    assert len(Segments(text, 24, 0)) == 8 and len(kept) == 5
    np.testing.assert_array_equal(kept[:4].reshape(-1), first)
    assert not copied(ids[:3]).any()


def test_text_is_read_once(tmp_path, tokenizer):
    zstandard = pytest.importorskip("zstandard")
    import json

    path = tmp_path / "a.jsonl.zst"
    lines = [json.dumps({"file": f"{n}", "text": f"Title: Reef_{n}\n\nthe reef, {n} tide"}) for n in range(9)]
    path.write_bytes(zstandard.compress("\n".join(lines).encode()))
    text = Text.read([path], tokenizer, 0, tmp_path)
    assert len(text.starts) == 10 and text.starts[-1] == len(text.ids) and (text.ids[text.starts[1:] - 1] == 0).all()
    assert tokenizer.decode(text.ids[:text.starts[1] - 1].tolist()) == "Reef 0\n\nthe reef, 0 tide"
    some = Text.read([path], tokenizer, 0, tmp_path, most=3, form="wikitext")
    assert len(some.starts) == 4 and " = Reef 4 = " in tokenizer.decode(some.ids[some.starts[1]:some.starts[2] - 1].tolist())
    assert len(list(tmp_path.glob("text-*.npz"))) == 2
    path.touch()
    np.testing.assert_array_equal(Text.read([path], tokenizer, 0, tmp_path).ids, text.ids)
    with pytest.raises(UsageError, match="plain or wikitext"):
        Text.read([path], tokenizer, 0, tmp_path, form="x")
