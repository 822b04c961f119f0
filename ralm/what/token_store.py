"""TokenStore: what stands behind every token of a datastore, found by the state that predicted it (kNN-LM's datastore).

    tokens = TokenStore.build(store, lm)          # or TokenStore(store, lm): what is there already, caught up with the store
    found = tokens.search(states_QD, k=1024)      # rows, distances, values; never of a document this version does not hold
    tokens.places(found.rows[0])                  # document, token position: where each neighbour was read

Rows follow the documents in the order they were added. A search asks the datastore which documents are alive, match the filter and
are not excluded, so removing a document works at once and changes no other distance (token_build.py, index/nearest.py)."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ralm.errors import StoreError, UsageError
from ralm.index import inverted, manifest, nearest
from ralm.what import token_build, token_merge
from ralm.what.token_build import Projection, Wish

FILTERS = 8  # bitmaps over rows that are kept


@dataclass(frozen=True, slots=True)
class Neighbours:
    """Result of a search among tokens: all [Q, K], nearest first, ties by ascending row, padded with (-1, inf, -1)."""

    rows: np.ndarray  # int64
    distances: np.ndarray  # float32: squared Euclidean, or minus the inner product
    values: np.ndarray  # int64: the token that followed
    counts: np.ndarray | None = None  # float32: tokens a row stands for (token_merge.py); None: one each
    lams: np.ndarray | None = None  # float32 [Q]: the weight a gate gives them (how/adaptive.py)

    def take(self, queries: np.ndarray | slice) -> Neighbours:
        """Those of some queries."""
        return Neighbours(*(None if (a := getattr(self, f.name)) is None else a[queries] for f in fields(self)))

    @staticmethod
    def joined(parts: Sequence[Neighbours]) -> Neighbours:
        """The queries of all parts, in order, as wide as the widest."""
        if not parts:
            return Neighbours.empty(0)
        size, wide, out = sum(len(p.rows) for p in parts), max(p.rows.shape[1] for p in parts), []
        for name, fill in (("rows", -1), ("distances", np.inf), ("values", -1), ("counts", 1)):
            some = [getattr(p, name) for p in parts]
            out.append(None if some[0] is None else np.full((size, wide), fill, some[0].dtype))
            at = 0
            for a in some if some[0] is not None else ():
                out[-1][at:at + len(a), :a.shape[1]] = a
                at += len(a)
        return Neighbours(*out)

    @staticmethod
    def empty(queries: int, k: int = 0) -> Neighbours:
        none = np.full((queries, k), -1, np.int64)
        return Neighbours(none, np.full((queries, k), np.inf, np.float32), none.copy())


class Place(NamedTuple):
    """Where a row was read: token `position` (from 0) of this revision of a document."""

    document: str
    revision: int
    position: int
    store: Any


class Rows:
    """The rows of a manifest, mapped: keys, values, and which document each belongs to."""

    def __init__(self, folder: Path, now: manifest.Manifest):
        self.folder, self.now, settings = folder, now, dict(now.settings)
        parts = [p for p in now.parts if "documents.npy" in p.files]
        for part in now.parts:
            manifest.sizes(folder, part)
        mapped = [token_build.mapped(folder, p, settings) for p in parts]
        self.projection = Projection.load(folder, now)
        self.keys = nearest.Keys([m[0] for m in mapped], [m[1] for m in mapped], settings["dim"], self.projection.step,
                                 settings["metric"])
        self._values = [m[2] for m in mapped]
        documents = [m[3] + np.array([0, start]) for m, start in zip(mapped, self.keys.starts.tolist())]
        documents = np.concatenate(documents) if documents else np.zeros((0, 2), np.int64)
        self.revs, first = documents[:, 0], documents[:, 1]
        self.first = np.append(first, len(self.keys))  # row at which each document begins; documents without tokens take none
        if (np.diff(self.revs) <= 0).any() or (np.diff(self.first) < 0).any() or (len(first) and first[0]):
            raise token_build.damaged(folder, "its documents are not in order")
        merged = [token_merge.columns(folder, p, m[3]) for p, m in zip(parts, mapped)] if "merged" in settings else []
        self.merged = np.concatenate(merged) if merged else None  # int32 [N, 2]: position, tokens a row stands for

    def __len__(self) -> int:
        return len(self.keys)

    def positions(self, rows: np.ndarray) -> np.ndarray:
        """int64: where in its document each row's token stands."""
        return rows - self.first[self.document(rows)] if self.merged is None else self.merged[rows, 0].astype(np.int64)

    def counts(self, rows: np.ndarray) -> np.ndarray | None:
        """float32: how many tokens each row stands for, 1 for rows below 0; None where each is one."""
        return None if self.merged is None else np.where(rows < 0, 1, self.merged[rows, 1]).astype(np.float32)

    def values(self, rows: np.ndarray) -> np.ndarray:
        """int64, the shape of `rows`: the token of each row, -1 for rows below 0."""
        out = np.full(rows.shape, -1, np.int64)
        for start, stored in zip(self.keys.starts.tolist(), self._values):
            here = (rows >= start) & (rows < start + len(stored))
            out[here] = stored[rows[here] - start]
        return out

    def document(self, rows: np.ndarray) -> np.ndarray:
        """int64: the number of the document (its place in `revs`) each row belongs to."""
        return np.searchsorted(self.first, rows, side="right") - 1

    def allowed(self, revisions: np.ndarray) -> np.ndarray | None:
        """bool [N] from a bitmap over revisions; None where every row is allowed."""
        there = self.revs < len(revisions)  # younger ones than the opened version are out
        keep = np.zeros(len(self.revs), bool)
        keep[there] = revisions[self.revs[there]]
        size = np.diff(self.first)
        return None if keep[size > 0].all() else np.repeat(keep, size)


class TokenStore:
    """The token rows of a datastore (or of a union of several, each with its own) for one language model.

    lm: the model whose states are asked with; None opens what is there without checking it. name: of a second store beside the
    first. device: where exact search multiplies ("cuda"; default: where the model is). Raises StoreError where there is none,
    FingerprintError where it was made by another model or otherwise than asked."""

    def __init__(self, store, lm: Any = None, name: str = "", index: str | None = None, nprobe: int | None = None,
                 device: str | None = None):
        self.store, self.lm, self.name, self.nprobe = store, lm, str(name or "default"), nprobe
        where = getattr(getattr(lm, "model", None), "device", None)
        self.device = device or (str(where) if getattr(where, "type", "cpu") == "cuda" else None)
        if nprobe is not None and nprobe < 1:
            raise UsageError(f"nprobe = {nprobe}: at least 1")
        self._wish, self._guard, self._view = Wish(index=index), threading.Lock(), None
        if index is not None:
            inverted.kind_of(index, 0)
        for part, _ in store.parts:
            if manifest.load(token_build.folder_of(part, self.name)) is None:
                raise StoreError(f"{part.path} has no token store '{self.name}': make one with ralm tokens {part.path} --lm …")
        _ = self.leaves  # opened now, so that what is wrong is told now

    @staticmethod
    def build(store, lm, name: str = "", *, key: str | None = None, window: int | None = None, stride: int | None = None,
              project: str | None = None, dtype: str | None = None, metric: str | None = None,
              index: str | None = None) -> TokenStore:
        """Make the token store of a datastore, or go on with the one that is there.

        key: ffn_in (default) or hidden; window, stride: as `RALM.score` (default: the model's window, half of it); project: none or
        pca:D; dtype: float16 or int8; metric: l2 or ip; index: auto, exact, ivf or ivfpq (index/inverted.py).
        Raises FingerprintError where the one that is there was made otherwise, CapabilityError for a model without such states."""
        wish = Wish(key, window, stride, project, dtype, metric, index)
        if index is not None:
            inverted.kind_of(index, 0)
        for part, _ in store.parts:
            token_build.ready(part, lm, name, wish)
        return TokenStore(store, lm, name, index)

    def __repr__(self) -> str:
        kinds = sorted({leaf.kind for leaf in self.leaves})
        return f"TokenStore('{self.name}', {len(self):,} tokens, {self.settings['key']}, {'/'.join(kinds)})"

    def __len__(self) -> int:
        return sum(len(leaf.rows) for leaf in self.leaves)

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.leaves[0].rows.now.settings)

    @property
    def key(self) -> str:
        return self.settings["key"]

    @property
    def recall(self) -> float:
        """recall@100 against exact search as measured when the index was made; 1 where search is exact."""
        return min((leaf.rows.now.facts["ivf"][f"recall@{inverted.DEPTH}"] for leaf in self.leaves if leaf.near), default=1.0)

    @property
    def leaves(self) -> list[_Leaf]:
        """The rows of every part, as of the version the store is at."""
        key = tuple((s.id, s.version, s.revision_rows) for s, _ in self.store.parts)
        with self._guard:
            if self._view is None or self._view[0] != key:
                leaves, offset = [], 0
                for part, _ in self.store.parts:
                    leaves.append(_Leaf(part, offset, self))
                    offset += len(leaves[-1].rows)
                one = {(x.rows.now.settings["fingerprint"], x.rows.now.settings["key"]) for x in leaves}
                if len(one) > 1:
                    raise StoreError(f"the token stores '{self.name}' of this union were made by different models or keys; make "
                                     "them with one (ralm tokens)")
                self._view = key, leaves
            return self._view[1]

    def search(self, q_QD: np.ndarray, k: int = 1024, where: str | None = None, exclude: Sequence[str] = (),
               spans: np.ndarray | None = None) -> Neighbours:
        """The k rows nearest to each query, of documents that are alive, match `where` and are not excluded.

        q_QD: float32 [Q, D'], states of the model as it gives them. spans: int64 [Q, 2], rows [from, to) that each query must not
        find (what a query was itself made from). Raises UsageError for queries of another width."""
        q_QD = np.ascontiguousarray(q_QD, np.float32)
        if q_QD.ndim != 2 or q_QD.shape[1] != self.settings["width"]:
            raise UsageError(f"queries have shape {q_QD.shape}, the keys of '{self.name}' were made of {self.settings['width']} "
                             "numbers; ask with states of the same model and key")
        found = [leaf.search(q_QD, k, where, tuple(exclude), spans) for leaf in self.leaves if len(leaf.rows)]
        if not found:
            return Neighbours.empty(len(q_QD), k)
        if len(found) > 1:
            rows, d, values = (np.concatenate([getattr(f, name) for f in found], 1) for name in ("rows", "distances", "values"))
            order = np.lexsort((np.where(rows < 0, np.iinfo(np.int64).max, rows), d))[:, :k]
            found = [Neighbours(*(np.take_along_axis(a, order, 1) for a in (rows, d, values)))]
        return replace(found[0], counts=self.counts(found[0].rows))

    def values(self, rows: np.ndarray) -> np.ndarray:
        """int64, the shape of `rows`: the token of each row, -1 for rows below 0."""
        out = np.full(rows.shape, -1, np.int64)
        for leaf in self.leaves:
            out = np.maximum(out, leaf.rows.values(rows - leaf.offset))
        return out

    def counts(self, rows: np.ndarray) -> np.ndarray | None:
        """float32, the shape of `rows`: how many tokens each row stands for; None where each is one."""
        if all(leaf.rows.merged is None for leaf in self.leaves):
            return None
        out = np.ones(rows.shape, np.float32)
        for leaf in self.leaves:
            if leaf.rows.merged is not None:
                here = (rows >= leaf.offset) & (rows < leaf.offset + len(leaf.rows))
                out[here] = leaf.rows.counts(rows[here] - leaf.offset)
        return out

    def distances(self, q_QD: np.ndarray, rows_QC: np.ndarray) -> np.ndarray:
        """float32 [Q, C]: of every query to its rows, as `search` would give it; inf for rows below 0."""
        out = np.full(rows_QC.shape, np.inf, np.float32)
        for leaf in self.leaves:
            here = (rows_QC >= leaf.offset) & (rows_QC < leaf.offset + len(leaf.rows))
            if here.any():
                local = np.where(here, rows_QC - leaf.offset, -1)
                out[here] = leaf.rows.keys.distances(leaf.rows.projection(q_QD), local)[here]
        return out

    def successors(self, rows_QC: np.ndarray, tokens_Q: np.ndarray) -> np.ndarray:
        """int64 [Q, C]: of each row that holds its query's token, the row of the token after it in the same document; else -1."""
        out = np.full(rows_QC.shape, -1, np.int64)
        for leaf in self.leaves:
            q, c = np.nonzero((rows_QC >= leaf.offset) & (rows_QC < leaf.offset + len(leaf.rows)))
            local = rows_QC[q, c] - leaf.offset
            right = leaf.rows.values(local) == tokens_Q[q]
            q, c, local = q[right], c[right], local[right]
            goes = local + 1 < leaf.rows.first[leaf.rows.document(local) + 1]
            if leaf.rows.merged is not None:  # the row of the token after it may be gone
                goes[goes] = leaf.rows.merged[local[goes] + 1, 0] == leaf.rows.merged[local[goes], 0] + 1
            out[q[goes], c[goes]] = local[goes] + 1 + leaf.offset
        return out

    def places(self, rows: Sequence[int]) -> list[Place]:
        """Where each row was read."""
        rows = np.asarray(rows, np.int64)
        out: list[Place] = [None] * len(rows)  # type: ignore[list-item]
        for leaf in self.leaves:
            here = np.flatnonzero((rows >= leaf.offset) & (rows < leaf.offset + len(leaf.rows)))
            if len(here):
                local = rows[here] - leaf.offset
                number = leaf.rows.document(local)
                revs = leaf.rows.revs[number]
                names = {rev: s.id for rev, s in leaf.store.state(np.unique(revs).tolist()).items()}
                for i, rev, position in zip(here.tolist(), revs.tolist(), leaf.rows.positions(local).tolist()):
                    out[i] = Place(names[rev], rev, position, leaf.store)
        if None in out:
            raise UsageError(f"rows run from 0 to {len(self) - 1}; search again")
        return out

    def tokens(self, store: Any, revision: int) -> np.ndarray:
        """int64: the tokens of a stored document revision."""
        leaf = next(x for x in self.leaves if x.store is store)
        if leaf.rows.merged is not None:  # not every token has its row
            return np.asarray(self.lm.tokenizer.encode(store.state([revision])[revision].text), np.int64)
        at = int(np.searchsorted(leaf.rows.revs, revision))
        return leaf.rows.values(np.arange(*leaf.rows.first[at:at + 2]))

    def span(self, document: str) -> tuple[int, int]:
        """Rows [from, to) of a document of this version: what its own scoring must not find. (0, 0) where there is none."""
        for leaf in self.leaves:
            alive = leaf.store.revisions()
            others = leaf.store.revisions(exclude=[document])
            for rev in np.flatnonzero(alive & ~others).tolist():
                at = int(np.searchsorted(leaf.rows.revs, rev))
                if at < len(leaf.rows.revs) and leaf.rows.revs[at] == rev:
                    return tuple((leaf.rows.first[at:at + 2] + leaf.offset).tolist())
        return 0, 0

    def any(self, where: str | None = None, exclude: Sequence[str] = ()) -> bool:
        """Whether a search could find anything."""
        return any(leaf.any(where, tuple(exclude)) for leaf in self.leaves)


class _Leaf:
    """The rows of one datastore; in the union it is searched in they begin at `offset`."""

    def __init__(self, store, offset: int, owner: TokenStore):
        self.store, self.offset, self.nprobe = store, offset, owner.nprobe
        folder, wish = token_build.folder_of(store, owner.name), owner._wish
        now, self.rows = manifest.opened(lambda: token_build.ready(store, owner.lm, owner.name, wish),
                                         lambda now: Rows(folder, now))
        self.rows.keys.device = owner.device
        exact = inverted.kind_of(wish.index or now.settings["index"], len(self.rows)) == "exact"
        self.near = None if exact else inverted.open_index(folder, now, self.rows.keys)
        self._filters: OrderedDict[tuple, np.ndarray | None] = OrderedDict()

    @property
    def kind(self) -> str:
        return self.near.kind if self.near else "exact"

    def allowed(self, where: str | None, exclude: tuple[str, ...]) -> np.ndarray | None:
        key = where, exclude
        if key not in self._filters:
            self._filters[key] = self.rows.allowed(self.store.revisions(where, exclude))
            while len(self._filters) > FILTERS:
                self._filters.popitem(last=False)
        return self._filters[key]

    def any(self, where: str | None, exclude: tuple[str, ...]) -> bool:
        allowed = self.allowed(where, exclude)
        return bool(len(self.rows)) and (allowed is None or bool(allowed.any()))

    def search(self, q_QD: np.ndarray, k: int, where: str | None, exclude: tuple[str, ...], spans: np.ndarray | None) -> Neighbours:
        allowed, q_QD = self.allowed(where, exclude), self.rows.projection(q_QD)
        if spans is None:
            rows, d = self._search(q_QD, k, allowed)
        else:
            rows, d = np.full((len(q_QD), k), -1, np.int64), np.full((len(q_QD), k), np.inf, np.float32)
            for span in np.unique(spans, axis=0):
                here = np.flatnonzero((spans == span).all(1))
                a, b = (int(min(max(x - self.offset, 0), len(self.rows))) for x in span)
                some = allowed
                if a < b:
                    some = np.ones(len(self.rows), bool) if allowed is None else allowed.copy()
                    some[a:b] = False
                rows[here], d[here] = self._search(q_QD[here], k, some)
        return Neighbours(np.where(rows < 0, rows, rows + self.offset), d, self.rows.values(rows))

    def _search(self, q_QD: np.ndarray, k: int, allowed: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        keys = self.rows.keys
        there = len(keys) if allowed is None else int(np.count_nonzero(allowed))
        if self.near is None or there <= max(20_000, 4 * k):
            return nearest.exact(keys, q_QD, k, allowed)
        near = self.near.search(q_QD, k, allowed, self.nprobe)
        if self.near.rows < len(keys):
            late = np.zeros(len(keys), bool)
            late[self.near.rows:] = True if allowed is None else allowed[self.near.rows:]
            near = np.concatenate([near, nearest.exact(keys, q_QD, k, late)[0]], 1)
        return nearest.padded(nearest.ranked(keys, q_QD, near, k), k)
