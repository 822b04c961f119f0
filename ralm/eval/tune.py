"""k, lam and temperature of kNN-LM, chosen on held-out text: every text is searched once, at the largest k, and all settings are
computed from what was found.

    weights of the k nearest are a prefix of those of the largest k: cumulative sums give p_kNN for every k at once,
    p(y) = (1 - lam) p_LM(y) + lam p_kNN(y) then costs one logaddexp per lam, k and temperature."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ralm import progress
from ralm.errors import UsageError
from ralm.eval.interval import interval
from ralm.eval.perplexity import _documents, own_documents
from ralm.how.output import Interpolate
from ralm.registry import real, whole
from ralm.types import Document

if TYPE_CHECKING:
    from ralm.model import RALM
    from ralm.what.token_store import Neighbours

TEMPERATURES = (1.0, 3.0, 10.0, 30.0, 100.0)
LAMS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7)
KS = (8, 32, 128, 512, 1024)


@dataclass(frozen=True)
class Watching(Interpolate):
    """Looks for neighbours as kNN-LM does, notes them, and mixes nothing in: what speaks below it stays as it is."""

    notes: Any = None  # list of (states [N, D], confidence [N, 2] or None), parallel to the run's `near`

    @property
    def idle(self) -> bool:
        return self.k == 0

    @property
    def wary(self) -> bool:
        return self.skip < 1 or self.notes is not None

    def _find(self, lm, ids_BT, keys_BSD, sure_BS2, ask, begin, first):
        found, (row, place) = super()._find(lm, ids_BT, keys_BSD, sure_BS2, ask, begin, first)
        if self.notes is not None:
            self.notes.append((keys_BSD[row, place - begin], sure_BS2[row, place - begin]))
        return found.take(slice(0, 0)), (row[:0], place[:0])


@dataclass(frozen=True)
class Found:
    """One text: ln p of what speaks below [T], its tokens [T], which of them have neighbours [n], and these [n, K]; with states
    [n, D] and confidence [n, 2] where they were asked for."""

    logp: np.ndarray
    tokens: np.ndarray
    at: np.ndarray
    near: Neighbours
    keys: np.ndarray | None = None
    sure: np.ndarray | None = None


def searched(ralm: RALM, texts: Sequence[Document | str | tuple[str, str]], k: int, window: int | None = None,
             stride: int | None = None, exclude_self: bool = True, states: bool = False) -> Iterator[Found]:
    """The neighbours of every token of every text, one text at a time, each searched once."""
    from ralm.what.token_store import Neighbours

    documents = _documents(texts)
    own = own_documents(ralm.store, documents) if exclude_self else {}
    given = {n: getattr(ralm.how, n) for n in ("temperature", "skip", "inner")}
    size = sum(len(d.text.encode("utf-8", "surrogatepass")) for d in documents)
    with progress.task("search", total=size, unit="B") as advance:
        for d in documents:
            how = Watching(k=k, notes=[] if states else None, **given)
            run = replace(ralm, how=how)._run(d.text, "", window, stride, tuple(own.get(d.id, ())), None)
            run.near = []
            scored = ralm._score(run, d.text)
            at = np.array([t for t, _, _ in run.near], np.int64)
            rows = [f.take(slice(i, i + 1)) for _, f, i in run.near]
            near = Neighbours.joined(rows) if rows else Neighbours.empty(0, k)
            keys, sure = ((np.concatenate([x.numpy() for x in part]) for part in zip(*how.notes)) if how.notes else (None, None))
            yield Found(scored.logp, scored.tokens, at, near, keys, sure)
            advance(len(d.text.encode("utf-8", "surrogatepass")))


def probabilities(found: Found, ks: Sequence[int], temperature: float) -> np.ndarray:
    """p_kNN of the text's own tokens [n, len(ks)], float64, at one temperature and every k."""
    d, counts = found.near.distances.astype(np.float64), found.near.counts
    if not d.size:
        return np.zeros((len(d), len(ks)))
    w = np.exp((d[:, :1] - d) / temperature)
    if counts is not None:
        w *= counts
    right = found.near.values == found.tokens[found.at][:, None]
    at = np.minimum(np.array(ks), d.shape[1]) - 1
    return np.cumsum(np.where(right, w, 0), 1)[:, at] / np.cumsum(w, 1)[:, at]


def mixed(logp: np.ndarray, p_knn: np.ndarray, lam: np.ndarray | float) -> np.ndarray:
    """ln [(1 - lam) p_LM + lam p_kNN], float64."""
    with np.errstate(divide="ignore"):
        return np.logaddexp(logp + np.log1p(-np.asarray(lam, np.float64)), np.log(lam) + np.log(p_knn))


def tune_knn(ralm: RALM, texts: Sequence[Document | str | tuple[str, str]], ks: Sequence[int] = KS,
             lams: Sequence[float] = LAMS, temperatures: Sequence[float] = TEMPERATURES, window: int | None = None,
             stride: int | None = None, exclude_self: bool = True) -> dict[str, Any]:
    """Nats per token of held-out texts under every combination of k, lam and temperature; each text is searched once.

    ralm: with a token store and how="knn" (its skip and what stands below it are kept; automaton and a gate are not swept). texts:
    not among those of the store, or they are excluded from their own searches (exclude_self). ks >= 1, lams 0..1, temperatures > 0.

    Returns {"best": {k, lam, temperature, nats_per_token, ppl, interval (95 %, bootstrap over texts)}, "spec": best as a spec,
    "model": {nats_per_token, ppl} with nothing mixed in, "gain": nats per token that the best saves, "gain_interval", "table":
    [{k, lam, temperature, nats_per_token, ppl}] in the order of the grid, "tokens", "documents", "searched", "edges": settings
    whose best is at the end of what was tried, "seconds"}. With an inverted index the k nearest of a smaller search may differ a
    little from the nearest k of the larger one. Raises UsageError for values out of range, or a system without neighbours."""
    began = time.perf_counter()
    _check(ralm, ks, lams, temperatures)
    ks, lams, temperatures = sorted(set(ks)), sorted(set(map(float, lams))), sorted(set(map(float, temperatures)))
    nats, base, sizes, asked = [], [], [], 0  # nats [documents][T, K, L]
    for found in searched(ralm, texts, max(ks), window, stride, exclude_self):
        own = np.zeros((len(temperatures), len(ks), len(lams)))
        below = found.logp[found.at]
        rest = -(found.logp.sum() - below.sum())
        for i, temperature in enumerate(temperatures):
            p = probabilities(found, ks, temperature)
            for j, lam in enumerate(lams):
                own[i, :, j] = rest - (mixed(below[:, None], p, lam) if lam else below[:, None] + 0 * p).sum(0)
        nats.append(own)
        base.append(-found.logp.sum())
        sizes.append(len(found.tokens))
        asked += len(found.at)
    tokens = sum(sizes)
    if not tokens:
        raise UsageError("the texts have no token to tune on; give longer ones")
    total = np.sum(nats, 0) / tokens
    i, n, j = np.unravel_index(np.argmin(total), total.shape)
    at = np.array([x[i, n, j] for x in nats])
    best = {"k": ks[n], "lam": lams[j], "temperature": temperatures[i]} | _figures(total[i, n, j])
    edges = [name for name, index, values in (("temperature", i, temperatures), ("k", n, ks), ("lam", j, lams))
             if len(values) > 1 and index in (0, len(values) - 1)]
    table = [{"k": k, "lam": lam, "temperature": t} | _figures(total[a, b, c]) for a, t in enumerate(temperatures)
             for b, k in enumerate(ks) for c, lam in enumerate(lams)]
    return {"best": best | {"interval": interval(at, sizes)},
            "spec": f"knn:k={best['k']},lam={best['lam']:g},temperature={best['temperature']:g}",
            "model": _figures(sum(base) / tokens), "gain": float(sum(base) / tokens - total[i, n, j]),
            "gain_interval": interval(np.array(base) - at, sizes), "table": table, "tokens": tokens, "documents": len(sizes),
            "searched": asked, "edges": edges, "seconds": time.perf_counter() - began}


def _figures(nats_per_token: float) -> dict[str, float]:
    return {"nats_per_token": float(nats_per_token), "ppl": math.exp(min(700, nats_per_token))}


def _check(ralm: RALM, ks: Sequence[int], lams: Sequence[float], temperatures: Sequence[float]) -> None:
    if not isinstance(ralm.how, Interpolate):
        raise UsageError(f"{type(ralm.how).__name__} has no neighbours of tokens to tune; use how=knn with a token store")
    for name, values in (("ks", ks), ("lams", lams), ("temperatures", temperatures)):
        if not len(values):
            raise UsageError(f"{name} is empty: nothing to choose from; give at least one value")
    for k in ks:
        whole(1, k=k)
    if wrong := [x for x in lams if not real(x) or not 0 <= x <= 1]:
        raise UsageError(f"lam={wrong[0]} is not a weight; use 0..1")
    if wrong := [x for x in temperatures if not real(x) or not x > 0]:
        raise UsageError(f"temperature={wrong[0]} cannot scale distances; use a finite value above 0")
