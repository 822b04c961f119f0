"""Rows of tokens through a language model: the one place where input-layer methods meet `forward`.

A row is [BOS, evidence, text]; a fusion wants ln p of the last few of its tokens. `logp_rows` runs many rows as few
left-padded batches; `PrefixCache` wraps a language model so that rows which only grew since they were last seen cost only
their new tokens. Both give the same numbers, which is why a fusion need not know which one it has.

Where a model reads neighbours (RETRO), a row is read `Beside` those of its chunks: numbers that are compared like its tokens, so a
row is never taken for one that was read beside others, or beside none."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ralm.types import Fusion, LanguageModel, LMOut, Segment

if TYPE_CHECKING:
    from ralm.lm.retro import Neighbours

# Most tokens (rows x length) in one forward. Bounds memory; on two CPU cores short rows gain from batches of this size, rows of
# several hundred tokens lose nothing (they do lose with 8192, where activations leave the caches).
BATCH_TOKENS = 2048
BATCH_LOGITS = 1 << 26  # most logits in one forward (256 MB of float32): what a large vocabulary bounds first
Job = tuple[Sequence[Sequence[int]], Sequence[int]]  # rows, and where each begins to be wanted
Chunks = tuple[tuple[int, ...], ...]  # of a row: the numbers of the neighbours of each of its complete chunks, -1 for none


@dataclass(frozen=True)
class Beside:
    """What rows are read beside: the neighbours of their chunks of m tokens, BOS counted.

    gather: numbers int64 [..., K] -> their tokens int64 [..., K, R] and bool [..., K, R], False where there is no token."""

    rows: tuple[Chunks, ...]
    gather: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    m: int

    def some(self, index: Sequence[int]) -> Beside:
        """Those of some rows."""
        return Beside(tuple(self.rows[i] for i in index), self.gather, self.m)

    @staticmethod
    def joined(parts: Sequence[Beside | None]) -> Beside | None:
        """Those of all rows, in order; None where there are none. All or none of the parts have some."""
        if parts[0] is None:
            return None
        return Beside(tuple(chain.from_iterable(p.rows for p in parts)), parts[0].gather, parts[0].m)

    def known(self, i: int, length: int) -> Chunks:
        """Those that row i was read beside when it had so many tokens."""
        return self.rows[i][:length // self.m]

    def piece(self, rows: Sequence[Sequence[int]], read: Sequence[int]) -> Neighbours | None:
        """The neighbours of the chunks that rows complete by their tokens from `read` on; None where none has any."""
        new = [chunks[a // self.m:len(row) // self.m] for chunks, row, a in zip(self.rows, rows, read, strict=True)]
        L, K = max(map(len, new), default=0), max((len(c) for chunks in new for c in chunks), default=0)
        ids_BLK = np.full((len(new), L, K), -1, np.int64)
        for b, chunks in enumerate(new):
            for u, ids in enumerate(chunks):
                ids_BLK[b, u, :len(ids)] = ids
        if not (ids_BLK >= 0).any():
            return None
        from ralm.lm.retro import Neighbours

        tokens, mask = self.gather(ids_BLK)
        return Neighbours(torch.as_tensor(tokens, dtype=torch.long), torch.as_tensor(mask, dtype=torch.bool))


def _asked(key: str | None, neighbours: Neighbours | None) -> dict[str, Any]:
    """Arguments of `forward` that not every model knows."""
    key = None if key is None else key.removesuffix("+z")
    return {name: value for name, value in (("key", key), ("neighbours", neighbours)) if value is not None}


def _state(out: LMOut, key: str | None) -> Tensor | None:
    """The state asked for [B, T', D]. KEY+z: with ln sum exp of the logits behind it [B, T', D + 1], which a softmax over more than
    the vocabulary needs (how/joint.py) and log-probabilities no longer tell."""
    if key is None or not key.endswith("+z"):
        return out.key
    return torch.cat([out.key, torch.logsumexp(out.logits.float(), -1, keepdim=True)], -1)


def logp_rows(lm: LanguageModel, rows: Sequence[Sequence[int]], starts: Sequence[int],
              beside: Beside | None = None) -> list[Tensor]:
    """For each row, ln p(. | row[:i]) for i = start .. len(row): float32 [len(row) - start + 1, V].

    `start` >= 1 counts from the beginning of the row (position 0 is BOS); the last distribution is that of the token which
    would follow the row. Rows are sorted by length so that little is padded."""
    return [logp for logp, _ in state_rows(lm, rows, starts, None, beside)]


def state_rows(lm: LanguageModel, rows: Sequence[Sequence[int]], starts: Sequence[int], key: str | None,
               beside: Beside | None = None) -> list[tuple[Tensor, Tensor | None]]:
    """`logp_rows`, and for each distribution the state `key` of the model that gave it: (logp [n, V], key [n, D])."""
    if isinstance(lm, PrefixCache):
        return lm.state_rows(rows, starts, key, beside)
    out: list[tuple[Tensor, Tensor | None] | None] = [None] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    at = 0
    while at < len(order):
        size, wanted = 1, _wanted(rows[order[at]], starts[order[at]])
        while at + size < len(order):
            i = order[at + size]
            more = max(wanted, _wanted(rows[i], starts[i]))
            if (size + 1) * len(rows[i]) > BATCH_TOKENS or (size + 1) * more * lm.vocab > BATCH_LOGITS:
                break
            size, wanted = size + 1, more
        batch = order[at:at + size]
        read, _, _ = _forward(lm, [rows[i] for i in batch], [starts[i] for i in batch], key, beside and beside.some(batch))
        for i, pair in zip(batch, read):
            out[i] = pair
        at += size
    return out  # type: ignore[return-value]


def target_rows(lm: LanguageModel, rows: Sequence[Sequence[int]], targets_BS: Tensor, key: str | None = None,
                told: bool = False, beside: Beside | None = None) -> list[tuple[Tensor, Tensor | None, Tensor | None]]:
    """Of each row ln p of the S tokens of its targets, each after the tokens before it: the row ends before the last of them.

    (logp [S], confidence [S, 2] where `told`, key [S, D])."""
    if isinstance(lm, PrefixCache):
        read = lm.state_rows(rows, [len(r) - targets_BS.shape[1] + 1 for r in rows], key, beside)
        return [(p.gather(1, t[:, None])[:, 0], confidence(p) if told else None, k) for (p, k), t in zip(read, targets_BS)]
    out = []
    for i, (row, target_S) in enumerate(zip(rows, targets_BS)):
        neighbours = None if beside is None else beside.some([i]).piece([row], [0])
        with torch.no_grad():
            given = lm.forward(torch.tensor([list(row)]), keep=len(target_S), **_asked(key, neighbours))
            logp_SV = torch.log_softmax(given.logits[0].float(), -1)  # logsumexp costs as much, and gives other last bits
            logp_S = logp_SV.gather(1, target_S[:, None])[:, 0]
        out.append((logp_S, confidence(logp_SV) if told else None, None if key is None else given.key[0]))
    return out


def window_rows(lm: LanguageModel, ids_BT: Tensor, segments: Sequence[Segment],
                beside: Beside | None = None) -> Iterator[tuple[Segment, Tensor]]:
    """(segment, logp_BSV) of rows [BOS, text]; one forward for all segments."""
    first, stop = segments[0].start, segments[-1].stop
    logp = logp_rows(lm, [[lm.bos, *row[:stop - 1]] for row in ids_BT.tolist()], [first + 1] * len(ids_BT), beside)
    logp_BSV = torch.stack(logp)
    for s in segments:
        yield s, logp_BSV[:, s.start - first:s.stop - first]


def window_targets(lm: LanguageModel, ids_BT: Tensor, segments: Sequence[Segment],
                   beside: Beside | None = None) -> Iterator[tuple[Segment, Tensor]]:
    """(segment, logp_BS) of rows [BOS, text]: ln p of the tokens that stand in ids_BT."""
    first, stop = segments[0].start, segments[-1].stop
    read = target_rows(lm, [[lm.bos, *row[:stop - 1]] for row in ids_BT.tolist()], ids_BT[:, first:stop], beside=beside)
    for s in segments:
        yield s, torch.stack([logp_S[s.start - first:s.stop - first] for logp_S, _, _ in read])


def confidence(logp_SV: Tensor) -> Tensor:
    """float32 [S, 2]: ln of the largest probability, and the entropy in nats."""
    p_SV = logp_SV.exp()
    return torch.stack([logp_SV.max(-1).values, -(p_SV * logp_SV.clamp(min=-1e30)).sum(-1)], -1)


def targets_of(how: Fusion) -> Callable[..., Iterator[tuple[Segment, Tensor]]]:
    """A fusion's way to ln p of the text's own tokens: its `targets`, or what `logprobs` says of them."""
    return getattr(how, "targets", None) or partial(of_targets, how)


def of_targets(how, lm: LanguageModel, ids_BT: Tensor, segments, fetch, store) -> Iterator[tuple[Any, Tensor]]:
    """(segment, logp_BS) read out of whole distributions: what `Fusion.targets` must equal, for fusions that have none."""
    for s, logp_BSV in how.logprobs(lm, ids_BT, segments, fetch, store):
        yield s, logp_BSV.gather(2, ids_BT[:, s.start:s.stop, None])[:, :, 0]


def logp_jobs(lm: LanguageModel, jobs: Iterable[Job]) -> Iterator[list[Tensor]]:
    """`logp_rows` of each job, in order, with the rows of many jobs in one batch; only one batch of results is held."""
    if isinstance(lm, PrefixCache):  # its memory is per job
        for rows, starts in jobs:
            yield logp_rows(lm, rows, starts)
        return
    held: list[Job] = []
    tokens = logits = 0
    for rows, starts in jobs:
        more_tokens, more_logits = sum(map(len, rows)), sum(map(_wanted, rows, starts)) * lm.vocab
        if held and (tokens + more_tokens > BATCH_TOKENS or logits + more_logits > BATCH_LOGITS):
            yield from _run(lm, held)
            held, tokens, logits = [], 0, 0
        held.append((rows, starts))
        tokens, logits = tokens + more_tokens, logits + more_logits
    if held:
        yield from _run(lm, held)


def _run(lm: LanguageModel, jobs: Sequence[Job]) -> Iterator[list[Tensor]]:
    logp = logp_rows(lm, [r for rows, _ in jobs for r in rows], [s for _, starts in jobs for s in starts])
    at = 0
    for rows, _ in jobs:
        yield logp[at:at + len(rows)]
        at += len(rows)


def _wanted(row: Sequence[int], start: int) -> int:
    return len(row) - start + 1


def left_pad(rows: Sequence[Sequence[int]], fill: int) -> tuple[Tensor, Tensor | None]:
    """ids [B, L] and mask [B, L] (None where nothing is padded): rows end together, so `keep=n` serves them all."""
    length = max(len(r) for r in rows)
    ids_BL = torch.tensor([[fill] * (length - len(r)) + list(r) for r in rows], dtype=torch.long)
    if all(len(r) == length for r in rows):
        return ids_BL, None
    mask_BL = torch.tensor([[0] * (length - len(r)) + [1] * len(r) for r in rows], dtype=torch.long)
    return ids_BL, mask_BL


def _forward(lm: LanguageModel, rows: Sequence[Sequence[int]], starts: Sequence[int], key: str | None = None,
             beside: Beside | None = None) -> tuple[list[tuple[Tensor, Tensor | None]], LMOut, Tensor | None]:
    ids_BL, mask_BL = left_pad(rows, lm.bos)
    wanted = [_wanted(r, s) for r, s in zip(rows, starts)]
    neighbours = None if beside is None else beside.piece(rows, [0] * len(rows))
    with torch.no_grad():
        out = lm.forward(ids_BL, mask=mask_BL, keep=max(wanted), **_asked(key, neighbours))
        logp_BSV, state = torch.log_softmax(out.logits.float(), -1), _state(out, key)
    read = [(logp_BSV[b, logp_BSV.shape[1] - n:], None if key is None else state[b, state.shape[1] - n:])
            for b, n in enumerate(wanted)]
    return read, out, mask_BL


@dataclass
class _Seen:
    """Rows that were run together: what the model remembers of them, their last distributions (per row [n, V]) and, where a key
    was asked for, the states these were made from. beside: the neighbours they were read with, None where they were read alone."""

    rows: list[list[int]]
    past: Any
    mask: Tensor | None
    tail: list[tuple[Tensor, Tensor | None]]
    key: str | None = None
    beside: Beside | None = None

    def growth(self, rows: list[list[int]], starts: Sequence[int], beside: Beside | None = None) -> int | None:
        """By how many tokens every row extends these; None where one does not, or where forgotten distributions are wanted."""
        grown = {len(new) - len(old) for new, old in zip(rows, self.rows)}
        if len(rows) != len(self.rows) or len(grown) != 1 or min(grown) < 0 or (beside is None) != (self.beside is None):
            return None
        if any(len(old) - len(t) + 1 > s for old, (t, _), s in zip(self.rows, self.tail, starts)):
            return None
        if beside is not None and any(beside.known(i, len(old)) != self.beside.rows[i] for i, old in enumerate(self.rows)):
            return None
        return grown.pop() if all(new[:len(old)] == old for new, old in zip(rows, self.rows)) else None

    def moves(self, rows: list[list[int]], starts: Sequence[int], beside: Beside | None) -> tuple[int, list[int]] | None:
        """As `growth`, whichever of these each row extends: by how much, and which. Rows may be left out and may come twice."""
        if (beside is None) != (self.beside is None):
            return None
        chunks = (None,) * len(self.rows) if self.beside is None else self.beside.rows
        where = {(tuple(old), its): i for i, (old, its) in enumerate(zip(self.rows, chunks))}
        for grown in sorted({len(rows[0]) - len(old) for old in self.rows}):
            if grown >= 0:
                index = [where.get((tuple(new[:len(new) - grown]), beside and beside.known(i, len(new) - grown)))
                         for i, new in enumerate(rows)]
                if None not in index and all(len(self.rows[i]) - len(self.tail[i][0]) + 1 <= s for i, s in zip(index, starts)):
                    return grown, index
        return None

    def move(self, index: Sequence[int]) -> None:
        """Row b becomes what row index[b] was."""
        index_B = torch.tensor(index)
        self.past = self.past.reorder(index_B)
        self.mask = None if self.mask is None else self.mask[index_B]
        self.rows, self.tail = [self.rows[i] for i in index], [self.tail[i] for i in index]
        self.beside = self.beside and self.beside.some(index)


class PrefixCache:
    """A language model with a memory of the rows it last saw. Exact: rows that extend nothing remembered are run anew.

    Used by the engine while streaming, so that a token costs one step of the model instead of a forward over its whole
    prefix. Several prefixes are remembered (at most four windows of tokens), so evidence that comes back costs only the
    text written since.

    moving: rows may also change places, end, and split in two (batches of texts, beams); rows that fit nothing remembered are then
    read again together with the others, so that they stay one batch."""

    def __init__(self, lm: LanguageModel, moving: bool = False):
        self.lm, self.moving = lm, moving
        self.name, self.tokenizer, self.window, self.vocab = lm.name, lm.tokenizer, lm.window, lm.vocab
        self.bos, self.eos, self.gives = lm.bos, lm.eos, lm.gives
        self.seen: list[_Seen] = []  # latest first
        self.passages: dict[Any, dict[int, list[int]]] = {}  # tokens of passages, see how/input.py
        self.pointers: OrderedDict[tuple[int, ...], Any] = OrderedDict()  # rows a text came from, see how/automaton.py
        self.local: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()  # states of rows' own tokens, see how/joint.py
        self.prefills = self.steps = 0  # counted so that tests and benchmarks can see reuse happen

    def forward(self, *args, **kwargs) -> LMOut:
        return self.lm.forward(*args, **kwargs)

    def logp_rows(self, rows: Sequence[Sequence[int]], starts: Sequence[int]) -> list[Tensor]:
        """As `logp_rows`, reusing what is remembered."""
        return logp_rows(self, rows, starts)

    def state_rows(self, rows: Sequence[Sequence[int]], starts: Sequence[int], key: str | None,
                   beside: Beside | None = None) -> list[tuple[Tensor, Tensor | None]]:
        """As `state_rows`; remembered prefixes are reused where every row grew by the same number of tokens."""
        rows = [list(r) for r in rows]
        found = ((s, n) for s in self.seen if key in (None, s.key) and (n := s.growth(rows, starts, beside)) is not None)
        seen, grown = min(found, key=lambda pair: pair[1], default=(None, 0))
        if seen is None and self.moving:
            seen, grown = self._moved(rows, starts, key, beside)
        if seen is None:
            tail, out, mask = _forward(self.lm, rows, starts, key, beside)
            seen = _Seen(rows, out.past, mask, tail, key, beside)
            self.prefills += 1
        else:
            self.seen.remove(seen)
            if grown:
                self._extend(seen, rows, grown, max(map(_wanted, rows, starts)), beside)
                self.steps += 1
        seen.tail = [tuple(x if x is None else x[len(x) - _wanted(r, s):] for x in t) for t, r, s in zip(seen.tail, rows, starts)]
        self._remember(seen)
        return seen.tail

    def _moved(self, rows: list[list[int]], starts: Sequence[int], key: str | None,
               beside: Beside | None) -> tuple[_Seen | None, int]:
        """What is remembered of rows in other places, put in their order, and by how much they grew."""
        for seen in self.seen:
            if key in (None, seen.key) and (fits := seen.moves(rows, starts, beside)) is not None:
                seen.move(fits[1])
                return seen, fits[0]
        return None, 0

    def mark(self) -> list[tuple[Any, ...]]:
        """A point to come back to with `restore`; it costs no copy but of a past that cannot be cropped (a running state)."""
        return [(s, s.rows, s.mask, s.tail, s.beside, s.past.length, None if getattr(s.past, "croppable", True) else s.past)
                for s in self.seen]

    def restore(self, mark: list[tuple[Any, ...]]) -> None:
        """Remember what was remembered at `mark`, bit for bit. Marks made since are void. Not with `moving`."""
        self.seen = []
        for seen, rows, mask, tail, beside, length, past in mark:
            seen.rows, seen.mask, seen.tail, seen.beside = rows, mask, tail, beside
            seen.past = seen.past.crop(length) if past is None else past
            self.seen.append(seen)

    def _extend(self, seen: _Seen, rows: list[list[int]], grown: int, wanted: int, beside: Beside | None) -> None:
        new_BT = torch.tensor([r[-grown:] for r in rows])
        if seen.mask is not None:
            seen.mask = torch.cat([seen.mask, torch.ones(len(rows), grown, dtype=torch.long)], 1)
        neighbours = None if beside is None else beside.piece(rows, [len(r) - grown for r in rows])
        with torch.no_grad():
            out = self.lm.forward(new_BT, past=seen.past, mask=seen.mask, keep=min(grown, wanted), **_asked(seen.key, neighbours))
            logp_BSV, state = torch.log_softmax(out.logits.float(), -1), _state(out, seen.key)
        seen.rows, seen.past, seen.beside = rows, out.past, beside
        new = [(logp_BSV[b], None if seen.key is None else state[b]) for b in range(len(rows))]
        seen.tail = new if wanted <= grown else [
            tuple(None if a is None else torch.cat([a, b]) for a, b in zip(old, more)) for old, more in zip(seen.tail, new)]

    def _remember(self, seen: _Seen) -> None:
        self.seen.insert(0, seen)
        room = 4 * self.window * (len(seen.rows) if self.moving else 1)  # each row of a batch may be read alone and otherwise
        for i, s in enumerate(self.seen):
            room -= sum(map(len, s.rows))
            if i and room < 0:
                del self.seen[i:]
                return
