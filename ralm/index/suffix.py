"""∞-gram search: how often any sequence of tokens occurs in a store, and what follows the longest suffix of a context that occurs.

    index = SuffixIndex(store, lm.tokenizer, called=lm.name)
    index.count(ids)                     # occurrences of a sequence in the documents of this version
    found = index.match(ids)             # for every position t of a text: the longest suffix of ids[:t] with a successor
    found.length[t], found.count[t]      # its tokens, its occurrences; target[t]: how many are followed by ids[t]
    found.followers(t)                   # the whole distribution of what follows
    found.occurrences(t)                 # which documents say so, and where

Liu et al. 2024, Infini-gram: the estimate of an n-gram with n as large as the data allow. A match never crosses documents. Filters
(`where`, `exclude`, removal, older versions) act inside: counts are those of a store that never held the other documents."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ralm.errors import UsageError
from ralm.index import manifest
from ralm.index import suffix_kernels as kernels
from ralm.index import suffix_parts as parts
from ralm.index.sparse import leaves
from ralm.index.suffix_kernels import COUNT, FIELDS, FIRST, HIGH, LAST, LENGTH, LOW, TARGET
from ralm.index.suffix_parts import Wish, damaged
from ralm.registry import whole
from ralm.what.filters import UnknownColumn

KIND = parts.KIND
FILTERS = 8  # filters kept as bitmaps
NOTHING = np.zeros(0, np.uint64), np.zeros(0, np.uint32)  # no bitmap: everything is allowed


@dataclass(frozen=True, slots=True)
class Occurrence:
    """One place where a context stands: tokens [start, start + length) of a document, followed by `token`."""

    document: str
    store: Path  # the datastore it is in (one part of a union)
    rev: int
    start: int
    length: int
    token: int


class Piece:
    """One sorted part, mapped."""

    def __init__(self, folder: Path, part: manifest.Part, settings: dict):
        manifest.sizes(folder, part)
        tokens, sa, heads, documents = (parts.load(folder, part, f"{n}.npy") for n in ("tokens", "sa", "heads", "documents"))
        self.width, self.vocab, self.first = settings["width"], settings["vocab"], part.first
        if (tokens.shape, heads.shape, documents.shape[1:]) != ((part.rows, self.width), (self.vocab + 1,), (2,)) or (
                len(sa) + len(documents) != part.rows):
            raise damaged(folder, f"the files of {part.name} do not belong together")
        self.data, self.sa, self.heads = np.asarray(tokens).reshape(-1), np.asarray(sa), np.asarray(heads)
        self.revs = documents[:, 0].astype(np.int64) + part.first
        self.starts = documents[:, 1].astype(np.int64)
        self._self_test(folder, part)

    def _self_test(self, folder: Path, part: manifest.Part) -> None:
        """Documents and heads ascend, a sample of neighbours in the array is in order: catches files that are not what they were.
        (`ralm doctor` reads every byte.)"""
        ends = np.append(self.starts[1:], part.rows) - 1  # where the separators are; some are looked at
        ascending = self.starts[0] == 0 and (ends > self.starts).all() and (np.diff(self.revs) > 0).all()
        if not ascending or (self._token(ends[::max(1, len(ends) // 64)]) != self.vocab).any():
            raise damaged(folder, f"the documents of {part.name} do not lie where they are said to")
        heads = self.heads.astype(np.int64)
        sample = np.unique(np.linspace(0, max(0, len(self.sa) - 2), 64).astype(np.int64))[:len(self.sa) - 1]
        if heads[0] != 0 or heads[-1] != len(self.sa) or (np.diff(heads) < 0).any() or (
                kernels.disorder(self.data, self.width, self.sa, sample) >= 0):
            raise damaged(folder, f"the suffixes of {part.name} are not in order")

    def _token(self, at: np.ndarray) -> np.ndarray:
        return parts.unpack(self.data.reshape(-1, self.width)[at])

    def mask(self, allowed: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """A bitmap over revisions as one over the suffix array, with ranks; NOTHING where all are allowed, None where none is."""
        inside = self.revs < len(allowed)  # revisions younger than the opened version are out
        keep = np.zeros(len(self.revs), bool)
        keep[inside] = allowed[self.revs[inside]]
        if keep.all():
            return NOTHING
        if not keep.any():
            return None
        sizes = np.diff(np.append(self.starts, len(self.data) // self.width))
        positions = np.packbits(np.repeat(keep, sizes), bitorder="little")
        words, ranks = np.zeros(len(self.sa) // 64 + 1, np.uint64), np.zeros(len(self.sa) // 64 + 1, np.uint32)
        kernels.allow(self.sa, positions, words, ranks)
        return words, ranks


@dataclass(frozen=True)
class Masked:
    """A piece under a filter: what the kernels take."""

    piece: Piece
    words: np.ndarray
    ranks: np.ndarray
    store: object

    @property
    def text(self) -> tuple:
        p = self.piece
        return p.data, p.width, p.sa

    @property
    def all(self) -> tuple:
        return *self.text, self.piece.heads, self.words, self.ranks

    def rank(self, i: int) -> int:
        return int(kernels.rank(self.words, self.ranks, i))


@dataclass(frozen=True)
class Matches:
    """What stands in the store for S positions of a text; arrays [S]. `length` is -1 where the store is empty (or where even the
    empty context has fewer than `least` occurrences)."""

    length: np.ndarray  # int64: tokens of the longest suffix
    count: np.ndarray  # int64: its occurrences that have a successor
    target: np.ndarray  # int64: those followed by the text's own next token; 0 where the text ends
    sparse: np.ndarray  # bool: all are followed by the same token
    _rows_PSF: np.ndarray  # int64 [P, S, FIELDS]: the same by part
    _masked: Sequence[Masked]
    shorter: tuple[Matches, ...] = ()  # of 1, 2, ... tokens where the longest has more: elsewhere length -1 and nothing counted

    def __len__(self) -> int:
        return len(self.length)

    def followers(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, counts), int64, tokens ascending: the distribution of what follows the context of position i."""
        found = [self._of_part(m, *self._rows_PSF[p, i, [LOW, HIGH, LENGTH]].tolist()) for p, m in enumerate(self._masked)
                 if self._rows_PSF[p, i, COUNT]]
        if len(found) == 1:
            return found[0]
        if not found:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        tokens, back = np.unique(np.concatenate([t for t, _ in found]), return_inverse=True)
        return tokens, np.bincount(back, np.concatenate([c for _, c in found])).astype(np.int64)

    @staticmethod
    def _of_part(m: Masked, lo: int, hi: int, k: int) -> tuple[np.ndarray, np.ndarray]:
        most = min(hi - lo, m.piece.vocab)
        tokens, counts = np.empty(most, np.int64), np.empty(most, np.int64)
        n = kernels.followers(*m.text, m.words, m.ranks, lo, hi, k, tokens, counts)
        return tokens[:n], counts[:n]

    def rows(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(pointers int64 [S + 1], tokens, counts): `followers` of all positions in a row, those of i from pointers[i] to
        pointers[i + 1]. Equal contexts are looked up once."""
        seen: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}
        each = []
        for i in range(len(self)):
            key = np.ascontiguousarray(self._rows_PSF[:, i, [LOW, HIGH, LENGTH, COUNT]]).tobytes()
            if key not in seen:
                seen[key] = self.followers(i)
            each.append(seen[key])
        pointers = np.concatenate([[0], np.cumsum([len(t) for t, _ in each], dtype=np.int64)]).astype(np.int64)
        empty = np.zeros(0, np.int64)
        return pointers, np.concatenate([empty, *(t for t, _ in each)]), np.concatenate([empty, *(c for _, c in each)])

    def occurrences(self, i: int, limit: int = 10, token: int | None = None) -> list[Occurrence]:
        """Up to `limit` places where the context of position i stands (followed by `token`, where one is given), spread evenly over
        them in the order of what follows."""
        out: list[Occurrence] = []
        places = [(m, *self._range(m, self._rows_PSF[p, i], token)) for p, m in enumerate(self._masked)]
        total = sum(n for *_, n in places)
        wanted = np.unique(np.linspace(0, total - 1, min(limit, total)).astype(np.int64)) if total else np.zeros(0, np.int64)
        for m, lo, hi, n in places:
            for nth in wanted[(wanted >= 0) & (wanted < n)].tolist():
                out.append(self._occurrence(m, int(kernels.select(m.words, m.ranks, lo, hi, nth)), int(self.length[i])))
            wanted = wanted - n
        return out

    @staticmethod
    def _range(m: Masked, row: np.ndarray, token: int | None) -> tuple[int, int, int]:
        lo, hi = int(row[LOW]), int(row[HIGH]) if row[COUNT] else int(row[LOW])
        if token is not None:
            lo, hi = map(int, kernels.refine(*m.text, lo, hi, int(row[LENGTH]), clean([token], m.piece.vocab)[0]))
        return lo, hi, m.rank(hi) - m.rank(lo)

    @staticmethod
    def _occurrence(m: Masked, entry: int, length: int) -> Occurrence:
        p = m.piece
        at = int(p.sa[entry])
        document = int(np.searchsorted(p.starts, at, side="right")) - 1
        rev = int(p.revs[document])
        return Occurrence(m.store.state([rev])[rev].id, m.store.path, rev, at - int(p.starts[document]), length,
                          int(kernels.token(p.data, p.width, at + length)))


class SuffixIndex:
    """The ∞-gram index of a store (or a union of stores) for one tokenizer. Opening it builds it, or extends it to new documents.

    tokenizer: with encode and decode, one whose vocabulary can be seen (transformers, tokenizers, ralm's own); called: its model's
    name, for messages; name: of a second index beside the first (index/suffix-NAME).
    Raises FingerprintError where the index was made with another tokenizer, StoreError for damaged files."""

    def __init__(self, store, tokenizer, called: str = "", name: str = ""):
        name = str(name or "")
        if name and not name.replace("-", "").replace("_", "").isalnum():
            raise UsageError(f"name = '{name}': letters, digits, - and _ only")
        self.store, self.tokenizer, self._wish = store, tokenizer, Wish(tokenizer, called, name)
        self._guard, self._view = threading.Lock(), None
        self._opened()

    def __repr__(self) -> str:
        view = self._opened()
        return f"SuffixIndex({view.settings['tokenizer']}, {view.tokens} tokens in {len(view.pieces)} parts)"

    @property
    def tokens(self) -> int:
        """Tokens held, those of removed documents among them."""
        return self._opened().tokens

    @property
    def fingerprint(self) -> str:
        """Of the tokenizer it is counted in (`tokenizer_fingerprint`)."""
        return self._opened().settings["fingerprint"]

    def count(self, ids: Sequence[int], where: str | None = None, exclude: Sequence[str] = ()) -> int:
        """How often these tokens occur, one after the other, in the documents that match `where` and are not excluded."""
        view, total = self._opened(), 0
        ids = clean(ids, view.settings["vocab"])
        for m in view.masked(self.store, where, exclude):
            lo, hi = kernels.find(*m.text, m.piece.heads, ids, 0, len(ids))
            total += m.rank(hi) - m.rank(lo)
        return total

    def match(self, ids: Sequence[int], start: int = 0, stop: int | None = None, *, least: int = 1, most: int | None = None,
              levels: int = 0, where: str | None = None, exclude: Sequence[str] = ()) -> Matches:
        """For every position t in [start, stop) the longest suffix of ids[:t], of at most `most` tokens (None: any number), that
        occurs at least `least` times with a successor. stop: by default len(ids); len(ids) + 1 asks for what follows it all too.

        levels: `shorter` holds the suffixes of 1 .. levels tokens too. The empty context occurs before every token. Raises
        UsageError for positions outside the text."""
        whole(1, least=least)
        most = len(ids) if most is None else most
        whole(0, most=most, levels=levels)
        stop = len(ids) if stop is None else stop
        if not 0 <= start <= stop <= len(ids) + 1:
            raise UsageError(f"positions {start} to {stop} of a text of {len(ids)} tokens; give 0 <= start <= stop <= "
                             f"{len(ids) + 1}")
        view = self._opened()
        masked = view.masked(self.store, where, exclude)
        return search(masked, clean(ids, view.settings["vocab"]), start, stop, least, most, levels)

    def _opened(self) -> View:
        """The view of the version the store is at; another one after the store has changed."""
        key = tuple((s.id, s.version) for s, _ in leaves(self.store))
        with self._guard:
            if self._view is None or self._view.key != key:
                self._view = None
                self._view = View(self.store, key, self._wish)
            return self._view


class View:
    """The parts of one version of a store, or of several as one, and the filters asked for lately."""

    def __init__(self, store, key: tuple, wish: Wish):
        self.key, self.settings = key, wish.settings()
        self.pieces = [(leaf, piece) for leaf, _ in leaves(store) for piece in _open(leaf, wish)]
        self.tokens = sum(len(p.sa) for _, p in self.pieces)
        self._filtered: OrderedDict[tuple, list[Masked]] = OrderedDict()
        self._guard = threading.Lock()

    def masked(self, store, where: str | None, exclude: Sequence[str]) -> list[Masked]:
        """The pieces that hold anything allowed, with their filters."""
        key = (where, tuple(sorted(exclude)))
        with self._guard:
            if key in self._filtered:
                self._filtered.move_to_end(key)
                return self._filtered[key]
        allowed = _allowed(store, where, exclude)
        masks = [(leaf, piece, piece.mask(allowed[id(leaf)])) for leaf, piece in self.pieces]
        out = [Masked(piece, *mask, leaf) for leaf, piece, mask in masks if mask is not None]
        with self._guard:
            self._filtered[key] = out
            while len(self._filtered) > FILTERS:
                self._filtered.popitem(last=False)
        return out


def _open(store, wish: Wish) -> list[Piece]:
    folder = wish.folder(store)
    return manifest.opened(lambda: parts.ready(store, wish),
                           lambda now: [Piece(folder, p, now.settings) for p in now.parts if p.rows])[1]


def _allowed(store, where: str | None, exclude: Sequence[str]) -> dict[int, np.ndarray]:
    """The bitmap over revisions of every leaf, by id(). A column that a part of a union lacks matches nothing there."""
    out, errors, all_leaves = {}, [], [leaf for leaf, _ in leaves(store)]
    for leaf in all_leaves:
        try:
            out[id(leaf)] = leaf.revisions(where=where, exclude=exclude)
        except UnknownColumn as e:
            errors.append(e)
            out[id(leaf)] = np.zeros(leaf.revision_rows, bool)
    if len(errors) == len(all_leaves):
        raise errors[0]
    return out


def clean(ids: Sequence[int], vocab: int) -> np.ndarray:
    """int64: ids that no document can hold become -1, which is found nowhere."""
    ids = np.asarray(ids, np.int64).reshape(-1)
    return np.where((ids >= 0) & (ids < vocab), ids, -1)


def search(masked: Sequence[Masked], ids: np.ndarray, start: int, stop: int, least: int, most: int, levels: int = 0) -> Matches:
    """See SuffixIndex.match; over pieces, for ids that are clean."""
    rows_PSF = np.zeros((len(masked), stop - start, FIELDS), np.int64)
    for m, out in zip(masked, rows_PSF):
        kernels.walk(*m.all, ids, start, most, out)
    length = rows_PSF[:, :, LENGTH].max(0, initial=-1)
    if least > 1:
        length = _longest(masked, ids, start, length, least)
    if len(masked) > 1 or least > 1:
        rows_PSF = _located(masked, ids, start, length)
    shorter = [np.where(length > n, n, -1) for n in range(1, levels + 1)]
    return _matches(length, rows_PSF, masked, tuple(_matches(n, _located(masked, ids, start, n), masked) for n in shorter))


def _located(masked: Sequence[Masked], ids: np.ndarray, start: int, lengths: np.ndarray) -> np.ndarray:
    """int64 [P, S, FIELDS] for contexts of these lengths."""
    rows_PSF = np.zeros((len(masked), len(lengths), FIELDS), np.int64)
    for m, out in zip(masked, rows_PSF):
        kernels.locate(*m.all, ids, start, lengths, out)
    return rows_PSF


def _matches(length: np.ndarray, rows_PSF: np.ndarray, masked: Sequence[Masked], shorter: tuple[Matches, ...] = ()) -> Matches:
    """Sums over the parts. One in which a context does not occur has a count of 0 and adds nothing."""
    count, target = rows_PSF[:, :, COUNT].sum(0), rows_PSF[:, :, TARGET].sum(0)
    there = rows_PSF[:, :, COUNT] > 0
    first = np.where(there, rows_PSF[:, :, FIRST], np.iinfo(np.int64).max).min(0, initial=np.iinfo(np.int64).max)
    last = np.where(there, rows_PSF[:, :, LAST], -1).max(0, initial=-1)
    return Matches(length, count, target, (count > 0) & (first == last), rows_PSF, masked, shorter)


def _longest(masked: Sequence[Masked], ids: np.ndarray, start: int, bound: np.ndarray, least: int) -> np.ndarray:
    """Per position the largest n <= bound whose context occurs `least` times with a successor over all parts, -1 where none does.
    Counts fall as contexts grow, so it is found by halving, for all positions at once."""
    good, bad = np.full(len(bound), -1), bound + 1
    rows = np.zeros((len(bound), FIELDS), np.int64)
    while (bad - good > 1).any():
        n = np.where(bad - good > 1, (good + bad) >> 1, good)
        total = np.zeros(len(bound), np.int64)
        for m in masked:
            kernels.locate(*m.all, ids, start, n, rows)
            total += rows[:, COUNT]
        fits = total >= least
        good, bad = np.where(fits, n, good), np.where(fits, bad, np.where(bad - good > 1, n, bad))
    return good


# ---- artifacts ------------------------------------------------------------------------------------------------------


def compact(store, artifact: str = "suffix") -> None:
    """Rewrite the parts of this folder of index/ without documents that are gone from the store."""
    parts.compact(store, Path(store.path) / "index" / artifact)
