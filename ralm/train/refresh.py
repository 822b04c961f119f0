"""The index of a retriever that learns: made anew every T steps from a snapshot of its weights, while training goes on.

    refresher = Refresher(store, encoder, folder, Index(refresh=500, lag=100))
    refresher.before(step)                         # before each step: {"index_age": steps since the weights the index is of}
    refresher.propose(q_QD, 8)                     # Hits by stored vectors; whoever asks scores them with live ones

A snapshot is taken before step 0, T, 2T, ...; its index is used from step s + lag on, and training waits there if it is not ready.
So an index is never older than T + lag - 1 steps, and which one a step uses depends on the step alone: a background process, the
same work done on the spot (background = false), and a run that was killed and resumed give the same losses bit for bit.
T = 0: the index of the first weights is used to the end.

    RUN/corpus-HASH.ralm/index/dense-realm000500/      the vectors (index/dense), named after the step of their weights
    RUN/snapshots/000500/                              the weights, a sentence-transformers folder
    RUN/refresh.jsonl                                  {"step", "passages", "seconds", "waited"} of each index

Which snapshots a run stands on is part of its saved state (`marks`); files that no saved state needs are deleted. An index that is
not of the snapshot the state names, or not of this corpus, is refused. The process reads jobs from a pipe and ends with it: when
the run ends, or is killed."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ralm.errors import FingerprintError, StoreError, UsageError
from ralm.index import manifest, vectors
from ralm.index.dense import Dense
from ralm.index.encode import Sentences
from ralm.train import ranks
from ralm.train.behind import Worker
from ralm.train.encoder import Trainable
from ralm.train.recipes import standing
from ralm.types import Hits
from ralm.what.datastore import Datastore

PATIENCE = 20.0  # seconds a killed run's process may take to let go of the corpus


@dataclass(frozen=True)
class Index:
    """The [index] table."""

    k: int = 7  # passages a query is read with, the null document apart
    refresh: int = 500  # steps between two snapshots; 0: never
    lag: int = 100  # steps between a snapshot and the use of its index
    background: bool = True
    threads: int = 1  # of the background process
    index: str = "flat"  # or hnsw, ivf, auto (index/ann.py)
    probe: int = 1  # queries of a part whose candidates are compared with fresh ones

    def active(self, step: int) -> int:
        """The step of the snapshot whose index is used at `step`."""
        return 0 if not self.refresh or step < self.refresh + self.lag else (step - self.lag) // self.refresh * self.refresh

    def pending(self, step: int) -> int:
        """The step of the snapshot whose index is being made at `step`, -1 where none is."""
        newest = step // self.refresh * self.refresh if self.refresh else 0
        return newest if newest > self.active(step) else -1

    def check(self) -> Index:
        if self.refresh and not 0 <= self.lag < self.refresh:
            raise UsageError(f"[index] lag = {self.lag} and refresh = {self.refresh}: an index must be ready before the next "
                             "snapshot is taken; use a lag below refresh")
        if min(self.k, self.threads) < 1 or min(self.refresh, self.probe) < 0:
            raise UsageError(f"[index] k = {self.k} and threads = {self.threads} are at least 1, refresh = {self.refresh} and "
                             f"probe = {self.probe} at least 0")
        return self


class Refresher:
    """The index in use, the one being made, and the snapshots they are of."""

    def __init__(self, store: Datastore, encoder: Trainable, folder: Path, wish: Index):
        self.wish, self.encoder, self.run = wish.check(), encoder, Path(folder).resolve()
        self.store = Datastore.open(store.path, version=store.version)  # what is added to it later is not part of this run
        self.marks = torch.full((2, 6), -1, dtype=torch.int64)  # in use, being made: step, weights (2), corpus (2), passages
        self.world, self.worker, self.index = ranks.world(), None, None
        self.built = 0.0  # processor seconds of the last index

    def state(self) -> dict[str, torch.Tensor]:
        return {"index": self.marks}

    # ---- in time with the steps

    def before(self, step: int) -> dict[str, float]:
        """Take the snapshot that is due at this step, and go over to the index that is."""
        if self.index is None:
            self._begin(step)
        if self.wish.refresh and step and step % self.wish.refresh == 0:
            self._snapshot(step)
        if (due := self.wish.active(step)) != int(self.marks[0, 0]):
            self._use(due)
        return {"index_age": step - int(self.marks[0, 0])}

    def _begin(self, step: int) -> None:
        """The first index of a new run, or those a resumed one stood on."""
        if int(self.marks[0, 0]) < 0:
            self._snapshot(step)
            self._use(step)
            return
        self._verify(self.marks[0], self.wish.active(max(step - 1, 0)))
        if int(self.marks[1, 0]) >= 0:
            self._verify(self.marks[1], self.wish.pending(max(step - 1, 0)))
            self._build(int(self.marks[1, 0]))
        at = int(self.marks[0, 0])
        if not self._ready(at):
            self._build(at)
        self._await(at)
        self.index = self._open(at)

    def _snapshot(self, step: int) -> None:
        folder = self._snapshot_folder(step)
        if self.world.main:
            self.encoder.save(folder, {"step": step}, f"# A snapshot\n\nThe retriever before step {step} of {self.run.name}.\n")
        self.world.wait()
        self.marks[1] = torch.tensor([step, *_numbers(Sentences("", folder).fingerprint), *_numbers(self._corpus()),
                                      self.store.n_chunks])
        self._build(step)

    def _use(self, step: int) -> None:
        if int(self.marks[1, 0]) != step:
            raise StoreError(f"the index of step {step} is due and no snapshot of it was taken: the state of {self.run} is not one "
                             "of this recipe")
        self._await(step)
        self.index = self._open(step)
        self.marks[0], self.marks[1] = self.marks[1].clone(), -1
        if self.world.main:
            self._clean()

    def propose(self, q_QD: np.ndarray, k: int) -> Hits:
        """The k passages of largest inner product with the vectors of the index in use, which are older than the queries."""
        return self.index.nearest(q_QD, k)

    def vectors(self, ids: np.ndarray) -> np.ndarray:
        """float32 [..., D]: the stored vectors of passages, as they are in the index in use."""
        _, rows = vectors.opened(self.store, vectors.Wish(name=_name(int(self.marks[0, 0]))))
        at = np.searchsorted(rows.ids, ids.ravel())
        return rows.take(at).astype(np.float32).reshape(*ids.shape, rows.dim)

    # ---- files

    def _snapshot_folder(self, step: int) -> Path:
        return self.run / "snapshots" / f"{step:06d}"

    def _index_folder(self, step: int) -> Path:
        return self.store.path / "index" / f"dense-{_name(step)}"

    def _corpus(self) -> str:
        import hashlib

        return hashlib.sha256(self.store.fingerprint().encode()).hexdigest()

    def _verify(self, mark: torch.Tensor, step: int) -> None:
        """Refuse a snapshot that is not the one the saved state was made with, or of another corpus."""
        said, folder = int(mark[0]), self._snapshot_folder(int(mark[0]))
        if said != step:
            raise FingerprintError(f"the saved state uses the index of step {said}, this recipe that of step {step}; go on with "
                                   "the recipe it was made by, or begin anew in another folder")
        if mark[3:5].tolist() != list(_numbers(self._corpus())):
            raise FingerprintError(f"the corpus {self.store.path} is not the one that this run began with; bring that back, or "
                                   "begin anew in another folder")
        if not (folder / "modules.json").is_file() or mark[1:3].tolist() != list(_numbers(Sentences("", folder).fingerprint)):
            raise FingerprintError(f"{folder} is not the snapshot of step {said} that the saved state was made with; bring it "
                                   "back, or begin anew in another folder")

    def _ready(self, step: int) -> bool:
        """Whether a complete index of this snapshot is there. What is there of other weights is deleted."""
        found = manifest.load(self._index_folder(step))
        snapshot = self._snapshot_folder(step)
        if found is not None and (found.settings["fingerprint"] != Sentences("", snapshot).fingerprint
                                  or found.settings["encoder"] != f"st:{snapshot}"):
            if self.world.main:
                shutil.rmtree(self._index_folder(step))
            return False
        return found is not None and found.stop >= self.store.chunk_rows

    def _open(self, step: int) -> Dense:
        """The index of a snapshot. Raises FingerprintError where it is of other weights."""
        folder = self._index_folder(step)
        found, fingerprint = manifest.load(folder), Sentences("", self._snapshot_folder(step)).fingerprint
        if found is None or found.settings["fingerprint"] != fingerprint:
            raise FingerprintError(f"{folder} was made with weights {found and found.settings['fingerprint']}, the snapshot of "
                                   f"step {step} has {fingerprint}; delete the folder, it is made again")
        return Dense(self.store, name=_name(step))

    def _clean(self) -> None:
        """Delete what is older than the index of the last saved state (the run may be killed, and go on from there)."""
        saved = standing(self.run)
        keep = min(self.wish.active(max((saved or {"step": 0})["step"] - 1, 0)), int(self.marks[0, 0]))
        for folder in (*self.run.glob("snapshots/[0-9]*"), *self.store.path.glob("index/dense-realm*")):
            if int(folder.name.removeprefix("dense-realm")) < keep:
                shutil.rmtree(folder, ignore_errors=True)

    # ---- making it

    def _build(self, step: int) -> None:
        """Begin to make the index of a snapshot; on the spot where there is no background process."""
        if not self.world.main or self._ready(step):
            return
        job = {"store": str(self.store.path), "version": self.store.version, "snapshot": str(self._snapshot_folder(step)),
               "name": _name(step), "index": self.wish.index, "threads": self.wish.threads}
        if self.wish.background:
            self.worker = self.worker or Worker(self.run / "refresh.log")
            self.worker.submit(job)
            return
        before = torch.get_num_threads()
        try:
            self._note(step, build(**job), 0.0)
        finally:
            torch.set_num_threads(before)

    def _await(self, step: int) -> None:
        """Until the index of a snapshot is complete."""
        if self.world.main and self.worker is not None and self.worker.busy(_name(step)):
            began = time.monotonic()
            seconds = self.worker.wait(_name(step))
            self._note(step, seconds, time.monotonic() - began)
        self.world.wait()

    def _note(self, step: int, seconds: float, waited: float) -> None:
        self.built = seconds
        line = {"step": step, "passages": self.store.n_chunks, "seconds": round(seconds, 3), "waited": round(waited, 3)}
        with (self.run / "refresh.jsonl").open("a", encoding="utf-8") as f:
            f.write(json.dumps(line) + "\n")

    def close(self) -> None:
        if self.worker is not None:
            self.worker.close()
            self.worker = None


def _name(step: int) -> str:
    return f"realm{step:06d}"


def _numbers(fingerprint: str) -> tuple[int, int]:
    """The first 120 bits of a hexadecimal fingerprint, as a tensor of whole numbers can hold them."""
    return int(fingerprint[:15], 16), int(fingerprint[15:30], 16)


def build(store: str, version: int, snapshot: str, name: str, index: str, threads: int) -> float:
    """Encode a corpus with a snapshot's weights (an interrupted build goes on); returns processor seconds."""
    torch.set_num_threads(threads)
    began, since = time.process_time(), time.monotonic()
    opened = Datastore.open(store, version=version)
    while True:
        try:
            Dense(opened, encoder=f"st:{snapshot}", index=index, name=name)
            return time.process_time() - began
        except FingerprintError:
            raise
        except StoreError as e:  # the process of a run that was killed may still be letting go
            if "is writing" not in str(e) or time.monotonic() - since > PATIENCE:
                raise
            time.sleep(0.2)
