"""The scoring forms: small pure functions of counts, as papers write them. They run as they stand and compiled.

    score(q, d) = sum over the terms t of q, repeated ones repeatedly, of  idf(df_t, N) * tf(tf_td, |d|, avgdl)

N alive chunks, df_t of them hold t, tf_td occurrences of t in d, |d| terms in d, avgdl the mean of |d|. Natural logarithms.
The table of forms is table 1 of Kamphuis, de Vries, Boytsov and Lin, "Which BM25 do you mean?" (ECIR 2020); the numbers are those
of the package bm25s, our oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numba.extending import register_jitable

from ralm.index.compiled import compiled

TF_SATURATING, TF_ATIRE, TF_L, TF_PLUS, TF_RELATIVE = 0, 1, 2, 3, 4


@register_jitable
def tf_saturating(tf, length, average, k1, b, delta):
    """tf / (tf + k1 (1 - b + b |d| / avgdl)): Robertson and others 1994 without the constant k1 + 1, as Lucene since version 8."""
    return tf / (tf + k1 * (1 - b + b * length / average))


@register_jitable
def tf_atire(tf, length, average, k1, b, delta):
    """(k1 + 1) tf / (tf + k1 (1 - b + b |d| / avgdl)): ATIRE (Trotman and others 2012) and the textbook."""
    return (k1 + 1) * tf / (tf + k1 * (1 - b + b * length / average))


@register_jitable
def tf_l(tf, length, average, k1, b, delta):
    """(k1 + 1)(c + delta) / (k1 + c + delta) with c = tf / (1 - b + b |d| / avgdl): BM25L (Lv and Zhai, SIGIR 2011)."""
    c = tf / (1 - b + b * length / average)
    return (k1 + 1) * (c + delta) / (k1 + c + delta)


@register_jitable
def tf_plus(tf, length, average, k1, b, delta):
    """ATIRE's part + delta: BM25+ (Lv and Zhai, CIKM 2011)."""
    return (k1 + 1) * tf / (tf + k1 * (1 - b + b * length / average)) + delta


@register_jitable
def tf_relative(tf, length, average, k1, b, delta):
    """tf / |d|: the share of the chunk's terms that are t (TF-IDF)."""
    return tf / length


@register_jitable
def tf_part(form, tf, length, average, k1, b, delta):
    """The tf part of the form with this number."""
    if form == TF_SATURATING:
        return tf_saturating(tf, length, average, k1, b, delta)
    if form == TF_ATIRE:
        return tf_atire(tf, length, average, k1, b, delta)
    if form == TF_L:
        return tf_l(tf, length, average, k1, b, delta)
    if form == TF_PLUS:
        return tf_plus(tf, length, average, k1, b, delta)
    return tf_relative(tf, length, average, k1, b, delta)


@compiled
def fill_impacts(wanted, indptr, rows, tfs, lengths, average, form, k1, b, delta, absent, out):
    """Write the tf part, less that of an absent term, of every posting of the wanted terms (-1: none) to `out`, float32.

    It stands in this file, not with the other kernels, because numba recompiles a function when its own file changes."""
    for t in wanted:
        if t >= 0:
            for j in range(indptr[t], indptr[t + 1]):
                part = tf_part(form, float(tfs[j]), float(lengths[rows[j]]), average, k1, b, delta) - absent
                out[j] = max(part, 0.0)


def idf_robertson(df, n):
    """ln((N - df + 1/2) / (df + 1/2)), and 0 where that is negative: a term in more than half of the chunks counts for nothing."""
    return np.log(np.maximum((n - df + 0.5) / (df + 0.5), 1.0))


def idf_lucene(df, n):
    """ln(1 + (N - df + 1/2) / (df + 1/2)): never negative."""
    return np.log(1 + (n - df + 0.5) / (df + 0.5))


def idf_plain(df, n):
    """ln(N / df): ATIRE and TF-IDF. 0 for a term that is everywhere."""
    return np.log(n / df)


def idf_l(df, n):
    """ln((N + 1) / (df + 1/2))."""
    return np.log((n + 1) / (df + 0.5))


def idf_plus(df, n):
    """ln((N + 1) / df)."""
    return np.log((n + 1) / df)


@dataclass(frozen=True)
class Form:
    """A way to score: idf(df, N), the number of its tf part, and the `delta` it uses unless told otherwise."""

    name: str
    idf: Callable
    tf: int
    delta: float = 0.0

    def absent(self, k1: float, delta: float) -> float:
        """The tf part of a term that the chunk lacks: tf = 0, any length. Not 0 in BM25L and BM25+."""
        if self.tf == TF_L:
            return (k1 + 1) * delta / (k1 + delta) if delta else 0.0
        return delta if self.tf == TF_PLUS else 0.0


FORMS = {f.name: f for f in (
    Form("robertson", idf_robertson, TF_SATURATING), Form("lucene", idf_lucene, TF_SATURATING),
    Form("atire", idf_plain, TF_ATIRE), Form("bm25l", idf_l, TF_L, delta=0.5), Form("bm25+", idf_plus, TF_PLUS, delta=0.5))}
TF_IDF = Form("tfidf", idf_plain, TF_RELATIVE)
