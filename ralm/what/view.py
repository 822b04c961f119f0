"""One version of a datastore, as a reader sees it: small arrays in memory (a few bytes per chunk), texts on disk.

A view never changes; a Datastore swaps its view for a newer one. Row positions come from sorted id arrays
(`np.searchsorted`), so a random read is one batched take from the texts table."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ralm.errors import StoreError
from ralm.types import Chunk, Document
from ralm.what import filters, tables
from ralm.what.rows import id_of, key_of, row

REMEMBER = 64_000_000  # characters of document text kept for the next read
FILTERS = 16  # filters kept as bitmaps


class Source(NamedTuple):
    """The revision of a document that a chunk was cut from."""

    id: str
    title: str
    source: str
    text: str


class View:
    """The documents table at one version, with the texts and chunks tables as they are now (a superset)."""

    def __init__(self, path: Path, facts: dict[str, Any], version: int | None = None):
        self.path, self.facts = path, facts
        self.documents = tables.table(path, "documents", version)  # before the others: they hold what it names
        self.texts = tables.table(path, "texts")
        self.chunks_table = tables.table(path, "chunks")
        self.version: int = self.documents.version
        self._recent: OrderedDict[int, Source] = OrderedDict()
        self._recent_size = 0
        self._filtered: OrderedDict[str | None, np.ndarray] = OrderedDict()
        self._guard = threading.Lock()

    def _column(self, dataset, *names: str, addresses: bool = False) -> list[np.ndarray]:
        with tables.guard(lambda e: self._lost(dataset, e)):
            table = dataset.to_table(columns=list(names), with_row_id=addresses)
        names = (*names, "_rowid") if addresses else names
        arrays = [table.column(n).to_numpy() for n in names]
        return [a.view(np.int64) if a.dtype == np.uint64 and n != "_key" else a for n, a in zip(names, arrays)]  # no copies

    def _lost(self, dataset, error: BaseException) -> StoreError:
        floor = tables.load(self.path)["floor"]
        if self.version < floor:
            return StoreError(f"{self.path} was purged (versions below {floor} are gone) since version {self.version} of it was "
                              "opened; open it again")
        return tables.damaged(Path(dataset.uri), error)

    # ---- arrays, loaded once -----------------------------------------------------------------------------------------

    @cached_property
    def _rows(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """rev, key and number of chunks per document, by row position."""
        rev, key, chunks, self._addresses = self._column(self.documents, "rev", "_key", "_chunks", addresses=True)
        return rev, key, chunks

    @cached_property
    def _by_key(self) -> tuple[np.ndarray, np.ndarray]:
        order = np.argsort(self._rows[1])
        return self._rows[1][order], order

    @cached_property
    def _by_rev(self) -> tuple[np.ndarray, np.ndarray]:
        order = np.argsort(self._rows[0], kind="stable")
        return self._rows[0][order], order

    @cached_property
    def _text_rev(self) -> np.ndarray:
        return self._ascending(self._column(self.texts, "rev")[0], self.texts)

    @cached_property
    def _chunk(self) -> tuple[np.ndarray, np.ndarray]:
        """id and rev of every stored chunk, ascending in id."""
        id, rev = self._column(self.chunks_table, "id", "rev")
        return self._ascending(id, self.chunks_table), rev

    @cached_property
    def _span(self) -> tuple[np.ndarray, np.ndarray]:
        start, end = self._column(self.chunks_table, "start", "end")
        return start, end

    def _ascending(self, ids: np.ndarray, dataset) -> np.ndarray:
        if len(ids) > 1 and not (ids[1:] > ids[:-1]).all():
            raise tables.damaged(Path(dataset.uri), ValueError("its row numbers are not ascending"))
        return ids

    # ---- sets of chunks ----------------------------------------------------------------------------------------------

    @cached_property
    def n_documents(self) -> int:
        return self.documents.count_rows()

    @cached_property
    def n_chunks(self) -> int:
        return int(self._rows[2].sum())

    @cached_property
    def chunk_rows(self) -> int:
        return max(int(self.facts["next_chunk"]), int(self._chunk[0][-1]) + 1 if len(self._chunk[0]) else 0)

    def _bitmap(self, revs: np.ndarray) -> np.ndarray:
        """bool [chunk_rows]: the chunks of these document revisions."""
        ids, rev = self._chunk
        top = max(int(rev.max(initial=-1)), int(revs.max(initial=-1))) + 1
        wanted = np.zeros(top, bool)
        wanted[revs] = True
        out = np.zeros(self.chunk_rows, bool)
        if len(ids) and ids[-1] - ids[0] == len(ids) - 1:  # none was dropped: no list of 8 bytes a chunk is needed
            out[ids[0]:ids[-1] + 1] = wanted[rev]
        else:
            out[ids[wanted[rev]]] = True
        return out

    @cached_property
    def revision_rows(self) -> int:
        return max(int(self.facts["next_rev"]), int(self._text_rev[-1]) + 1 if len(self._text_rev) else 0)

    def revisions(self, where: str | None = None, exclude: Sequence[str] = ()) -> np.ndarray:
        """See Datastore.revisions."""
        revs = self._rows[0]
        if where is not None and where.strip():
            revs = filters.revs(self.documents, where.strip()).to_numpy().astype(np.int64)
        out = np.zeros(self.revision_rows, bool)
        out[revs] = True
        if len(exclude):
            out[self.revs_of(list(self.positions(exclude).values()))] = False
        out.flags.writeable = False
        return out

    def allow(self, where: str | None = None, exclude: Sequence[str] = ()) -> np.ndarray:
        """See Datastore.allow."""
        where = where.strip() or None if where else None
        with self._guard:
            bitmap = self._filtered.get(where)
            if bitmap is not None:
                self._filtered.move_to_end(where)
        if bitmap is None:
            bitmap = self._matching(where)
            bitmap.flags.writeable = False
            with self._guard:
                self._filtered[where] = bitmap
                while len(self._filtered) > FILTERS:
                    self._filtered.pop(next(k for k in self._filtered if k is not None))
        if not len(exclude):
            return bitmap
        bitmap = bitmap.copy()
        ids, rev = self._chunk
        for position in self.positions(exclude).values():
            first, stop = np.searchsorted(rev, [self._rows[0][position], self._rows[0][position] + 1])  # ids and revs grow together
            bitmap[ids[first:stop]] = False
        bitmap.flags.writeable = False
        return bitmap

    def _matching(self, where: str | None) -> np.ndarray:
        if where is not None:
            revs = filters.revs(self.documents, where).to_numpy().astype(np.int64)
            return self._bitmap(revs)
        alive = self._bitmap(self._rows[0])
        if int(alive.sum()) != self.n_chunks:
            raise self._lost(self.chunks_table, ValueError(f"{int(alive.sum())} chunks stored, {self.n_chunks} expected"))
        return alive

    # ---- documents ---------------------------------------------------------------------------------------------------

    def positions(self, ids: Sequence[str]) -> dict[str, int]:
        """Row positions in the documents table, for those of the ids that are there."""
        names = list(dict.fromkeys(map(id_of, ids)))
        keys, order = self._by_key
        wanted = np.array([key_of(n) for n in names], np.uint64)
        first = np.searchsorted(keys, wanted)
        found = [int(order[j]) for i, w in zip(first.tolist(), wanted) for j in self._run(keys, i, w)]
        if not found:
            return {}
        rows = self._take(self.documents, found, ["id"]).column("id").to_pylist()  # a key is 8 bytes: the id decides
        named = set(names)
        return {id: at for id, at in zip(rows, found) if id in named}

    @staticmethod
    def _run(keys: np.ndarray, at: int, key: np.uint64) -> Iterator[int]:
        while at < len(keys) and keys[at] == key:
            yield at
            at += 1

    def held(self, ids: Sequence[str]) -> dict[str, tuple[str, str]]:
        """(content hash, source) of those of the ids that are there."""
        at = self.positions(ids)
        if not at:
            return {}
        rows = self._take(self.documents, list(at.values()), ["sha256", "source"])
        return dict(zip(at, zip(*(c.to_pylist() for c in rows.columns))))

    def revs_of(self, positions: Sequence[int]) -> np.ndarray:
        return self._rows[0][np.asarray(positions, np.int64)]

    def read(self, where: str | None = None, positions: Sequence[int] | None = None, batch: int = 512) -> Iterator[Document]:
        """Documents in the order they were added (or at the positions given)."""
        if positions is None:
            revs, order = self._by_rev
            if where is not None:
                keep = np.isin(revs, filters.revs(self.documents, where).to_numpy().astype(np.int64))
                order = order[keep]
        else:
            order = np.asarray(positions, np.int64)
        for i in range(0, len(order), batch):
            at = order[i:i + batch]
            rows = self._take(self.documents, at.tolist(), ["id", "title", "source", "licence", "date", "metadata"]).to_pylist()
            sources = self.sources(self._rows[0][at], keep=False)
            for fields, rev in zip(rows, self._rows[0][at].tolist()):
                yield Document(text=sources[rev].text, **fields | {"metadata": json.loads(fields["metadata"])})

    def verify(self, batch: int = 512) -> list[str]:
        """See Datastore.verify."""
        wrong, order = [], self._by_rev[1]
        for i in range(0, len(order), batch):
            at = order[i:i + batch]
            stored = self._take(self.documents, at.tolist(), ["sha256"]).column(0).to_pylist()
            wrong += [d.id for d, sha in zip(self.read(positions=at), stored) if row(d).sha256 != sha]
        return wrong

    # ---- texts -------------------------------------------------------------------------------------------------------

    def _take(self, dataset, positions: Sequence[int], columns: list[str]):
        with tables.guard(lambda e: self._lost(dataset, e)):
            if dataset is self.documents and len(self._rows[0]):
                # by address: in a table that lost rows, Lance takes a millisecond to find out what each position is
                return dataset._take_rows(self._addresses[np.asarray(positions, np.int64)].tolist(), columns=columns)
            return dataset.take(list(positions), columns=columns)

    def sources(self, revs: np.ndarray, keep: bool = True) -> dict[int, Source]:
        """The revisions asked for, {rev: Source}; one read for all that are not remembered."""
        wanted = np.unique(revs)
        out: dict[int, Source] = {}
        with self._guard:
            for rev in wanted.tolist():
                if rev in self._recent:
                    self._recent.move_to_end(rev)
                    out[rev] = self._recent[rev]
        missing = wanted[[rev not in out for rev in wanted.tolist()]] if len(out) < len(wanted) else wanted[:0]
        if len(missing):
            rows = self._take(self.texts, self._text_positions(missing).tolist(), list(Source._fields))
            fresh = dict(zip(missing.tolist(), map(Source, *(rows.column(f).to_pylist() for f in Source._fields))))
            out |= fresh
            if keep:
                self._remember(fresh)
        return out

    def _remember(self, fresh: dict[int, Source]) -> None:
        with self._guard:
            for rev, source in fresh.items():
                if rev not in self._recent:
                    self._recent[rev] = source
                    self._recent_size += len(source.text) + 200
            while self._recent_size > REMEMBER and len(self._recent) > 1:
                self._recent_size -= len(self._recent.popitem(last=False)[1].text) + 200

    def chunk_positions(self, ids: Sequence[int]) -> np.ndarray:
        asked = np.asarray(ids, np.int64).reshape(-1)
        known = self._chunk[0]
        at = np.searchsorted(known, asked)
        gone = (at >= len(known)) | (known[np.minimum(at, len(known) - 1)] != asked) if len(known) else np.ones(len(asked), bool)
        if gone.any():
            some = ", ".join(map(str, asked[gone][:5].tolist()))
            raise StoreError(f"{self.path} has no chunk {some} (any more): ids run to {self.chunk_rows - 1}, and "
                             "compaction drops dead ones; search again, or rebuild the index they came from")
        return at

    def chunks(self, ids: Sequence[int]) -> list[Chunk]:
        """See Datastore.chunks."""
        if not len(ids):
            return []
        at = self.chunk_positions(ids)
        revs = self._chunk[1][at]
        sources = self.sources(revs)
        out = []
        spans = (column[at].tolist() for column in self._span)
        for id, rev, start, end in zip(np.asarray(ids).tolist(), revs.tolist(), *spans):
            s = sources[rev]
            out.append(Chunk(id, s.id, start, end, s.text[start:end], s.title, s.source))
        return out

    def document_ids(self, chunk_ids: Sequence[int]) -> list[str]:
        """See Datastore.document_ids. Reads the texts table's id column only."""
        if not len(chunk_ids):
            return []
        wanted, back = np.unique(self._chunk[1][self.chunk_positions(chunk_ids)], return_inverse=True)
        names = self.names(wanted)
        return [names[i] for i in back.tolist()]

    def names(self, revs: np.ndarray) -> list[str]:
        """See Datastore.names."""
        if not len(revs):
            return []
        return self._take(self.texts, self._text_positions(revs).tolist(), ["id"]).column("id").to_pylist()

    def _text_positions(self, revs: np.ndarray) -> np.ndarray:
        """Row positions in the texts table. Raises StoreError for a revision that is not stored."""
        at = np.searchsorted(self._text_rev, revs)
        if (at >= len(self._text_rev)).any() or (self._text_rev[at] != revs).any():
            raise self._lost(self.texts, ValueError("the text of a document is not there"))
        return at

    def states(self, first: int = 0, batch: int = 128) -> Iterator[tuple[int, Source]]:
        """See Datastore.states."""
        revs = self._text_rev[int(np.searchsorted(self._text_rev, first)):]
        for i in range(0, len(revs), batch):
            found = self.sources(revs[i:i + batch], keep=False)
            yield from sorted(found.items())

    def stored_ids(self) -> np.ndarray:
        """See Datastore.stored_ids."""
        return _fixed(self._chunk[0])

    def stored_revisions(self) -> np.ndarray:
        """See Datastore.stored_revisions."""
        return _fixed(self._text_rev)

    def characters(self, first: int = 0) -> int:
        """See Datastore.characters."""
        begin = int(np.searchsorted(self._chunk[1], first))  # ids and revs grow together
        rev, end = self._chunk[1][begin:], self._span[1][begin:]
        return int(np.maximum.reduceat(end, np.flatnonzero(np.r_[True, rev[1:] != rev[:-1]])).sum()) if len(rev) else 0

    def stored(self, first: int = 0, batch: int = 4096) -> Iterator[tuple[np.ndarray, list[str], list[str]]]:
        """See Datastore.texts."""
        ids, revs = self._chunk
        start, end = self._span
        for i in range(int(np.searchsorted(ids, first)), len(ids), batch):
            rows = slice(i, i + batch)
            sources = self.sources(revs[rows], keep=False)
            cut = [(sources[r], a, b) for r, a, b in zip(revs[rows].tolist(), start[rows].tolist(), end[rows].tolist())]
            yield ids[rows], [s.title for s, _, _ in cut], [s.text[a:b] for s, a, b in cut]


def _fixed(array: np.ndarray) -> np.ndarray:
    """The same array, not to be written to."""
    array = array.view()
    array.flags.writeable = False
    return array
