"""The store against a plain dict: random adds, updates, removals, compactions, every version remembered."""

import random

import numpy as np
import pytest

from ralm.errors import UsageError
from ralm.types import Document
from ralm.what import tables
from ralm.what.datastore import Datastore


def corpus(n: int = 6) -> list[Document]:
    return [Document(f"d{i}", f"words of document {i} " * (i + 1), title=f"T{i}", licence="cc0" if i % 2 else "by",
                     metadata={"year": 1990 + i}) for i in range(n)]


@pytest.fixture
def store(tmp_path):
    return Datastore.build(tmp_path / "kb.ralm", corpus(), split="words:5")


def test_example(tmp_path):
    store = Datastore.build(tmp_path / "kb.ralm", [Document("a", "text one", metadata={"year": 1999})])
    held = store.version
    store.add([Document("b", "text two")])
    store.remove(["a"])
    assert [d.id for d in store.documents()] == ["b"]
    assert [d.id for d in Datastore.open(tmp_path / "kb.ralm", version=held).documents()] == ["a"]


def test_large_files_are_not_rewritten(tmp_path, monkeypatch):
    """A table of long texts, whose files never have many rows: merged once, a file stays as it is."""
    monkeypatch.setattr(tables, "FRAGMENTS", 3)
    monkeypatch.setattr(tables, "FILE", 20_000)
    rng, store = random.Random(0), Datastore.create(tmp_path / "kb.ralm")

    def files():
        return [f.data_files()[0].path for f in tables.table(store.path, "texts").get_fragments()]

    for i in range(40):
        store.add([Document(f"{i}/{j}", "".join(rng.choices("abcdefghij klmnop", k=2000))) for j in range(4)])
        if i == 15:
            before = files()
    kept = [name for name in before if name in files()]
    assert len(kept) >= len(before) - 5 and len(kept) > 2 and len(files()) < 30
    assert [d.id for d in store.documents()] == [f"{i}/{j}" for i in range(40) for j in range(4)]
    sizes = [f.data_files()[0].file_size_bytes for f in tables.table(store.path, "texts").get_fragments()]
    assert sum(size > 9_000 for size in sizes) >= len(sizes) - 5


def test_chunks_are_spans_of_their_documents(store):
    ids = store.chunk_ids()
    assert ids.tolist() == list(range(store.n_chunks)) and store.n_chunks == store.chunk_rows
    asked = [int(ids[-1]), 0, 3, 3, 0]
    for id, chunk in zip(asked, store.chunks(asked)):
        document = store.document(chunk.document)
        assert chunk.id == id and chunk.text == document.text[chunk.start:chunk.end] and chunk.title == document.title
    assert store.document_ids(asked) == [c.document for c in store.chunks(asked)]
    assert store.chunks([]) == [] and store.document_ids([]) == []


def test_documents_come_back_as_they_were(store):
    assert list(store.documents()) == corpus()
    assert store.document("d3") == corpus()[3]
    assert [d.id for d in store.documents("year >= 1993 and licence = 'cc0'")] == ["d3", "d5"]


def test_filters_are_bitmaps_over_chunks(store):
    allowed = store.allow("year = 1991")
    assert {c.document for c in store.chunks(np.flatnonzero(allowed))} == {"d1"}
    assert not store.allow("year = 1991", exclude=["d1"]).any()
    assert store.allow(exclude=["d1", "nobody"]).sum() == store.n_chunks - allowed.sum()
    assert store.allow("year = 1991") is allowed and not allowed.flags.writeable


@pytest.mark.parametrize("where, says", [("yaer > 1", "Did you mean 'year'"), ("year >", "not understood"), ("year", "boolean"),
                                         ("year > 1; drop table x", "one condition"), ("'", "not understood"),
                                         ("year > '1990'", "year, which holds numbers, with text; .* without quotes"),
                                         ("licence > 3", r"which holds text, with numbers; write cast\(licence as double\)"),
                                         ("year = true", "compare like with like")])
def test_wrong_filters_are_one_line(store, where, says):
    for ask in (store.allow, lambda w: list(store.documents(w)), lambda w: store.remove(where=w)):
        with pytest.raises(UsageError, match=says) as e:
            ask(where)
        assert "\n" not in str(e.value)
    assert len(store) == 6


def test_same_again_is_nothing(store):
    version = store.version
    added = store.add(corpus())
    assert (added.documents, added.updated, added.unchanged, added.chunks) == (0, 0, 6, 0) and store.version == version


def test_update_replaces_in_one_version(store):
    before, version = store.chunk_rows, store.version
    added = store.add([Document("d1", "quite other words"), Document("d2", "first"), Document("d2", "last one wins")])
    assert (added.documents, added.updated, added.chunks) == (0, 2, 2) and store.version == version + 1
    assert store.document("d2").text == "last one wins" and len(store) == 6
    assert [c.document for c in store.chunks(range(before, before + 2))] == ["d1", "d2"]
    old = Datastore.open(store.path, version=version)
    assert list(old.documents()) == corpus()
    assert [c.text for c in old.chunks(old.chunk_ids())] == [c.text for c in store.chunks(old.chunk_ids())]


def test_remove_is_all_or_nothing(store):
    with pytest.raises(UsageError, match="'no', 'neither'"):
        store.remove(["d1", "no", "neither"])
    assert len(store) == 6
    with pytest.raises(UsageError, match="nothing to remove"):
        store.remove()
    reader = Datastore.open(store.path)
    removed = store.remove(["d1"], where="year > 1994")
    assert removed.documents == 2 and sorted(d.id for d in store.documents()) == ["d0", "d2", "d3", "d4"]
    assert len(reader) == 6 and reader.alive.all()
    assert len(reader.refresh()) == 4


def test_ids_whose_hashes_collide_are_told_apart(tmp_path, monkeypatch):
    """The look-up key is 8 bytes of a hash; here it is the same for all."""
    for module in ("ralm.what.view", "ralm.what.write"):
        monkeypatch.setattr(f"{module}.key_of", lambda id: 7)
    store = Datastore.build(tmp_path / "kb.ralm", corpus(), split="words:5")
    added = store.add([Document("new", "text"), corpus()[4], Document("d2", "other")])
    assert (added.documents, added.updated, added.unchanged) == (1, 1, 1)
    assert store.document("d4") == corpus()[4] and not store.has("nobody")
    assert set(store.document_ids(np.flatnonzero(store.allow(exclude=["nobody", "d4"])))) == {"d0", "d1", "d2", "d3", "d5", "new"}
    assert store.remove(["d3"]).documents == 1 and [d.id for d in store.documents()] == ["d0", "d1", "d4", "d5", "new", "d2"]


def test_the_same_content_from_another_path_is_unchanged(tmp_path):
    store = Datastore.build(tmp_path / "kb", [Document("a", "one two", source="x/a.txt")])
    added = store.add([Document("a", "one two", source="../x/a.txt")])
    assert added.unchanged == 1 and added.updated == 0 and store.document("a").source == "x/a.txt"
