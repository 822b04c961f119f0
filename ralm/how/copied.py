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
    for i in range(max(begin, first - R), stop):
        before_KR = np.zeros_like(run_KR)
        before_KR[:, 1:] = run_KR[:, :-1]
        run_KR = np.where(mask_KR & (tokens_KR == ids_T[i]), before_KR + 1, 0)
        if i >= first and run_KR.size:
            best = int(run_KR.argmax())  # the first of equal ones, row by row
            out.length[i - first] = run_KR.flat[best]
            out.neighbour[i - first], out.last[i - first] = divmod(best, R)
    return out


def longest(length_T: np.ndarray, source_T: np.ndarray, least: int = 2) -> list[tuple[int, int]]:
    """(last token, length) of the runs that the next token does not carry on, at least so long; in the order of the text.

    source: what each token's run was looked for in; a run that goes on in another's neighbours ends there."""
    T = len(length_T)
    return [(i, int(n)) for i, n in enumerate(length_T)
            if n >= least and not (i + 1 < T and source_T[i + 1] == source_T[i] and length_T[i + 1] == n + 1)]
