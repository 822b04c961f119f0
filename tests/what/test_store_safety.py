"""What must not happen: a lost document, a traceback for a user's mistake, removed text that is still there."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ralm import progress
from ralm.errors import RalmError, StoreError, UsageError
from ralm.types import Document
from ralm.what import tables
from ralm.what.datastore import Datastore


def corpus(n: int = 6) -> list[Document]:
    return [Document(f"d{i}", f"secret{i}zz words of document {i} " * 3, metadata={"year": 1990 + i}) for i in range(n)]


@pytest.fixture
def store(tmp_path):
    return Datastore.build(tmp_path / "kb", corpus(), split="words:5")


@pytest.fixture
def notes(monkeypatch):
    class Sink(progress.Silent):
        def note(self, text):
            said.append(text)

    said = []
    monkeypatch.setattr(progress, "_sink", Sink())
    return said


# ---- making and opening ----------------------------------------------------------------------------------------------


def test_create_refuses_what_is_there(tmp_path, store):
    with pytest.raises(StoreError, match="exists already"):
        Datastore.create(store.path)
    (tmp_path / "empty").mkdir()
    assert len(Datastore.create(tmp_path / "empty")) == 0
    with pytest.raises(UsageError, match="Did you mean 'words'"):
        Datastore.create(tmp_path / "new", split="word:100")
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".*"))


def test_open_says_what_is_wrong(tmp_path, store):
    for path, says in ((tmp_path / "nowhere", "does not exist"), (tmp_path, "is no datastore")):
        with pytest.raises(StoreError, match=says):
            Datastore.open(path)
    for version in (0, 99, -1):
        with pytest.raises(StoreError, match="it has versions 1 to 2"):
            Datastore.open(store.path, version=version)
    with pytest.raises(StoreError, match="split by 'words:5', 'none' is asked for"):
        Datastore.build(store.path, [], split="none")
    with pytest.raises(StoreError, match="the past cannot be changed"):
        Datastore.open(store.path, version=1).add([])
    with pytest.raises(StoreError, match="no document 'nobody'"):
        store.document("nobody")
    with pytest.raises(StoreError, match="no chunk 999"):
        store.chunks([0, 999])


@pytest.mark.parametrize("name", ["documents", "texts", "chunks"])
@pytest.mark.parametrize("harm", ["folder", "versions", "data", "short"])
def test_damage_names_the_table(store, name, harm):
    table = store.path / f"{name}.lance"
    if harm == "folder":
        shutil.rmtree(table)
    elif harm in ("versions", "data"):
        shutil.rmtree(table / ("_versions" if harm == "versions" else "data"))
    else:
        for file in (table / "data").iterdir():
            file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(StoreError, match=f"{name}.lance") as e:
        damaged = Datastore.open(store.path)
        damaged.chunks(damaged.chunk_ids())
        list(damaged.documents())
    assert "\n" not in str(e.value) and "build" in str(e.value)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '{"format": 99, "id": "x", "split": "none", "next_rev": 0, '
                                  '"next_chunk": 0, "floor": 1}'])
def test_damaged_store_json(store, text):
    (store.path / "store.json").write_text(text)
    with pytest.raises(StoreError, match=r"damaged|newer ralm"):
        Datastore.open(store.path)


def test_changed_bytes_are_found(store):
    assert store.verify() == []
    (file,) = (store.path / "texts.lance" / "data").iterdir()
    raw = file.read_bytes()
    assert raw.count(b"secret3zz") == 3
    file.write_bytes(raw.replace(b"secret3zz", b"secret3zy"))
    with pytest.raises(StoreError, match=f"{file.name} is not what was written .* restore it from a copy"):
        Datastore.open(store.path)
    (store.path / "sums.txt").unlink()
    assert Datastore.open(store.path).verify() == ["d3"]


def test_reading_changes_no_file(store):
    def state():
        return {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in store.path.rglob("*")}

    store.remove(["d0"])
    (store.path / "write.lock").unlink()
    before = state()
    for folder in [p for p in store.path.rglob("*") if p.is_dir()] + [store.path]:
        folder.chmod(0o555)
    try:
        reader = Datastore.open(store.path)
        assert len(reader) == 5 and len(reader.chunks(reader.chunk_ids())) == reader.n_chunks
        assert reader.allow("year > 1992").any() and reader.history() and Datastore.open(store.path, version=2).document("d0")
        assert state() == before
        if os.geteuid() != 0:  # root writes where it likes
            with pytest.raises(StoreError, match="it can be read, not changed"):
                reader.add(corpus(7))
    finally:
        for folder in [store.path] + [p for p in store.path.rglob("*") if p.is_dir()]:
            folder.chmod(0o755)


# ---- writers ---------------------------------------------------------------------------------------------------------


def test_one_writer_at_a_time(store):
    other = Datastore.open(store.path)
    with store.lock(), store.lock():  # nests
        for change in (lambda: other.add(corpus()), lambda: other.remove(["d1"]), other.compact):
            with pytest.raises(StoreError, match=f"process {os.getpid()} is writing"):
                change()
        assert len(other.chunks(other.chunk_ids())) == other.n_chunks  # readers do not care
        store.remove(["d1"])
    assert other.remove(["d2"]).documents == 1 and len(other) == 4


def test_the_lock_dies_with_its_holder(store):
    code = ("import sys, time; from ralm.what.lock import WriteLock; from pathlib import Path\n"
            "with WriteLock(Path(sys.argv[1])).hold():\n  print('held', flush=True); time.sleep(60)")
    child = subprocess.Popen([sys.executable, "-c", code, str(store.path / "write.lock")], stdout=subprocess.PIPE)
    try:
        assert child.stdout.readline() == b"held\n"
        with pytest.raises(StoreError, match=f"process {child.pid} is writing"):
            store.remove(["d1"])
    finally:
        child.kill()
        child.communicate()
    assert store.remove(["d1"]).documents == 1


def test_a_writer_builds_on_what_others_committed(store):
    other = Datastore.open(store.path)
    store.add([Document("new", "by the first")])
    other.add([Document("other", "by the second")])
    assert len(store) == 7 and len(other) == 8 == len(store.refresh())
    assert np.unique(other.chunk_ids()).size == other.n_chunks


def test_an_error_in_the_source_keeps_what_was_committed(tmp_path):
    def source():
        yield from corpus(5)
        raise ValueError("the disk went away")

    with pytest.raises(ValueError, match="went away"):
        Datastore.build(tmp_path / "kb", source(), split="words:5", batch=2)
    assert [d.id for d in Datastore.open(tmp_path / "kb").documents()] == ["d0", "d1", "d2", "d3"]


def test_a_failed_write_is_one_line(store, monkeypatch):
    import lance

    def full(*args, **kwargs):
        raise OSError("LanceError(IO): No space left on device, /home/somewhere/lance.rs:1")

    monkeypatch.setattr(lance, "write_dataset", full)
    with pytest.raises(StoreError, match=r"failed \(No space left on device\); what was committed before stays"):
        store.add([Document("x", "y")])
    assert len(store) == 6


def test_many_batches_make_few_files(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "FRAGMENTS", 5)
    monkeypatch.setattr(tables, "MANY", 8)
    documents = [Document(f"d{i}", f"text {i}") for i in range(30)]
    store = Datastore.build(tmp_path / "kb", documents, batch=2)
    assert list(store.documents()) == documents and store.chunk_ids().tolist() == list(range(30))
    assert all(len(tables.table(store.path, n).get_fragments()) <= 6 for n in tables.SCHEMAS)
    assert len(Datastore.open(store.path, version=4).documents().__next__().id) == 2
    assert [len(Datastore.open(store.path, version=v)) for v in (1, 2, 3)] == [0, 2, 4]


# ---- removing for good -----------------------------------------------------------------------------------------------


def holders(path: Path, word: bytes) -> list[Path]:
    return [f for f in path.rglob("*") if f.is_file() and word in f.read_bytes()]


def test_purge_leaves_no_byte(store):
    store.add([Document("d1", "harmless now", metadata={"was": "hidden1zz"})])
    store.add([Document("d1", "harmless still")])
    store.remove(["d2"])
    reader, ids, old_files = Datastore.open(store.path), store.chunk_ids(), set((store.path / "texts.lance" / "data").iterdir())
    assert holders(store.path, b"secret1zz") and holders(store.path, b"secret2zz") and holders(store.path, b"hidden1zz")
    store.compact()
    assert holders(store.path, b"secret2zz") and len(reader.chunks(range(3))) == 3
    gone = store.compact(purge=True)
    assert gone.documents == 3 and gone.chunks > 0 and gone.bytes > 0
    for word in (b"secret1zz", b"secret2zz", b"hidden1zz", b'"d2"'):
        assert not holders(store.path, word)
    assert holders(store.path, b"secret3zz")
    assert not old_files & set((store.path / "texts.lance" / "data").iterdir())
    assert np.array_equal(store.chunk_ids(), ids) and store.document("d1").text == "harmless still"
    with pytest.raises(StoreError, match="was purged"):
        list(reader.documents())
    assert store.history()[-1].action == "purge" and store.history()[-1].documents == 3
    with pytest.raises(StoreError, match="earlier ones were purged"):
        Datastore.open(store.path, version=2)
    assert store.compact(purge=True).documents == 0


def test_numbers_are_never_used_again(store):
    top = store.chunk_rows
    store.remove(where="true")
    store.compact(purge=True)
    assert len(store) == store.n_chunks == 0 and store.chunk_rows == top and not store.alive.any() and list(store.texts()) == []
    store.add([Document("new", "text")])
    assert store.chunk_ids().tolist() == [top] and Datastore.open(store.path).chunk_rows == top + 1


def test_history_tells_what_was_done(store):
    store.add([Document("d1", "other"), Document("x", "new", metadata={"lang": "en"})])
    store.remove(["x"])
    store.compact()
    told = [(h.action, h.documents, h.updated, h.total) for h in store.history()]
    assert told[:2] == [("create", None, None, 0), ("add", 6, 0, 6)] and ("columns", None, None, 6) in told
    assert ("add", 1, 1, 7) in told and ("remove", 1, None, 6) in told and told[-1] == ("compact", 0, None, 6)
    assert [h.version for h in store.history()] == list(range(1, store.version + 1))
    assert len(Datastore.open(store.path, version=2).history()) == 2
    for file in (store.path / "documents.lance" / "_transactions").iterdir():
        file.unlink()
    assert [h.total for h in Datastore.open(store.path).history()] == [h[3] for h in told]  # the log is gone, the versions are not


# ---- odd documents ---------------------------------------------------------------------------------------------------


def test_text_that_cannot_be_encoded(tmp_path):
    odd = [Document("a\udce9", "x \ud800 y\x00z", title="\udfff"), Document("a\udcea", " \n\t "),
           Document("b", "", metadata={"k": "\ud8ff"})]
    store = Datastore.build(tmp_path / "kb", odd)
    a, blank, b = store.documents()
    assert a.text == "x \ufffd y\x00z" and a.title == "\ufffd" and a.id != blank.id and b.metadata == {"k": "\ufffd"}
    assert store.document("a\udce9") == a and store.n_chunks == 1 and store.allow("k is not null").sum() == 0
    assert store.add(odd).unchanged == 3
    assert store.remove(["a\udce9"]).documents == 1


@pytest.mark.parametrize("wrong, says", [
    (Document("", "text"), "empty id"), (Document("a", None), "text = None"), (Document("a", "t", title=3), "title = 3"),
    ("text", "no Document"),
    (Document("a", "t", metadata={3: 4}), "keys must be text"), (Document("a", "t", metadata={"s": {1, 2}}), "cannot be stored")])
def test_documents_that_cannot_be_stored(store, wrong, says):
    with pytest.raises(UsageError, match=says):
        store.add([wrong])
    assert len(store) == 6


def test_metadata_that_cannot_be_a_column_is_kept(store, notes):
    odd = {"year": "unknown", "text": 1, "ID": 2, "a b": 3, "tags": ["x"], "huge": 2**70, "none": None, "nan": float("nan"),
           "_rowid": 1, "Year": 5, "select": "from", "ok": True}
    store.add([Document("odd", "text", metadata=odd)])
    kept = dict(store.document("odd").metadata)
    assert kept.pop("nan") != kept.get("nan") and kept == {k: v for k, v in odd.items() if k != "nan"}
    assert set(store.columns()) == {"id", "title", "source", "licence", "date", "sha256", "year", "huge", "nan", "select", "ok"}
    assert store.document("odd").id not in [d.id for d in store.documents("year > 0")]
    assert [d.id for d in store.documents("`select` = 'from' and ok")] == ["odd"]
    assert len(notes) == len(set(notes)) and any("'a b'" in n for n in notes) and any("'year' is int64" in n for n in notes)
    said = len(notes)
    store.add([Document(f"mixed{i}", "t", metadata={"score": score}) for i, score in enumerate((1, 1.5, 2))])
    assert store.columns()["score"] == "double" and len(list(store.documents("score >= 1"))) == 3 and len(notes) == said


def test_there_is_an_end_to_columns(store, notes):
    store.add([Document("wide", "t", metadata={f"k{i}": i for i in range(400)})])
    assert len(store.columns()) < 270 and len(store.document("wide").metadata) == 400 and notes


PIECES = st.sampled_from(["year", "id", "and", "or", "not", "(", ")", "'d1'", "1992", ">", "=", "is null", "like", "'%1'", "in",
                          "(1, 2)", ",", "--", "/*", ";", "$1", "?", "cast(year as text)", "/ 0", "1e999", "\x00", "é", "`", '"',
                          "exists", "case when", "[0]"])


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(PIECES, max_size=8).map(" ".join) | st.text(max_size=12))
def test_any_filter_is_a_bitmap_or_one_line(store, where):
    try:
        assert store.allow(where).shape == (store.chunk_rows,)
    except RalmError as e:
        assert isinstance(e, UsageError) and "\n" not in str(e)


def test_a_purge_that_stopped_between_two_tables_leaves_no_chunk_without_its_text(tmp_path, monkeypatch):
    """Found by killing: texts were dropped first, and the chunks that were left could neither be read nor dropped any more."""
    from ralm.what import tables

    store = Datastore.build(tmp_path / "kb", [Document(f"d{i}", f"words {i}") for i in range(6)])
    store.remove(["d1", "d4"])
    calls, delete = [], tables.delete

    def stops(dataset, revs, note=None):
        calls.append(dataset.uri)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return delete(dataset, revs, note)

    monkeypatch.setattr(tables, "delete", stops)
    with pytest.raises(KeyboardInterrupt):
        store.compact(purge=True)
    monkeypatch.undo()
    again = Datastore.open(tmp_path / "kb")
    assert sum(len(ids) for ids, _, _ in again.texts()) == 4 and len(calls) == 2
    again.compact(purge=True)
    assert {s.id for _, s in again.states()} == {"d0", "d2", "d3", "d5"}
