"""Inverted lists over stored keys (FAISS): candidates for stores too large to compare every key. Distances are those of nearest.py.

    exact    every key is compared; up to EXACT rows what auto means
    ivf      lists of keys as 4-bit codes scanned with SIMD (fast-scan product quantiser), REACH x k candidates re-ranked by their
             stored keys; keys of more than 256 numbers are first reduced to 256 (principal components) for the codes
    ivfpq    the classic of the kNN-LM papers, IVF with 64 codes of 8 bits, for comparison; re-ranked too

How many lists a search looks into (nprobe) is the least that finds TARGET of the true DEPTH nearest, measured on stored keys
(themselves aside); what was reached is in the manifest. A few of those searches are kept with their true answers, and
repeated whenever the index is opened: a FAISS build that returns wrong neighbours is told, not trusted."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ralm import progress
from ralm.errors import need, unknown
from ralm.index import manifest, nearest

KINDS = ("auto", "exact", "ivf", "ivfpq")
EXACT = 200_000
TAIL, SHARE = 50_000, 0.1  # rows that may wait to be added, searched exactly meanwhile
LEAST = 2_000  # fewer rows than this are not worth lists
REACH = 1.25
DEPTH, TARGET, PROBES = 100, 0.9, 128
NPROBE = (4, 8, 16, 32, 64)  # where even 64 lists miss the target, more would cost more than they bring (docs/log.md)
CODED = 256  # dimensions that codes are made of


def kind_of(index: str, rows: int) -> str:
    """The kind meant by a setting at this size. Raises UsageError for an unknown one."""
    if index not in KINDS:
        raise unknown("token index", str(index), KINDS)
    return index if index != "auto" else "exact" if rows <= EXACT else "ivf"


def due(now: manifest.Manifest, asked: str | None) -> bool:
    """Whether an index must be made or extended."""
    rows, facts = sum(p.rows for p in now.parts), now.facts.get("ivf")
    kind = kind_of(asked or now.settings["index"], rows)
    if kind == "exact" or rows < LEAST:  # an index that is there is left alone, and not used
        return False
    return facts is None or facts["kind"] != kind or rows - facts["rows"] > max(TAIL, SHARE * facts["rows"])


@dataclass
class Inverted:
    """An opened index over the first `rows` rows."""

    kind: str
    index: Any
    rows: int
    nprobe: int
    queries: Any = None

    def search(self, q_QD: np.ndarray, k: int, allowed: np.ndarray | None, nprobe: int | None = None) -> np.ndarray:
        """Candidate rows int64 [Q, REACH k], -1 for none; allowed: bool [rows] or None."""
        import faiss

        nprobe, options = nprobe or self.nprobe, {}
        lists = faiss.extract_index_ivf(self.index).nlist
        if allowed is not None:
            options["sel"] = faiss.IDSelectorBitmap(np.packbits(allowed[:self.rows], bitorder="little"))
            share = max(1, int(np.count_nonzero(allowed[:self.rows]))) / self.rows
            nprobe = min(int(nprobe / share) + 1, 16 * nprobe)  # a narrow filter needs more lists for as many rows
        parameters = faiss.SearchParametersIVF(nprobe=min(nprobe, lists), **options)
        if isinstance(self.index, faiss.IndexPreTransform):
            parameters = faiss.SearchParametersPreTransform(index_params=parameters)
        return self.index.search(np.ascontiguousarray(q_QD, np.float32), min(int(REACH * k), self.rows), params=parameters)[1]


def open_index(folder: Path, now: manifest.Manifest, keys: nearest.Keys) -> Inverted | None:
    """The index of a manifest, mapped, None where it has none. StoreError where it does not find what it found when it was made."""
    from ralm.what.token_build import damaged

    facts = now.facts.get("ivf")
    part = next((p for p in now.parts if "rows.faiss" in p.files), None)
    if facts is None or part is None:
        return None
    faiss = need("faiss", f"a token index of kind {facts['kind']}", "lm")
    try:
        index = faiss.read_index(str(folder / part.name / "rows.faiss"), faiss.IO_FLAG_MMAP)
    except RuntimeError as e:
        raise damaged(folder, f"{part.name}/rows.faiss cannot be read ({str(e).splitlines()[-1][:120]})") from e
    found = Inverted(facts["kind"], index, int(facts["rows"]), int(facts["nprobe"]))
    if index.ntotal != found.rows or index.d != keys.dim or found.rows > len(keys):
        raise damaged(folder, f"its inverted index holds {index.ntotal} keys of {index.d}, its manifest says {found.rows} of "
                              f"{keys.dim}")
    _self_test(folder, found, keys, facts)
    return found


def _self_test(folder: Path, found: Inverted, keys: nearest.Keys, facts: dict[str, Any]) -> None:
    """Stored keys find themselves first, at distance 0, in order; recall of the remembered searches is what it was."""
    from ralm.what.token_build import damaged

    own = np.asarray(facts["test"]["rows"], np.int64)
    q_QD = keys.take(own)
    depth = len(facts["test"]["nearest"][0])
    rows, d = nearest.ranked(keys, q_QD, found.search(q_QD, depth, None), depth)
    if (np.diff(d, axis=1) < 0).any():
        raise damaged(folder, "its inverted index returns neighbours out of order")
    itself = keys.distances(q_QD, own[:, None])[:, 0]
    if keys.metric == "l2" and not ((d[:, 0] <= itself) | (rows[:, 0] == own)).all():
        raise damaged(folder, "stored keys do not find themselves in its inverted index; is this FAISS build sound?")
    recall = float(np.mean([np.isin(t, r).mean() for t, r in zip(facts["test"]["nearest"], rows)]))
    if recall < facts["test"]["recall"] - 0.1:
        raise damaged(folder, f"its inverted index finds {recall:.2f} of the nearest keys, when it was made it found "
                              f"{facts['test']['recall']:.2f}; is this FAISS build sound?")


# ---- making ---------------------------------------------------------------------------------------------------------


def refresh(folder: Path, now: manifest.Manifest, asked: str | None) -> manifest.Manifest:
    """Make the index, or add the rows it lacks; choose nprobe; commit. Under the store's lock."""
    import faiss

    from ralm.what.token_store import Rows

    need("faiss", "a token index above 200,000 rows", "lm")
    rows, began = Rows(folder, now), time.perf_counter()
    kind, facts = kind_of(asked or now.settings["index"], len(rows.keys)), now.facts.get("ivf")
    old = next((p for p in now.parts if "rows.faiss" in p.files), None)
    if facts and old and facts["kind"] == kind and len(rows.keys) < 4 * facts["trained"]:
        index, trained = faiss.read_index(str(folder / old.name / "rows.faiss")), facts["trained"]
    else:
        index, trained = _new(kind, rows.keys), len(rows.keys)
    with progress.task(f"index ({kind})", total=len(rows.keys) - index.ntotal, unit="keys") as advance:
        for first, x, _ in rows.keys.blocks(keep=False):
            if first + len(x) > index.ntotal:
                index.add(np.ascontiguousarray(x[max(0, index.ntotal - first):]))
                advance(len(x))
    found = Inverted(kind, index, len(rows.keys), 0)
    recall = tune(found, rows)
    path = manifest.new_part(folder)
    _save(index, path / "rows.faiss")
    part = manifest.seal(path, 0, 0, 0)
    facts = {"kind": kind, "rows": len(rows.keys), "trained": trained, "nprobe": found.nprobe, f"recall@{DEPTH}": round(recall, 4),
             "lists": faiss.extract_index_ivf(index).nlist, "seconds": round(time.perf_counter() - began, 1),
             "test": _test(found, rows.keys)}
    settings = dict(now.settings) | ({"index": asked} if asked else {})
    parts = (*(p for p in now.parts if "rows.faiss" not in p.files), part)
    now = replace(now, settings=settings, parts=parts, facts=dict(now.facts) | {"ivf": facts})
    manifest.commit(folder, now)
    return now


def _save(index: Any, file: Path) -> None:
    import faiss

    try:
        faiss.write_index(index, str(file))
    except RuntimeError as e:
        raise OSError(f"cannot write {file}: {str(e).splitlines()[-1][:120]}") from e


def lists_of(rows: int) -> int:
    """How many lists for so many rows: with 2 sqrt(N) a search at nprobe lists compares 2 sqrt(N) centres and nprobe sqrt(N) / 2
    codes, and codes are ten times cheaper."""
    return max(4, min(2 * int(rows ** 0.5), rows // 40))


def _new(kind: str, keys: nearest.Keys) -> Any:
    """An empty, trained FAISS index."""
    import faiss

    dim, metric = keys.dim, faiss.METRIC_L2 if keys.metric == "l2" else faiss.METRIC_INNER_PRODUCT
    lists = lists_of(len(keys))
    if kind == "ivf":
        coded = min(dim, CODED)
        codes = max(m for m in range(1, coded // 2 + 1) if coded % m == 0 and m <= max(1, coded // 2))
        reduce = f"PCA{coded}," if dim > coded else ""
        index = faiss.index_factory(dim, f"{reduce}IVF{lists},PQ{codes}x4fs", metric)
    else:  # "np": without polysemous training, which FAISS would add silently and which takes ten times as long
        codes = max(m for m in range(1, 65) if dim % m == 0 and (dim // m >= 8 or m == 1))  # FAISS trains narrower ones slowly
        index = faiss.index_factory(dim, f"IVF{lists},PQ{codes}np", metric)
    faiss.extract_index_ivf(index).cp.niter = 10
    rng = np.random.default_rng(0)
    sample = np.sort(rng.choice(len(keys), min(len(keys), max(40 * lists, 20_000)), replace=False))
    with progress.task(f"train ({kind})", total=len(sample), unit="keys") as advance:
        index.train(keys.take(sample))
        advance(len(sample))
    return index


def tune(found: Inverted, rows: Any) -> float:
    """Set the least nprobe that finds TARGET of the DEPTH nearest of stored keys (themselves aside); the recall reached."""
    keys = rows.keys
    own = np.random.default_rng(1).choice(len(keys), min(PROBES, len(keys)), replace=False)
    q_QD, depth, recall = keys.take(own), min(DEPTH + 1, len(keys)), 0.0
    truth = nearest.exact(keys, q_QD, depth)[0]
    truth = np.where(truth == own[:, None], -2, truth)  # a stored key finds itself too easily
    for nprobe in NPROBE:
        found.nprobe = nprobe
        near = nearest.ranked(keys, q_QD, found.search(q_QD, depth, None), depth)[0]
        recall = float(np.mean([np.isin(t[t >= 0], n).mean() for t, n in zip(truth, near)]))
        if recall >= TARGET:
            break
    return recall


def _test(found: Inverted, keys: nearest.Keys, queries: int = 8, depth: int = 10) -> dict[str, Any]:
    """Searches to be repeated at every opening: rows, the true nearest of each, and how many of them the index finds."""
    some = np.unique(np.linspace(0, len(keys) - 1, 4 * queries).astype(np.int64))
    q_QD = keys.take(some)
    rows = nearest.ranked(keys, q_QD, found.search(q_QD, depth, None), depth)[0]
    kept = np.flatnonzero((rows == some[:, None]).any(1))[:: max(1, len(some) // (2 * queries))][:queries]
    truth = nearest.exact(keys, q_QD[kept], depth)[0]
    recall = float(np.mean([np.isin(t, r).mean() for t, r in zip(truth, rows[kept])])) if len(kept) else 1.0
    return {"rows": some[kept].tolist(), "nearest": truth.tolist(), "recall": round(recall, 4)}
