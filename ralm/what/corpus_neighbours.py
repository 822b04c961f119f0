"""The neighbours of a training corpus, found once and kept (Borgeaud et al. 2022, section 2.4): what a chunk may read is known
before training, and nothing of what it is cut from is among it.

    found = precompute(neighbours, rows, documents, k=2, folder="run/neighbours")      # int32 [N, L, k], -1 for none
    tokens, mask = neighbours.gather(found[i])                                         # [L, k, 2m]

    folder/neighbours.npy  int32 or int64 [N, L, k]     chunk numbers, best first
    folder/scores.npy      float32 [N, L, k]            the retriever's, -inf for none
    folder/state.json      what it was made from, and how many blocks of rows are done: a killed run goes on there

A neighbour of a row must not hold what the row is about to predict. exclude="document": no neighbour is of a document in the row.
exclude="row": neighbours of the same documents are allowed where neither N nor F touches the row's own tokens.

Hits are asked for deeper than k and filtered: a row has few documents, and asking for 64 costs little more than asking for 2. A
query that lacks some is asked again, deeper, and at last with its documents excluded in the search, so nothing is missed.
(A fusion ranks what its parts found for it; hits of it that are filtered are not quite those of a filtered fusion.)"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ralm import progress
from ralm.errors import FingerprintError, StoreError, UsageError, unknown
from ralm.index import manifest
from ralm.registry import whole
from ralm.types import Hits
from ralm.what.neighbours import NeighbourStore

BLOCK = 8192  # queries of a block: what a kill can cost, and what is searched together
DEPTHS = 62, 510  # hits beyond k that are asked for before documents are excluded in the search
EXCLUDE = ("document", "row")
Span = tuple[str, int, int]  # a document's id, and the tokens [from, to) of it that stand in a row


def precompute(neighbours: NeighbourStore, rows: np.ndarray, documents: Sequence[Collection[str]], k: int, folder: str | Path,
               spans: Sequence[Sequence[Span]] | None = None, exclude: str = "document", where: str | None = None,
               special: Collection[int] | None = None, held: np.ndarray | None = None) -> np.ndarray:
    """The k neighbours of every chunk of the rows, as a read-only map [N, L, k] of chunk numbers, -1 for none.

    rows: int [N, L m], the grid a model sees (BOS counted). documents: by row, the ids of those that are excluded whole. spans
    (exclude="row"): by row, the pieces of documents it is made of. special: tokens that are no text (default: BOS and EOS of the
    model); they are left out of what is looked up. held: int [N, L], which chunk of the store each chunk of the rows is,
    -1 for none: a dense retriever takes its vector. Work is kept block by block in `folder`; the same call goes on with it.
    Raises UsageError for shapes that do not fit, FingerprintError where the folder holds neighbours of something else."""
    task = Task(neighbours, np.asarray(rows), documents, spans, k, exclude, where, special, held)
    folder = Path(folder)
    ids, scores, done = _begun(folder, task)
    with progress.task(f"neighbours ({neighbours.retriever})", total=(len(task.rows) - done) * task.L, unit="chunks") as advance:
        for first in range(done, len(task.rows), task.block):
            here = slice(first, min(first + task.block, len(task.rows)))
            ids[here], scores[here] = task.found(here)
            ids.flush()
            scores.flush()
            _state(folder, task, here.stop)
            advance((here.stop - first) * task.L)
    del ids, scores
    return load(folder)[0]


def load(folder: str | Path) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """(chunk numbers [N, L, k], scores [N, L, k], what they were made from), mapped. Raises StoreError where not all are there."""
    state = _read(Path(folder))
    if state is None or state["done"] < state["rows"]:
        what = "no neighbours" if state is None else f"neighbours of {state['done']:,} of {state['rows']:,} rows"
        raise StoreError(f"{folder} holds {what}; run the precomputation (again), it goes on where it stopped")
    return *(np.load(Path(folder) / f"{n}.npy", mmap_mode="r", allow_pickle=False) for n in ("neighbours", "scores")), state


class Task:
    """What is looked up, and what must not be found."""

    def __init__(self, neighbours: NeighbourStore, rows: np.ndarray, documents: Sequence[Collection[str]],
                 spans: Sequence[Sequence[Span]] | None, k: int, exclude: str, where: str | None,
                 special: Collection[int] | None, held: np.ndarray | None):
        whole(1, k=k)
        if exclude not in EXCLUDE:
            raise unknown("exclude", str(exclude), EXCLUDE)
        m = neighbours.m
        if rows.ndim != 2 or rows.shape[1] % m or rows.dtype.kind not in "iu":
            raise UsageError(f"rows are {rows.dtype} {list(rows.shape)}: give token ids [N, L m], m = {m}")
        given = {"documents": documents} | ({"spans": spans or ()} if exclude == "row" else {})
        for name, each in given.items():
            if len(each) != len(rows):
                raise UsageError(f"{len(rows)} rows and {name} for {len(each)}: give one set for each row")
        self.neighbours, self.rows, self.documents, self.k = neighbours, rows, documents, k
        self.where, self.exclude = where, exclude
        self.spans = spans if exclude == "row" else [()] * len(rows)
        self.m, self.L = m, rows.shape[1] // m
        self.block = max(1, BLOCK // max(1, self.L))
        lm = neighbours.lm
        special = {getattr(lm, "bos", None), getattr(lm, "eos", None)} - {None} if special is None else special
        self.special = sorted({int(t) for t in special})
        if held is not None and np.shape(held) != (len(rows), self.L):
            raise UsageError(f"held is {list(np.shape(held))}, the rows have [{len(rows)}, {self.L}] chunks: give a number each")
        self.held = np.full((len(rows), self.L), -1) if held is None else np.asarray(held, np.int64)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """All that decides what is found."""
        who = hashlib.sha256(json.dumps([[sorted(d) for d in self.documents], [[list(s) for s in x] for x in self.spans]]).encode())
        return {"neighbours": self.neighbours.identity(), "m": self.m, "k": self.k, "exclude": self.exclude, "where": self.where,
                "special": self.special, "rows": len(self.rows), "chunks": self.L, "block": self.block,
                "tokens": hashlib.sha256(np.ascontiguousarray(self.rows, np.int64).data).hexdigest(), "documents": who.hexdigest(),
                "held": hashlib.sha256(np.ascontiguousarray(self.held, np.int64).data).hexdigest()}

    def found(self, here: slice) -> tuple[np.ndarray, np.ndarray]:
        """(ids [n, L, k], scores [n, L, k]) of some rows."""
        row = np.repeat(np.arange(here.start, here.stop), self.L)
        barred = Barred(self, range(here.start, here.stop))
        ids, scores = np.full((len(row), self.k), -1, np.int64), np.full((len(row), self.k), -np.inf, np.float32)
        left, most, search = np.arange(len(row)), barred.most, self._search(here)
        for beyond in DEPTHS:
            if not len(left):
                break
            depth = self.k + int(min(beyond, most[row[left] - here.start].max()))
            hits = search(left, depth)
            ids[left], scores[left], lacking = self._kept(hits.ids, hits.scores, barred.bars(row[left], hits.ids))
            left = left[lacking & (hits.ids[:, -1] >= 0) & (most[row[left] - here.start] > depth - self.k)]
        for r in np.unique(row[left]).tolist():  # few: their nearest hundreds are all of their own documents
            mine = left[row[left] == r]
            alone = self.exclude == "document"
            depth = self.k + (0 if alone else int(most[r - here.start]))
            hits = search(mine, depth, sorted(self.documents[r]) if alone else ())
            ids[mine], scores[mine], _ = self._kept(hits.ids, hits.scores, barred.bars(row[mine], hits.ids))
        shape = here.stop - here.start, self.L, self.k
        return ids.reshape(shape), scores.reshape(shape)

    def _search(self, here: slice):
        """A call that finds (which of the chunks of these rows, depth, excluded documents) -> Hits."""
        held, chunks = self.held[here].reshape(-1), self.rows[here].reshape(-1, self.m)
        texts = {q: self.neighbours.text(c[~np.isin(c, self.special)]) for q, c in enumerate(chunks) if held[q] < 0}

        def search(which: np.ndarray, depth: int, exclude: Sequence[str] = ()) -> Hits:
            out, own = Hits.empty(len(which), depth), held[which] >= 0
            for at, find, what in ((own, self.neighbours.search_held, held[which[own]]),
                                   (~own, self.neighbours.search, [texts[q] for q in which[~own].tolist()])):
                if len(what):
                    found = find(what, depth, self.where, exclude)
                    out.ids[at], out.scores[at] = found.ids, found.scores
            return out
        return search

    def _kept(self, ids: np.ndarray, scores: np.ndarray, bad: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The first k hits that are not bad, and which queries have fewer."""
        good = (ids >= 0) & ~bad
        rank = np.cumsum(good, 1) - 1
        q, at = np.nonzero(good & (rank < self.k))
        out = np.full((len(ids), self.k), -1, np.int64), np.full((len(ids), self.k), -np.inf, np.float32)
        out[0][q, rank[q, at]], out[1][q, rank[q, at]] = ids[q, at], scores[q, at]
        return *out, out[0][:, -1] < 0


class Barred:
    """What some rows must not find: documents as a whole, and pieces of documents.

    most int64 [n]: how many chunks that is at most, by row."""

    def __init__(self, task: Task, rows: Iterable[int]):
        self.task, self.rows = task, list(rows)
        names = {d for r in self.rows for d in task.documents[r]} | {s[0] for r in self.rows for s in task.spans[r]}
        numbers, sizes = task.neighbours.numbers(sorted(names)), task.neighbours.sizes()
        self.held, whole_, pieces, self.most = len(sizes), [], [], np.zeros(len(self.rows), np.int64)
        for i, r in enumerate(self.rows):
            for d in {n for name in task.documents[r] for n in numbers.get(name, ())}:
                whole_.append(r * self.held + d)
                self.most[i] += sizes[d]
            for name, a, b in task.spans[r]:
                for d in numbers.get(name, ()) if a < b else ():
                    pieces.append((r * self.held + d, a, b))
                    self.most[i] += min(sizes[d], (b - a) // task.m + 3)
        self.whole = np.unique(np.array(whole_, np.int64))
        self.pieces = np.array(sorted(pieces), np.int64).reshape(-1, 3)

    def bars(self, row: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """bool [Q, K]: which hits of queries of these rows must not be."""
        document, token = self.task.neighbours.places(ids)
        key = np.where(ids < 0, -1, row[:, None] * self.held + document)
        bad = np.isin(key, self.whole)
        if len(self.pieces):
            keys, a, b = self.pieces.T
            first, stop = np.searchsorted(keys, key), np.searchsorted(keys, key, side="right")
            while (more := first < stop).any():  # once for every piece that one row has of one document
                piece, t = first[more], token[more]
                bad[more] |= (t < b[piece]) & (t + 2 * self.task.m > a[piece])
                first[more] += 1
        return bad


# ---- files ------------------------------------------------------------------------------------------------------------


def _begun(folder: Path, task: Task) -> tuple[np.ndarray, np.ndarray, int]:
    """(ids, scores, rows that are done), mapped for writing; new ones where the folder holds none."""
    state, facts, shape = _read(folder), task.facts, (len(task.rows), task.L, task.k)
    if state is None:
        folder.mkdir(parents=True, exist_ok=True)
        kind = np.int32 if len(task.neighbours.alive()) < 2**31 else np.int64
        ids, scores = (manifest.room(folder / f"{n}.npy", t, shape) for n, t in (("neighbours", kind), ("scores", np.float32)))
        _state(folder, task, 0)
        return ids, scores, 0
    for key, value in facts.items():
        if state.get(key) != value:
            raise FingerprintError(f"{folder} holds neighbours made with {key} = {state.get(key)!r}, this asks for {value!r}: use "
                                   f"another folder, or delete {folder}")
    return *(np.load(folder / f"{n}.npy", mmap_mode="r+", allow_pickle=False) for n in ("neighbours", "scores")), state["done"]


def _state(folder: Path, task: Task, done: int) -> None:
    temporary = folder / f"state.{os.getpid()}.tmp"
    with temporary.open("w", encoding="utf-8") as f:
        json.dump(task.facts | {"done": done}, f, indent=1, sort_keys=True)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(folder / "state.json")


def _read(folder: Path) -> dict[str, Any] | None:
    file = folder / "state.json"
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as e:
        raise StoreError(f"{file} is damaged ({e}); delete {folder} and run the precomputation again") from e
