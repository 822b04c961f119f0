"""Writers killed with SIGKILL: what was committed is there, nothing is there by halves, the next run completes."""

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ralm.errors import StoreError
from ralm.what.datastore import Datastore

CHILD = Path(__file__).with_name("crash_child.py")
sys.path.insert(0, str(CHILD.parent))
from crash_child import BATCH, DOCUMENTS, document, documents  # noqa: E402


class Child:
    def __init__(self, path, action, *step):
        self.process = subprocess.Popen([sys.executable, str(CHILD), str(path), action, *map(str, step)], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def run(self, seconds: float | None = None) -> int:
        """Let it work, kill it after so many seconds (None: it ends or kills itself); what it last said it had committed."""
        assert self.process.stdout.readline() == b"ready\n", self.process.stderr.read().decode()
        self.process.stdin.write(b"go\n")
        self.process.stdin.flush()
        if seconds is not None:
            time.sleep(seconds)
            self.process.kill()
        said, error = self.process.communicate(timeout=120)
        assert self.process.returncode in (0, -signal.SIGKILL), error.decode()
        assert seconds is not None or self.process.returncode != 0, "the step was never reached: nothing was tested"
        numbers = [int(line) for line in said.split() if line.isdigit()]
        return numbers[-1] if numbers else 0


def whole(store: Datastore) -> list[int]:
    """The numbers of the documents the store holds, each checked to be complete and searchable."""
    held = list(store.documents())
    by_document: dict[str, list[str]] = {}
    for chunk in store.chunks(store.chunk_ids()):
        by_document.setdefault(chunk.document, []).append(chunk.text)
    for d in held:
        assert d == document(int(d.id[1:]))
        assert " ".join(by_document.pop(d.id)).split() == d.text.split()
    assert not by_document and store.n_chunks == store.alive.sum()
    return sorted(int(d.id[1:]) for d in held)


def leaks(path: Path, word: bytes) -> list[Path]:
    return [f for f in path.rglob("*") if f.is_file() and word in f.read_bytes()]


@pytest.fixture
def full(tmp_path):
    return Datastore.build(tmp_path / "kb", documents(lambda i: None), split="words:10", batch=20)


def killed_add(folder: Path, seconds, *step) -> None:
    path = folder / "kb"
    child = Child(path, "add", *step)
    committed = child.run(seconds)
    if (path / "store.json").exists():
        held = whole(Datastore.open(path))
        assert len(held) >= committed and len(held) % BATCH == 0 and held == list(range(len(held)))
    else:
        assert committed == 0
    store = Datastore.build(path, documents(lambda i: None), split="words:10", batch=BATCH)
    assert whole(store) == list(range(DOCUMENTS))
    version = store.version
    store.compact()
    assert whole(store) == list(range(DOCUMENTS)) == whole(Datastore.open(path, version=version))
    assert [i for ids, _, _ in store.texts() for i in ids.tolist()] == store.chunk_ids().tolist()  # orphans are gone


def killed_remove(store: Datastore, folder: Path, seconds, *step) -> None:
    path = shutil.copytree(store.path, folder / "copy")
    committed = Child(path, "remove", *step).run(seconds)
    store = Datastore.open(path)
    held = whole(store)
    done = next((i for i in range(0, DOCUMENTS, 4) if i in held), DOCUMENTS)
    assert done >= committed and held == [i for i in range(DOCUMENTS) if i >= done or i % 4 > 1]
    if rest := [f"d{i}" for i in held if i % 4 < 2]:  # none where the kill came after the commit
        store.remove(rest)
    assert whole(store) == [i for i in range(DOCUMENTS) if i % 4 > 1]
    assert whole(Datastore.open(path, version=1)) == [] and len(Datastore.open(path, version=4)) == DOCUMENTS


def killed_compact(store: Datastore, folder: Path, purge: bool, seconds, *step) -> None:
    path = shutil.copytree(store.path, folder / "copy")
    store = Datastore.open(path)
    store.remove([f"d{i}" for i in range(0, DOCUMENTS, 2)])
    kept, chunks, versions = list(range(1, DOCUMENTS, 2)), store.chunk_ids(), store.version
    next_chunk = store.chunk_rows
    assert leaks(path, b"secret8zz")
    Child(path, "purge" if purge else "compact", *step).run(seconds)
    store = Datastore.open(path)
    assert whole(store) == kept and np.array_equal(store.chunk_ids(), chunks) and store.version >= versions
    for version in range(1, versions):  # an earlier version can be opened in full, or not at all
        try:
            old = Datastore.open(path, version=version)
        except StoreError:
            assert purge
            continue
        assert len(whole(old)) in (0, 20, 40, 60)
    store.compact(purge=purge)
    assert whole(store) == kept and np.array_equal(store.chunk_ids(), chunks) and store.history()[-1].version > versions
    assert bool(leaks(path, b"secret8zz")) is not purge
    store.add([document(0)])
    assert store.chunk_ids()[-1] >= next_chunk and store.document("d0") == document(0)


@pytest.mark.parametrize("step", [3, 9])  # between texts and chunks, before a commit to documents
def test_add_killed_at_a_step(tmp_path, step):
    killed_add(tmp_path, None, step)


def test_add_killed_at_some_time(tmp_path):
    killed_add(tmp_path, random.uniform(0.05, 0.6))


@pytest.mark.parametrize("seconds, step", [(None, 4), ("random", None)])
def test_remove_killed(full, tmp_path, seconds, step):
    killed_remove(full, tmp_path, random.uniform(0.02, 0.3) if seconds else None, *([step] if step else []))


@pytest.mark.parametrize("step", [4])
def test_compact_killed(full, tmp_path, step):
    killed_compact(full, tmp_path, False, None, step)


@pytest.mark.parametrize("step", [3, 7])  # earlier versions renounced but nothing deleted; files half deleted
def test_purge_killed(full, tmp_path, step):
    killed_compact(full, tmp_path, True, None, step)


@pytest.mark.slow
@pytest.mark.parametrize("action", ["add", "remove", "compact", "purge"])
def test_killed_at_many_times(full, tmp_path, action):
    for round in range(25):
        folder = tmp_path / str(round)
        folder.mkdir()
        if action == "add":
            killed_add(folder, random.uniform(0, 1.2))
        elif action == "remove":
            killed_remove(full, folder, random.uniform(0, 0.5))
        else:
            killed_compact(full, folder, action == "purge", random.uniform(0, 0.3))
        shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize("step", range(1, 11))
def test_purge_killed_at_every_step(full, tmp_path, step):
    killed_compact(full, tmp_path, True, None, step)
