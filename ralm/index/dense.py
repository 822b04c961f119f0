"""Dense retrieval: chunks and queries as vectors of one encoder, scored by their cosine. `Dense(store).search(["who wrote faust"])`

The first opening encodes the store into index/dense and says so through ralm.progress; later ones use the encoder recorded there.
Vectors are kept once, float16; above 100,000 chunks a FAISS index finds the candidates (ann.py), hits are always scored with the
stored vectors (exact.py). Filters act inside the search: with fewer than NARROW allowed chunks, or where the index finds fewer
than k of those allowed, the allowed ones are searched exactly. A chunk of nothing but unknown words (zero vector, static encoders)
scores 0; a query of that kind finds nothing."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from ralm.errors import UsageError
from ralm.index import ann, exact, vectors
from ralm.index.sparse import leaves
from ralm.index.vectors import Wish
from ralm.types import Hits

NARROW = 20_000  # allowed chunks up to which exact search is as fast as a filtered graph
FILTERS = 4  # bitmaps over rows that are remembered
KIND = vectors.KIND


class Dense:
    """A retriever over one encoder's vectors.

    encoder: see encode.py; None means the stored one, minilm for a new index. index: flat, hnsw, ivf, ivfpq or auto (ann.py);
    asking for another kind than the stored one makes it from the stored vectors, flat only ignores the index. name: of a second
    set of vectors beside the first (index/dense-NAME). title: encode "title\\ntext" (default) or the text alone. effort: how far an
    approximate search looks (ef, nprobe), instead of the measured one.
    Raises FingerprintError where the vectors were made by another encoder, StoreError for damaged files."""

    def __init__(self, store, encoder: str | None = None, index: str | None = None, name: str = "", title: bool | None = None,
                 effort: int | None = None):
        if index is not None:
            ann.kind_of(index, 0)
        if effort is not None and effort < 1:
            raise UsageError(f"effort = {effort}: at least 1")
        name = str(name or "")
        if name and not name.replace("-", "").replace("_", "").isalnum():
            raise UsageError(f"name = '{name}': letters, digits, - and _ only")
        self.store, self.effort = store, effort
        self._wish, self._guard, self._view = Wish(encoder, title, index, name), threading.Lock(), None
        self._opened()

    def __repr__(self) -> str:
        return f"Dense({', '.join(sorted({v.now.settings['encoder'] + '/' + v.kind for v in self._opened().leaves}))})"

    @property
    def recall(self) -> float:
        """recall@10 against exact search, as measured when the index was made; 1 where search is exact."""
        return min((v.now.facts["ann"]["recall@10"] for v in self._opened().leaves if v.near), default=1.0)

    def search(self, queries: Sequence[str], k: int = 10, where: str | None = None, exclude: Sequence[str] = ()) -> Hits:
        """The k chunks of highest cosine among those that match `where` and are not of the documents `exclude`.

        Returns Hits [Q, k]: ties by ascending id, padded with (-1, -inf). Raises UsageError for one string instead of several
        and for a negative k."""
        if isinstance(queries, str):
            raise UsageError("search takes a list of queries, this is one text: search([text])")
        if k < 0:
            raise UsageError(f"k = {k}: at least 0")
        view = self._opened()
        if not len(queries) or not k:
            return Hits.empty(len(queries), k)
        allowed = self.store.allow(where=where, exclude=exclude)
        return view.search(lambda leaf: leaf.encode(queries), len(queries), k, allowed, self.effort)

    def nearest(self, q_QD: np.ndarray, k: int = 10, where: str | None = None, exclude: Sequence[str] = ()) -> Hits:
        """As `search`, for query vectors float32 [Q, D] of length one made by the same encoder."""
        q_QD = np.ascontiguousarray(q_QD, np.float32)
        allowed = self.store.allow(where=where, exclude=exclude)
        return self._opened().search(lambda leaf: q_QD, len(q_QD), k, allowed, self.effort)

    def vectors(self, ids: Sequence[int]) -> np.ndarray:
        """float32 [N, D]: the stored vectors of these chunks, as `nearest` takes them. Raises StoreError for a chunk without one,
        UsageError where the parts of a union have different encoders."""
        return self._opened().vectors(np.asarray(ids, np.int64))

    def _opened(self) -> View:
        """The view of the version the store is at; another one after the store has changed."""
        key = tuple((s.id, s.version) for s, _ in leaves(self.store))
        with self._guard:
            if self._view is None or self._view.key != key:
                self._view = None
                self._view = View(self.store, key, self._wish)
            return self._view


class View:
    """The vectors of one version of a store, or of several as one."""

    def __init__(self, store, key: tuple, wish: Wish):
        self.key = key
        self.leaves = [Leaf(part, offset, wish) for part, offset in leaves(store)]

    def vectors(self, ids: np.ndarray) -> np.ndarray:
        if len(made := {leaf.now.settings["encoder"]: leaf for leaf in self.leaves if len(leaf.rows)}) > 1:
            raise UsageError(f"vectors of {' and '.join(made)} are not of one kind: search by texts")
        out, left = np.empty((len(ids), self.leaves[0].rows.dim), np.float32), np.ones(len(ids), bool)
        for leaf in self.leaves:
            at = np.searchsorted(leaf.ids, ids)
            here = np.flatnonzero(at < len(leaf.ids))
            here = here[leaf.ids[at[here]] == ids[here]]
            out[here], left[here] = leaf.rows.take(at[here]), False
        if left.any():
            raise vectors.damaged(self.leaves[0].folder, f"chunk {ids[left][0]} has no vector")
        return out

    def search(self, encode, queries: int, k: int, allowed: np.ndarray, effort: int | None) -> Hits:
        if len(self.leaves) == 1 and len(self.leaves[0].rows):
            return self.leaves[0].search(encode(self.leaves[0]), k, allowed, effort)
        ids, scores, made = [], [], {}
        for leaf in self.leaves:
            fingerprint = leaf.now.settings["fingerprint"]
            if not len(leaf.rows):
                continue
            if fingerprint not in made:
                made[fingerprint] = encode(leaf)
            found = leaf.search(made[fingerprint], k, allowed, effort)
            ids.append(found.ids)
            scores.append(found.scores)
        if not ids:
            return Hits.empty(queries, k)
        return best(np.concatenate(ids, 1), np.concatenate(scores, 1), k)


class Leaf:
    """The vectors of one datastore, whose chunk ids begin at `offset` in the union it is searched in."""

    def __init__(self, store, offset: int, wish: Wish):
        self.folder = wish.folder(store)
        self.now, self.rows = vectors.opened(store, wish)
        self.ids = self.rows.ids + offset
        self._first, self._stop = offset, offset + store.chunk_rows
        self._guard, self._filters = threading.Lock(), []
        flat = (wish.index or self.now.settings["index"]) == "flat"
        self.near = None if flat else ann.open_index(self.folder, self.now, self.rows)
        self._self_test()

    @property
    def kind(self) -> str:
        return self.near.kind if self.near else "flat"

    @cached_property
    def encoder(self):
        return vectors.encoder_of(self.folder, self.now)

    def encode(self, queries: Sequence[str]) -> np.ndarray:
        with self._guard:
            return self.encoder.encode(list(queries), role="query")

    def _self_test(self) -> None:
        """A few stored vectors have length one (or are zero): catches files that are not what they were."""
        if len(self.rows):
            some = self.rows.take(np.unique(np.linspace(0, len(self.rows) - 1, 4).astype(np.int64))).astype(np.float32)
            with np.errstate(all="ignore"):
                length = np.sqrt((some * some).sum(1))
            if not ((np.abs(length - 1) < 0.01) | (length == 0)).all():
                raise vectors.damaged(self.folder, f"stored vectors have lengths {length.tolist()}, not 1")

    def filter(self, allowed: np.ndarray) -> ann.Allowed:
        """The bitmap over chunk ids as one over rows; the last few are remembered (by the array itself, which is read-only)."""
        for known, found in self._filters:
            if known is allowed:
                return found
        found = ann.Allowed(self.mask(allowed))
        if not allowed.flags.writeable:
            self._filters = [(allowed, found), *self._filters[:FILTERS - 1]]
        return found

    def mask(self, allowed: np.ndarray) -> np.ndarray:
        """bool over rows; rows younger than the opened version are out."""
        out = np.zeros(len(self.ids), bool)
        n = int(np.searchsorted(self.ids, self._stop))
        if n and self.ids[n - 1] - self.ids[0] == n - 1:
            out[:n] = allowed[self.ids[0]:self.ids[0] + n]
        else:
            out[:n] = allowed[self.ids[:n]]
        return out

    def search(self, q_QD: np.ndarray, k: int, allowed: np.ndarray, effort: int | None) -> Hits:
        if q_QD.ndim != 2 or q_QD.shape[1] != self.rows.dim:
            raise UsageError(f"query vectors {list(q_QD.shape)}, stored ones of {self.rows.dim} dimensions: give "
                             f"[Q, {self.rows.dim}], made by {self.now.settings['encoder']}")
        allowed = self.filter(allowed)
        if not allowed.count:
            return Hits.empty(len(q_QD), k)
        if self.near is None or allowed.count <= max(NARROW, 2 * k):
            return self._exact(q_QD, k, allowed)
        return self._near(q_QD, k, allowed, effort)

    def _exact(self, q_QD: np.ndarray, k: int, allowed: ann.Allowed) -> Hits:
        out, width = Hits.empty(len(q_QD), k), min(k, allowed.count)
        rows, scores = exact.top(self.rows, q_QD, width, allowed.filter)
        out.ids[:, :width] = np.where(rows >= 0, self.ids[rows], -1)
        out.scores[:, :width] = scores
        return out

    def _near(self, q_QD: np.ndarray, k: int, allowed: ann.Allowed, effort: int | None, strict: bool = False) -> Hits:
        """Candidates of the FAISS index and of the tail it does not cover. Queries that get fewer than k: the index is asked
        for allowed rows only, then search is exact."""
        width = min(k, allowed.count)
        near = self.near.search(q_QD, width, allowed, effort, strict)
        if self.near.rows < len(self.rows):
            near = np.concatenate([near, exact.top(self.rows, q_QD, width, allowed.filter, self.near.rows)[0]], 1)
        ids, scores, found = exact.score(self.rows, q_QD, near, k, allowed.filter, self.ids)
        if found < width:
            short = np.flatnonzero((ids[:, width - 1] < 0) & (q_QD != 0).any(1))
            if len(short):
                again = (self._exact(q_QD[short], k, allowed) if strict or allowed.filter is None
                         else self._near(q_QD[short], k, allowed, effort, True))
                ids[short], scores[short] = again.ids, again.scores
        return Hits(ids, scores)


def best(ids: np.ndarray, scores: np.ndarray, k: int) -> Hits:
    """The k best of [Q, n] hits, sorted by score and id, padded."""
    order = np.lexsort((np.where(ids < 0, np.iinfo(np.int64).max, ids), -scores), axis=1)[:, :k]
    out = Hits.empty(len(ids), k)
    out.ids[:, :order.shape[1]] = np.take_along_axis(ids, order, 1)
    out.scores[:, :order.shape[1]] = np.take_along_axis(scores, order, 1)
    return out


# ---- artifacts ------------------------------------------------------------------------------------------------------


def update(store, artifact: str = "dense") -> None:
    """Extend the vectors in this folder of index/ to all stored chunks; linear in the new ones."""
    vectors.ready(store, Wish(name=artifact.partition("-")[2]))


def compact(store, artifact: str = "dense") -> None:
    """Rewrite the vectors in this folder of index/ without rows that are gone from the store."""
    vectors.compact(store, Path(store.path) / "index" / artifact)
