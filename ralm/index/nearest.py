"""Nearest keys: exact search in blocks, and the one way in which every distance is computed.

A distance is the squared Euclidean one (or minus the inner product), between the query (float32) and the stored key, summed in
float32 by one compiled loop. It does not depend on what else is stored, in which blocks or by which index a key was found: a
store that lost a document gives the same bits as one that never held it. Matrix products in float32 only choose candidates, more
than are wanted, and where rounding could have hidden a nearer key the search is widened.

Shapes: Q queries, D dimensions, N rows, K neighbours, C candidates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ralm.errors import unknown
from ralm.index import half
from ralm.index.compiled import compiled, summing
from ralm.index.half import widen

BLOCK, DEVICE_BLOCK = 16_384, 262_144  # rows of one matrix product; on a GPU
QUERIES = 512  # queries of one matrix product
FEW, GROUP = 32, 8  # queries compared without a library, and how many at once
CACHE = 1 << 30  # bytes of widened copies kept
METRICS = ("l2", "ip")
NONE, NOTHING = np.zeros(0, bool), 0xFFFFFFFF  # no filter; the row that is none


@compiled
def _offer(s_QB, first, allowed, best_QK, row_QK, held):
    """Keep the K largest scores of every query in a heap whose root is the smallest. allowed: bool [B], or empty for all.

    Rows come in ascending order and an equal score does not displace one that is held, so of equal ones the first stay."""
    K = best_QK.shape[1]
    check = len(allowed) > 0
    for q in range(s_QB.shape[0]):
        best, row, n = best_QK[q], row_QK[q], held[q]
        root = best[0] if n == K else -np.inf
        for j in range(s_QB.shape[1]):
            s = s_QB[q, j]
            if s <= root and n == K:
                continue
            if check and not allowed[j]:
                continue
            if n < K:
                i = n
                n += 1
                while i > 0 and best[(i - 1) >> 1] > s:  # the new one rises
                    best[i], row[i] = best[(i - 1) >> 1], row[(i - 1) >> 1]
                    i = (i - 1) >> 1
            else:
                i = 0
                while True:  # the new one takes the root's place and sinks
                    child = 2 * i + 1
                    if child >= K:
                        break
                    if child + 1 < K and best[child + 1] < best[child]:
                        child += 1
                    if best[child] >= s:
                        break
                    best[i], row[i] = best[child], row[child]
                    i = child
            best[i], row[i] = s, first + j
            root = best[0] if n == K else -np.inf
        held[q] = n


@summing
def _products(q_QD, x_BD, out_QB):
    """q x^T, of few queries: a library's product packs the keys first, which costs more than comparing them."""
    Q, D = q_QD.shape
    for j in range(x_BD.shape[0]):
        x, i = x_BD[j], 0
        while i + 4 <= Q:  # a key is read once for four queries
            a, b, c, e = q_QD[i], q_QD[i + 1], q_QD[i + 2], q_QD[i + 3]
            s, t, u, v = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
            for d in range(D):
                s += a[d] * x[d]
                t += b[d] * x[d]
                u += c[d] * x[d]
                v += e[d] * x[d]
            out_QB[i, j], out_QB[i + 1, j], out_QB[i + 2, j], out_QB[i + 3, j] = s, t, u, v
            i += 4
        while i < Q:
            a, s = q_QD[i], np.float32(0)
            for d in range(D):
                s += a[d] * x[d]
            out_QB[i, j] = s
            i += 1


@summing
def _distance(a, b, ip):
    s = np.float32(0)
    if ip:
        for d in range(len(a)):
            s -= a[d] * b[d]
    else:
        for d in range(len(a)):
            x = a[d] - b[d]
            s += x * x
    return s


@summing
def _distances16(q_QD, bits_ND, first, pairs, C, ip, out):
    """Distances to keys that are float16, given by their bits (uint16). pairs: row << 32 | place in the flat `out`, ascending, so
    that keys are read in the order they lie in and each is widened once."""
    key = np.empty(q_QD.shape[1], np.float32)
    wide, last = key.view(np.uint32), np.int64(-1)
    for pair in pairs:
        row, place = np.int64(pair >> np.uint64(32)), np.int64(pair & np.uint64(NOTHING))
        if row != last:
            widen(bits_ND[row - first], wide, key)
            last = row
        out[place] = _distance(q_QD[place // C], key, ip)


@summing
def _distances8(q_QD, keys_ND, step_D, first, pairs, C, ip, out):
    """As _distances16, to keys that are int8 multiples of a step per dimension."""
    key, last = np.empty(q_QD.shape[1], np.float32), np.int64(-1)
    for pair in pairs:
        row, place = np.int64(pair >> np.uint64(32)), np.int64(pair & np.uint64(NOTHING))
        if row != last:
            for d in range(len(key)):
                key[d] = np.float32(keys_ND[row - first, d]) * step_D[d]
            last = row
        out[place] = _distance(q_QD[place // C], key, ip)


class Keys:
    """Stored keys, mapped from several parts: float16 [N, D], or int8 [N, D] in multiples of step_D.

    norms: float32 [N], squared lengths of the stored (rounded) keys. device: where torch multiplies (cuda), None for numpy on the
    CPU; the stored keys then stay on that device."""

    def __init__(self, maps: Sequence[np.ndarray], norms: Sequence[np.ndarray], dim: int, step_D: np.ndarray | None = None,
                 metric: str = "l2", device: str | None = None):
        if metric not in METRICS:
            raise unknown("metric", metric, METRICS)
        self.maps, self.norms, self.dim, self.step, self.metric = list(maps), list(norms), dim, step_D, metric
        self.starts = np.concatenate([np.zeros(1, np.int64), np.cumsum([len(m) for m in self.maps], dtype=np.int64)])
        self.longest = float(np.sqrt(max((float(n.max(initial=0)) for n in self.norms), default=0.0)))
        self.device = device
        self._float32: dict[int, np.ndarray] = {}
        self._there: dict[int, Any] = {}  # blocks on the device

    def __len__(self) -> int:
        return int(self.starts[-1])

    def wide(self, keys: np.ndarray) -> np.ndarray:
        """Stored keys as float32."""
        if self.step is not None:
            return np.asarray(keys).astype(np.float32) * self.step
        out = np.empty(keys.shape, np.float32)
        half.widen_rows(half.bits(keys), out)
        return out

    def take(self, rows: np.ndarray) -> np.ndarray:
        """float32 [n, D]: the keys of these rows, as they are stored."""
        out = np.empty((len(rows), self.dim), np.float32)
        for start, stored in zip(self.starts.tolist(), self.maps):
            here = (rows >= start) & (rows < start + len(stored))
            out[here] = self.wide(stored[rows[here] - start])
        return out

    def blocks(self, keep: bool = True) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(first row, float32 [n, D], squared lengths [n]); widened copies are kept while they take less than CACHE bytes."""
        for start, stored, norms in zip(self.starts.tolist(), self.maps, self.norms):
            for a in range(0, len(stored), BLOCK):
                x = self._float32.get(start + a)
                if x is None:
                    x = self.wide(stored[a:a + BLOCK])
                    if keep and 4 * self.dim * BLOCK * (len(self._float32) + 1) <= CACHE:
                        self._float32[start + a] = x
                yield start + a, x, norms[a:a + BLOCK]

    def distances(self, q_QD: np.ndarray, row_QC: np.ndarray) -> np.ndarray:
        """float32 [Q, C]: the distance of every query to each of its rows; inf for rows below 0."""
        out = np.full(row_QC.size, np.inf, np.float32)
        q_QD, ip, C = np.ascontiguousarray(q_QD, np.float32), self.metric == "ip", max(1, row_QC.shape[1])
        pairs = row_QC.reshape(-1).astype(np.uint64) << np.uint64(32) | np.arange(row_QC.size, dtype=np.uint64)
        pairs.sort()  # rows below 0 come last
        cut = np.searchsorted(pairs, self.starts.astype(np.uint64) << np.uint64(32))
        for start, stored, a, b in zip(self.starts.tolist(), self.maps, cut[:-1], cut[1:]):
            if self.step is None:
                _distances16(q_QD, half.bits(stored), start, pairs[a:b], C, ip, out)
            else:
                _distances8(q_QD, stored, self.step, start, pairs[a:b], C, ip, out)
        return out.reshape(row_QC.shape)


def ranked(keys: Keys, q_QD: np.ndarray, row_QC: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest of candidate rows (-1 for none, no row twice): (rows int64 [Q, k], distances float32 [Q, k]), nearest first,
    ties by ascending row, padded with (-1, inf)."""
    packed = _pack(keys.distances(q_QD, row_QC), row_QC)
    if k < packed.shape[1]:
        packed = np.partition(packed, k - 1, 1)[:, :k]
    packed.sort(1)
    return _unpack(packed)


def _pack(d: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Distance and row as one integer that orders by both: numpy sorts those with SIMD, pairs it does not. Rows: below 2^32 - 1."""
    bits = np.ascontiguousarray(d, np.float32).view(np.uint32)
    bits = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))  # negative numbers order the other way round
    return bits.astype(np.uint64) << np.uint64(32) | rows.astype(np.uint64) & np.uint64(NOTHING)


def _unpack(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    bits = (packed >> np.uint64(32)).astype(np.uint32)
    d = np.where(bits >> 31, bits & np.uint32(0x7FFFFFFF), ~bits).view(np.float32)
    rows = (packed & np.uint64(NOTHING)).astype(np.int64)
    return np.where(np.isinf(d), -1, rows), d


def padded(found: tuple[np.ndarray, np.ndarray], k: int) -> tuple[np.ndarray, np.ndarray]:
    """The same rows and distances [Q, k], widened with (-1, inf)."""
    rows, d = found
    if rows.shape[1] == k:
        return rows, d
    out = np.full((len(rows), k), -1, np.int64), np.full((len(rows), k), np.inf, np.float32)
    out[0][:, :rows.shape[1]], out[1][:, :rows.shape[1]] = rows, d
    return out


def exact(keys: Keys, q_QD: np.ndarray, k: int, allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest rows among the allowed (bool [N], None for all), as `ranked` gives them; never N distances in memory."""
    q_QD = np.ascontiguousarray(q_QD, np.float32)
    there = len(keys) if allowed is None else int(np.count_nonzero(allowed))
    if not min(k, there, len(q_QD)):
        return padded((np.zeros((len(q_QD), 0), np.int64), np.zeros((len(q_QD), 0), np.float32)), k)
    take = min(there, k + max(16, k // 16))
    parts = [_exact(keys, q_QD[a:a + QUERIES], min(k, there), take, there, allowed) for a in range(0, len(q_QD), QUERIES)]
    return padded(tuple(np.concatenate(p) for p in zip(*parts)), k)


def _exact(keys: Keys, q_QD: np.ndarray, k: int, take: int, there: int,
           allowed: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    row_QC, s_QC = candidates(keys, q_QD, take, allowed)
    rows, d = ranked(keys, q_QD, row_QC, k)
    if take >= there:
        return rows, d
    # a row that was not kept has at most the least kept score, which is off by at most this much
    length = np.sqrt((q_QD.astype(np.float64) ** 2).sum(1))
    l2 = keys.metric == "l2"
    error = 1.1 * keys.dim * 2.0 ** -24 * ((2 if l2 else 1) * length * keys.longest + (keys.longest ** 2 + d[:, -1] if l2 else 0))
    nearest_left = (length ** 2 if l2 else 0) - s_QC.min(1) - error
    doubt = np.flatnonzero(d[:, -1] >= nearest_left)
    if len(doubt):
        rows[doubt], d[doubt] = _exact(keys, q_QD[doubt], k, min(2 * take, there), there, allowed)
    return rows, d


def candidates(keys: Keys, q_QD: np.ndarray, take: int, allowed: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Rows int64 [Q, take] of the largest float32 scores (2 q.x - |x|^2, or q.x), and those scores; in no order."""
    if keys.device is not None:
        return _candidates_on(keys, q_QD, take, allowed)
    l2 = keys.metric == "l2"
    best = np.full((len(q_QD), take), -np.inf, np.float32)
    rows, held = np.full((len(q_QD), take), -1, np.int64), np.zeros(len(q_QD), np.int64)
    q_QD = 2 * q_QD if l2 else q_QD
    for first, x, norms in keys.blocks():
        here = NONE if allowed is None else allowed[first:first + len(x)]
        if len(here) and not here.any():
            continue
        s_QB = _scores(q_QD, x)
        if l2:
            s_QB -= norms
        _offer(s_QB, first, here, best, rows, held)
    return rows, best


def _scores(q_QD: np.ndarray, x_BD: np.ndarray) -> np.ndarray:
    """q x^T [Q, B] in float32, summed in any order."""
    if len(q_QD) > FEW:
        return q_QD @ x_BD.T
    out = np.empty((len(q_QD), len(x_BD)), np.float32)
    for a in range(0, len(q_QD), GROUP):
        _products(q_QD[a:a + GROUP], x_BD, out[a:a + GROUP])
    return out


def _candidates_on(keys: Keys, q_QD: np.ndarray, take: int, allowed: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """`candidates` by torch on keys.device: blocks of stored keys are moved there once, the top is merged block by block."""
    import torch

    l2, on = keys.metric == "l2", dict(device=keys.device)
    q = torch.from_numpy(2 * q_QD if l2 else q_QD).to(**on)
    best = torch.full((len(q), take), -torch.inf, **on)
    rows = torch.full((len(q), take), -1, dtype=torch.long, **on)
    step = None if keys.step is None else torch.from_numpy(keys.step).to(**on)
    for start, stored, norms in zip(keys.starts.tolist(), keys.maps, keys.norms):
        for a in range(0, len(stored), DEVICE_BLOCK):
            if start + a not in keys._there:
                keys._there[start + a] = torch.from_numpy(np.array(stored[a:a + DEVICE_BLOCK])).to(**on)
            x = keys._there[start + a].float()
            s_QB = q @ (x if step is None else x * step).T
            if l2:
                s_QB -= torch.from_numpy(np.array(norms[a:a + DEVICE_BLOCK])).to(**on)
            if allowed is not None:
                here = torch.from_numpy(np.ascontiguousarray(allowed[start + a:start + a + len(x)])).to(**on)
                s_QB.masked_fill_(~here, -torch.inf)
            s, at = s_QB.topk(min(take, len(x)), 1)
            best, order = torch.cat([best, s], 1).topk(take, 1)
            rows = torch.cat([rows, at + (start + a)], 1).gather(1, order)
    rows = torch.where(torch.isinf(best), -1, rows)
    return rows.cpu().numpy(), best.cpu().numpy()
