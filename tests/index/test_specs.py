"""Retrievers by spec string, and what stands under index/."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from ralm import index, progress
from ralm.errors import FingerprintError, UsageError
from ralm.index.sparse import BM25, TFIDF
from ralm.types import Document, Retriever
from ralm.what.datastore import Datastore

_spec = importlib.util.spec_from_file_location("brute", Path(__file__).parent / "brute.py")
brute = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(brute)

TEXTS = ["the cat sat on the mat", "dogs chase cats", "a dog and a dog", "running in Zürich"]


@pytest.fixture
def store(tmp_path):
    return brute.make(tmp_path / "kb.ralm", TEXTS)


def test_a_spec_is_a_constructor(store):
    found = index.retriever("bm25:form=atire,k1=1.2,b=0.5,stemmer=none,stop=none", store)
    assert isinstance(found, BM25) and isinstance(found, Retriever) and repr(found) == "BM25(atire, k1=1.2, b=0.5, delta=0.0)"
    assert found.settings.stemmer is None and found.settings.stop == ()
    want = BM25(store, form="atire", k1=1.2, b=0.5).search(["dog cats"], 4)
    assert np.array_equal(found.search(["dog cats"], 4).scores, want.scores)
    assert repr(index.retriever("bm25:bm25+", store)) == "BM25(bm25+, k1=1.5, b=0.75, delta=0.5)"
    assert isinstance(index.retriever("tfidf", store), TFIDF)


@pytest.mark.parametrize("spec, message", [
    ("bm52", "unknown retriever 'bm52'. Did you mean 'bm25'"), ("bm25:k2=1", "unknown option of retriever 'bm25' 'k2'"),
    ("bm25:form=lucin", "unknown form of BM25 'lucin'"), ("auto:k1=1", "auto takes no options"), ("bm25:k1=-1", "k1 = -1"),
    ("tfidf:k1=1", "unknown option of retriever 'tfidf' 'k1'"), ("bm25:stemmer=klingon", "unknown stemmer 'klingon'")])
def test_wrong_specs(store, spec, message):
    with pytest.raises(UsageError) as e:
        index.retriever(spec, store)
    assert message in str(e.value) and index.built(store) == []


def test_the_default_is_what_is_built(store):
    said = []

    class Sink(progress.Silent):
        def note(self, text):
            said.append(text)

    progress.use(Sink())
    try:
        assert isinstance(index.retriever("", store), BM25) and isinstance(index.retriever("auto", store), BM25)
    finally:
        progress.use(progress.Silent())
    assert said == ["retriever: bm25"] * 2 and index.built(store) == ["bm25"]


def test_update_extends_what_is_there(store):
    index.update(store)
    assert index.built(store) == []  # nothing is built that was not
    index.build("tfidf", store)
    store.add([Document("new", "an emu")])
    index.update(store)
    with store.lock():  # nothing is left to do
        assert BM25(Datastore.open(store.path)).search(["emu"], 1).ids.tolist() == [[4]]


def test_rebuilding_changes_settings(store):
    index.build("bm25", store)
    with pytest.raises(FingerprintError, match=r"--rebuild"):
        index.build("bm25:stemmer=porter", store)
    index.build("bm25:stemmer=porter", store, rebuild=True)
    assert BM25(store).settings.stemmer == "porter"


def test_a_rebuild_killed_while_it_deletes_leaves_nothing_half_there(store, monkeypatch):
    from ralm.app.doctor import examine

    def killed(path, **_):
        next(f for f in Path(path).rglob("*") if f.is_file() and f.name != "manifest.json").unlink()
        raise KeyboardInterrupt

    for spec in ("bm25", "dense:static"):
        index.build(spec, store)
        with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
            m.setattr("shutil.rmtree", killed)
            index.build(spec, store, rebuild=True)
        problems = []
        examine(store.path, problems)
        assert not problems, problems
    assert index.built(store) == []
    index.build("bm25", store)
    index.compact(store)
    assert [p.name for p in (store.path / "index").iterdir()] == ["bm25"]


def test_compact_follows_a_purge(store):
    index.build("bm25", store)
    store.remove(["d1"])
    store.compact(purge=True)
    index.compact(store)
    assert not [f for f in (store.path / "index").rglob("*") if f.is_file() and b"chase" in f.read_bytes()]
    assert index.retriever("bm25", store).search(["cat"], 2).ids.tolist() == [[0, -1]]


def test_a_union_has_what_every_part_has(store, tmp_path):
    other = brute.make(tmp_path / "other.ralm", ["an emu"])
    index.build("bm25:stemmer=porter", store)
    both = Datastore.union(other, store)
    assert index.built(both) == []
    found = index.retriever("bm25", both)  # the part without an index gets one like the other's
    assert index.built(both) == ["bm25"] and BM25(other).settings.stemmer == "porter"
    assert found.search(["emu", "dogs"], 1).ids.tolist() == [[0], [3]]
