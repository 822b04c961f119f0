"""Copied spans: the longest run of tokens that ends at a token and stands in what was retrieved (Borgeaud et al. 2022, section 4.5:
the colour of a token is the longest j such that x_{i-j} .. x_i occurs in RET(C_{u-1})).

Arrays and nothing else. Shapes: T tokens of a text, K neighbours of R tokens each, S tokens in question."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Runs(NamedTuple):
    """Of each token: the length of the run (0: it occurs nowhere), the neighbour that has it, and the place of its last token
    there; all int64 [S]. Of equally long runs the first neighbour's first one."""

    length: np.ndarray
    neighbour: np.ndarray
    last: np.ndarray


def runs(ids_T: np.ndarray, first: int, stop: int, tokens_KR: np.ndarray, mask_KR: np.ndarray, begin: int = 0) -> Runs:
    """The runs that end at tokens [first, stop) of a text; they reach back to `begin` at most, before `first` too.

    mask: False where a neighbour has no token. run[i, k, r] = run[i-1, k, r-1] + 1 where x_i is token r of neighbour k, else 0."""
    K, R = tokens_KR.shape
    S = stop - first
    out = Runs(*(np.zeros(S, np.int64) for _ in range(3)))
    run_KR = np.zeros((K, R), np.int64)
    for i in range(max(begin, first - R + 1), stop):
        before_KR = np.zeros_like(run_KR)
        before_KR[:, 1:] = run_KR[:, :-1]
        run_KR = np.where(mask_KR & (tokens_KR == ids_T[i]), before_KR + 1, 0)
        if i >= first and run_KR.size:
            best = int(run_KR.argmax())  # the first of equal ones, row by row
            out.length[i - first] = run_KR.flat[best]
            out.neighbour[i - first], out.last[i - first] = divmod(best, R)
    return out


def joined(length_T: np.ndarray, place_T: np.ndarray, least: int = 2) -> list[tuple[int, int, int]]:
    """The tokens [first, stop) of runs of at least so many, each one after the other in one stored document; in the order of the
    text. They may overlap, in different places; first is below 0 for a run that begins before the text. With each the token whose
    own run begins there too.

    place: where the last token of each token's run is stored, counted so that the next token of the document is one further. A run
    that was looked for in [N, F] ends where these end; the next chunk's neighbours may carry it on, and reach back over a gap."""
    made: list[list[int]] = []
    last: dict[int, list[int]] = {}  # by how much further the document is than the text
    for t, n in enumerate(length_T.tolist()):
        if not n:
            continue
        shift, first = int(place_T[t]) - t, t + 1 - n
        run = last.get(shift)
        if run is None or run[1] < first:
            run = last[shift] = [first, t + 1, t]
            made.append(run)
        elif first < run[0]:
            run[0], run[2] = first, t
        run[1] = t + 1
    return [(first, stop, begin) for first, stop, begin in sorted(made) if stop - first >= least]
