"""Rows for RETRO: the documents of a datastore on a fixed grid, so that the neighbours of every chunk can be looked up beforehand.

A row is [END, tokens], window + 1 of them: documents of one source in random order, END after each, cut every `window` tokens. A
source is what stands before the first / of a document's id. Which rows a step has depends on seed and counter alone.

Three kinds of neighbours (`KINDS`), a kind a row, drawn once:
    document   of other documents than those of the row (Borgeaud et al. 2022, section 2.2)
    row        of the same document too, where neither N nor F touches the row: names and phrases that a document repeats
    copy       one of them is a piece of the row itself, its chunk and what follows, moved by up to half a chunk: nothing teaches a
               small model sooner to look what stands behind a match (as gpt_data.py does for text in front)
Of the first two, documents that tell the same in another typography (the same id behind the first /) are out too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ralm.errors import UsageError

KINDS = ("document", "row", "copy")
BLOCK = 1 << 16  # chunks read at a time


@dataclass(frozen=True)
class Text:
    """Documents one after the other, each followed by END."""

    ids: np.ndarray  # [T]
    starts: np.ndarray  # int64 [D + 1]
    names: list[str]

    def rows(self, window: int) -> int:
        return len(self.ids) // window

    def spans(self, row: int, window: int) -> list[tuple[str, int, int]]:
        """(document, from token, to token) of what a row holds, END left out."""
        a, b = row * window, (row + 1) * window
        first, last = np.searchsorted(self.starts, [a, b - 1], "right") - 1
        out = []
        for d in range(int(first), int(last) + 1):
            start, stop = int(self.starts[d]), int(self.starts[d + 1]) - 1
            if max(a, start) < min(b, stop):
                out.append((self.names[d], max(a, start) - start, min(b, stop) - start))
        return out


def read(neighbours: Any) -> list[tuple[str, np.ndarray]]:
    """(id, tokens) of every document of a NeighbourStore's version, in the order of its chunks."""
    numbers, m = np.flatnonzero(neighbours.alive()), neighbours.m
    if not len(numbers):
        raise UsageError(f"{neighbours.store} holds no text to train on; add documents")
    of, _ = neighbours.places(numbers)
    tokens, counts = [], []
    for at in range(0, len(numbers), BLOCK):
        t, mask = neighbours.gather(numbers[at:at + BLOCK])
        tokens.append(t[:, :m][mask[:, :m]])
        counts.append(mask[:, :m].sum(1))
    tokens, counts = np.concatenate(tokens), np.concatenate(counts)
    first = np.flatnonzero(np.diff(of, prepend=-1))  # the first chunk of each document
    ends = np.cumsum(np.add.reduceat(counts, first))
    return list(zip(neighbours.documents(numbers[first]), np.split(tokens, ends[:-1])))


class Rows:
    """Rows to train on and rows held out, by source, and the neighbours of both.

    sources: share of the rows, by name. held: every so-many-th document of a source is never trained on. limit: most different
    rows. kinds: share of the rows of each kind of neighbours. leak: neighbours that have so many words in a row in common with
    the row are left out, whatever document they are of (0: none)."""

    def __init__(self, documents: Sequence[tuple[str, np.ndarray]], sources: Mapping[str, float], window: int, m: int, end: int,
                 seed: int, held: int = 50, limit: int = 0, kinds: Mapping[str, float] | None = None,
                 leak: int = 0, words: np.ndarray | None = None):
        self.window, self.m, self.end, self.seed = window, m, end, seed
        self.chunks = window // m - 1  # whose neighbours somebody reads: those of the last are read by one token
        if self.chunks < 1:
            raise UsageError(f"rows of {window} tokens hold no two chunks of {m}; use window = {2 * m} at least")
        rng = np.random.default_rng([seed, 0])
        self.leak, self.words = leak, words  # words: bool [V], tokens that are no punctuation or space
        self.names, self.train, self.held = list(sources), [], []
        for name in self.names:
            mine = [d for d in documents if d[0].partition("/")[0] == name]
            if not mine:
                raise UsageError(f"no document of source '{name}': ids are SOURCE/NAME, the first is '{documents[0][0]}'")
            mine = [mine[i] for i in rng.permutation(len(mine))]
            self.held.append(self._text(mine[::held] if held else []))
            self.train.append(self._text([d for i, d in enumerate(mine) if not held or i % held]))
        if short := [n for n, t in zip(self.names, self.train) if not t.rows(window)]:
            raise UsageError(f"source '{short[0]}' has no row of {window} tokens; use a smaller window or more text")
        share = np.array([sources[n] for n in self.names], float)
        total = sum(t.rows(window) for t in self.train)
        total = min(limit, total) if limit else total
        of = rng.choice(len(share), total, p=share / share.sum())
        self.order = self._order(of, self.train, rng)
        few = [(s, i) for s, t in enumerate(self.held) for i in rng.permutation(t.rows(window)).tolist()]
        self.held_order = np.array([few[i] for i in rng.permutation(len(few))], np.int64).reshape(-1, 2)
        weight = np.array([(kinds or {"document": 1.0}).get(k, 0.0) for k in KINDS], float)
        self.kind = rng.choice(len(KINDS), total, p=weight / weight.sum())

    def _text(self, documents: Sequence[tuple[str, np.ndarray]]) -> Text:
        parts = [np.append(tokens, self.end).astype(np.int32) for _, tokens in documents]
        starts = np.concatenate([[0], np.cumsum([len(p) for p in parts])]).astype(np.int64)
        return Text(np.concatenate([np.zeros(0, np.int32), *parts]), starts, [name for name, _ in documents])

    def _order(self, of: np.ndarray, texts: list[Text], rng: np.random.Generator) -> np.ndarray:
        """int64 [N, 2]: (source, row) of the rows in the order they are dealt; no row of a source twice before all are."""
        out = np.empty((len(of), 2), np.int64)
        out[:, 0] = of
        for s, text in enumerate(texts):
            mine, rows = np.flatnonzero(of == s), text.rows(self.window)
            epochs = [rng.permutation(rows) for _ in range(-(-len(mine) // rows))]
            out[mine, 1] = np.concatenate([np.zeros(0, np.int64), *epochs])[:len(mine)]
        return out

    def __len__(self) -> int:
        """Rows before the first one comes again."""
        return len(self.order)

    def tokens(self, order: np.ndarray, texts: list[Text]) -> np.ndarray:
        """int64 [n, window + 1] of rows named by (source, row)."""
        out = np.full((len(order), self.window + 1), self.end, np.int64)
        for i, (s, row) in enumerate(order.tolist()):
            out[i, 1:] = texts[s].ids[row * self.window:(row + 1) * self.window]
        return out

    # ---- neighbours -------------------------------------------------------------------------------------------------------

    def find(self, neighbours: Any, k: int, folder: Path, examples: int) -> None:
        """Look up the neighbours of all rows, and of `examples` rows held out, once with each kind; kept in `folder`."""
        same = self.kind != KINDS.index("document")
        self.found = np.full((len(self), self.chunks, k), -1, np.int64)
        for which, rows in (("document", np.flatnonzero(~same)), ("row", np.flatnonzero(same))):
            if len(rows):
                self.found[rows] = self._look(neighbours, self.order[rows], self.train, which, k, folder / f"train-{which}")
        some = self.held_order[:examples]
        self.found_held = {w: self._look(neighbours, some, self.held, w, k, folder / f"held-{w}") for w in KINDS[:2]}

    def _look(self, neighbours: Any, order: np.ndarray, texts: list[Text], which: str, k: int, folder: Path) -> np.ndarray:
        """int64 [n, chunks, k]: numbers of chunks, -1 for none."""
        from ralm.what.corpus_neighbours import precompute

        if not len(order):
            return np.zeros((0, self.chunks, k), np.int64)
        spans = [texts[s].spans(row, self.window) for s, row in order.tolist()]
        own = [{name for name, *_ in row} for row in spans]
        twins = [{f"{source}/{name.partition('/')[2]}" for name in row for source in self.names} for row in own]
        ids = self.tokens(order, texts)[:, :self.chunks * self.m]
        if which == "document":
            found = precompute(neighbours, ids, [a | b for a, b in zip(own, twins)], k, folder)
        else:
            found = precompute(neighbours, ids, [b - a for a, b in zip(own, twins)], k, folder, spans, "row")
        return self._unlike(np.array(found, np.int64), self.tokens(order, texts), neighbours) if self.leak else np.asarray(found)

    def _unlike(self, found: np.ndarray, rows: np.ndarray, neighbours: Any) -> np.ndarray:
        """The neighbours without those that have `leak` words in a row in common with their row: a copy under another title would
        teach that what is found goes on as the text does."""
        for i, row in enumerate(rows):
            tokens, mask = neighbours.gather(found[i])
            own = self._grams(row)
            bad = np.zeros(found[i].shape, bool)
            for at in np.ndindex(bad.shape):
                bad[at] = bool(np.isin(self._grams(tokens[at][mask[at]]), own).any())
            found[i] = np.take_along_axis(np.where(bad, -1, found[i]), np.argsort(bad, axis=-1, kind="stable"), -1)
        return found

    def _grams(self, tokens: np.ndarray) -> np.ndarray:
        """uint64: a hash of every `leak` words in a row."""
        words = tokens[self.words[tokens]].astype(np.uint64)
        if len(words) < self.leak:
            return np.zeros(0, np.uint64)
        power = np.uint64(0x9E3779B97F4A7C15) ** np.arange(1, self.leak + 1, dtype=np.uint64)
        return (np.lib.stride_tricks.sliding_window_view(words + np.uint64(1), self.leak) * power).sum(1, dtype=np.uint64)

    def copy(self, row: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """(tokens [chunks, 2m], mask) of neighbours that are the row itself, from up to half a chunk before its chunk or behind."""
        at = np.arange(self.chunks) * self.m + rng.integers(-(self.m // 2), self.m // 2 + 1, self.chunks)
        index = at[:, None] + np.arange(2 * self.m)
        there = (index >= 1) & (index < len(row))
        return np.where(there, row[np.clip(index, 0, len(row) - 1)], 0), there

    def given(self, ids: np.ndarray, rows: np.ndarray, k: int, neighbours: Any, copies: np.ndarray,
              rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """(tokens int64 [n, chunks, k, 2m], mask) for numbers of chunks [n, chunks, >= k]; in rows where `copies` (bool [n]) one
        of the k, at random, is a copy."""
        tokens, mask = neighbours.gather(ids[..., :k])
        for i in np.flatnonzero(copies):
            j = int(rng.integers(k))
            tokens[i, :, j], mask[i, :, j] = self.copy(rows[i], rng)
        return tokens, mask
