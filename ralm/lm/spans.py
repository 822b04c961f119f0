"""Span arithmetic of the extractive reader, free of any model: enumerate, normalise, marginalise, aggregate.

Shapes: T word pieces of a passage, W widest span in word pieces, N candidate spans, K passages. Natural logs."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(answer: str) -> str:
    """SQuAD's answer normalisation: lower case, no punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def band(length: int, width: int) -> np.ndarray:
    """bool [T, T]: True at (i, j) where the span of word pieces i..j inclusive is a candidate, 0 <= j - i < width."""
    gap = np.arange(length)[None, :] - np.arange(length)[:, None]
    return (gap >= 0) & (gap < width)


@dataclass(frozen=True, slots=True)
class Window:
    """Word pieces [start, stop) of a passage, seen at once; it answers for the spans that begin in [own, own_stop)."""

    start: int
    stop: int
    own: int
    own_stop: int


def windows(length: int, size: int, stride: int) -> list[Window]:
    """Cover `length` word pieces by windows of at most `size`, `stride` apart; every start belongs to exactly one.

    A start belongs to the window that shows the most context around it: borders lie in the middle of the overlaps."""
    if length <= size:
        return [Window(0, length, 0, length)]
    starts = list(range(0, length - size, stride)) + [length - size]
    borders = [0] + [(b + a + size) // 2 for a, b in pairwise(starts)] + [length]
    return [Window(s, s + size, lo, hi) for s, (lo, hi) in zip(starts, pairwise(borders))]


def log_softmax(x: np.ndarray) -> np.ndarray:
    """Log-softmax over the last axis; rows of -inf only stay -inf."""
    top = x.max(-1, keepdims=True)
    top = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        return x - top - np.log(np.exp(x - top).sum(-1, keepdims=True))


def logsumexp(x: np.ndarray) -> float:
    """ln sum exp of all entries; -inf of none."""
    if not len(x) or not np.isfinite(top := float(np.max(x))):
        return -np.inf
    return top + float(np.log(np.exp(x - top).sum()))


def within_passage(odds: Sequence[np.ndarray]) -> tuple[list[np.ndarray], float]:
    """P(span | x, z) over all spans of one passage and its null span.

    odds: per window, span logits minus that window's null logit (any shape, -inf where no candidate), so that windows
    are comparable. Returns (ln P of each entry, ln P of the null span); of one window it is the softmax with null."""
    total = np.logaddexp(0.0, logsumexp(np.array([logsumexp(o.ravel()) for o in odds])))
    return [o - total for o in odds], -float(total)


def passage_prior(relevance: np.ndarray, logp: np.ndarray | None = None, weight: float = 1.0) -> np.ndarray:
    """ln P(z | x) [K]: log-softmax of the reader's relevance logits plus `weight` times the retriever's log-prior.

    A passage the retriever rules out (-inf) stays ruled out."""
    logits = np.asarray(relevance, np.float64)
    if logp is not None:
        logp = np.asarray(logp, np.float64)
        logits = np.where(np.isneginf(logp), -np.inf, logits + weight * np.where(np.isneginf(logp), 0.0, logp))
    return log_softmax(logits)


def aggregate(answers: Sequence[tuple[str, float]]) -> dict[str, float]:
    """ln of the summed probability per normalised string, from (text, ln P(z, span | x)) of spans in any passages.

    Strings that normalise to nothing (only punctuation or articles) are kept apart under their own text."""
    groups: dict[str, list[float]] = {}
    for text, logp in answers:
        groups.setdefault(normalised(text) or text, []).append(logp)
    return {key: logsumexp(np.array(group)) for key, group in groups.items()}


def occurrences(text: str, answers: Sequence[str], offsets: Sequence[tuple[int, int]],
                width: int) -> list[tuple[int, int]]:
    """Word-piece spans (i, j), inclusive, of every occurrence of every answer in `text`, at most `width` pieces long.

    offsets: character [start, end) of each word piece. Only whole words count (no 5 inside 1956)."""
    first = {start: i for i, (start, end) in reversed(list(enumerate(offsets))) if end > start}
    last = {end: i for i, (start, end) in enumerate(offsets) if end > start}
    found = set()
    for answer in {a.strip() for a in answers} - {""}:
        at = text.find(answer)
        while at >= 0:
            end = at + len(answer)
            inside = text[max(0, at - 1) : at].isalnum() or text[end : end + 1].isalnum()
            i, j = first.get(at), last.get(end)
            if not inside and i is not None and j is not None and i <= j < i + width:
                found.add((i, j))
            at = text.find(answer, at + 1)
    return sorted(found)
