"""Searching less by following pointers (RetoMaton: Alon et al. 2022, section 3, without its clusters).

A neighbour that held the token just read points to the row after it, in the same document. While enough pointers are alive they are
the neighbours, with their exact distances, and nothing is searched; where too few are, the store is searched:

    N_t = P_t                                    where |P_t| >= least
          the k nearest rows of the store        elsewhere
    P_{t+1} = {r + 1 : r in N_t, value(r) = x_t, r + 1 in r's document}

So with more pointers asked for than there are neighbours, this is kNN-LM. The distribution must be a function of the text read so
far and nothing else (law 3), however its positions are asked for: pointers start anew at every BLOCK-th position of a window, and a
position is computed by going there from its block's beginning, or from what is remembered of the position before. The blocks of all
rows go in lock-step: one search and one chase for all of them per step. A token that is not worth a search (skip, spare) passes its
pointers on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ralm.how.rows import PrefixCache

if TYPE_CHECKING:
    from ralm.what.token_store import Neighbours, TokenStore

BLOCK = 64  # positions after which pointers start anew: a search more, and that many blocks fewer to go in lock-step
REMEMBERED = 128  # positions


def begin(lm: Any, texts: Sequence[Sequence[int]], first: int) -> int:
    """From which position on states are needed to know the pointers at `first`. texts: tokens of each row of the batch."""
    if first % BLOCK and not all(_memory(lm, ids[:first - 1]) is not None for ids in texts):
        return first // BLOCK * BLOCK
    return first


def _memory(lm: Any, before: Sequence[int]) -> np.ndarray | None:
    """Rows that position len(before) of a text was found in."""
    return lm.pointers.get(tuple(before)) if isinstance(lm, PrefixCache) else None


def _remember(lm: Any, before: Sequence[int], rows: np.ndarray) -> None:
    if isinstance(lm, PrefixCache):
        lm.pointers[tuple(before)] = rows
        lm.pointers.move_to_end(tuple(before))
        while len(lm.pointers) > REMEMBERED:
            lm.pointers.popitem(last=False)


def follow(lm: Any, texts: Sequence[Sequence[int]], keys_BSD: np.ndarray, wanted_BS: np.ndarray, k: int, least: int, ask: Callable,
           start: int, first: int) -> Neighbours:
    """Neighbours [n, K] of the wanted positions from `first`, row after row.

    texts: the tokens of each row before the last position; keys_BSD: states of the positions from `start` (see `begin`); ask: the
    engine's search, with the token store it searches as `ask.tokens`."""
    from ralm.what.token_store import Neighbours

    stop, tokens = start + keys_BSD.shape[1], ask.tokens
    lanes = [(b, p, min(stop, (p // BLOCK + 1) * BLOCK)) for b in range(len(texts))
             for p in [start, *range((start // BLOCK + 1) * BLOCK, stop, BLOCK)]]
    held = np.full((len(lanes), 0), -1, np.int64)  # N of the position before, per lane
    if start % BLOCK:
        held = _set(held, [i for i, (_, p, _) in enumerate(lanes) if p == start],
                    _padded([_memory(lm, texts[b][:start - 1]) for b, p, _ in lanes if p == start]))
    out: dict[tuple[int, int], Neighbours] = {}
    for step in range(max(end - p for _, p, end in lanes)):
        live = [i for i, (_, p, end) in enumerate(lanes) if p + step < end]
        at = [(lanes[i][0], lanes[i][1] + step) for i in live]
        read = np.array([texts[b][p - 1] if p else -1 for b, p in at])
        pointers = _tight(tokens.successors(held[live], read)) if held.shape[1] else held[live]
        found = _step(tokens, keys_BSD, pointers, wanted_BS, k, least, ask, start, at)
        held = _set(held, live, found.rows)
        for i, (b, p) in enumerate(at):
            if p >= first and wanted_BS[b, p - start]:
                out[b, p] = found.take(slice(i, i + 1))
    for i, (b, _, end) in enumerate(lanes):
        if end == stop:
            _remember(lm, texts[b][:stop - 1], held[i][held[i] >= 0])
    return Neighbours.joined([out[at] for at in sorted(out)])


def _step(tokens: TokenStore, keys_BSD: np.ndarray, pointers_LP: np.ndarray, wanted_BS: np.ndarray, k: int, least: int,
          ask: Callable, start: int, at: Sequence[tuple[int, int]]) -> Neighbours:
    """One position of every lane: [L, K], from pointers where there are enough, from a search elsewhere."""
    from ralm.what.token_store import Neighbours

    b, s = np.array([b for b, _ in at]), np.array([p - start for _, p in at])
    wanted = wanted_BS[b, s]
    searched = np.flatnonzero(wanted & ((pointers_LP >= 0).sum(1) < least))
    chased = np.flatnonzero(wanted & ((pointers_LP >= 0).sum(1) >= least))
    rows, d = pointers_LP, np.full(pointers_LP.shape, np.inf, np.float32)
    if len(chased):
        d[chased] = tokens.distances(keys_BSD[b[chased], s[chased]], rows[chased])
        d = np.where(rows < 0, np.inf, d)
        order = np.lexsort((np.where(rows < 0, np.iinfo(np.int64).max, rows), d))
        rows, d = np.take_along_axis(rows, order, 1)[:, :k], np.take_along_axis(d, order, 1)[:, :k]
    found = Neighbours(rows, d, tokens.values(rows), tokens.counts(rows))
    if not len(searched):
        return found
    new = ask(keys_BSD[b[searched], s[searched]], k, [at[i][1] for i in searched.tolist()])
    return Neighbours(*(None if (theirs := getattr(new, name)) is None else _set(getattr(found, name), searched, theirs, fill)
                        for name, fill in (("rows", -1), ("distances", np.inf), ("values", -1), ("counts", 1))))


def _set(held: np.ndarray, lanes: Sequence[int] | np.ndarray, rows: np.ndarray, fill: float = -1) -> np.ndarray:
    """`held` with the rows of some lanes replaced; widened with `fill` where they need it."""
    width = max(held.shape[1], rows.shape[1])
    out = np.full((len(held), width), fill, held.dtype)
    out[:, :held.shape[1]] = held
    out[lanes] = fill
    out[np.asarray(lanes)[:, None], np.arange(rows.shape[1])] = rows
    return out


def _tight(rows: np.ndarray) -> np.ndarray:
    """The rows there are, without those below 0 between them."""
    there = rows >= 0
    lane, _ = np.nonzero(there)
    out = np.full((len(rows), int(there.sum(1).max(initial=0))), -1, np.int64)
    out[lane, (np.cumsum(there, 1) - 1)[there]] = rows[there]
    return out


def _padded(rows: Sequence[np.ndarray | None]) -> np.ndarray:
    wide = max((len(r) for r in rows if r is not None), default=0)
    out = np.full((len(rows), wide), -1, np.int64)
    for one, r in zip(out, rows):
        if r is not None:
            one[:len(r)] = r
    return out
