"""Compiled exact top k over postings: whole blocks of rows are passed over where bounds show that none of them can be a hit.

For every term that was asked for, Asked (sparse.py) keeps its impacts (what one posting adds to a score), the greatest of them, and
for terms of many rows a byte for every SPAN rows: how near their best impact comes to the greatest, rounded up. A query adds up
those bytes: a bound for every SPAN rows. The most promising blocks are scored first, then every other block whose bound reaches the
k-th best score so far. Bounds decide only what is looked at: a row that is scored gets the sum of its impacts in the order of the
query's terms, so pruning, appending and threads change no digit. This is Block-Max Pruning (Mallia, Suel and Tonellotto, SIGIR
2024), but exact, and with bounds of the statistics of today, since impacts are.

Scores are float32 and never negative. Therefore they sort as the integers of their bits do, and -0.0, in an accumulator, says that
no term was there: "shares a term" costs nothing to know, even where a matching chunk scores exactly 0. A candidate is one int64:
the bits of its score, then its row counted from the last one of all segments; greater is better, and of equal scores the smaller
row. (Rows ascend as chunk ids do.)"""

from __future__ import annotations

import numpy as np

from ralm.index.compiled import compiled

SPAN_BITS, BLOCK_BITS = 4, 8
SPAN, BLOCK = 1 << SPAN_BITS, 1 << BLOCK_BITS  # rows that share a bound; rows that are scored together
PARTS = BLOCK // SPAN
TILE = 256  # blocks whose bounds are added up together: 16 KB
GROUP = 16  # blocks passed over together
UNTOUCHED = np.int32(-(2**31))  # -0.0 as int32
LEVELS = 255
LEAST = np.float32(1e-30)  # the bound of rows that hold a term which is worth nothing
ROUNDING = 2.0**-22  # of sums of float32, for each term: no bound may be below a score by a digit
BINS, BIN_BITS = 512, 16  # of bounds: 1/128 wide, down to 1/16 of the greatest
FIRST, SECOND = 8, 1  # k over these blocks, and EXTRA, are scored before the others
EXTRA = 16
LAST_ROW = (1 << 32) - 1


def blocks_of(rows: int) -> int:
    return -(-rows // BLOCK)


def spans_of(allow: np.ndarray) -> np.ndarray:
    """int8 [PARTS, blocks]: -1 where `allow` (bool by row) has any of the rows of a span, else 0."""
    padded = np.zeros(blocks_of(len(allow)) * BLOCK, bool)
    padded[:len(allow)] = allow
    some = (padded.view(np.uint64).reshape(-1, SPAN // 8) != 0).any(1)
    return np.negative(some.reshape(-1, PARTS).T.astype(np.int8, order="C"))


@compiled
def summarise(numbers, slots, indptr, rows, impacts, allow, tops, levels, offsets):
    """Bounds of terms over the allowed rows (bool): term i has number numbers[i] (-1: not in this segment), its impacts are there.

    Writes its greatest impact to tops[i] and, where slots[i] >= 0, to that row of `levels` (uint8 [., PARTS, blocks]) and `offsets`
    (int32 [., blocks + 1]: its first posting in each block, counted from its first of all)."""
    for i in range(len(numbers)):
        t = numbers[i]
        if t < 0:
            tops[i] = 0
            continue
        first, stop, top = indptr[t], indptr[t + 1], np.float32(0)
        for j in range(first, stop):
            if allow[rows[j]]:
                top = max(top, impacts[j])
        tops[i] = top
        if slots[i] < 0:
            continue
        level, offset, scale, block = levels[slots[i]], offsets[slots[i]], LEVELS / max(top, LEAST), 0
        level[:] = 0
        for j in range(first, stop):
            b, part = rows[j] >> BLOCK_BITS, (rows[j] >> SPAN_BITS) & (PARTS - 1)
            if allow[rows[j]]:
                level[part, b] = max(level[part, b], min(max(np.ceil(impacts[j] * scale), 1), LEVELS))
            while block <= b:
                offset[block] = j - first
                block += 1
        offset[block:] = stop - first


@compiled
def _bound(terms, weights, numbers, slots, tops, indptr, rows, impacts, levels, allow, spans, bound, best, groups):
    """Fill best (int32 by block, bits of float32: no allowed row scores more; 0 where no term occurs) and groups (the greatest of
    GROUP blocks each); returns the greatest. `bound` is scratch, float32 [PARTS, blocks]."""
    bound[:] = 0
    for t in range(len(terms)):
        i = terms[t]
        if numbers[i] >= 0 and slots[i] < 0:
            w, j, stop = weights[t], indptr[numbers[i]], indptr[numbers[i] + 1]
            while j < stop:
                span, top = rows[j] >> SPAN_BITS, np.float32(-1)
                while j < stop and rows[j] >> SPAN_BITS == span:
                    if allow[rows[j]]:
                        top = max(top, impacts[j])
                    j += 1
                if top >= 0:
                    bound[span & (PARTS - 1), span >> (BLOCK_BITS - SPAN_BITS)] += max(w * top, LEAST)
    bits = bound.view(np.int32)
    for first in range(0, len(best), TILE):
        last = min(first + TILE, len(best))
        for t in range(len(terms)):
            i = terms[t]
            if numbers[i] >= 0 and slots[i] >= 0:
                scale = np.float32(max(weights[t] * tops[i] / LEVELS, LEAST))
                for part in range(PARTS):
                    level, to = levels[slots[i], part, first:last], bound[part, first:last]
                    for b in range(len(to)):
                        to[b] += scale * np.float32(level[b])
        out = best[first:last]
        out[:] = 0
        for part in range(PARTS):
            of, is_open = bits[part, first:last], spans[part, first:last]
            for b in range(len(out)):
                out[b] = max(out[b], of[b] & np.int32(is_open[b]))
    greatest = np.int32(0)
    for g in range(len(groups)):
        top, of = np.int32(0), best[g * GROUP:(g + 1) * GROUP]
        for b in range(len(of)):
            top = max(top, of[b])
        groups[g] = top
        greatest = max(greatest, top)
    return greatest


@compiled
def _tiers(best, greatest, k, counts):
    """Two bounds that about so many blocks reach as are to be scored first, and second."""
    counts[:] = 0
    for b in range(len(best)):
        counts[min((greatest - best[b]) >> BIN_BITS, BINS - 1)] += 1
    n, at = 0, -1
    first = second = np.int32(1)
    while at < BINS - 2 and n < k // SECOND + EXTRA:
        at += 1
        before, n = n, n + counts[at]
        low = max(greatest - ((at + 1) << BIN_BITS) + 1, 1)
        if before < k // FIRST + EXTRA:
            first = np.int32(low)
        second = np.int32(low)
    return first, second


@compiled
def _select(keys, n, k):
    """Move the k greatest of the first n to the front, the least of them to place k - 1."""
    low, high = 0, n - 1
    while low < high:
        middle, i, j = keys[(low + high) >> 1], low, high
        while i <= j:
            while keys[i] > middle:
                i += 1
            while keys[j] < middle:
                j -= 1
            if i <= j:
                keys[i], keys[j] = keys[j], keys[i]
                i += 1
                j -= 1
        if k - 1 <= j:
            high = j
        elif k - 1 >= i:
            low = i
        else:
            break


@compiled
def _need(floor, base, terms):
    """The bits of the least bound with which a score can reach the floor."""
    least = np.empty(1, np.float32)
    least[0] = max((floor * (1 - ROUNDING) - base) / (1 + (terms + 4) * ROUNDING), LEAST / 2)
    return least.view(np.int32)[0]


@compiled
def _score(b, own, weights, numbers, slots, indptr, rows, impacts, offsets, at, total):
    """Add up what the query's terms give to the rows of block b; at: where the terms without a slot go on."""
    first = b << BLOCK_BITS
    for t in range(len(own)):
        term, slot, w = numbers[own[t]], slots[own[t]], weights[t]
        if term < 0:
            continue
        if slot >= 0:
            start = indptr[term]
            # unsigned: an index that cannot be negative needs no test for it
            for j in range(np.uint64(start + offsets[slot, b]), np.uint64(start + offsets[slot, b + 1])):
                total[rows[j] & (BLOCK - 1)] += w * impacts[j]
        else:
            j, stop = np.uint64(at[t]), np.uint64(indptr[term + 1])
            while j < stop and rows[j] < first:
                j += np.uint64(1)
            while j < stop and rows[j] < first + BLOCK:
                total[rows[j] & (BLOCK - 1)] += w * impacts[j]
                j += np.uint64(1)
            at[t] = j


@compiled
def _gather(bits, score, base, floor, allow, key, found, n):
    """Append the touched and allowed rows of a block that reach the floor, and leave every accumulator untouched again.

    What is stored is the accumulator + base as float32, so ties are the ties of the result. `score` is scratch, `key` what stands
    below the score for the block's first row. Returns how many are held now."""
    total, as_int = bits.view(np.float32), score.view(np.int32)
    for part in range(0, BLOCK, SPAN):
        top = UNTOUCHED
        for i in range(part, part + SPAN):
            top = max(top, bits[i])
        as_int[0] = top
        if top >= 0 and score[0] + base >= floor:
            for i in range(part, min(part + SPAN, len(allow))):
                score[0] = total[i] + base
                found[n] = (np.int64(as_int[0]) << 32) | (key - i)
                n += (bits[i] >= 0) & (score[0] >= floor) & allow[i]
    bits[:] = UNTOUCHED
    return n


@compiled
def _cut(found, n, k, score):
    """Drop all but the k best; returns the worst of them: the new floor."""
    _select(found, n, k)
    score.view(np.int32)[0] = found[k - 1] >> 32
    return score[0]


@compiled
def search(query_ptr, terms, weights, base, numbers, slots, tops, indptr, rows, impacts, levels, offsets, allow, spans, shift,
           keys, held, floor):
    """Exact top k of each query over one segment.

    Query q has terms[query_ptr[q]:query_ptr[q+1]] with their weights >= 0 and base[q] >= 0, which every hit gets. By term: numbers
    (in this segment, -1 where it lacks them) and what `summarise` wrote for these allowed rows or more. allow (bool by row) and
    spans_of it; shift: rows before
    this segment. keys int64 [Q, 2k + BLOCK] hold the held[q] <= k best so far, none of them below floor[q] (at first 0 and 0); they
    carry over from segment to segment, and `unpack` ends it."""
    k, blocks = (keys.shape[1] - BLOCK) >> 1, spans.shape[1]
    bits, score = np.full(BLOCK, UNTOUCHED, np.int32), np.empty(1, np.float32)
    total = bits.view(np.float32)
    bound, best = np.empty(spans.shape, np.float32), np.empty(blocks, np.int32)
    groups, counts = np.empty((blocks + GROUP - 1) // GROUP, np.int32), np.empty(BINS, np.int64)
    for q in range(len(query_ptr) - 1):
        here = slice(query_ptr[q], query_ptr[q + 1])
        own, own_weights, found, n, m = terms[here], weights[here], keys[q], held[q], query_ptr[q + 1] - query_ptr[q]
        greatest = _bound(own, own_weights, numbers, slots, tops, indptr, rows, impacts, levels, allow, spans, bound, best,
                          groups)
        need, above, at = _need(floor[q], base[q], m), np.int32(2**31 - 1), np.empty(m, np.int64)
        if greatest < need:
            continue
        first, second = _tiers(best, greatest, k, counts)
        for low in (first, second, np.int32(1)):
            for t in range(m):
                at[t] = indptr[max(numbers[own[t]], 0)]
            for g in range(len(groups)):
                if groups[g] < max(low, need):
                    continue
                for b in range(g * GROUP, min(g * GROUP + GROUP, blocks)):
                    if max(low, need) <= best[b] < above:
                        _score(b, own, own_weights, numbers, slots, indptr, rows, impacts, offsets, at, total)
                        n = _gather(bits, score, base[q], floor[q], allow[b * BLOCK:], LAST_ROW - shift - b * BLOCK, found, n)
                        if n >= 2 * k:
                            floor[q], n = _cut(found, n, k, score), k
                            need = _need(floor[q], base[q], m)
            if n > k:
                floor[q], n = _cut(found, n, k, score), k
                need = _need(floor[q], base[q], m)
            above = low
        held[q] = n


def ranked(keys: np.ndarray, held: np.ndarray) -> np.ndarray:
    """What `search` holds, sorted: keys [Q, k] ascending, -1 (before all others) where there are fewer."""
    keys = keys[:, :(keys.shape[1] - BLOCK) >> 1]
    keys[np.arange(keys.shape[1]) >= held[:, None]] = -1
    keys.sort(axis=1)
    return keys


@compiled
def unpack(keys, held, row_ids, out_scores, out_ids):
    """Write `ranked` keys to the answer [Q, k], which is padded already: scores descending, ties by ascending id.

    row_ids int64: the chunk ids of all segments."""
    score = np.empty(1, np.float32)
    bits = score.view(np.int32)
    for q in range(len(held)):
        for i in range(held[q]):
            key = keys[q, keys.shape[1] - 1 - i]
            bits[0] = key >> 32
            out_scores[q, i], out_ids[q, i] = score[0], row_ids[LAST_ROW - (key & 0xFFFFFFFF)]
