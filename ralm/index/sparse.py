"""TF-IDF and BM25 over a datastore: one exact index for every form. `BM25(store).search(["who wrote faust"], k=10)`

Index folder: index/bm25, whatever the form; form, k1, b and delta are chosen when searching. A query is cut by the analyser that is
stored with the index, always. Repeated words of a query count repeatedly.

Statistics (N, df, avgdl) are those of the chunks alive in the opened version, exactly: a store that had documents removed scores
like one that never held them. A `where` filter restricts the hits and leaves the statistics alone. Only chunks that share a term
with the query are hits (under BM25L and BM25+ every other chunk would score the same constant); a shared term may be worth 0."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ralm.errors import FingerprintError, UsageError, unknown
from ralm.index import grow, kernels, manifest, topk
from ralm.index.analyse import Analyser, Settings, grown
from ralm.index.bm25 import FORMS, TF_IDF, Form, fill_impacts
from ralm.index.postings import Segment
from ralm.registry import real
from ralm.types import Hits

AS_STORED = grow.AS_STORED
PIECE = 128  # queries searched together
MEMORY = 1 << 20  # distinct query terms remembered
MANY = 256  # queries that pay for bounds under a new filter


class Sparse:
    """A retriever of one form. Use BM25 or TFIDF."""

    def __init__(self, store, form: Form, k1: float, b: float, delta: float, wish: grow.Wish, threads: int = 1):
        if not (all(map(real, (k1, b, delta))) and k1 >= 0 and 0 <= b <= 1 and delta >= 0):
            raise UsageError(f"k1 = {k1}, b = {b}, delta = {delta} do not go together: k1 and delta are numbers from 0 on, b is "
                             "one from 0 to 1")
        if threads < 1:
            raise UsageError(f"threads = {threads}: at least 1")
        self.store, self.form, self.k1, self.b, self.delta, self.threads = store, form, float(k1), float(b), float(delta), threads
        self._wish, self._guard, self._view = wish, threading.Lock(), None
        self._opened()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.form.name}, k1={self.k1}, b={self.b}, delta={self.delta})"

    @property
    def settings(self) -> Settings:
        """How the index cuts text."""
        return self._opened().analyser.settings

    def search(self, queries: Sequence[str], k: int = 10, where: str | None = None, exclude: Sequence[str] = ()) -> Hits:
        """The k best chunks of each query among those that match `where` and are not of the documents `exclude`. Exact.

        Returns Hits [Q, k]: ties by ascending id, padded with (-1, -inf). Raises UsageError for one string instead of several
        and for a negative k."""
        if isinstance(queries, str):
            raise UsageError("search takes a list of queries, this is one text: search([text])")
        if k < 0:
            raise UsageError(f"k = {k}: at least 0")
        view, hits = self._opened(), Hits.empty(len(queries), k)
        if where or len(exclude):
            masks = view.masks(self.store.allow(where=where, exclude=exclude))
            spans = [topk.spans_of(mask) for mask in masks]
        else:
            masks, spans = view.alive, view.spans
        which = (where, tuple(exclude)) if masks is not view.alive else None
        width = min(k, sum(map(len, masks)))
        if not len(queries) or not width:
            return hits
        with self._guard:
            jobs = view.plan(queries, self, which, masks)
        step = max(1, min(PIECE, -(-len(queries) // (4 * self.threads)) if self.threads > 1 else PIECE))

        def run(first: int) -> None:
            piece = slice(first, min(first + step, len(queries)))
            n = piece.stop - first
            keys, held, floor = np.empty((n, 2 * width + topk.BLOCK), np.int64), np.zeros(n, np.int64), np.zeros(n, np.float32)
            for s, asked, mask, span, shift in zip(view.segments, jobs.asked, masks, spans, view.shifts):
                topk.search(jobs.ptr[first:piece.stop + 1], jobs.terms, jobs.weights, jobs.base[piece], asked.numbers, asked.slots,
                            asked.tops, s.indptr, s.rows, asked.impacts, asked.levels, asked.offsets, mask, span, shift,
                            keys, held, floor)
            topk.unpack(topk.ranked(keys, held), held, view.row_ids, hits.scores[piece], hits.ids[piece])

        if self.threads == 1:
            for first in range(0, len(queries), step):
                run(first)
        else:
            with ThreadPoolExecutor(self.threads) as pool:
                list(pool.map(run, range(0, len(queries), step)))
        return hits

    def _opened(self) -> View:
        """The view of the version the store is at; another one after the store has changed."""
        key = tuple((s.id, s.version) for s, _ in leaves(self.store))
        with self._guard:
            if self._view is None or self._view.key != key:
                self._view = None  # unmaps the old one first
                self._view = View(self.store, key, self._wish)
            return self._view


class BM25(Sparse):
    """BM25 in the form robertson, lucene, atire, bm25l or bm25+ (Kamphuis and others, ECIR 2020), over title and text as one field.

    k1, b and delta (None: the form's own) apply to this searcher. stemmer (none or a Snowball language), stop (none, english, or a
    list) and title belong to the index: the first to build it decides, later ones may leave them out. Building takes the store's
    write lock; an index that is complete is opened without. Raises FingerprintError where the index was made otherwise."""

    def __init__(self, store, form: str = "lucene", k1: float = 1.5, b: float = 0.75, delta: float | None = None,
                 stemmer: str | None = AS_STORED, stop: str | Sequence[str] | None = AS_STORED, title: bool | str = AS_STORED,
                 threads: int = 1):
        if form not in FORMS:
            raise unknown("form of BM25", str(form), FORMS)
        super().__init__(store, FORMS[form], k1, b, FORMS[form].delta if delta is None else delta,
                         grow.Wish(stemmer, stop, title), threads)


class TFIDF(Sparse):
    """TF-IDF as tf / |d| * ln(N / df), over the same index as BM25 (and with the same stemmer, stop and title)."""

    def __init__(self, store, stemmer: str | None = AS_STORED, stop: str | Sequence[str] | None = AS_STORED,
                 title: bool | str = AS_STORED, threads: int = 1):
        super().__init__(store, TF_IDF, 0.0, 0.0, 0.0, grow.Wish(stemmer, stop, title), threads)


class Asked:
    """What has been worked out in one segment for the terms asked for: numbers, slots and tops by term, and what topk.py reads.

    impacts (float32) are by posting. levels and offsets have a row for each term with a slot: those in more than half as many rows
    as there are blocks. The pages of these three come into being when they are written."""

    def __init__(self, segment: Segment, alive: np.ndarray):
        self.segment, self.alive, self.blocks, self.terms, self.used = segment, alive, topk.blocks_of(len(segment.ids)), 0, 0
        self.numbers, self.slots, self.tops = np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.float32)
        many = int(np.count_nonzero(2 * np.diff(segment.indptr) > self.blocks))
        self.impacts = np.empty(len(segment.rows), np.float32)
        self.levels = np.empty((many, topk.PARTS, self.blocks), np.uint8)
        self.offsets = np.empty((many, self.blocks + 1), np.int32)

    def learn(self, numbers: np.ndarray, fill: Callable) -> None:
        """The next terms, by their numbers in the segment (-1: not there). fill(segment, numbers, out) computes impacts."""
        s, first, stop = self.segment, self.terms, self.terms + len(numbers)
        many = (numbers >= 0) & (2 * (s.indptr[numbers + 1] - s.indptr[numbers]) > self.blocks)
        self.numbers, self.slots, self.tops = (grown(a, stop) for a in (self.numbers, self.slots, self.tops))
        self.numbers[first:stop], self.slots[first:stop] = numbers, np.where(many, self.used + np.cumsum(many) - 1, -1)
        self.terms, self.used = stop, self.used + int(many.sum())
        fill(s, numbers, self.impacts)
        topk.summarise(numbers, self.slots[first:stop], s.indptr, s.rows, self.impacts, self.alive, self.tops[first:stop],
                       self.levels, self.offsets)

    def narrowed(self, under: Narrow, terms: np.ndarray) -> Asked:
        """The same with bounds of only the rows that a filter allows, worked out for these terms where they were not yet."""
        s, out = self.segment, copy(self)
        under.done, under.tops = (np.concatenate([a, np.zeros(self.terms - len(a), a.dtype)]) for a in (under.done, under.tops))
        new = np.unique(terms)
        new = new[(self.slots[new] >= 0) & ~under.done[new]]
        tops = np.empty(len(new), np.float32)
        topk.summarise(self.numbers[new], self.slots[new], s.indptr, s.rows, self.impacts, under.allow, tops, under.levels,
                       self.offsets)
        under.tops[new], under.done[new] = tops, True
        out.tops, out.levels = under.tops, under.levels
        return out


class Narrow:
    """Bounds under a filter, for one segment: tops and levels as in Asked, and for which terms they are done."""

    def __init__(self, asked: Asked, allow: np.ndarray):
        self.allow, self.levels = allow, np.empty_like(asked.levels)
        self.done, self.tops = np.empty(0, bool), np.empty(0, np.float32)


class Jobs(NamedTuple):
    """Queries ready for the kernel: where each begins, its terms, their weights, what every hit gets; and by segment, what is known
    of the terms."""

    ptr: np.ndarray
    terms: np.ndarray
    weights: np.ndarray
    base: np.ndarray
    asked: list[Asked]


class View:
    """The index of one version of a store, or of several as one: statistics, and what has been worked out for the terms asked for.

    `n` alive chunks, `average` their mean length, row_ids (of the union); by segment: ids (part of them), shifts (rows before),
    alive (bool), spans (of alive)."""

    def __init__(self, store, key: tuple, wish: grow.Wish):
        self.key, self.segments, self.ids, self._places = key, [], [], []
        found = {}
        for part, offset in leaves(store):
            found[part.path], segments = grow.opened(part, _like(store, part, wish))
            for _, segment in segments:
                self.segments.append(segment)
                self.ids.append(np.asarray(segment.ids) + offset)
                self._places.append((offset, part.chunk_rows))
        self.row_ids = np.concatenate([np.empty(0, np.int64), *self.ids])  # ascending
        self.shifts = np.cumsum([0, *map(len, self.ids)])
        if len(self.row_ids) > topk.LAST_ROW + 1:
            raise UsageError(f"{store.path} has {len(self.row_ids):,} chunks in its index, one search can tell at most "
                             f"{topk.LAST_ROW + 1:,} apart: search parts of it and merge their hits by score")
        self.ids = [self.row_ids[a:b] for a, b in pairwise(self.shifts)]
        self._settings = _common({path: m.settings for path, m in found.items()})
        self.alive = self.masks(store.allow())
        self._dead = [len(a) - int(a.sum()) for a in self.alive]
        self.n = sum(map(len, self.alive)) - sum(self._dead)
        total = sum(int(s.lengths[a].sum(dtype=np.int64)) for s, a in zip(self.segments, self.alive))
        self.average = total / self.n if total else 1.0  # without alive terms nothing can be found, whatever it is
        self._counts: dict[int, np.ndarray] = {}  # df of a segment with dead rows
        self.spans = [topk.spans_of(a) for a in self.alive]
        self._forget()

    def _forget(self) -> None:
        self.analyser = Analyser(self._settings)
        self._asked = [Asked(s, alive) for s, alive in zip(self.segments, self.alive)]
        self._filter, self._narrow = None, None
        self._df = np.empty(0, np.int64)

    def masks(self, allow: np.ndarray) -> list[np.ndarray]:
        """The bitmap over chunk ids as one bitmap over rows for each segment; rows younger than the opened version are out."""
        out = []
        for ids, (offset, rows) in zip(self.ids, self._places):
            mask = np.zeros(len(ids), bool)
            n = int(np.searchsorted(ids, offset + rows))
            if n and ids[n - 1] - ids[0] == n - 1:
                mask[:n] = allow[ids[0]:ids[0] + n]
            else:
                mask[:n] = allow[ids[:n]]
            out.append(mask)
        return out

    def df(self, segment: int, numbers: np.ndarray) -> np.ndarray:
        """int64: in how many alive rows of a segment the terms with these numbers occur (0 for number -1)."""
        if self._dead[segment] and segment not in self._counts:
            self._counts[segment] = self.segments[segment].df(self.alive[segment], self._dead[segment])
        if segment in self._counts:
            df = self._counts[segment][numbers]
        else:
            indptr = self.segments[segment].indptr
            df = indptr[numbers + 1] - indptr[numbers]
        return np.where(numbers >= 0, df, 0)

    def plan(self, queries: Sequence[str], how: Sparse, which: tuple | None, masks: list[np.ndarray]) -> Jobs:
        """Cut the queries, look up and work out what no query has asked for before. One thread at a time.

        which: the filter whose rows are in `masks`, None for no filter. One that comes again, or with many queries, gets bounds of
        its own: those of all rows say little about the few it allows."""
        if len(self.analyser.terms) > MEMORY:
            self._forget()
        known = len(self.analyser.terms)
        try:
            ptr, terms, counts, _ = self.analyser.count(queries)
            self._learn(known, how)
        except BaseException:
            self._forget()  # an interrupt between two segments must not leave one of them behind
            raise
        df = self._df[terms]
        weights = np.zeros(len(terms))
        weights[df > 0] = how.form.idf(df[df > 0].astype(np.float64), self.n) * counts[df > 0]
        sums = np.concatenate([np.zeros(1), np.cumsum(weights)])
        base = (sums[ptr[1:]] - sums[ptr[:-1]]) * how.form.absent(how.k1, how.delta)
        asked = [copy(a) for a in self._asked]
        if which is not None:
            if which != self._filter:
                self._narrow = None
            if self._narrow is None and (which == self._filter or len(queries) >= MANY):
                self._narrow = [Narrow(a, mask) for a, mask in zip(asked, masks)]
            self._filter = which
            if self._narrow is not None:
                asked = [a.narrowed(n, terms) for a, n in zip(asked, self._narrow)]
        return Jobs(ptr, terms, weights.astype(np.float32), base.astype(np.float32), asked)

    def _learn(self, first: int, how: Sparse) -> None:
        """Numbers, df and impacts of the query terms from `first` on."""
        new = [t.encode() for t in self.analyser.terms[first:]]
        if not new:
            return
        blob, starts = np.frombuffer(bytearray(b"".join(new)), np.uint8), np.zeros(len(new) + 1, np.int64)
        starts[1:] = np.cumsum([len(w) for w in new])
        absent = how.form.absent(how.k1, how.delta)

        def fill(s: Segment, numbers: np.ndarray, out: np.ndarray) -> None:
            fill_impacts(numbers, s.indptr, s.rows, s.tfs, s.lengths, self.average, how.form.tf, how.k1, how.b, how.delta, absent,
                         out)

        self._df = grown(self._df, first + len(new))
        df = self._df[first:first + len(new)]
        df[:] = 0
        for i, s in enumerate(self.segments):
            numbers = kernels.find(s.blob, s.starts, blob, starts)
            self._asked[i].learn(numbers, fill)
            df += self.df(i, numbers)


def leaves(store, offset: int = 0) -> Iterator[tuple]:
    """(datastore, offset of its chunk ids) for every store that a union is made of, or for the store itself."""
    for part, more in store.parts:
        if part is store:
            yield part, offset + more
        else:
            yield from leaves(part, offset + more)


def _like(store, part, wish: grow.Wish) -> grow.Wish:
    """A part of a union that has no index yet gets one like those of the other parts."""
    stored = [manifest.load(grow.folder_of(s)) for s, _ in [(part, 0), *leaves(store)]]
    there = next((m for m in stored if m is not None), None)
    return wish if stored[0] is not None or there is None else grow.Wish(*_shown(wish.settle(there)))


def _shown(settled: tuple[Settings, bool]) -> tuple:
    return settled[0].stemmer, list(settled[0].stop), settled[1]


def _common(settings: dict[Path, Mapping[str, Any]]) -> Settings:
    """The analyser of all parts. Raises FingerprintError where they are not the same: the terms would not be."""
    (path, ours), *others = settings.items()
    for other, theirs in others:
        for key in ("stemmer", "stop", "title", *ours):
            if ours[key] != theirs.get(key):
                raise FingerprintError(
                    f"the sparse indexes of {path} and {other} were made with {key} = {ours[key]!r} and {theirs.get(key)!r}, they "
                    f"cannot be searched as one: rebuild one like the other (ralm index {other} --index bm25:… --rebuild)")
    return Settings.of(ours["stemmer"], ours["stop"])
