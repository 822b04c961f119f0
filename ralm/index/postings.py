"""Segments of a sparse index: what one append wrote, as memory-mapped arrays that never change.

    ids int64 [R]       chunk ids, ascending            lengths uint32 [R]   terms in each row
    blob uint8, starts int64 [V+1]                      the vocabulary, sorted by bytes
    indptr int64 [V+1], rows int32 [P], tfs [P]         postings: the rows of a term, ascending, and how often each holds it
    row_ptr int64 [R+1], terms int32 [P]                the other way round: the distinct terms of a row

tfs are uint8 where they fit, uint16 or uint32 otherwise. The way round by rows is there for removals: what a dead row adds to the
statistics can be subtracted without reading all postings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from ralm.errors import StoreError
from ralm.index import kernels, manifest
from ralm.index.analyse import Analyser, Settings

FLUSH = 24_000_000  # postings held in memory before a segment is written: about 400 MB at the peak
RUNS = 4_000_000  # distinct runs before a segment is written: bounds the analyser's table
FAN = 8  # so many segments of a size class become one of the next
LARGEST = 1_000_000  # rows; segments above it are not merged any further, which bounds what one merge costs
NAMES = ("ids", "lengths", "blob", "starts", "indptr", "rows", "tfs", "row_ptr", "terms")


@dataclass(frozen=True)
class Segment:
    """One segment, opened. Numbers: R rows, V terms, P postings (see above)."""

    ids: np.ndarray
    lengths: np.ndarray
    blob: np.ndarray
    starts: np.ndarray
    indptr: np.ndarray
    rows: np.ndarray
    tfs: np.ndarray
    row_ptr: np.ndarray
    terms: np.ndarray

    def df(self, alive: np.ndarray, dead: int) -> np.ndarray:
        """int64 [V]: in how many of the alive rows (bool [R]) each term occurs."""
        if not dead:
            return np.diff(self.indptr)
        return kernels.document_frequency(self.indptr, self.rows, self.row_ptr, self.terms, alive, dead)


def open_segment(folder: Path, part: manifest.Part) -> Segment:
    """Map a segment's files. Raises StoreError where a file is missing or has another size than the manifest says."""
    manifest.sizes(folder, part)
    arrays = {}
    for name in NAMES:
        file = folder / part.name / f"{name}.npy"
        try:
            # "c": a private mapping. The file is opened for reading only, and numba sees the same type as for arrays in memory.
            arrays[name] = np.asarray(np.lib.format.open_memmap(file, mode="c"))
        except ValueError as e:
            raise StoreError(f"{file} is not what was written ({e}); delete {folder} and build it again with ralm index") from e
    return Segment(**arrays)


class Writer:
    """Collects analysed rows in memory and writes them as one segment."""

    def __init__(self, settings: Settings, title: bool):
        self.analyser, self.title = Analyser(settings), title
        self._ids, self._lengths, self._sizes, self._terms, self._counts = [], [], [], [], []
        self.postings = 0

    def full(self) -> bool:
        return self.postings >= FLUSH or self.analyser.runs >= RUNS

    def add(self, ids: np.ndarray, titles: Sequence[str], texts: Sequence[str]) -> None:
        whole = [f"{a}\n{b}" if a else b for a, b in zip(titles, texts)] if self.title else texts
        row_ptr, terms, counts, lengths = self.analyser.count(whole)
        self._ids.append(np.asarray(ids, np.int64))
        self._lengths.append(lengths.astype(np.uint32))
        self._sizes.append(np.diff(row_ptr))
        self._terms.append(terms.copy())  # a copy: the array it is part of has room for every repetition
        self._counts.append(_small(counts))
        self.postings += len(terms)

    def write(self, folder: Path, first: int) -> manifest.Part:
        """Write and seal the segment that covers chunk ids from `first` to the last one added."""
        words = [t.encode() for t in self.analyser.terms]
        by_name = sorted(range(len(words)), key=words.__getitem__)
        order = np.empty(len(words), np.int32)
        order[by_name] = np.arange(len(words), dtype=np.int32)
        ids, sizes = np.concatenate(self._ids), np.concatenate(self._sizes)
        row_ptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])
        terms, counts = _join(self._terms), _join(self._counts)
        indptr, rows, tfs = np.zeros(len(words) + 1, np.int64), np.empty(len(terms), np.int32), np.empty(len(terms), counts.dtype)
        kernels.invert(row_ptr, terms, counts, order, indptr, rows, tfs)
        del counts
        blob, starts = _blob([words[t] for t in by_name])
        lengths = np.concatenate(self._lengths)
        return _write(manifest.new_part(folder), first, int(ids[-1]) + 1, {
            "ids": ids, "lengths": lengths, "blob": blob, "starts": starts, "indptr": indptr, "rows": rows, "tfs": tfs,
            "row_ptr": row_ptr, "terms": terms})


def merge(folder: Path, segments: Sequence[Segment], keep: Sequence[np.ndarray], first: int, stop: int) -> manifest.Part:
    """One segment out of several with ascending ids: the rows that `keep` (bool [R] each) names, the terms that they hold.

    Postings go straight into the new files, mapped: memory holds the vocabularies and a few bytes a row and a term."""
    df = [s.df(k, int(len(k) - k.sum())) for s, k in zip(segments, keep)]
    maps, blob, starts = _union(segments, df)
    sizes = np.zeros(len(starts), np.int64)
    for m, d in zip(maps, df):
        sizes[m[m >= 0] + 1] += d[m >= 0]
    indptr = np.cumsum(sizes)
    rows_kept, total = sum(int(k.sum()) for k in keep), int(indptr[-1])
    path = manifest.new_part(folder)
    rows, terms = _room(path, "rows", np.int32, total), _room(path, "terms", np.int32, total)
    tfs = _room(path, "tfs", max((s.tfs.dtype for s in segments), key=lambda t: t.itemsize), total)
    row_ptr, head, row, n = np.zeros(rows_kept + 1, np.int64), indptr[:-1].copy(), 0, 0
    for s, k, m in zip(segments, keep, maps):
        to_row = np.where(k, np.cumsum(k) - 1 + row, -1).astype(np.int32)
        kernels.copy_postings(m, to_row, s.indptr, s.rows, s.tfs, head, rows, tfs)
        n = kernels.copy_forward(m, to_row, s.row_ptr, s.terms, n, row_ptr, terms)
        row += int(k.sum())
    del rows, terms, tfs  # unmapped: what was written is the file's now
    return _write(path, first, stop, {
        "ids": np.concatenate([s.ids[k] for s, k in zip(segments, keep)]), "blob": blob, "starts": starts, "indptr": indptr,
        "lengths": np.concatenate([s.lengths[k] for s, k in zip(segments, keep)]), "row_ptr": row_ptr})


def _union(segments: Sequence[Segment], df: Sequence[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """The vocabularies as one: for each segment the new number of each term (int32, -1 where its df is 0), then blob and starts."""
    ends = np.cumsum([0, *(len(s.blob) for s in segments)])
    ptr = np.cumsum([0, *(len(s.starts) - 1 for s in segments)])
    words = np.concatenate([s.blob for s in segments])
    begin = np.concatenate([s.starts[:-1] + at for s, at in zip(segments, ends)])
    end = np.concatenate([s.starts[1:] + at for s, at in zip(segments, ends)])
    numbers, blob, starts = kernels.merge_words(words, begin, end, ptr, np.concatenate(df) > 0)
    return [numbers[a:b] for a, b in pairwise(ptr)], blob, starts


def _room(path: Path, name: str, kind: type, n: int) -> np.ndarray:
    """A new array in a file of its own, mapped. Raises OSError where the disk is full."""
    return np.asarray(manifest.room(path / f"{name}.npy", kind, (n,)))


def crowded(parts: Sequence[manifest.Part]) -> int:
    """How many of the last parts should become one now: FAN or more that are not of a greater size class than the last one."""
    def tier(part):
        return 0 if part.rows < FAN else int(np.log(part.rows) / np.log(FAN) + 1e-9)

    n = 0
    while n < len(parts) and tier(parts[-1 - n]) <= tier(parts[-1]) and parts[-1 - n].rows < LARGEST:
        n += 1
    return n if n >= FAN else 0


def nothing(first: int, stop: int) -> manifest.Part:
    """A part that says: the chunk ids [first, stop) are covered, and none of them is stored any more."""
    return manifest.Part(f"none-{first}-{stop}", first, stop, 0, {})


def _write(path: Path, first: int, stop: int, arrays: Mapping[str, np.ndarray]) -> manifest.Part:
    for name, array in arrays.items():
        np.save(path / f"{name}.npy", array, allow_pickle=False)
    return manifest.seal(path, first, stop, len(arrays["ids"]))


def _blob(words: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    starts = np.zeros(len(words) + 1, np.int64)
    starts[1:] = np.cumsum([len(w) for w in words])
    return np.frombuffer(bytearray(b"".join(words)), np.uint8), starts


def _small(counts: np.ndarray) -> np.ndarray:
    top = int(counts.max(initial=0))
    return counts.astype(np.uint8 if top < 1 << 8 else np.uint16 if top < 1 << 16 else np.uint32)


def _join(parts: list[np.ndarray]) -> np.ndarray:
    """The concatenation; empties the list on the way, so that the parts are not held twice for long."""
    kind = max((p.dtype for p in parts), key=lambda t: t.itemsize)
    out, n = np.empty(sum(map(len, parts)), kind), 0
    for i, p in enumerate(parts):
        out[n:n + len(p)] = p
        n += len(p)
        parts[i] = None
    return out
