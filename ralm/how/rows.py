"""Rows of tokens through a language model: the one place where input-layer methods meet `forward`.

A row is [BOS, evidence, text]; a fusion wants ln p of the last few of its tokens. `logp_rows` runs many rows as one
left-padded batch; `PrefixCache` wraps a language model so that rows which only grew since the last call cost only their
new tokens. Both give the same numbers, which is why a fusion need not know which one it has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ralm.types import LanguageModel, LMOut

BATCH_TOKENS = 8192  # most tokens (rows x length) in one forward: bounds memory, keeps the matmuls large


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
        size = 1
        while at + size < len(order) and (size + 1) * len(rows[order[at + size]]) <= BATCH_TOKENS:
            size += 1
        batch = order[at:at + size]
        for i, logp in zip(batch, _forward(lm, [rows[i] for i in batch], [starts[i] for i in batch])[0]):
            out[i] = logp
        at += size
    return out  # type: ignore[return-value]


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
    wanted = [len(r) - s + 1 for r, s in zip(rows, starts)]
    with torch.no_grad():
        out = lm.forward(ids_BL, mask=mask_BL, keep=max(wanted))
        logp_BSV = torch.log_softmax(out.logits.float(), -1)
    return [logp_BSV[b, logp_BSV.shape[1] - n:] for b, n in enumerate(wanted)], out, mask_BL


class PrefixCache:
    """A language model with a memory of the rows it last saw. Exact: a row that does not extend its remembered self is run anew.

    Used by the engine while streaming, so that a token costs one step of the model instead of a forward over its whole prefix."""

    def __init__(self, lm: LanguageModel):
        self.lm = lm
        self.name, self.tokenizer, self.window, self.vocab = lm.name, lm.tokenizer, lm.window, lm.vocab
        self.bos, self.eos, self.gives = lm.bos, lm.eos, lm.gives
        self.rows: list[list[int]] = []
        self.past = None
        self.mask: Tensor | None = None
        self.tail: list[Tensor] = []  # per row [n, V]
        self.prefills = self.steps = 0  # counted so that tests and benchmarks can see reuse happen

    def forward(self, *args, **kwargs) -> LMOut:
        return self.lm.forward(*args, **kwargs)

    def logp_rows(self, rows: Sequence[Sequence[int]], starts: Sequence[int]) -> list[Tensor]:
        """As `logp_rows`; remembered prefixes are reused where every row grew by the same number of tokens."""
        rows = [list(r) for r in rows]
        grown = self._growth(rows)
        if grown is None or any(len(o) - len(t) + 1 > s for o, t, s in zip(self.rows, self.tail, starts)):
            self.tail, out, self.mask = _forward(self.lm, rows, starts)
            self.past = out.past
            self.prefills += 1
        elif grown:
            new_BT = torch.tensor([r[-grown:] for r in rows])
            if self.mask is not None:
                self.mask = torch.cat([self.mask, torch.ones(len(rows), grown, dtype=torch.long)], 1)
            with torch.no_grad():
                out = self.lm.forward(new_BT, past=self.past, mask=self.mask)
                logp_BTV = torch.log_softmax(out.logits.float(), -1)
            self.past = out.past
            self.tail = [torch.cat([t, logp_BTV[b]]) for b, t in enumerate(self.tail)]
            self.steps += 1
        self.rows = rows
        self.tail = [t[t.shape[0] - (len(r) - s + 1):] for t, r, s in zip(self.tail, rows, starts)]
        return self.tail

    def _growth(self, rows: list[list[int]]) -> int | None:
        """By how many tokens every row extends its remembered self; None where that is not so."""
        if len(rows) != len(self.rows) or not rows:
            return None
        grown = {len(new) - len(old) for new, old in zip(rows, self.rows)}
        if len(grown) != 1 or min(grown) < 0:
            return None
        return grown.pop() if all(new[:len(old)] == old for new, old in zip(rows, self.rows)) else None
