"""A datastore seen as chunks of m tokens: what the indexes over neighbours are made of, and where [N, F] comes from.

It has the reading interface of a datastore (ids, texts, allow, parts, lock, path), so index/ builds, extends, searches and compacts
over it as over any other; its path is neighbours/NAME. A chunk's number is never given twice. Which chunks are alive is asked of
the datastore at every search."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ralm.errors import StoreError
from ralm.index import manifest
from ralm.types import Chunk
from ralm.what import neighbour_build

FILTERS = 16  # bitmaps that are remembered


class TokenChunks:
    """The chunks of one datastore as of its version, made or extended with `lm` where documents are missing.

    as_it_is: whatever is there, complete or not. chunk_rows: 1 + the largest number of a chunk that this version may see. Raises
    what neighbour_build.ready raises."""

    def __init__(self, store, name: str = "", lm: Any = None, m: int | None = None, as_it_is: bool = False):
        self.store, self.name, self.id, self.version = store, str(name or "default"), store.id, store.version
        self.path: Path = neighbour_build.folder_of(store, name)
        self.now, self._maps = manifest.opened(lambda: neighbour_build.ready(store, name, lm, m, as_it_is), self._map)
        self.settings = dict(self.now.settings)
        self.m: int = self.settings["m"]
        self.split = f"tokens:{self.m}/{self.settings['fingerprint'][:16]}"
        self._table()
        self._filtered: OrderedDict[tuple, np.ndarray] = OrderedDict()

    def _map(self, now: manifest.Manifest) -> list[neighbour_build.Mapped]:
        folder, parts = neighbour_build.chunks_of(self.store, self.name), [p for p in now.parts if p.files]
        for part in parts:
            manifest.sizes(folder, part)
        return [neighbour_build.mapped(folder, p) for p in parts]

    def _table(self) -> None:
        """Per document: revision, number of its first chunk, its first token and its first row, counted over all parts."""
        sizes = np.array([len(x.tokens) for x in self._maps], np.int64)
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)  # token at which each part begins
        each = [x.documents + np.array([0, 0, start]) for x, start in zip(self._maps, self._starts.tolist())]
        self.revs, self.first, tokens = np.concatenate([np.zeros((0, 3), np.int64), *each]).T.copy()
        self.tokens = np.append(tokens, self._starts[-1])
        self.counts = -(-np.diff(self.tokens) // self.m)  # chunks of each document
        self.rows = np.concatenate([[0], np.cumsum(self.counts)])
        self.ends = np.concatenate([np.zeros(0, np.uint32), *(x.ends for x in self._maps)])
        last = int(np.searchsorted(self.revs, self.store.revision_rows)) - 1
        self.chunk_rows = int(self.first[last] + self.counts[last]) if last >= 0 else 0
        if ((np.diff(self.revs) <= 0).any() or (np.diff(self.tokens) < 0).any() or (np.diff(self.first) < self.counts[:-1]).any()
                or len(self.ends) != self.rows[-1]):
            raise neighbour_build.damaged(neighbour_build.chunks_of(self.store, self.name), "its documents are not in order")

    def __repr__(self) -> str:
        return f"TokenChunks({self.path}, {len(self.ends):,} chunks of {self.m} tokens)"

    def __len__(self) -> int:
        """Chunks held, those of removed documents among them."""
        return len(self.ends)

    # ---- sets of chunks -------------------------------------------------------------------------------------------------

    @property
    def parts(self) -> list[tuple[TokenChunks, int]]:
        return [(self, 0)]

    def lock(self) -> AbstractContextManager[None]:
        """Be the one writer of the datastore, whose indexes these are."""
        return self.store.lock()

    def refresh(self) -> TokenChunks:
        """Never another version: whoever opened this opens another."""
        return self

    def _numbers(self, keep: np.ndarray) -> np.ndarray:
        """int64, ascending: the chunks of the documents (bool [D]) kept."""
        counts = self.counts[keep]
        return np.repeat(self.first[keep] - (np.cumsum(counts) - counts), counts) + np.arange(int(counts.sum()))

    def allow(self, where: str | None = None, exclude: Sequence[str] = ()) -> np.ndarray:
        """bool [chunk_rows], read-only: as of a datastore. Raises UsageError for a wrong filter."""
        key = where, tuple(exclude), self.store.version
        if (found := self._filtered.get(key)) is None:
            revisions, keep = self.store.revisions(where, exclude), np.zeros(len(self.revs), bool)
            seen = self.revs < len(revisions)  # younger ones than the opened version are out
            keep[seen] = revisions[self.revs[seen]]
            found = np.zeros(self.chunk_rows, bool)
            numbers = self._numbers(keep)
            found[numbers[numbers < self.chunk_rows]] = True
            found.flags.writeable = False
            self._filtered[key] = found
            while len(self._filtered) > FILTERS:
                self._filtered.popitem(last=False)
        return found

    @property
    def alive(self) -> np.ndarray:
        return self.allow()

    def chunk_ids(self) -> np.ndarray:
        """int64, ascending: the chunks of the documents of this version."""
        return np.flatnonzero(self.alive)

    @cached_property
    def _stored(self) -> np.ndarray:
        return np.isin(self.revs, self.store.stored_revisions())

    def stored_ids(self) -> np.ndarray:
        """int64, ascending: all chunks whose document is still stored."""
        return self._numbers(self._stored)

    # ---- where a chunk is ---------------------------------------------------------------------------------------------------

    def document(self, ids: np.ndarray) -> np.ndarray:
        """int64, the shape of ids: which document (its place in `revs`) each chunk is of. Raises StoreError for a number that no
        chunk has (any more)."""
        ids = np.asarray(ids, np.int64)
        at = np.searchsorted(self.first, ids, side="right") - 1
        wrong = (at < 0) | (ids - self.first[at] >= self.counts[at]) if len(self.first) else np.ones(ids.shape, bool)
        if wrong.any():
            raise StoreError(f"{self.path} has no chunk {ids[wrong].flat[0]} (any more); search again, or precompute again the "
                             "neighbours that name it")
        return at

    def places(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64: the document (its place in `revs`) of each chunk, and where in it the chunk's first token stands."""
        at = self.document(ids)
        return at, (np.asarray(ids, np.int64) - self.first[at]) * self.m

    def gather(self, ids: np.ndarray, out: np.ndarray, mask: np.ndarray) -> None:
        """Fill out int64 [n, 2m] and mask bool [n, 2m] with [N, F] of n chunks: F is what follows in the same document."""
        at, offset = self.places(ids)
        first, stop = self.tokens[at] + offset, self.tokens[at + 1]
        part = np.searchsorted(self._starts, first, side="right") - 1
        reach = np.arange(2 * self.m)
        mask[:] = first[:, None] + reach < stop[:, None]
        for p in np.unique(part).tolist():
            here = np.flatnonzero(part == p)
            tokens, begin = self._maps[p].tokens, int(self._starts[p])
            index = np.minimum(first[here, None] - begin + reach, len(tokens) - 1)
            out[here] = np.where(mask[here], tokens[index], 0)

    def largest(self) -> int:
        """The largest token that is held, -1 where there is none."""
        return max((int(x.tokens.max()) for x in self._maps if len(x.tokens)), default=-1)

    # ---- texts ----------------------------------------------------------------------------------------------------------------

    def spans(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64: the characters [start, end) of its document that each chunk is."""
        at = self.document(ids)
        row = self.rows[at] + np.asarray(ids, np.int64) - self.first[at]
        before = np.where(row == self.rows[at], 0, self.ends[row - 1])
        return before.astype(np.int64), self.ends[row].astype(np.int64)

    def chunks(self, ids: Sequence[int]) -> list[Chunk]:
        """The chunks with these numbers, in the order asked, whether this version holds them or not."""
        if not len(ids):
            return []
        ids = np.asarray(ids, np.int64).reshape(-1)
        revs = self.revs[self.document(ids)]
        sources = self.store.state(np.unique(revs).tolist())
        spans = (s.tolist() for s in self.spans(ids))
        return [Chunk(id, (s := sources[rev]).id, start, end, s.text[start:end], s.title, s.source)
                for id, rev, start, end in zip(ids.tolist(), revs.tolist(), *spans)]

    def document_ids(self, ids: Sequence[int]) -> list[str]:
        """The id of the document each chunk is of."""
        wanted, back = np.unique(self.revs[self.document(np.asarray(ids, np.int64).reshape(-1))], return_inverse=True)
        names = self.store.names(wanted)
        return [names[i] for i in back.tolist()]

    def texts(self, first: int = 0, batch: int = 4096) -> Iterator[tuple[np.ndarray, list[str], list[str]]]:
        """(numbers, titles, texts) of all stored chunks from `first` on, in batches. Titles are '': a chunk is its tokens."""
        ids, texts = [], []
        begin = max(0, int(np.searchsorted(self.first, first, side="right")) - 1)
        states = self.store.states(int(self.revs[begin])) if len(self.revs) else iter(())
        for rev, source in states:
            at = int(np.searchsorted(self.revs, rev))
            if at == len(self.revs) or self.revs[at] != rev:
                continue  # added after the chunks were opened
            ends = self.ends[self.rows[at]:self.rows[at + 1]].tolist()
            for i, (a, b) in enumerate(zip([0, *ends], ends), int(self.first[at])):
                if i >= first:
                    ids.append(i)
                    texts.append(source.text[a:b])
            for _ in range(len(ids) // batch):
                yield np.array(ids[:batch], np.int64), [""] * batch, texts[:batch]
                ids, texts = ids[batch:], texts[batch:]
        if ids:
            yield np.array(ids, np.int64), [""] * len(ids), texts
