"""Compiled loops over suffix arrays: intervals of a pattern, the longest match of every position of a text, what comes next.

A text of tokens is `data`, uint8 [N * w]: w bytes a token, the high byte first, so that the order of bytes is the order of tokens.
Every document ends with the separator `end`, larger than any token. `sa` holds the positions of all N - documents tokens in the
order of what follows them; those that begin with token v are sa[heads[v]:heads[v + 1]].

A filter is a bitmap over sa (`words`, 64 entries each) with the number of set bits before each word (`ranks`); no words at all
means that everything is allowed. Reading beyond the text is impossible even where sa is damaged: positions are cut to N - 1."""

from __future__ import annotations

import numpy as np

from ralm.index.compiled import compiled

# columns of what `describe` writes about a position
LENGTH, LOW, HIGH, COUNT, TARGET, FIRST, LAST = range(7)
FIELDS = 7


@compiled
def token(data, w, i):
    """The token at position i."""
    i = min(i, len(data) // w - 1) * w
    if w == 2:
        return np.int64(data[i]) << 8 | np.int64(data[i + 1])
    value = np.int64(0)
    for j in range(w):
        value = value << 8 | np.int64(data[i + j])
    return value


@compiled
def rank(words, ranks, i):
    """How many of the first i entries are allowed."""
    if len(words) == 0:
        return np.int64(i)
    x = words[i >> 6] & ((np.uint64(1) << np.uint64(i & 63)) - np.uint64(1))
    x = x - ((x >> np.uint64(1)) & np.uint64(0x5555555555555555))
    x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64(ranks[i >> 6]) + np.int64((x * np.uint64(0x0101010101010101)) >> np.uint64(56))


@compiled
def select(words, ranks, lo, hi, nth):
    """The entry of [lo, hi) that is allowed as number nth (from 0), hi where there are not so many."""
    if len(words) == 0:
        return min(lo + nth, hi)
    wanted = rank(words, ranks, lo) + nth + 1
    a, b = lo, hi + 1  # the smallest i with rank(i) = wanted; the entry is i - 1
    while a < b:
        m = (a + b) >> 1
        if rank(words, ranks, m) < wanted:
            a = m + 1
        else:
            b = m
    return a - 1


@compiled
def refine(data, w, sa, lo, hi, k, x):
    """The part of [lo, hi) whose token at offset k is x; its suffixes agree in the k tokens before."""
    a, b, above = lo, hi, hi
    while a < b:
        m = (a + b) >> 1
        t = token(data, w, np.int64(sa[m]) + k)
        if t < x:
            a = m + 1
        else:
            b = m
            if t > x:
                above = m
    first, b = a, above
    while a < b:
        m = (a + b) >> 1
        if token(data, w, np.int64(sa[m]) + k) > x:
            b = m
        else:
            a = m + 1
    return first, a


@compiled
def trim(data, w, sa, lo, hi, k, end):
    """Where in [lo, hi) the suffixes begin that end with their document after k tokens: nothing follows those."""
    if lo >= hi or token(data, w, np.int64(sa[hi - 1]) + k) != end:
        return hi
    return refine(data, w, sa, lo, hi, k, end)[0]


@compiled
def find(data, w, sa, heads, ids, begin, stop):
    """The interval of the suffixes that begin with ids[begin:stop]; everything for an empty pattern."""
    if begin >= stop:
        return np.int64(0), np.int64(len(sa))
    x = ids[begin]
    if not 0 <= x < len(heads) - 1:
        return np.int64(0), np.int64(0)
    lo, hi = np.int64(heads[x]), np.int64(heads[x + 1])
    for i in range(begin + 1, stop):
        if lo >= hi:
            break
        lo, hi = refine(data, w, sa, lo, hi, i - begin, ids[i])
    return lo, hi


@compiled
def fit(data, w, sa, heads, words, ranks, ids, t, n):
    """(allowed occurrences of ids[t - n:t] that something follows, their interval)."""
    lo, hi = find(data, w, sa, heads, ids, t - n, t)
    hi = trim(data, w, sa, lo, hi, n, len(heads) - 1)
    return rank(words, ranks, hi) - rank(words, ranks, lo), lo, hi


@compiled
def describe(data, w, sa, words, ranks, ids, t, n, lo, hi, out):
    """Write what is known of the context ids[t - n:t] with interval [lo, hi); returns the interval of context and target."""
    out[LENGTH], out[LOW], out[HIGH] = n, lo, hi
    out[COUNT] = rank(words, ranks, hi) - rank(words, ranks, lo)
    out[TARGET], out[FIRST], out[LAST] = 0, -1, -1
    if out[COUNT] > 0:
        out[FIRST] = token(data, w, np.int64(sa[select(words, ranks, lo, hi, 0)]) + n)
        out[LAST] = token(data, w, np.int64(sa[select(words, ranks, lo, hi, out[COUNT] - 1)]) + n)
    if t >= len(ids):
        return hi, hi
    a, b = refine(data, w, sa, lo, hi, n, ids[t])
    out[TARGET] = rank(words, ranks, b) - rank(words, ranks, a)
    return a, b


@compiled
def walk(data, w, sa, heads, words, ranks, ids, begin, most, out):
    """The longest match of each position: for t = begin, begin + 1, ... the largest n <= most such that something follows an
    allowed occurrence of ids[t - n:t]. Writes out[t - begin]; LENGTH is -1 where nothing at all is allowed.

    A match grows by at most one token from one position to the next, and then its interval is that of context and target
    together. Where it does not grow, shorter ones are tried: one token less, two, four, and the middle between fit and unfit."""
    if rank(words, ranks, len(sa)) == 0:
        out[:] = 0
        out[:, LENGTH] = -1
        return
    n, a, b = np.int64(-1), np.int64(0), np.int64(0)  # of the position before: its length, the interval with its target
    for j in range(len(out)):
        t = begin + j
        grown = n + 1
        lo, hi = a, trim(data, w, sa, a, b, grown, len(heads) - 1)
        if j > 0 and grown <= most and rank(words, ranks, hi) > rank(words, ranks, lo):
            n = grown
        else:
            bound = n if j > 0 else reach(data, w, sa, heads, words, ranks, ids, t, min(t, most))
            n, lo, hi = shrink(data, w, sa, heads, words, ranks, ids, t, bound)
        a, b = describe(data, w, sa, words, ranks, ids, t, n, lo, hi, out[j])


@compiled
def shrink(data, w, sa, heads, words, ranks, ids, t, bound):
    """(n, its interval): the longest match of position t, at most `bound` tokens. Lengths are tried from above, where the match
    of the position before was."""
    good, low, high = np.int64(0), np.int64(0), np.int64(len(sa))
    bad, step = np.int64(bound + 1), np.int64(1)
    while bad - good > 1:
        n = max(bad - step, 1) if good == 0 else (good + bad) >> 1
        count, lo, hi = fit(data, w, sa, heads, words, ranks, ids, t, n)
        if count > 0:
            good, low, high = n, lo, hi
        else:
            bad, step = n, 2 * step
    return good, low, high


@compiled
def reach(data, w, sa, heads, words, ranks, ids, t, most):
    """A bound for the longest match of position t, at most `most`: one less than the first of 1, 2, 4, ... that does not fit."""
    n = np.int64(1)
    while n <= most and fit(data, w, sa, heads, words, ranks, ids, t, n)[0] > 0:
        n *= 2
    return min(n - 1, most)


@compiled
def locate(data, w, sa, heads, words, ranks, ids, begin, lengths, out):
    """What `describe` writes for contexts of given lengths; those of negative length are nothing at all."""
    for j in range(len(lengths)):
        out[j] = 0
        out[j, LENGTH] = out[j, FIRST] = out[j, LAST] = -1
        if lengths[j] >= 0:
            _, lo, hi = fit(data, w, sa, heads, words, ranks, ids, begin + j, lengths[j])
            describe(data, w, sa, words, ranks, ids, begin + j, lengths[j], lo, hi, out[j])


@compiled
def followers(data, w, sa, words, ranks, lo, hi, k, tokens, counts):
    """The distinct tokens at offset k of [lo, hi), ascending, with how many allowed entries have each; returns their number.

    The end of a run of equal tokens is found by doubling steps: one look at a run of one entry, 2 ln2(r) at one of r."""
    n, i = 0, lo
    while i < hi:
        x = token(data, w, np.int64(sa[i]) + k)
        step, known = 1, i  # entry `known` has token x
        while known + step < hi and token(data, w, np.int64(sa[known + step]) + k) == x:
            known += step
            step *= 2
        a, b = known + 1, min(known + step, hi)  # the first entry with another token lies in [a, b]
        while a < b:
            m = (a + b) >> 1
            if token(data, w, np.int64(sa[m]) + k) == x:
                a = m + 1
            else:
                b = m
        count = rank(words, ranks, a) - rank(words, ranks, i)
        if count > 0:
            tokens[n], counts[n] = x, count
            n += 1
        i = a
    return n


@compiled
def keep_whole(found, w, sa):
    """Of the sorted positions of bytes those that begin a token, as positions of tokens: the first len(sa) of them."""
    n = 0
    for i in range(len(found)):
        if found[i] % w == 0:
            if n == len(sa):
                return
            sa[n] = found[i] // w
            n += 1


@compiled
def count_tokens(data, w, counts):
    """counts[v] += occurrences of token v."""
    for i in range(len(data) // w):
        counts[token(data, w, i)] += 1


@compiled
def allow(sa, positions, words, ranks):
    """The bitmap over sa of a bitmap over positions (uint8, low bit first), with its ranks."""
    total = 0
    for g in range(len(words)):
        ranks[g] = total
        x = np.uint64(0)
        for i in range(64 * g, min(64 * g + 64, len(sa))):
            p = min(np.int64(sa[i]), 8 * len(positions) - 1)
            bit = (positions[p >> 3] >> (p & 7)) & 1
            x |= np.uint64(bit) << np.uint64(i & 63)
            total += bit
        words[g] = x


@compiled
def disorder(data, w, sa, at):
    """Which of the entries `at` (all but the last entry of sa) does not come before its successor, -1 where all do."""
    n = len(data) // w
    for i in at:
        p, q = np.int64(sa[i]), np.int64(sa[i + 1])
        if p >= n or q >= n or p == q:
            return i
        while token(data, w, p) == token(data, w, q):
            p, q = p + 1, q + 1
            if p >= n or q >= n:
                break
        if p < n and (q >= n or token(data, w, p) > token(data, w, q)):
            return i
    return -1
