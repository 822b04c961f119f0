"""Readers beside a writer, and two writers: every answer is one that a committed version gives."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ralm import index
from ralm.errors import StoreError
from ralm.index.sparse import BM25
from ralm.types import Document
from ralm.what.datastore import Datastore

CHILD = Path(__file__).with_name("reader_child.py")


def text(r: random.Random) -> str:
    return " ".join(f"w{r.randrange(40) if r.random() < 0.7 else r.randrange(6)}" for _ in range(r.randrange(3, 25)))


class Record:
    """What every version of a datastore held, as the writer knows it."""

    def __init__(self, store: Datastore):
        self.store, self.now, self.held = store, {}, {store.version: {}}

    def keep(self) -> None:
        for version in range(max(self.held) + 1, self.store.version):
            self.held[version] = self.held[version - 1]  # a new column, merged files: the same documents
        self.held[self.store.version] = dict(self.now)

    def step(self, r: random.Random) -> None:
        """One change of some kind, with the indexes after it or, as a reader may also find them, without."""
        kind = r.random()
        if kind < 0.55 or not self.now:
            new = {f"d{r.randrange(80)}": text(r) for _ in range(r.randrange(1, 9))}
            self.store.add([Document(i, t) for i, t in new.items()])
            self.now |= new
        elif kind < 0.9:
            gone = r.sample(sorted(self.now), min(len(self.now), r.randrange(1, 5)))
            self.store.remove(gone)
            self.now = {i: t for i, t in self.now.items() if i not in gone}
        else:
            self.store.compact()
            index.compact(self.store)
        self.keep()
        if r.random() < 0.5:
            index.update(self.store)


class Oracle:
    """A datastore made anew for each version that was answered from."""

    def __init__(self, folder: Path, held: dict[int, dict[str, str]]):
        self.folder, self.held, self.made = folder, held, {}

    def hits(self, version: int, query: str) -> tuple[list, list]:
        if version not in self.made:
            documents = [Document(i, t) for i, t in self.held[version].items()]
            self.made[version] = BM25(Datastore.build(self.folder / str(version), documents, split="none"))
        hits = self.made[version].search([query], 80)
        ids = hits.ids[0][hits.ids[0] >= 0].tolist()
        return [(c.document, c.text) for c in self.made[version].store.chunks(ids)], hits.scores[0][:len(ids)].tolist()

    def check(self, told: dict) -> None:
        version = told["version"]
        held = self.held[version]
        assert told["documents"] == len(held) and told["text"] == held.get(told["name"])
        assert told["listed"] is None or told["listed"] == sorted(held)
        found, scores = self.hits(version, told["query"])
        assert told["scores"] == scores[:5]
        right = dict(zip(map(tuple, found), scores))  # equal scores are in the order of ids of chunks, which tell a store's history
        assert [right[tuple(h)] for h in told["hits"]] == told["scores"]
        assert len({tuple(h) for h in told["hits"]}) == len(told["hits"])


def beside(folder: Path, seconds: float, seed: int) -> tuple[list[dict], Record]:
    """What four readers were told while one writer wrote."""
    record, r = Record(Datastore.create(folder / "kb", split="none")), random.Random(seed)
    record.step(r)
    index.build("bm25", record.store)
    out = [open(folder / f"reader{i}", "w+") for i in range(4)]  # noqa: SIM115
    readers = [subprocess.Popen([sys.executable, str(CHILD), str(folder / "kb"), str(seconds), str(seed + i)], stdout=f,
                                env=os.environ | {"OMP_NUM_THREADS": "1"}) for i, f in enumerate(out)]
    while any(p.poll() is None for p in readers):
        try:
            record.step(r)
        except StoreError as e:  # a reader brings the index up to date under the same lock: told clearly, nothing half done
            assert "one writer at a time" in str(e)
        record.store.refresh()
        time.sleep(0.05)
    told = []
    for p, f in zip(readers, out):
        f.seek(0)
        lines = f.read().splitlines()
        f.close()
        assert p.returncode == 0 and lines[0] == "ready" and lines[-1] == '"done"'
        told += [json.loads(line) for line in lines[1:-1]]
    return told, record


def answered(folder: Path, seconds: float, seed: int) -> tuple[int, int, int]:
    """(answers, versions they came from, times a reader was told to wait); each answer checked."""
    told, record = beside(folder, seconds, seed)
    raised = [t["raised"] for t in told if "raised" in t]
    assert not raised, raised[:3]
    errors = [t["error"] for t in told if "error" in t]
    assert all("one writer at a time" in e for e in errors), [e for e in errors if "one writer at a time" not in e][:3]
    oracle, answers = Oracle(folder / "oracle", record.held), [t for t in told if "version" in t]
    (folder / "oracle").mkdir()
    for t in answers:
        oracle.check(t)
    assert {d.id: d.text for d in Datastore.open(folder / "kb").documents()} == record.now
    return len(answers), len({t["version"] for t in answers}), len(errors)


def test_readers_beside_a_writer(tmp_path):
    answers, versions, _ = answered(tmp_path, 2, 1)
    assert answers > 20 and versions > 3


@pytest.mark.slow
def test_readers_beside_a_writer_for_a_minute(tmp_path):
    answers, versions, waits = answered(tmp_path, 60, 2)
    print(f"{answers:,} answers of {versions:,} versions, {waits:,} times told to wait")
    assert answers > 200 and versions > 50


def test_two_writers_both_land_or_one_is_told(tmp_path):
    """Two programs add to one datastore at the same time, in several transactions each."""
    files = []
    for name in "ab":
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps({"id": f"{name}{i}", "text": f"{name} {i} text"}) + "\n" for i in range(3000)))
    path = tmp_path / "kb"
    Datastore.create(path)
    writers = [subprocess.Popen([sys.executable, "-m", "ralm.app.cli", "add", str(path), str(f), "-q"],
                                stderr=subprocess.PIPE, text=True)
               for f in files]
    said = [w.communicate(timeout=120)[1] for w in writers]
    store = Datastore.open(path)
    for name, w, text in zip("ab", writers, said):
        assert w.returncode in (0, 1)
        there = sum(d.id.startswith(name) for d in store.documents())
        if w.returncode:
            assert "there can be one writer at a time" in text and text.count("\n") == 1 and not there
        else:
            assert there == 3000
    assert any(w.returncode == 0 for w in writers)
    assert not store.verify() and len(store.chunks(store.chunk_ids())) == store.n_chunks
