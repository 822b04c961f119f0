"""WHAT is retrieved: documents and their chunks in versioned Lance tables.

    store = Datastore.build("kb.ralm", [Document("a", "text ...", metadata={"year": 1999})])
    store.add([...]); store.remove(["a"])
    Datastore.open("kb.ralm", version=2)            # exactly what version 2 held

Every change is one transaction and one new version (a new metadata key adds a version of its own, which holds the same
documents). A killed writer leaves the last committed version; running it again goes on from there, because documents that
are there already are recognised by their content hash. Readers take no lock and stay at the version they opened."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import chain
from pathlib import Path

import numpy as np

from ralm.errors import StoreError, UsageError
from ralm.types import Chunk, Document
from ralm.what import filters, history, tables
from ralm.what.history import VersionInfo
from ralm.what.lock import WriteLock
from ralm.what.rows import row
from ralm.what.view import Source, View
from ralm.what.write import Added, Compacted, Removed, Writer

BATCH = 2000  # documents per transaction, or
CHARACTERS = 64_000_000  # this much text


class Datastore:
    """Documents, their chunks, and every version of both. Make one with `create`, `open` or `build`."""

    def __init__(self, path: Path, view: View, pinned: bool):
        self.path = path
        self.id: str = view.facts["id"]
        self.split: str = view.facts["split"]
        self._view, self._pinned = view, pinned
        self._lock = WriteLock(path / "write.lock")

    # ---- making ------------------------------------------------------------------------------------------------------

    @staticmethod
    def create(path: str | Path, split: str = "words:100") -> Datastore:
        """A new, empty datastore. Raises StoreError where something is there already, UsageError for a wrong split."""
        return Datastore._create(Path(path), split, [])

    @staticmethod
    def _create(path: Path, spec: str, columns: list) -> Datastore:
        from ralm.what.split import split

        split(spec)("one probe: a splitter that lacks its package or file fails here, before anything is made")
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise StoreError(f"{path} exists already" + ("; open it, or choose another path" if path.is_dir() else
                             " and is a file, a datastore is a folder; choose another path"))
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")  # one rename makes it visible, complete
        try:
            temporary.mkdir(parents=True)
            for name in tables.SCHEMAS:
                note = {"action": "create"} if name == "documents" else {}
                tables.empty(temporary, name, columns if name == "documents" else [], note)
            tables.save(temporary, {"format": tables.FORMAT, "id": str(uuid.uuid4()), "split": spec,
                                    "next_rev": 0, "next_chunk": 0, "floor": 1})
            os.rename(temporary, path)
        except OSError as e:
            shutil.rmtree(temporary, ignore_errors=True)
            raise StoreError(f"cannot create {path} ({e.strerror or tables.reason(e)}); check the path and its permissions") from e
        return Datastore.open(path)

    @staticmethod
    def open(path: str | Path, version: int | None = None) -> Datastore:
        """The datastore at `path`: its newest version, or exactly `version` (then read-only).

        Raises StoreError where there is none, it is damaged, or it has no such version."""
        path = Path(path)
        facts = tables.load(path)
        if version is not None:
            latest = tables.table(path, "documents").version
            if not isinstance(version, int) or not facts["floor"] <= version <= latest:
                purged = " (earlier ones were purged)" if facts["floor"] > 1 else ""
                raise StoreError(f"{path} has no version {version}: it has versions {facts['floor']} to {latest}{purged}")
        return Datastore(path, View(path, facts, version), version is not None)

    @staticmethod
    def build(path: str | Path, documents: Iterable[Document], split: str = "words:100", batch: int = BATCH) -> Datastore:
        """Create the datastore, or go on with the one that is there, and add the documents.

        Raises StoreError where the datastore there was cut in another way."""
        path = Path(path)
        if (path / "store.json").is_file():
            store = Datastore.open(path)
            if store.split != split:
                raise StoreError(f"{path} is split by '{store.split}', '{split}' is asked for; "
                                 f"ask for '{store.split}', or build another datastore")
        else:
            documents, columns = _first_columns(documents, batch)
            store = Datastore._create(path, split, columns)
        store.add(documents, batch=batch)
        return store

    def __repr__(self) -> str:
        return f"Datastore('{self.path}', version={self.version})"

    # ---- changing ----------------------------------------------------------------------------------------------------

    def add(self, documents: Iterable[Document], batch: int = BATCH) -> Added:
        """Add documents, replacing those whose id is there with other content; one transaction per batch.

        A document that is there with the same content is left alone, so a killed add is resumed by running it again. Of an id
        that is given twice the last one stays. A document without text is kept and has no chunks. Lone surrogates become U+FFFD.
        Raises StoreError where another process writes, UsageError for a document that cannot be stored."""
        if batch < 1:
            raise UsageError(f"batch = {batch}, at least 1 document per transaction is needed")
        with self.lock():
            writer = Writer(self._latest())
            try:
                return writer.add(documents, batch, CHARACTERS)
            finally:
                self.refresh()

    def remove(self, ids: Sequence[str] = (), where: str | None = None) -> Removed:
        """Remove the documents with these ids and the documents that match the filter, in one transaction.

        Raises UsageError for an id that is not there (nothing is removed then) or where neither is given."""
        if isinstance(ids, str):
            raise UsageError(f"ids = {ids!r} is one text; give a list of ids: [{ids!r}]")
        if where is not None and not where.strip():
            raise UsageError("the filter is empty; give a condition, or where=None")
        with self.lock():
            try:
                return Writer(self._latest()).remove(list(ids), where)
            finally:
                self.refresh()

    def compact(self, purge: bool = False) -> Compacted:
        """Merge small files and drop chunks of killed writers; every version can still be opened.

        purge=True deletes all earlier versions and every file that holds text of documents that are not in the newest one.
        Chunk ids stay what they were, version numbers go on. Killed in between, the datastore is readable; run it again.
        Indexes hold what they were built from: `ralm.index.compact(store)` after it."""
        with self.lock():
            try:
                return Writer(self._latest()).compact(purge)
            finally:
                self.refresh()

    def lock(self) -> AbstractContextManager[None]:
        """Be the one writer. StoreError at once, naming the holder's process id, where another one writes. Nests."""
        return self._lock.hold()

    def refresh(self) -> Datastore:
        """Go to the newest version, unless one was asked for at opening."""
        if not self._pinned:
            self._view = View(self.path, tables.load(self.path))
        return self

    def _latest(self) -> View:
        if self._pinned:
            raise StoreError(f"{self.path} was opened at version {self.version}, the past cannot be changed; "
                             "open it without version")
        view, seen = View(self.path, tables.load(self.path)), self._view
        return seen if (seen.version, seen.facts) == (view.version, view.facts) else view  # with the arrays it has loaded

    # ---- reading -----------------------------------------------------------------------------------------------------

    @property
    def version(self) -> int:
        return self._view.version

    def __len__(self) -> int:
        return self._view.n_documents

    @property
    def n_chunks(self) -> int:
        """Chunks of the documents of this version."""
        return self._view.n_chunks

    @property
    def chunk_rows(self) -> int:
        """1 + the largest chunk id ever written: the length of every bitmap that `allow` gives."""
        return self._view.chunk_rows

    @property
    def alive(self) -> np.ndarray:
        return self._view.allow()

    @property
    def parts(self) -> list[tuple[Datastore, int]]:
        return [(self, 0)]

    def fingerprint(self) -> str:
        """What a derived artifact was made from: id, version and split."""
        return f"{self.id}@{self.version}/{self.split}"

    def allow(self, where: str | None = None, exclude: Sequence[str] = ()) -> np.ndarray:
        """bool [chunk_rows], read-only: chunks of this version whose document matches the filter and is not excluded.

        `exclude` are document ids; those that are not there exclude nothing. Raises UsageError for a wrong filter."""
        return self._view.allow(where, exclude)

    @property
    def revision_rows(self) -> int:
        """1 + the largest revision number ever given: the length of the bitmap that `revisions` gives."""
        return self._view.revision_rows

    def revisions(self, where: str | None = None, exclude: Sequence[str] = ()) -> np.ndarray:
        """bool [revision_rows], read-only: the document revisions of this version that match the filter and are not excluded.

        A revision is one stored state of one document; artifacts made of whole documents are filtered by it, as those made of
        chunks are by `allow`. Raises UsageError for a wrong filter."""
        return self._view.revisions(where, exclude)

    def states(self, first: int = 0) -> Iterator[tuple[int, Source]]:
        """(revision, its id, title, source and text) of all stored revisions >= first, ascending, whether this version holds them
        or not: what an artifact of whole documents is built from."""
        return self._view.states(first)

    def stored_revisions(self) -> np.ndarray:
        """int64, ascending, read-only: all stored revisions, those that this version does not hold among them."""
        return self._view.stored_revisions()

    def characters(self, first: int = 0) -> int:
        """How many characters all stored revisions >= first have, from the ends of their chunks: no text is read, and white space
        behind the last chunk of a document does not count."""
        return self._view.characters(first)

    def state(self, revs: Sequence[int]) -> dict[int, Source]:
        """The stored states of these revisions. Raises StoreError for one that was never given or that compaction dropped."""
        return self._view.sources(np.asarray(revs, np.int64)) if len(revs) else {}

    def names(self, revs: Sequence[int]) -> list[str]:
        """The document ids of these stored revisions; no text is read. Raises StoreError for one that is not there (any more)."""
        return self._view.names(np.asarray(revs, np.int64))

    def revisions_of(self, ids: Sequence[str]) -> dict[str, int]:
        """{id: revision} of those of these documents that this version holds."""
        at = self._view.positions(ids)
        return dict(zip(at, self._view.revs_of(list(at.values())).tolist()))

    def chunk_ids(self) -> np.ndarray:
        """int64, ascending: the chunks of this version."""
        return np.flatnonzero(self.alive)

    def stored_ids(self) -> np.ndarray:
        """int64, ascending, read-only: all stored chunks, those that this version does not hold among them."""
        return self._view.stored_ids()

    def chunks(self, ids: Sequence[int]) -> list[Chunk]:
        """The chunks with these ids, in the order asked, whether this version holds them or not.

        Raises StoreError for an id that was never given or that compaction dropped."""
        return self._view.chunks(ids)

    def document_ids(self, chunk_ids: Sequence[int]) -> list[str]:
        """The id of the document each chunk was cut from."""
        return self._view.document_ids(chunk_ids)

    def texts(self, first: int = 0, batch: int = 4096) -> Iterator[tuple[np.ndarray, list[str], list[str]]]:
        """(chunk ids, titles, texts) of all stored chunks with ids >= first, ascending: what an index is built from.

        Chunks that this version does not hold are among them; `allow` keeps them out of every search."""
        return self._view.stored(first, batch)

    def document(self, id: str) -> Document:
        """One document. Raises StoreError where this version has none with that id."""
        at = list(self._view.positions([id]).values())
        if not at:
            raise StoreError(f"{self.path} has no document '{id}' in version {self.version}; "
                             f"ralm show {self.path} --ids lists what it has")
        return next(self._view.read(positions=at))

    def has(self, id: str) -> bool:
        """Whether this version holds a document with that id."""
        return bool(self._view.positions([id]))

    def documents(self, where: str | None = None) -> Iterator[Document]:
        """The documents of this version, in the order they were added. Raises UsageError for a wrong filter."""
        return self._view.read(where)

    def verify(self) -> list[str]:
        """Read every document and compare it with the hash it was stored with: the ids of those that differ."""
        return self._view.verify()

    def columns(self) -> dict[str, str]:
        """What a filter may name, and its type."""
        schema = self._view.documents.schema
        return {name: str(schema.field(name).type) for name in filters.known(schema)}

    def history(self) -> list[VersionInfo]:
        """What every version that can be opened was made by, oldest first."""
        return history.of(self._view)

    @staticmethod
    def union(*stores: Datastore):
        """Several datastores searched as one, read-only. See ralm.what.union.Union."""
        from ralm.what.union import Union

        return Union(*stores)


def _first_columns(documents: Iterable[Document], batch: int) -> tuple[Iterator[Document], list]:
    """The documents once more, and the filter columns of the first batch: a new table has them from its first version on."""
    documents = iter(documents)
    first, size = [], 0
    for document in documents:
        first.append(document)
        size += len(document.text)
        if len(first) >= batch or size >= CHARACTERS:
            break
    fields, _ = filters.new_columns(tables.DOCUMENTS, [row(d).metadata for d in first])
    return chain(first, documents), fields
