"""Several datastores searched as one, each left where it is and what it is (legally segregated stores: SILO).

A chunk id of the union is the id in its part plus the part's offset; parts keep their order, so ids are stable as long as
the parts are given in the same order and an earlier part does not grow. A union reads; writing goes to a part."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ralm.errors import StoreError, UsageError
from ralm.types import Chunk, Document
from ralm.what.filters import UnknownColumn

if TYPE_CHECKING:
    from ralm.what.datastore import Datastore


class Union:
    """The reading interface of a Datastore over several. Raises UsageError for none, or for one given twice."""

    def __init__(self, *stores: Datastore | Union):
        flat = [part for store in stores for part, _ in store.parts]
        if not flat:
            raise UsageError("a union of no datastores; give at least one")
        twice = next((a for i, a in enumerate(flat) if any(a.id == b.id for b in flat[:i])), None)
        if twice is not None:
            raise UsageError(f"{twice.path} is in the union twice (id {twice.id}); give each datastore once")
        self._stores = flat
        self._sizes = [s.chunk_rows for s in flat]
        self._cache: OrderedDict[tuple, np.ndarray] = OrderedDict()

    # ---- what it is --------------------------------------------------------------------------------------------------

    @property
    def parts(self) -> list[tuple[Datastore, int]]:
        """The datastores and the offset of their chunk ids."""
        self._check()
        return list(zip(self._stores, self._offsets.tolist()))

    @property
    def _offsets(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self._sizes[:-1])]).astype(np.int64)

    def _check(self) -> None:
        """A part that was written to through this process has other offsets now: ids handed out before would lie."""
        for store, size in zip(self._stores, self._sizes):
            if store.chunk_rows != size:
                raise StoreError(f"{store.path} has {store.chunk_rows} chunk rows, {size} when the union was made; "
                                 "make the union again, or refresh() it")

    @property
    def id(self) -> str:
        return "+".join(s.id for s in self._stores)

    @property
    def version(self) -> tuple[int, ...]:
        return tuple(s.version for s in self._stores)

    @property
    def split(self) -> str:
        return " + ".join(dict.fromkeys(s.split for s in self._stores))

    @property
    def path(self) -> Path:
        """The first part's folder. Nothing is written there on behalf of a union: artifacts belong to the parts."""
        return self._stores[0].path

    def fingerprint(self) -> str:
        return hashlib.sha256("\n".join(s.fingerprint() for s in self._stores).encode()).hexdigest()

    def __repr__(self) -> str:
        return f"Union({', '.join(map(repr, self._stores))})"

    def __len__(self) -> int:
        return sum(map(len, self._stores))

    @property
    def n_chunks(self) -> int:
        return sum(s.n_chunks for s in self._stores)

    @property
    def chunk_rows(self) -> int:
        return sum(self._sizes)

    # ---- sets of chunks ----------------------------------------------------------------------------------------------

    @property
    def alive(self) -> np.ndarray:
        return self.allow()

    def allow(self, where: str | None = None, exclude: Sequence[str] = ()) -> np.ndarray:
        """See Datastore.allow. A column that a part lacks matches nothing there; UsageError where no part has it."""
        self._check()
        key = (where, tuple(exclude), self.version)
        if key not in self._cache:
            bitmap = np.concatenate(self._each(lambda s: s.allow(where, exclude), lambda s: np.zeros(s.chunk_rows, bool)))
            bitmap.flags.writeable = False
            self._cache[key] = bitmap
            while len(self._cache) > 16:
                self._cache.popitem(last=False)
        return self._cache[key]

    def _each(self, ask, lacking) -> list:
        out, errors = [], []
        for store in self._stores:
            try:
                out.append(ask(store))
            except UnknownColumn as e:
                errors.append(e)
                out.append(lacking(store))
        if len(errors) == len(self._stores):
            raise errors[0]
        return out

    def chunk_ids(self) -> np.ndarray:
        return np.flatnonzero(self.alive)

    # ---- reading -----------------------------------------------------------------------------------------------------

    def _split(self, ids: Sequence[int]) -> Iterator[tuple[Datastore, int, np.ndarray]]:
        """(part, its offset, positions in `ids` that belong to it)."""
        self._check()
        asked = np.asarray(ids, np.int64).reshape(-1)
        wrong = asked[(asked < 0) | (asked >= self.chunk_rows)]
        if len(wrong):
            raise StoreError(f"the union has no chunk {wrong[0]}: ids run from 0 to {self.chunk_rows - 1}; search again")
        offsets = self._offsets
        part = np.searchsorted(np.cumsum(self._sizes), asked, side="right")
        for i in np.unique(part).tolist():
            yield self._stores[i], int(offsets[i]), np.flatnonzero(part == i)

    def chunks(self, ids: Sequence[int]) -> list[Chunk]:
        """See Datastore.chunks; the ids are the union's."""
        out: list = [None] * len(ids)
        asked = np.asarray(ids, np.int64).reshape(-1)
        for store, offset, at in self._split(ids):
            for i, c in zip(at.tolist(), store.chunks(asked[at] - offset)):
                out[i] = Chunk(int(asked[i]), c.document, c.start, c.end, c.text, c.title, c.source)
        return out

    def document_ids(self, chunk_ids: Sequence[int]) -> list[str]:
        out: list = [None] * len(chunk_ids)
        asked = np.asarray(chunk_ids, np.int64).reshape(-1)
        for store, offset, at in self._split(chunk_ids):
            for i, name in zip(at.tolist(), store.document_ids(asked[at] - offset)):
                out[i] = name
        return out

    def texts(self, first: int = 0, batch: int = 4096) -> Iterator[tuple[np.ndarray, list[str], list[str]]]:
        for store, offset in self.parts:
            for ids, titles, texts in store.texts(max(0, first - offset), batch):
                yield ids + offset, titles, texts

    def document(self, id: str) -> Document:
        """The document of the first part that has one with this id. Raises StoreError where none has."""
        for store in self._stores:
            if store.has(id):
                return store.document(id)
        raise StoreError(f"no part of the union has a document '{id}': {', '.join(str(s.path) for s in self._stores)}")

    def has(self, id: str) -> bool:
        return any(s.has(id) for s in self._stores)

    def documents(self, where: str | None = None) -> Iterator[Document]:
        """Documents part by part. Ids are unique within a part only."""
        if where is not None:
            self.allow(where)  # an unknown column is an error before the first document
        for store in self._stores:
            try:
                yield from store.documents(where)
            except UnknownColumn:
                continue

    def columns(self) -> dict[str, str]:
        out: dict[str, str] = {}
        for store in self._stores:
            out = store.columns() | out
        return out

    def history(self) -> list:
        self._refuse("has no history of its own; ask its parts")

    def refresh(self) -> Union:
        """Every part at its newest version, with the offsets that fit."""
        for store in self._stores:
            store.refresh()
        self._sizes = [s.chunk_rows for s in self._stores]
        return self

    # ---- what it refuses ---------------------------------------------------------------------------------------------

    def _refuse(self, what: str):
        raise UsageError(f"a union of {len(self._stores)} datastores {what}: {', '.join(str(s.path) for s in self._stores)}")

    def add(self, documents, batch: int = 0):
        self._refuse("is read-only; add to one of its parts")

    def remove(self, ids=(), where=None):
        self._refuse("is read-only; remove from its parts")

    def compact(self, purge: bool = False):
        self._refuse("is read-only; compact its parts")

    def lock(self) -> AbstractContextManager[None]:
        self._refuse("is read-only; lock its parts")
