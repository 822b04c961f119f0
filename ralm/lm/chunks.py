"""The index arithmetic of RETRO: which token reads which chunk's neighbours, and at what distance.

A sequence is cut into chunks of m tokens; chunk u is tokens [u m, (u+1) m). Its neighbours are known once its last token is, so
token t reads the neighbours of chunk u(t) = (t+1)//m - 1, the last one that is complete at t, from row i(t) = (t+1) mod m:

    m = 4        t   0  1  2  3  4  5  6  7  8  9 10
    chunk of t       0  0  0  0  1  1  1  1  2  2  2
    reads u(t)       -  -  -  0  0  0  0  1  1  1  1      (none: nothing is added)
    row i(t)         1  2  3  0  1  2  3  0  1  2  3

so the tokens that read one chunk's neighbours are a chunk themselves, one place early: listing 1 of Borgeaud et al. 2022 drops m-1
rows, cuts the rest and pads again. Here a token has slot t + 1 instead, and group g = slot // m reads chunk g - 1; group 0 is what
stands before the first complete chunk. `Layout` does this for a piece of text that follows what was read before, for rows at
different phases and with padding in between. All of it is exact integer arithmetic, used by training and decoding alike.

Shapes: B rows, T places of this piece, m tokens of a chunk, L chunks that this piece completes, W any width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# ---- one sequence ---------------------------------------------------------------------------------------------------------


def complete(n: int, m: int) -> int:
    """How many chunks a text of n tokens completes."""
    return n // m


def attended(t, m: int):
    """The chunk u(t) whose neighbours token t reads, -1 for none. t: a number or an array of them."""
    return (t + 1) // m - 1


def row(t, m: int):
    """The row i(t) of token t among the m tokens that read the same chunk's neighbours."""
    return (t + 1) % m


def readers(u: int, n: int, m: int) -> range:
    """The tokens of a text of n that read the neighbours of chunk u: its last one and the m - 1 that follow."""
    return range(min((u + 1) * m - 1, n), min((u + 2) * m - 1, n))


def cross_positions(m: int, r: int) -> tuple[range, range]:
    """Positions of the m rows and of the r tokens of one neighbour, so that row minus token is d = i - i' + m - 1 (equation 6).

    The same for every neighbour: a neighbour and the chunk that found it begin at the same place, whichever rank it has."""
    return range(m - 1, 2 * m - 1), range(r)


def encoder_positions(r: int, m: int) -> tuple[range, range]:
    """Positions of the r tokens of a neighbour and of the m tokens of its chunk: token minus chunk is i' - i (equation 7)."""
    return range(r), range(m)


# ---- a batch, in pieces -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Where the T places of a piece go, for rows that have read `seen` tokens before it.

    phase_B: tokens of the incomplete chunk that were read before (0 to m-1); count_B: real tokens of the piece; order_BT: the place
    of the r-th real token of a row, None where nothing is padded; done_B: chunks the piece completes. All of them on the CPU: they
    decide shapes."""

    m: int
    phase_B: Tensor
    count_B: Tensor
    places_T: int
    order_BT: Tensor | None = None

    @staticmethod
    def of(m: int, seen: Sequence[int] | Tensor, places: int, real_BT: Tensor | None = None) -> Layout:
        """For rows that have seen so many real tokens, and a piece of `places`; real_BT: bool, False for padding."""
        phase_B = torch.as_tensor(seen, dtype=torch.long) % m
        if real_BT is None or bool(real_BT.all()):
            return Layout(m, phase_B, torch.full_like(phase_B, places), places)
        real_BT = real_BT.cpu()
        return Layout(m, phase_B, real_BT.sum(1), places, (~real_BT).to(torch.uint8).argsort(dim=1, stable=True))

    @property
    def done_B(self) -> Tensor:
        """How many chunks each row completes in this piece."""
        return (self.phase_B + self.count_B) // self.m

    @property
    def done(self) -> int:
        """L, the most chunks that a row completes."""
        return int(self.done_B.max())

    @property
    def even(self) -> int | None:
        """The phase that all rows share where nothing is padded, else None: then slices do instead of look-ups."""
        first = int(self.phase_B[0])
        return first if self.order_BT is None and bool((self.phase_B == first).all()) else None

    def chunks(self, x_BTW: Tensor, held_BmW: Tensor | None) -> Tensor:
        """The L chunks that become complete, [B, L, m, W]; what was read of the first before stands in `held` (see `rest`).

        Rows that complete fewer chunks have rubbish behind their last."""
        B, _, W = x_BTW.shape
        return self._line(x_BTW, held_BmW)[:, :self.done * self.m].reshape(B, self.done, self.m, W)

    def rest(self, x_BTW: Tensor, held_BmW: Tensor | None) -> Tensor:
        """The incomplete chunk that is left, [B, m, W], zero behind its end: `held` of the next piece."""
        line, m = self._line(x_BTW, held_BmW), self.m
        if self.even is not None:
            left = line[:, self.done * m:]
            return F.pad(left, (0, 0, 0, m - left.shape[1]))
        index_Bm = self.done_B[:, None] * m + torch.arange(m)
        left_B = (self.phase_B + self.count_B) % m
        return _take(line, torch.where(torch.arange(m) < left_B[:, None], index_Bm, line.shape[1]))

    def groups(self, x_BTW: Tensor) -> Tensor:
        """The places by what they read, [B, L+1, m, W]: group 0 what was read before this piece, group g chunk g-1 of this piece.

        Zero where a slot belongs to no token of the piece."""
        B, T, W = x_BTW.shape
        slots = (self.done + 1) * self.m
        if self.even is not None:
            return F.pad(x_BTW, (0, 0, self.even + 1, slots - self.even - 1 - T)).view(B, -1, self.m, W)
        ordinal_BS = torch.arange(slots) - 1 - self.phase_B[:, None]
        return _take(x_BTW, self._place(ordinal_BS)).view(B, -1, self.m, W)

    def places(self, y_BGmW: Tensor) -> Tensor:
        """`groups` undone: [B, T, W], zero at padding."""
        flat, T = y_BGmW.flatten(1, 2), self.places_T
        if self.even is not None:
            return flat[:, self.even + 1:self.even + 1 + T]
        slot_BT = torch.full((len(flat), T), flat.shape[1])
        ordinal_BT = torch.arange(T).expand(len(flat), T)
        slots_BT = torch.where(ordinal_BT < self.count_B[:, None], self.phase_B[:, None] + ordinal_BT + 1, flat.shape[1])
        slot_BT = slots_BT if self.order_BT is None else slot_BT.scatter(1, self.order_BT, slots_BT)
        return _take(flat, slot_BT)

    def _line(self, x_BTW: Tensor, held_BmW: Tensor | None) -> Tensor:
        """Held and new tokens of each row without gaps, [B, S, W], from the beginning of its incomplete chunk."""
        if self.even is not None:
            return x_BTW if held_BmW is None or not self.even else torch.cat([held_BmW[:, :self.even], x_BTW], 1)
        m = self.m
        if held_BmW is None:
            held_BmW = x_BTW.new_zeros(len(x_BTW), m, x_BTW.shape[2])
        slot_S = torch.arange((self.done + 1) * m)
        index_BS = torch.where(slot_S < self.phase_B[:, None], slot_S, m + self._place(slot_S - self.phase_B[:, None]))
        return _take(torch.cat([held_BmW, x_BTW], 1), index_BS)

    def _place(self, ordinal_BS: Tensor) -> Tensor:
        """The place of the so-many-th real token, T where there is none."""
        there = (ordinal_BS >= 0) & (ordinal_BS < self.count_B[:, None])
        if self.order_BT is not None:
            safe = ordinal_BS.clamp(0, self.places_T - 1).expand(len(self.order_BT), -1)
            ordinal_BS = self.order_BT.gather(1, safe)
        return torch.where(there, ordinal_BS, self.places_T)


def _take(x_BTW: Tensor, index_BS: Tensor) -> Tensor:
    """x[b, index[b, s]], zero for an index of T: [B, S, W]."""
    padded = F.pad(x_BTW, (0, 0, 0, 1))
    index = index_BS.to(x_BTW.device)[..., None].expand(-1, -1, x_BTW.shape[2])
    return padded.gather(1, index)
