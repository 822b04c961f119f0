"""Rows of tokens through a language model: the one place where input-layer methods meet `forward`.

A row is [BOS, evidence, text]; a fusion wants ln p of the last few of its tokens. `logp_rows` runs many rows as few
left-padded batches; `PrefixCache` wraps a language model so that rows which only grew since they were last seen cost only
their new tokens. Both give the same numbers, which is why a fusion need not know which one it has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ralm.types import LanguageModel, LMOut

# Most tokens (rows x length) in one forward. Bounds memory; on two CPU cores short rows gain from batches of this size, rows of
# several hundred tokens lose nothing (they do lose with 8192, where activations leave the caches).
BATCH_TOKENS = 2048
BATCH_LOGITS = 1 << 26  # most logits in one forward (256 MB of float32): what a large vocabulary bounds first
Job = tuple[Sequence[Sequence[int]], Sequence[int]]  # rows, and where each begins to be wanted


def logp_rows(lm: LanguageModel, rows: Sequence[Sequence[int]], starts: Sequence[int]) -> list[Tensor]:
    """For each row, ln p(. | row[:i]) for i = start .. len(row): float32 [len(row) - start + 1, V].

    `start` >= 1 counts from the beginning of the row (position 0 is BOS); the last distribution is that of the token which
    would follow the row. Rows are sorted by length so that little is padded."""
    if isinstance(lm, PrefixCache):
        return lm.logp_rows(rows, starts)
    out: list[Tensor | None] = [None] * len(rows)
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
        for i, logp in zip(batch, _forward(lm, [rows[i] for i in batch], [starts[i] for i in batch])[0]):
            out[i] = logp
        at += size
    return out  # type: ignore[return-value]


def logp_jobs(lm: LanguageModel, jobs: Iterable[Job]) -> Iterator[list[Tensor]]:
    """`logp_rows` of each job, in order, with the rows of many jobs in one batch; only one batch of results is held."""
    if isinstance(lm, PrefixCache):  # its memory is per job
        for rows, starts in jobs:
            yield lm.logp_rows(rows, starts)
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


def _forward(lm: LanguageModel, rows: Sequence[Sequence[int]], starts: Sequence[int]) -> tuple[list[Tensor], LMOut, Tensor | None]:
    ids_BL, mask_BL = left_pad(rows, lm.bos)
    wanted = [_wanted(r, s) for r, s in zip(rows, starts)]
    with torch.no_grad():
        out = lm.forward(ids_BL, mask=mask_BL, keep=max(wanted))
        logp_BSV = torch.log_softmax(out.logits.float(), -1)
    return [logp_BSV[b, logp_BSV.shape[1] - n:] for b, n in enumerate(wanted)], out, mask_BL


@dataclass
class _Seen:
    """Rows that were run together: what the model remembers of them and their last distributions (per row [n, V])."""

    rows: list[list[int]]
    past: Any
    mask: Tensor | None
    tail: list[Tensor]

    def growth(self, rows: list[list[int]], starts: Sequence[int]) -> int | None:
        """By how many tokens every row extends these; None where one does not, or where forgotten distributions are wanted."""
        grown = {len(new) - len(old) for new, old in zip(rows, self.rows)}
        if len(rows) != len(self.rows) or len(grown) != 1 or min(grown) < 0:
            return None
        if any(len(old) - len(t) + 1 > s for old, t, s in zip(self.rows, self.tail, starts)):
            return None
        return grown.pop() if all(new[:len(old)] == old for new, old in zip(rows, self.rows)) else None


class PrefixCache:
    """A language model with a memory of the rows it last saw. Exact: rows that extend nothing remembered are run anew.

    Used by the engine while streaming, so that a token costs one step of the model instead of a forward over its whole
    prefix. Several prefixes are remembered (at most four windows of tokens), so evidence that comes back costs only the
    text written since."""

    def __init__(self, lm: LanguageModel):
        self.lm = lm
        self.name, self.tokenizer, self.window, self.vocab = lm.name, lm.tokenizer, lm.window, lm.vocab
        self.bos, self.eos, self.gives = lm.bos, lm.eos, lm.gives
        self.seen: list[_Seen] = []  # latest first
        self.passages: dict[Any, dict[int, list[int]]] = {}  # tokens of passages, see how/input.py
        self.prefills = self.steps = 0  # counted so that tests and benchmarks can see reuse happen

    def forward(self, *args, **kwargs) -> LMOut:
        return self.lm.forward(*args, **kwargs)

    def logp_rows(self, rows: Sequence[Sequence[int]], starts: Sequence[int]) -> list[Tensor]:
        """As `logp_rows`; remembered prefixes are reused where every row grew by the same number of tokens."""
        rows = [list(r) for r in rows]
        found = ((s, n) for s in self.seen if (n := s.growth(rows, starts)) is not None)
        seen, grown = min(found, key=lambda pair: pair[1], default=(None, 0))
        if seen is None:
            tail, out, mask = _forward(self.lm, rows, starts)
            seen = _Seen(rows, out.past, mask, tail)
            self.prefills += 1
        else:
            self.seen.remove(seen)
            if grown:
                self._extend(seen, rows, grown, max(map(_wanted, rows, starts)))
                self.steps += 1
        seen.tail = [t[t.shape[0] - _wanted(r, s):] for t, r, s in zip(seen.tail, rows, starts)]
        self._remember(seen)
        return seen.tail

    def _extend(self, seen: _Seen, rows: list[list[int]], grown: int, wanted: int) -> None:
        new_BT = torch.tensor([r[-grown:] for r in rows])
        if seen.mask is not None:
            seen.mask = torch.cat([seen.mask, torch.ones(len(rows), grown, dtype=torch.long)], 1)
        with torch.no_grad():
            out = self.lm.forward(new_BT, past=seen.past, mask=seen.mask, keep=min(grown, wanted))
            logp_BSV = torch.log_softmax(out.logits.float(), -1)
        seen.rows, seen.past = rows, out.past
        seen.tail = [logp_BSV[b] if wanted <= grown else torch.cat([t, logp_BSV[b]]) for b, t in enumerate(seen.tail)]

    def _remember(self, seen: _Seen) -> None:
        self.seen.insert(0, seen)
        room = 4 * self.window
        for i, s in enumerate(self.seen):
            room -= sum(map(len, s.rows))
            if i and room < 0:
                del self.seen[i:]
                return
