"""The one writer: what a transaction of each kind does to the three tables, and in which order.

The order is the crash safety. Adding: texts, chunks, then the commit to documents; killed before it, the rows written
are orphans that no version names. Purging: the documents table is rewritten as a new version, then store.json says that
earlier versions are gone and which numbers are used up (one rename: from here on they cannot be opened), then rows and files
are deleted, and last a version that says "purge"; killed in between, the next purge finishes it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass, replace

import numpy as np
import pyarrow as pa

from ralm import progress
from ralm.errors import UsageError
from ralm.types import Document
from ralm.what import filters, tables
from ralm.what.rows import FIELDS, Row, batches, id_of, key_of
from ralm.what.view import View

FRESH = 200_000  # documents written in one add before the look-up arrays are read again, or, where it is more,
SHARE = 20  # a 20th of all documents: the reading then grows as their number does, not as its square


@dataclass(frozen=True, slots=True)
class Added:
    documents: int = 0  # new ones
    updated: int = 0  # the id was there with other content
    unchanged: int = 0
    chunks: int = 0  # cut from new and updated documents
    replaced: int = 0  # gave way to another document of the same id: one from another source, or a later one of this add

    def __add__(self, other: Added) -> Added:
        return Added(*(a + b for a, b in zip(astuple(self), astuple(other))))


@dataclass(frozen=True, slots=True)
class Removed:
    documents: int = 0
    chunks: int = 0


@dataclass(frozen=True, slots=True)
class Compacted:
    documents: int = 0  # revisions whose text is gone
    chunks: int = 0  # chunks that are gone
    bytes: int = 0  # what the folder's tables lost


class Writer:
    """Holds the newest tables while the lock is held; made anew for each change."""

    def __init__(self, view: View):
        from ralm.what.split import split

        self.view, self.path = view, view.path
        self.documents, self.texts, self.chunks = view.documents, view.texts, view.chunks_table
        self.splitter = split(view.facts["split"])
        self.noted: set[str] = set()

    # ---- add ---------------------------------------------------------------------------------------------------------

    def add(self, documents: Iterable[Document], count: int, characters: int) -> Added:
        rev = self.view._text_rev
        self.next_rev = max(self.view.facts["next_rev"], int(rev[-1]) + 1 if len(rev) else 0)
        self.next_chunk = self.view.chunk_rows
        self.written: dict[str, tuple[str, str]] = {}  # id -> (hash, source), of this add
        self.replaced: list[int | str] = [0, ""]  # how many, and the first of them in words
        total = Added()
        with progress.task("add", unit="documents") as advance:
            for group in batches(documents, count, characters, self._repeated):
                total += self._batch(group)
                advance(len(group))
                if len(self.written) > max(FRESH, self.view.n_documents // SHARE):
                    self.view, self.written = View(self.path, self.view.facts), {}
                self._tidy(tables.MANY)
        self._tidy(tables.FRAGMENTS)
        number, first = self.replaced
        if number:
            progress.note(f"{number:,} {'document' if number == 1 else 'documents'} gave way to another of the same id ({first}); "
                          "where both are wanted, give them ids of their own")
        return replace(total, replaced=number)

    def _repeated(self, old: Row, new: Row) -> None:
        self._replaces(old.id, old.fields[1], new.fields[1])

    def _replaces(self, id: str, old: str, new: str) -> None:
        """Count a document that another of its id takes the place of; `old` and `new` are their sources."""
        if not self.replaced[0]:
            old, new = old or "?", new or "?"
            self.replaced[1] = f"'{id}' of {old} to that of {new}" if old != new else f"'{id}' is twice in {new}"
        self.replaced[0] += 1

    def _batch(self, group: list[Row]) -> Added:
        """One transaction."""
        before = self.view.held([r.id for r in group]) | {r.id: self.written[r.id] for r in group if r.id in self.written}
        rows = [r for r in group if r.id not in before or before[r.id][0] != r.sha256]
        updated = sum(r.id in before for r in rows)
        for r in rows:
            if r.id in before and (r.id in self.written or before[r.id][1] != r.fields[1]):
                self._replaces(r.id, before[r.id][1], r.fields[1])
        if not rows:
            return Added(unchanged=len(group))
        spans = [self.splitter(r.text) for r in rows]
        revs = np.arange(self.next_rev, self.next_rev + len(rows), dtype=np.uint64)
        counts = np.array([len(s) for s in spans], np.uint32)
        flat = np.array([pair for s in spans for pair in s], np.uint32).reshape(-1, 2)
        added = Added(len(rows) - updated, updated, len(group) - len(rows), len(flat))
        self.texts = tables.append(self.texts, pa.table(
            [pa.array(revs), [r.id for r in rows], [r.fields[0] for r in rows], [r.fields[1] for r in rows],
             pa.array([r.text for r in rows], pa.large_string())], schema=tables.TEXTS))
        if len(flat):
            self.chunks = tables.append(self.chunks, pa.table(
                [np.arange(self.next_chunk, self.next_chunk + len(flat), dtype=np.uint64), np.repeat(revs, counts),
                 flat[:, 0], flat[:, 1]], schema=tables.CHUNKS))
        self.next_rev, self.next_chunk = self.next_rev + len(rows), self.next_chunk + len(flat)
        self._commit(rows, revs, counts, added)
        self.written |= {r.id: (r.sha256, r.fields[1]) for r in rows}
        return added

    def _commit(self, rows: list[Row], revs: np.ndarray, counts: np.ndarray, added: Added) -> None:
        metadata = [r.metadata for r in rows]
        fields, refused = filters.new_columns(self.documents.schema, metadata)
        if fields:
            tables.widen(self.documents, fields)
        for key in sorted(refused):
            self._note(key, f"metadata key '{key}' cannot be used in filters (its name, its type, or too many of them); it is kept")
        columns = {"id": [r.id for r in rows], "rev": revs, "sha256": [r.sha256 for r in rows],
                   "metadata": pa.array([r.json for r in rows], pa.large_string()),
                   "_key": np.array([key_of(r.id) for r in rows], np.uint64), "_chunks": counts}
        columns |= {name: [r.fields[i] for r in rows] for i, name in enumerate(FIELDS)}
        schema = self.documents.schema
        for field in schema:
            if field.name not in tables.DOCUMENTS.names:
                columns[field.name], odd = filters.values(field, metadata)
                if odd:
                    self._note(field.name, f"metadata '{field.name}' is {field.type} in filters; values of another type are kept "
                                           "with their documents, and match no filter")
        table = pa.table([columns[f.name] for f in schema], schema=schema)
        note = {"action": "add", "documents": added.documents, "updated": added.updated, "chunks": added.chunks}
        change = tables.upsert if added.updated else tables.append
        self.documents = change(self.documents, table, note)

    def _note(self, key: str, text: str) -> None:
        if key not in self.noted:
            self.noted.add(key)
            progress.note(text)

    # ---- remove ------------------------------------------------------------------------------------------------------

    def remove(self, ids: list[str], where: str | None) -> Removed:
        if not ids and where is None:
            raise UsageError("nothing to remove is named; give ids or a filter")
        at = self.view.positions(ids)
        missing = [i for i in dict.fromkeys(map(id_of, ids)) if i not in at]
        if missing:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise UsageError(f"{self.path} has no document {', '.join(map(repr, missing[:5]))}{more}; nothing was removed")
        gone = self.view.revs_of(list(at.values()))
        if where is not None:
            gone = np.union1d(gone, filters.revs(self.documents, where).to_numpy().astype(np.int64))
        if not len(gone):
            return Removed()
        rev, _, chunks = self.view._rows
        removed = Removed(len(gone), int(chunks[np.isin(rev, gone)].sum()))
        tables.delete(self.documents, gone, {"action": "remove", "documents": removed.documents, "chunks": removed.chunks})
        return removed

    # ---- compact -----------------------------------------------------------------------------------------------------

    def compact(self, purge: bool) -> Compacted:
        before = self._bytes()
        with progress.task("compact", total=4) as advance:
            tables.merge_files(self.documents)
            self._remember(floor=self.documents.version if purge else None)
            advance(1)
            keep = self.view._rows[0] if purge else self._named()
            texts = np.setdiff1d(self.view._text_rev, keep)
            dead = int((~np.isin(self.view._chunk[1], keep)).sum())
            self._drop(np.union1d(texts, np.setdiff1d(self.view._chunk[1], keep)))
            advance(1)
            for dataset in (self.texts, self.chunks, *([self.documents] if purge else [])):
                tables.forget(dataset, everything=purge)
            advance(1)
            tables.mark(self.documents, {"action": "purge" if purge else "compact", "documents": len(texts), "chunks": dead})
            advance(1)
        return Compacted(len(texts), dead, before - self._bytes())

    def _remember(self, floor: int | None) -> None:
        """Numbers in use must not come back once the rows that show them are gone."""
        facts = dict(self.view.facts)
        facts["next_chunk"] = self.view.chunk_rows
        rev = self.view._text_rev
        facts["next_rev"] = max(facts["next_rev"], int(rev[-1]) + 1 if len(rev) else 0)
        facts["floor"] = floor or facts["floor"]
        tables.save(self.path, facts)

    def _drop(self, revs: np.ndarray) -> None:
        if len(revs):  # chunks first: killed in between, there is no chunk without its text
            self.chunks = tables.delete(self.chunks, revs)
            self.texts = tables.delete(self.texts, revs)
        tables.merge_files(self.texts)
        tables.merge_files(self.chunks)

    def _named(self) -> np.ndarray:
        """The revs that some version names. Newest first, and only until every stored rev has been seen."""
        named = self.view._rows[0]
        unseen = np.setdiff1d(np.union1d(self.view._text_rev, self.view._chunk[1]), named)
        for version in range(self.view.version - 1, self.view.facts["floor"] - 1, -1):
            if not len(unseen):
                break
            old = View(self.path, self.view.facts, version)._rows[0]
            named, unseen = np.union1d(named, old), np.setdiff1d(unseen, old)
        return named

    def _tidy(self, most: int) -> None:
        """Few files after many batches, so that opening stays fast and commits stay small."""
        for dataset in (self.documents, self.texts, self.chunks):
            if tables.small_files(dataset) > most:
                tables.merge_files(dataset)
                if dataset is not self.documents:
                    tables.forget(dataset, everything=False)

    def _bytes(self) -> int:
        return sum(f.stat().st_size for name in tables.SCHEMAS for f in (self.path / f"{name}.lance").rglob("*") if f.is_file())
