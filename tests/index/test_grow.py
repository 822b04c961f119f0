"""How the sparse index follows its store: appends, merges, compaction, kills, damage, stores that cannot be written."""

import errno
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tracemalloc
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from ralm import progress
from ralm.errors import FingerprintError, StoreError, UsageError
from ralm.index import grow, manifest, postings, topk
from ralm.index.sparse import BM25, TFIDF
from ralm.types import Document
from ralm.what.datastore import Datastore

_spec = importlib.util.spec_from_file_location("brute", Path(__file__).parent / "brute.py")
brute = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(brute)

RNG = np.random.default_rng(5)
TEXTS = [" ".join(f"w{w}" for w in RNG.zipf(1.3, RNG.integers(1, 30)) % 200) for _ in range(150)]
QUERIES = ["w1 w2 w3", "w1 w1 w150", "w7", "w199 w13 w5 w6", "nothing"]
FILES = {f"{n}.npy" for n in postings.NAMES}


def documents(texts, first=0):
    return [Document(f"d{first + i}", t) for i, t in enumerate(texts)]


def equal(a, b, k=200):
    for x, y in ((p.search(QUERIES, k), q.search(QUERIES, k)) for p, q in ((a, b), (TFIDF(a.store), TFIDF(b.store)))):
        assert np.array_equal(x.ids, y.ids) and np.array_equal(x.scores, y.scores)


def parts(store):
    return manifest.load(grow.folder_of(store)).parts


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return BM25(brute.make(tmp_path_factory.mktemp("whole") / "kb.ralm", TEXTS))


def test_appending_equals_building_at_once(tmp_path, whole):
    """Law 8, and segments never change: an append leaves the files of the others as they are."""
    store = Datastore.build(tmp_path / "kb.ralm", documents(TEXTS[:70]), split="none")
    found = BM25(store)
    before = parts(store)
    store.add(documents(TEXTS[70:], 70))
    equal(found, whole)  # the searcher notices that its store has changed
    assert parts(store)[:1] == before and len(parts(store)) == 2
    assert not manifest.verify(grow.folder_of(store), manifest.load(grow.folder_of(store)))


def test_many_appends_are_merged(tmp_path, whole):
    store = Datastore.create(tmp_path / "kb.ralm", split="none")
    found = BM25(store)
    assert found.search(["w1"], 3).ids.tolist() == [[-1, -1, -1]]
    for i in range(0, 150, 5):
        store.add(documents(TEXTS[i:i + 5], i))
        grow.ready(store, grow.Wish())
        assert sum(p.rows for p in parts(store)) == i + 5 and len(parts(store)) < 2 * postings.FAN
    assert len(parts(store)) < 15
    equal(found, whole)
    named = {p.name for p in parts(store)} | {"manifest.json"}
    assert {p.name for p in grow.folder_of(store).iterdir()} == named
    for name in named - {"manifest.json"}:
        assert {p.name for p in (grow.folder_of(store) / name).iterdir()} == FILES


def test_flushing_often_changes_nothing(tmp_path, whole, monkeypatch):
    monkeypatch.setattr(postings, "FLUSH", 30)
    monkeypatch.setattr(grow, "BATCH", 7)
    equal(BM25(brute.make(tmp_path / "kb.ralm", TEXTS)), whole)


def test_counts_above_255_are_kept(tmp_path):
    texts = ["w1 " * 300 + "w2", "w1 w2 w2", "w3"]
    store = Datastore.build(tmp_path / "kb.ralm", documents(texts[:1]), split="none")
    BM25(store)
    for i in (1, 2):
        store.add(documents(texts[i:i + 1], i))
    for _ in range(10):  # small and large counts merged
        store.add(documents(["w9"], 3 + len(store)))
        grow.ready(store, grow.Wish())
    found = BM25(store)
    want, _ = brute.scores([*texts, *["w9"] * 10], "w1 w2", found.settings)
    hits = found.search(["w1 w2"], 2)
    np.testing.assert_allclose(hits.scores[0], sorted(want, reverse=True)[:2], rtol=1e-5)


@pytest.mark.parametrize("most, kind", [(255, np.uint8), (256, np.uint16), (65_535, np.uint16), (65_536, np.uint32)])
def test_counts_take_as_few_bytes_as_they_can(tmp_path, most, kind):
    store = Datastore.build(tmp_path / "kb.ralm", documents(["w1 " * most, "w2"]), split="none")
    BM25(store)
    assert np.load(grow.folder_of(store) / parts(store)[0].name / "tfs.npy").dtype == kind


def test_a_merge_holds_no_postings_in_memory(tmp_path):
    """Eight segments of 200,000 postings each: their copies would be 14 MB."""
    store = Datastore.create(tmp_path / "kb.ralm", split="none")
    for i in range(postings.FAN - 1):
        store.add([Document(f"{i}/{j}", " ".join(f"w{w}" for w in range(1000))) for j in range(200)])
        grow.ready(store, grow.Wish())
    segments = [postings.open_segment(grow.folder_of(store), p) for p in parts(store)]
    assert len(segments) == postings.FAN - 1
    keep = [np.ones(len(s.ids), bool) for s in segments]
    postings.merge(tmp_path, segments, keep, 0, store.chunk_rows)  # compiled
    tracemalloc.start()
    try:
        part = postings.merge(tmp_path, segments, keep, 0, store.chunk_rows)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert part.files["rows.npy"]["bytes"] > 5_000_000


def test_a_full_disk_stops_a_merge_with_one_line(tmp_path, whole, monkeypatch):
    """Written through a mapping, a full disk would be a signal that kills the process: the space is asked for first."""
    store = Datastore.create(tmp_path / "kb.ralm", split="none")
    for i in range(0, 126, 18):
        store.add(documents(TEXTS[i:i + 18], i))
        grow.ready(store, grow.Wish())
    before = parts(store)
    store.add(documents(TEXTS[126:], 126))

    def full(file, offset, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(postings, "FAN", 2)
    with monkeypatch.context() as broken:
        broken.setattr(os, "posix_fallocate", full)
        with pytest.raises(StoreError, match=r"covers 126 of 150 chunks and cannot be extended.*No space left"):
            BM25(store)
    assert parts(store) == before
    equal(BM25(store), whole)
    assert len(parts(store)) < len(before)


def test_large_segments_are_left_alone():
    part = partial(manifest.Part, "x", 0, 1, files={})
    few = [part(rows=postings.LARGEST - 1)] * postings.FAN
    assert postings.crowded(few) == postings.FAN
    assert postings.crowded([part(rows=postings.LARGEST)] * 3 * postings.FAN) == 0
    assert postings.crowded([*few, part(rows=postings.LARGEST)]) == 0


def test_more_rows_than_keys_can_count_are_refused(tmp_path, monkeypatch):
    store = Datastore.build(tmp_path / "kb.ralm", documents(TEXTS[:9]), split="none")
    monkeypatch.setattr(topk, "LAST_ROW", 8)
    BM25(store)
    monkeypatch.setattr(topk, "LAST_ROW", 7)
    with pytest.raises(UsageError, match=r"9 chunks.*at most 8"):
        BM25(store)


@pytest.mark.parametrize("merge", [False, True])
def test_purging_leaves_nothing_of_the_text(tmp_path, merge):
    texts = [*TEXTS[:20], "classified zanzibar w1", *TEXTS[20:30]]
    store = Datastore.build(tmp_path / "kb.ralm", documents(texts), split="none")
    found, first = BM25(store), store.version
    if merge:
        for i in range(10):
            store.add(documents([f"later{i} w1"], 100 + i))
            grow.ready(store, grow.Wish())
    store.remove(["d20"])
    assert found.search(["zanzibar"], 1).ids.tolist() == [[-1]]
    grow.compact(store)  # the row is stored still: the first version can be opened
    assert BM25(Datastore.open(store.path, version=first)).search(["zanzibar"], 1).ids.tolist() == [[20]]
    store.compact(purge=True)
    before = found.search(QUERIES, 50)
    grow.compact(store)
    after = BM25(store).search(QUERIES, 50)
    assert np.array_equal(before.ids, after.ids) and np.array_equal(before.scores, after.scores)
    assert sum(p.rows for p in parts(store)) == store.n_chunks
    assert not [f for f in grow.folder_of(store).rglob("*") if f.is_file() and b"zanzibar" in f.read_bytes()]


def test_purging_everything(tmp_path):
    store = Datastore.build(tmp_path / "kb.ralm", documents(TEXTS[:5]), split="none")
    found = BM25(store)
    store.remove([f"d{i}" for i in range(5)])
    store.compact(purge=True)
    grow.compact(store)
    assert (found.search(QUERIES, 3).ids == -1).all() and (BM25(store).search(QUERIES, 3).ids == -1).all()
    stop = manifest.load(grow.folder_of(store)).stop
    store.add(documents(["w1 again"]))
    assert found.search(["w1"], 2).ids.tolist() == [[store.chunk_ids()[0], -1]] and store.chunk_ids()[0] >= stop


@pytest.mark.parametrize("step", [4, 11, 25])
def test_a_killed_build_is_resumed(tmp_path, whole, step):
    """Killed while it writes the files of a segment, while it seals one, before it commits one."""
    store = brute.make(tmp_path / "kb.ralm", TEXTS)
    child = [sys.executable, str(Path(__file__).with_name("kill_child.py")), str(store.path), str(step)]
    assert subprocess.run(child, timeout=120, capture_output=True).returncode == -signal.SIGKILL
    done = manifest.load(grow.folder_of(store))
    assert (done.stop if done else 0) < len(TEXTS) and (done is not None) == (step > 11)
    equal(BM25(store), whole)
    if done:
        assert all(p in parts(store) for p in done.parts)  # what was committed was not made again
    assert len(list(grow.folder_of(store).iterdir())) == len(parts(store)) + 1


def test_other_settings_are_refused(tmp_path):
    store = Datastore.build(tmp_path / "kb.ralm", documents(TEXTS[:5]), split="none")
    BM25(store, stemmer="porter", stop=["w1", "w2"])
    BM25(store, stemmer="porter")
    with pytest.raises(FingerprintError, match=r"stemmer = 'porter', 'german' is asked for"):
        BM25(store, stemmer="german")
    with pytest.raises(FingerprintError, match=r"stop = \['w1', 'w2'\], 'none' is asked for"):
        TFIDF(store, stop="none")
    with pytest.raises(FingerprintError, match=r"title = True, False is asked for"):
        BM25(store, title=False)
    other = Datastore.build(tmp_path / "other.ralm", documents(TEXTS[:5]), split="none")
    (store.path / "index").rename(other.path / "index")
    with pytest.raises(FingerprintError, match="datastore = "):
        BM25(other)


def test_another_release_of_the_stemmer_is_refused(tmp_path):
    store = Datastore.build(tmp_path / "kb.ralm", documents(TEXTS[:5]), split="none")
    BM25(store)
    file = grow.folder_of(store) / "manifest.json"
    raw = json.loads(file.read_text())
    raw["settings"]["snowball"] = "2.0"
    del raw["sum"]
    file.write_text(json.dumps(raw))
    with pytest.raises(FingerprintError, match=r"snowball = '2.0'"):
        BM25(store)


def test_damage_is_one_clear_error(tmp_path):
    store = Datastore.build(tmp_path / "kb.ralm", documents(TEXTS[:5]), split="none")
    BM25(store)
    file = grow.folder_of(store) / parts(store)[0].name / "rows.npy"
    whole = file.read_bytes()
    file.write_bytes(whole[:-4])
    with pytest.raises(StoreError, match=r"rows.npy has \d+ bytes, its manifest says \d+"):
        BM25(store)
    file.write_bytes(b"x" * len(whole))
    with pytest.raises(StoreError, match="is not what was written"):
        BM25(store)
    file.unlink()
    with pytest.raises(StoreError, match="has None bytes"):
        BM25(store)


def test_a_complete_index_is_opened_without_the_lock(tmp_path):
    """While another one writes: what is complete can be searched, what is not says who holds the lock."""
    store = Datastore.build(tmp_path / "kb.ralm", documents(TEXTS[:5]), split="none")
    BM25(store)
    with store.lock():
        assert BM25(Datastore.open(store.path)).search(["w1"], 1).ids[0, 0] >= 0
    store.add(documents(TEXTS[5:9], 5))
    with store.lock(), pytest.raises(StoreError, match="one writer at a time"):
        BM25(Datastore.open(store.path))


def test_an_old_version_sees_nothing_newer(tmp_path):
    store = Datastore.build(tmp_path / "kb.ralm", documents(TEXTS[:40]), split="none")
    first, before = store.version, BM25(store).search(QUERIES, 50)
    store.add(documents(TEXTS[40:], 40))
    grow.ready(store, grow.Wish())
    again = BM25(Datastore.open(store.path, version=first)).search(QUERIES, 50)
    assert np.array_equal(before.ids, again.ids) and np.array_equal(before.scores, again.scores)


def test_building_reports_its_progress(tmp_path):
    class Sink(progress.Silent):
        seen = []

        def start(self, stage, total, unit):
            self.seen.append((stage, total, unit))
            return 0

        def advance(self, task, amount):
            self.seen.append(amount)

    store = Datastore.build(tmp_path / "kb.ralm", documents(TEXTS[:9]), split="none")
    progress.use(Sink())
    try:
        BM25(store)
    finally:
        progress.use(progress.Silent())
    assert Sink.seen == [("bm25", 9, "chunks"), 9]
