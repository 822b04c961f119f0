"""NeighbourStore: the neighbours of a chunk of m tokens, and what followed them (Borgeaud et al. 2022, section 2.3 and 2.4).

    neighbours = NeighbourStore.build(store, lm, m=64, retriever="bm25")     # or NeighbourStore(store, lm): what is there
    hits = neighbours.search([ids], k=2)                  # chunk numbers; never of a document this version does not hold
    tokens, mask = neighbours.gather(hits.ids)            # [N, F]: each chunk and what follows it in the same document

Documents are cut into chunks of m tokens of the model's tokenizer (neighbour_build.py); the chunks are searched by the indexes that
search passages (token_chunks.py). Removing a document works at once, in every search; nothing here needs torch but the encoder of a
dense retriever."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from ralm.errors import FingerprintError, UsageError, unknown
from ralm.index import SPECS, manifest, retriever
from ralm.types import Chunk, Hits, Retriever
from ralm.what import neighbour_build
from ralm.what.token_chunks import TokenChunks
from ralm.what.union import Union

FIRST = "bm25"  # what searches new chunks where nothing else is said: it finds better neighbours (Doostmohammadi et al. 2023)


def spec_of(text: str) -> str:
    """The retriever a user names, as ralm.index knows it: "dense+bm25" is a fusion of both. Raises UsageError for an unknown name,
    and for `auto`."""
    spec = text.strip()
    names = spec.partition(":")[0].split("+")
    if "" in names or "auto" in names:
        raise UsageError(f"retriever '{text}': name what searches the chunks: bm25, dense, dense:ENCODER or dense+bm25")
    if wrong := [n for n in names if n not in SPECS]:
        raise unknown("retriever", wrong[0], SPECS)
    parts = [p.partition(":")[0] for p in spec.split("+")]
    return f"hybrid:parts={spec}" if len(parts) > 1 and set(parts) <= {*SPECS} - {"hybrid"} else spec


class NeighbourStore:
    """The chunks of a datastore (or of a union of several, each with its own), searched by one retriever.

    lm: a model or its tokenizer, compared with what the chunks were cut by; None opens what is there, which must be up to date.
    retriever: bm25, dense, dense:ENCODER, hybrid or dense+bm25 (default: what it was built with). A lacking index is built.
    Raises StoreError where there is none, FingerprintError for another tokenizer or a model that reads chunks of another m."""

    def __init__(self, store, lm: Any = None, name: str = "default", retriever: str | None = None):
        self.store, self.lm, self.name = store, lm, str(name or "default")
        self._wish = None if retriever is None else spec_of(retriever)
        self._guard, self._view = threading.Lock(), None
        for part, _ in store.parts:
            folder = neighbour_build.chunks_of(part, self.name)
            if manifest.load(folder) is None:
                raise neighbour_build.lacking(part, folder)
        self._opened()  # now, so that what is wrong is told now

    @staticmethod
    def build(store, lm: Any, *, m: int | None = None, name: str = "default", retriever: str | None = None) -> NeighbourStore:
        """Make the neighbours of a datastore, or go on with what is there: its chunks, and the index that searches them.

        m: tokens of a chunk (default: what is there, what the model reads, 64). retriever: default what is there, bm25
        for new ones; one that is named is what searches from now on. Raises FingerprintError where what is there is otherwise."""
        spec = None if retriever is None else spec_of(retriever)
        for part, _ in store.parts:
            neighbour_build.ready(part, name, lm, m)
        made = NeighbourStore(store, lm, name, spec)
        for part, _ in store.parts:
            neighbour_build.prefer(part, name, made.retriever)
        return made

    def __repr__(self) -> str:
        return f"NeighbourStore('{self.name}', {len(self):,} chunks of {self.m} tokens, {self.retriever})"

    def __len__(self) -> int:
        """Chunks held, those of removed documents among them."""
        return sum(len(leaf) for leaf, _ in self.leaves)

    # ---- what it is --------------------------------------------------------------------------------------------------------

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.leaves[0][0].settings)

    @property
    def m(self) -> int:
        return self.leaves[0][0].m

    @property
    def retriever(self) -> str:
        """The spec of what searches the chunks."""
        return self._opened().spec

    @property
    def leaves(self) -> list[tuple[TokenChunks, int]]:
        """(the chunks of a datastore, the number of its first in the union) as of the version the store is at."""
        return self._opened().leaves

    @property
    def fingerprint(self) -> str:
        """Of the tokenizer the chunks were cut by (`tokenizer_fingerprint`)."""
        return self.settings["fingerprint"]

    @property
    def tokens(self) -> int:
        """Tokens held, those of removed documents among them."""
        return sum(int(leaf.tokens[-1]) for leaf, _ in self.leaves)

    @property
    def recall(self) -> float:
        """recall@10 of a dense index against exact search, as measured when it was made; 1 where search is exact."""
        search = self._opened().search
        return min((getattr(part, "recall", 1.0) for part in getattr(search, "parts", [search])), default=1.0)

    def identity(self) -> str:
        """What decides what is found: datastores with their versions, tokenizer, m, retriever."""
        at = "+".join(f"{leaf.id}@{leaf.version}" for leaf, _ in self.leaves)
        return f"{at}/{self.leaves[0][0].split}/{self.retriever}"

    def _opened(self) -> View:
        """Chunks and retriever of the version the store is at; opened again after it has changed."""
        key = tuple((s.id, s.version, s.revision_rows) for s, _ in self.store.parts)
        with self._guard:
            if self._view is None or self._view.key != key:
                self._view = None  # unmaps the old one first
                self._view = View(self, key)
            return self._view

    # ---- searching ---------------------------------------------------------------------------------------------------------

    def search(self, chunks: Sequence[str] | Sequence[Sequence[int]], k: int, where: str | None = None,
               exclude: Sequence[str] = ()) -> Hits:
        """The k best neighbours of each chunk, given as texts or as token ids, among the documents that are alive, match `where`
        and are not excluded (document ids). Hits [Q, k]: chunk numbers, -1 for none; scores are the retriever's."""
        if isinstance(chunks, str):
            raise UsageError("search takes a list of chunks, this is one text: search([text], k)")
        texts = [c if isinstance(c, str) else self.text(c) for c in chunks]
        return self._opened().search.search(texts, k, where=where, exclude=tuple(exclude))

    def search_held(self, ids: Sequence[int], k: int, where: str | None = None, exclude: Sequence[str] = ()) -> Hits:
        """As `search`, for chunks that are held, by their numbers. A dense retriever has their vectors and encodes nothing; every
        other looks up their text. A chunk finds itself, unless it is excluded."""
        search = self._opened().search
        if hasattr(search, "vectors"):
            return search.nearest(search.vectors(ids), k, where=where, exclude=tuple(exclude))
        return self.search([c.text for c in self.chunks(ids)], k, where, exclude)

    def text(self, ids: Sequence[int]) -> str:
        """What tokens are looked up as. Raises UsageError where no model was given."""
        if self.lm is None:
            raise UsageError("chunks of token ids need the tokenizer: open NeighbourStore(store, lm), or search by texts")
        return neighbour_build.tokenizer_of(self.lm).decode([int(i) for i in ids])

    def any(self, where: str | None = None, exclude: Sequence[str] = ()) -> bool:
        """Whether a search could find anything."""
        return bool(self.alive(where, exclude).any())

    def alive(self, where: str | None = None, exclude: Sequence[str] = ()) -> np.ndarray:
        """bool, read-only: by chunk number, those of documents that are alive, match `where` and are not excluded."""
        return self._opened().chunks.allow(where, tuple(exclude))

    # ---- reading -----------------------------------------------------------------------------------------------------------

    def gather(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[N, F] of chunks int64 [...]: (tokens int64 [..., 2m], mask bool [..., 2m]). F stops where the document stops; -1 is
        all 0 and False. Raises StoreError for a number that no chunk has."""
        ids = np.asarray(ids, np.int64)
        flat, m = ids.reshape(-1), self.m
        tokens, mask = np.zeros((len(flat), 2 * m), np.int64), np.zeros((len(flat), 2 * m), bool)
        for leaf, here, local in self._split(flat):
            some = np.empty((len(here), 2 * m), np.int64), np.empty((len(here), 2 * m), bool)
            leaf.gather(local, *some)
            tokens[here], mask[here] = some
        return tokens.reshape(*ids.shape, 2 * m), mask.reshape(*ids.shape, 2 * m)

    def chunks(self, ids: Sequence[int]) -> list[Chunk]:
        """The chunks with these numbers (N, without what follows): text is document.text[start:end] exactly."""
        return self._opened().chunks.chunks(ids)

    def documents(self, ids: Sequence[int]) -> list[str]:
        """The id of the document each chunk is of."""
        return self._opened().chunks.document_ids(ids)

    def places(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Two int64 of the shape of ids: a number for the document of each chunk, and where in it its first token is; -1 for -1.

        The number is the place of a document among all that are held, as `numbers` gives it."""
        ids = np.asarray(ids, np.int64)
        document, token, before = np.full(ids.size, -1, np.int64), np.full(ids.size, -1, np.int64), self._opened().before
        for leaf, here, local in self._split(ids.reshape(-1)):
            at, token[here] = leaf.places(local)
            document[here] = at + before[id(leaf)]
        return document.reshape(ids.shape), token.reshape(ids.shape)

    def numbers(self, documents: Sequence[str]) -> dict[str, list[int]]:
        """By document id, the numbers of the documents of this version that have it (one in each part of a union at most)."""
        view, out = self._opened(), {}
        for leaf, _ in view.leaves:
            for name, rev in leaf.store.revisions_of(documents).items():
                at = int(np.searchsorted(leaf.revs, rev))
                if at < len(leaf.revs) and leaf.revs[at] == rev:
                    out.setdefault(name, []).append(at + view.before[id(leaf)])
        return out

    def sizes(self) -> np.ndarray:
        """int64: how many chunks each document has, by its number."""
        return np.concatenate([leaf.counts for leaf, _ in self.leaves])

    def _split(self, flat: np.ndarray):
        """(chunks of a datastore, which of the numbers are its own, these counted in it). -1 is nobody's."""
        leaves = self.leaves
        if (flat < -1).any():
            raise UsageError(f"chunk {flat.min()}: numbers count from 0, -1 is none")
        for i, (leaf, offset) in enumerate(leaves):
            end = leaves[i + 1][1] if i + 1 < len(leaves) else np.inf
            here = np.flatnonzero((flat >= offset) & (flat < end))
            if len(here):
                yield leaf, here, flat[here] - offset


class View:
    """The chunks of one version of a store, as one, with what searches them."""

    def __init__(self, of: NeighbourStore, key: tuple):
        self.key, each = key, [TokenChunks(part, of.name, of.lm) for part, _ in of.store.parts]
        for leaf in each[1:]:
            for what in ("m", "fingerprint"):
                if leaf.settings[what] != each[0].settings[what]:
                    raise FingerprintError(
                        f"{each[0].path} and {leaf.path} were made with {what} = {each[0].settings[what]} and "
                        f"{leaf.settings[what]}, they cannot be searched as one: make one like the other "
                        f"({manifest.command(leaf.path / 'chunks')} --rebuild)")
        self.chunks: TokenChunks | Union = each[0] if len(each) == 1 else Union(*each)
        self.leaves = [(leaf, offset) for leaf, offset in self.chunks.parts]
        documents = np.concatenate([[0], np.cumsum([len(leaf.revs) for leaf in each])]).tolist()
        self.before = {id(leaf): n for leaf, n in zip(each, documents)}  # documents of the parts before it
        self.spec: str = of._wish or next((s for x in each if (s := x.now.facts.get("retriever"))), FIRST)
        self.search: Retriever = retriever(self.spec, self.chunks)
