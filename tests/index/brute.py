"""BM25 and TF-IDF as the papers write them: float64, one chunk at a time, sharing the analyser with the index and nothing else."""

import math
from collections import Counter

import numpy as np

from ralm.index.analyse import Analyser
from ralm.types import Document
from ralm.what.datastore import Datastore

FORMS = ("robertson", "lucene", "atire", "bm25l", "bm25+", "tfidf")


def make(path, texts, titles=None):
    """A datastore of one chunk for each text; document ids d0, d1, ..."""
    titles = titles or [""] * len(texts)
    return Datastore.build(path, [Document(f"d{i}", t, title) for i, (t, title) in enumerate(zip(texts, titles))], split="none")


def idf(form, df, n):
    return {"robertson": max(0.0, math.log((n - df + 0.5) / (df + 0.5))), "lucene": math.log(1 + (n - df + 0.5) / (df + 0.5)),
            "atire": math.log(n / df), "bm25l": math.log((n + 1) / (df + 0.5)), "bm25+": math.log((n + 1) / df),
            "tfidf": math.log(n / df)}[form]


def tf_part(form, tf, length, average, k1, b, delta):
    if form == "tfidf":
        return tf / length if length else 0.0
    norm = 1 - b + b * length / average
    if form == "bm25l":
        c = tf / norm if tf else 0.0
        return (k1 + 1) * (c + delta) / (k1 + c + delta) if c + delta else 0.0
    saturated = tf / (tf + k1 * norm) if tf else 0.0
    return {"robertson": saturated, "lucene": saturated, "atire": (k1 + 1) * saturated, "bm25+": (k1 + 1) * saturated + delta}[form]


def scores(texts, query, settings, form="lucene", k1=1.5, b=0.75, delta=0.5):
    """(score of every text for the query, whether it shares a term). Terms of no text count for nothing."""
    bags = [Counter(Analyser(settings).words(t)) for t in texts]
    lengths, n = [sum(bag.values()) for bag in bags], len(texts)
    average = sum(lengths) / n if n else 0.0
    out, shares = np.zeros(n), np.zeros(n, bool)
    for term in Analyser(settings).words(query):
        df = sum(term in bag for bag in bags)
        if df:
            for i, bag in enumerate(bags):
                out[i] += idf(form, df, n) * tf_part(form, bag[term], lengths[i], average, k1, b, delta)
                shares[i] |= term in bag
    return out, shares
