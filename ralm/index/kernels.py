"""Compiled loops of the sparse index: bytes -> tokens -> postings. Everything here works on plain arrays; topk.py ranks them."""

from __future__ import annotations

import numpy as np

from ralm.index.compiled import compiled

END, OTHER, LETTER, DIGIT, LOW_LINE, HIGH, APOSTROPHE, POINT = 0, 1, 2, 3, 4, 5, 6, 7
SEPARATOR = 0xFF  # stands after every text; no UTF-8 byte looks like it
FNV_START, FNV_PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)


def byte_kinds() -> np.ndarray:
    """uint8 [256]: what each byte of UTF-8 text is to the tokeniser."""
    kind = np.full(256, OTHER, np.uint8)
    kind[ord("a"):ord("z") + 1] = kind[ord("A"):ord("Z") + 1] = LETTER
    kind[ord("0"):ord("9") + 1] = DIGIT
    kind[ord("_")], kind[ord("'")] = LOW_LINE, APOSTROPHE
    kind[ord(".")] = kind[ord(",")] = POINT
    kind[0x80:0xFF] = HIGH
    kind[SEPARATOR] = END
    return kind


@compiled
def _look(data, kind, i):
    """(kind, width) of what stands at byte i. General punctuation (U+2000 to U+203F, of which English text is full) is told from
    letters here; the curly apostrophe is an apostrophe, joiners and marks of direction stay in their run."""
    c = data[i]
    if c == 0xE2 and data[i + 1] == 0x80:
        third = data[i + 2]
        if third == 0x99:
            return APOSTROPHE, 3
        if 0x8C <= third <= 0x8F or 0xAA <= third <= 0xAE or third == 0xBF:
            return HIGH, 1
        return OTHER, 3
    return kind[c], 1


@compiled
def tokenise(data, kind, lower, apostrophes, slots, hashes, starts, blob, count, ids, ptr):
    """Cut texts into runs and give every distinct run a number.

    data: UTF-8 bytes, each text followed by SEPARATOR, and two bytes of slack. A run is a maximal sequence of ASCII letters,
    digits, low lines and bytes above 127, with an apostrophe between letters and a point or comma between digits; it needs one
    character that is not a low line. slots (a power of two, int32, -1 free) with hashes, starts and blob are the table of the
    `count` runs known so far. Writes run numbers to `ids` and where each text ends to ptr[1:]; returns (tokens, known runs)."""
    mask = np.uint64(len(slots) - 1)
    n, text, i = 0, 0, 0
    size = len(data) - 2
    used = starts[count]
    while i < size:
        what, width = _look(data, kind, i)
        if what == END:
            text += 1
            ptr[text] = n
        if not LETTER <= what <= HIGH:
            i += width
            continue
        h, m, good = FNV_START, used, False
        while True:
            c = lower[data[i]] if what != APOSTROPHE else np.uint8(39)
            blob[m] = c
            m += 1
            h = (h ^ np.uint64(c)) * FNV_PRIME
            good |= what != LOW_LINE
            i += width
            last = what
            what, width = _look(data, kind, i)
            if LETTER <= what <= HIGH:
                continue
            if what == APOSTROPHE and apostrophes and last in (LETTER, HIGH):
                after = _look(data, kind, i + width)[0]
                if after in (LETTER, HIGH):
                    continue
            elif what == POINT and last == DIGIT and kind[data[i + 1]] == DIGIT:
                continue
            break
        if not good:
            continue
        place = (h ^ (h >> np.uint64(29))) & mask
        while True:
            number = slots[place]
            if number < 0:
                slots[place] = number = count
                hashes[count] = h
                count += 1
                starts[count] = used = m
                break
            if hashes[number] == h and starts[number + 1] - starts[number] == m - used:
                same, a = True, starts[number]
                for j in range(m - used):
                    if blob[a + j] != blob[used + j]:
                        same = False
                        break
                if same:
                    break
            place = (place + np.uint64(1)) & mask
        ids[n] = number
        n += 1
    return n, count


@compiled
def rehash(hashes, count, slots):
    """Fill the free table `slots` with the numbers of `count` runs."""
    mask = np.uint64(len(slots) - 1)
    for number in range(count):
        h = hashes[number]
        place = (h ^ (h >> np.uint64(29))) & mask
        while slots[place] >= 0:
            place = (place + np.uint64(1)) & mask
        slots[place] = number


@compiled
def expand(ids, ptr, run_ptr, run_terms):
    """Replace run numbers by the terms each run stands for (none, one, or several); returns (terms, new ptr)."""
    total = 0
    for i in ids:
        total += run_ptr[i + 1] - run_ptr[i]
    out, out_ptr, n = np.empty(total, np.int32), np.zeros(len(ptr), np.int64), 0
    for text in range(len(ptr) - 1):
        for j in range(ptr[text], ptr[text + 1]):
            for t in range(run_ptr[ids[j]], run_ptr[ids[j] + 1]):
                out[n] = run_terms[t]
                n += 1
        out_ptr[text + 1] = n
    return out, out_ptr


@compiled
def count_terms(terms, ptr, seen, where, stamp):
    """Distinct terms of each row in the order they first occur, with their counts: (ptr [rows+1], terms int32, counts uint32).

    seen, where: int64 scratch by term, kept from call to call; `stamp` must be greater than everything in `seen`, and the caller
    adds the number of rows to it afterwards. So a call costs what its rows cost, whatever the vocabulary."""
    out, counts = np.empty(len(terms), np.int32), np.empty(len(terms), np.uint32)
    out_ptr, n = np.zeros(len(ptr), np.int64), 0
    for row in range(len(ptr) - 1):
        for j in range(ptr[row], ptr[row + 1]):
            t = terms[j]
            if seen[t] == stamp + row:
                counts[where[t]] += np.uint32(1)
            else:
                seen[t], where[t] = stamp + row, n
                out[n], counts[n] = t, 1
                n += 1
        out_ptr[row + 1] = n
    return out_ptr, out[:n], counts[:n]


@compiled
def invert(row_ptr, terms, counts, order, indptr, rows, tfs):
    """Forward rows -> postings. order[t] is the final number of term t; indptr [V+1] must be zero. Renumbers `terms` in place."""
    for j in range(len(terms)):
        terms[j] = order[terms[j]]
        indptr[terms[j] + 1] += 1
    for t in range(len(indptr) - 1):
        indptr[t + 1] += indptr[t]
    head = indptr[:-1].copy()
    for row in range(len(row_ptr) - 1):
        for j in range(row_ptr[row], row_ptr[row + 1]):
            t = terms[j]
            rows[head[t]], tfs[head[t]] = row, counts[j]
            head[t] += 1


@compiled
def find(blob, starts, wanted, wanted_starts):
    """int32: where each wanted term stands in a sorted vocabulary (term t is blob[starts[t]:starts[t+1]]), -1 where it does not."""
    out = np.full(len(wanted_starts) - 1, -1, np.int32)
    for i in range(len(out)):
        a, size = wanted_starts[i], wanted_starts[i + 1] - wanted_starts[i]
        low, high = 0, len(starts) - 1
        while low < high:
            middle = (low + high) >> 1
            s, stop = starts[middle], starts[middle + 1]
            j = 0
            while j < size and s + j < stop and blob[s + j] == wanted[a + j]:
                j += 1
            if j == size and s + j == stop:
                out[i] = middle
                break
            if j < size and (s + j == stop or blob[s + j] < wanted[a + j]):
                low = middle + 1
            else:
                high = middle
    return out


@compiled
def merge_words(blob, begin, end, ptr, keep):
    """Several sorted vocabularies, laid end to end, as one: (int32 number of every word, blob, int64 starts of the result).

    Word w is blob[begin[w]:end[w]]; vocabulary s has the words ptr[s]:ptr[s+1]. Words with keep[w] false get number -1."""
    number, heads = np.full(len(begin), -1, np.int32), ptr[:-1].copy()
    out, starts, n, size = np.empty(len(blob), np.uint8), np.zeros(len(begin) + 1, np.int64), 0, 0
    order = np.empty(len(heads), np.int64)  # of each head against the least word so far: 1 less, 0 equal, -1 greater or none
    while True:
        best = -1
        for s in range(len(heads)):
            while heads[s] < ptr[s + 1] and not keep[heads[s]]:
                heads[s] += 1
            order[s] = -1
            if heads[s] < ptr[s + 1]:
                order[s] = 1 if best < 0 else _less(blob, begin, end, heads[s], best)
                if order[s] == 1:
                    order[:s] = -1
                    order[s], best = 0, heads[s]
        if best < 0:
            return number, out[:size].copy(), starts[:n + 1].copy()
        for s in range(len(heads)):
            if order[s] == 0:
                number[heads[s]] = n
                heads[s] += 1
        for j in range(begin[best], end[best]):
            out[size] = blob[j]
            size += 1
        n += 1
        starts[n] = size


@compiled
def _less(blob, begin, end, a, b):
    """1 where word a sorts before word b, 0 where they are equal, -1 otherwise."""
    size_a, size_b, i = end[a] - begin[a], end[b] - begin[b], 0
    while i < min(size_a, size_b):
        if blob[begin[a] + i] != blob[begin[b] + i]:
            return 1 if blob[begin[a] + i] < blob[begin[b] + i] else -1
        i += 1
    return 1 if size_a < size_b else 0 if size_a == size_b else -1


@compiled
def document_frequency(indptr, rows, row_ptr, terms, alive, dead):
    """int64 [V]: in how many alive rows each term occurs. Few dead rows are subtracted through the forward index, otherwise the
    postings are counted anew."""
    df = indptr[1:] - indptr[:-1]
    if 2 * dead <= len(alive):
        for row in range(len(alive)):
            if not alive[row]:
                for j in range(row_ptr[row], row_ptr[row + 1]):
                    df[terms[j]] -= 1
        return df
    for t in range(len(df)):
        n = 0
        for j in range(indptr[t], indptr[t + 1]):
            n += alive[rows[j]]
        df[t] = n
    return df


@compiled
def copy_postings(term_map, to_row, indptr, rows, tfs, head, out_rows, out_tfs):
    """Append one segment's postings to a merged one: to_row[row] is the new row, or -1 to leave it out."""
    for t in range(len(term_map)):
        to = term_map[t]  # -1 only where no row that is kept holds the term
        for j in range(indptr[t], indptr[t + 1]):
            row = to_row[rows[j]]
            if row >= 0:
                out_rows[head[to]], out_tfs[head[to]] = row, tfs[j]
                head[to] += 1


@compiled
def copy_forward(term_map, to_row, row_ptr, terms, n, out_ptr, out_terms):
    """The same for the forward index, from position n on; returns the next free position."""
    for row in range(len(to_row)):
        if to_row[row] >= 0:
            for j in range(row_ptr[row], row_ptr[row + 1]):
                out_terms[n] = term_map[terms[j]]
                n += 1
            out_ptr[to_row[row] + 1] = n
    return n
