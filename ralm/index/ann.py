"""Approximate nearest neighbours over stored vectors, by FAISS: which index for how many rows, its making, its measured recall.

    flat     none: blocked matrix products over the vectors themselves, exact
    hnsw     graph of 32 neighbours over float16 codes (Malkov and Yashunin 2018); cannot delete, so filters act inside the search
    ivf      inverted lists over float16 codes, `nprobe` lists read (the codes are the stored vectors: "IVF-Flat" loses nothing)
    ivfpq    inverted lists over 4-bit product codes scanned with SIMD (PQ fast-scan, Andre and others 2015), `factor` times k
             candidates re-ranked with the stored vectors
    auto     flat up to 100,000 rows, hnsw up to 3 million, ivfpq above

The index covers the first rows; new rows wait in a tail that is searched exactly until it is a twentieth (and 20,000 rows), then
they are added (graph and centroids stay; lists are trained anew when the rows have grown fourfold). How far a search looks (ef,
nprobe) is the least that reaches the target recall@10 on pieces of stored texts used as queries; the recall reached is in the
manifest's facts. Scores never come from codes: hits of every kind are scored with the stored vectors."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ralm import progress
from ralm.errors import need, unknown
from ralm.index import manifest

KINDS = ("auto", "flat", "hnsw", "ivf", "ivfpq")
FLAT, GRAPH = 100_000, 3_000_000  # rows up to which auto is flat, hnsw
TAIL, SHARE = 20_000, 0.05
# recall@10 aimed at (real questions find 2 to 3 % less than these probes), queries it is measured on, words of each
TARGET, PROBES, WORDS = 0.97, 200, 10
EFFORTS = {"hnsw": (32, 64, 128, 256, 512), "ivf": (8, 16, 32, 64, 128, 256, 512), "ivfpq": (8, 16, 32, 64, 128, 256, 512)}
LOOSE = 0.05  # share of rows up to which those that are not allowed are dropped after the search
FACTOR = 20  # ivfpq: candidates re-ranked, in multiples of k
BLOCK = 65_536


def kind_of(index: str, rows: int) -> str:
    """The kind meant by a setting at this size. Raises UsageError for an unknown one."""
    if index not in KINDS:
        raise unknown("dense index", str(index), KINDS)
    if index != "auto":
        return index
    return "flat" if rows <= FLAT else "hnsw" if rows <= GRAPH else "ivfpq"


def due(kind: str, facts: dict[str, Any] | None, rows: int, asked: str | None) -> bool:
    """Whether a FAISS index must be made or extended."""
    if kind == "flat" or rows < 2 * PROBES:  # asked for flat, an index that is there is left alone, and not used
        return False
    if facts is None or facts["kind"] != kind:
        return asked not in (None, "auto") or facts is None or kind != "hnsw"  # auto does not go back to a smaller kind
    return rows - facts["rows"] > max(TAIL, SHARE * facts["rows"])


class Allowed:
    """A bitmap over rows (bool [R], not to be changed any more), with what searches ask of it worked out once."""

    def __init__(self, mask: np.ndarray):
        self.mask, self.count = mask, int(np.count_nonzero(mask))
        self._selectors: dict[int, Any] = {}
        self.parameters: dict[tuple[int, int, bool], Any] = {}  # of the one index over these rows (Ann.search)

    @cached_property
    def filter(self) -> np.ndarray | None:
        """The bitmap; None where it allows everything."""
        return None if self.count == len(self.mask) else self.mask

    def selector(self, rows: int) -> tuple[Any, int]:
        """FAISS's form of the first rows, and how many of them are allowed."""
        if rows not in self._selectors:
            import faiss

            bits = np.packbits(self.mask[:rows], bitorder="little")
            self._selectors[rows] = faiss.IDSelectorBitmap(bits), int(np.count_nonzero(self.mask[:rows]))
        return self._selectors[rows]


@dataclass
class Ann:
    """An opened index. `search` gives candidate rows [Q, n], padded with -1."""

    kind: str
    index: Any
    rows: int
    effort: int
    _parameters: dict[tuple[int, int, bool], Any] = field(default_factory=dict)

    def __post_init__(self):
        import faiss

        # the method that FAISS's own `search` calls after its checks, which take a fortieth of a search by one query
        self._search, self._pointer = self.index.search_c, faiss.swig_ptr

    def search(self, q_QD: np.ndarray, k: int, allowed: Allowed | None = None, effort: int | None = None,
               strict: bool = False) -> np.ndarray:
        """q_QD: of the index's own dimension, not checked here. The effort is raised where more than LOOSE are not allowed.

        Where nearly all rows are allowed, a few more candidates are given and some of them may not be allowed (FAISS would ask
        at every row it meets, which is 4 % of the time); strict: none is."""
        kept = self._parameters if allowed is None or allowed.filter is None else allowed.parameters
        asked = k, effort or self.effort, strict
        width, parameters = kept.get(asked) or self._made(kept, *asked, allowed)
        pointer, n = self._pointer, len(q_QD)
        q_QD = np.ascontiguousarray(q_QD, np.float32)
        rows, scores = np.empty((n, width), np.int64), np.empty((n, width), np.float32)
        self._search(n, pointer(q_QD), width, pointer(scores), pointer(rows), parameters)
        return rows

    def _made(self, kept: dict, k: int, effort: int, strict: bool, allowed: Allowed | None) -> tuple[int, Any]:
        """How many candidates, and FAISS's object of parameters; it is kept, since making one takes 3 microseconds."""
        import faiss

        options, width, asked = {}, k, (k, effort, strict)
        if allowed is not None and allowed.filter is not None:
            selector, n = allowed.selector(self.rows)
            gone = 1 - n / self.rows
            if gone > LOOSE:
                effort = min(-int(-effort * self.rows // max(1, n)), 16 * effort)
            if strict or gone > LOOSE:
                options["sel"] = selector
            else:
                width = k + 1 + int(3 * k * gone)  # every one more is half a percent of the time
        if self.kind == "hnsw":
            parameters = faiss.SearchParametersHNSW(efSearch=max(effort, width), **options)
        else:
            parameters = faiss.SearchParametersIVF(nprobe=min(effort, self.index.nlist), **options)
        if len(kept) >= 64:
            kept.clear()
        kept[asked] = found = min(width * FACTOR if self.kind == "ivfpq" else width, self.rows), parameters
        return found


def open_index(folder: Path, now: manifest.Manifest, rows) -> Ann | None:
    """The index of a manifest, memory-mapped, None where it has none. StoreError where stored rows do not find themselves."""
    facts = now.facts.get("ann")
    part = next((p for p in now.parts if "rows.faiss" in p.files), None)
    if facts is None or part is None:
        return None
    from ralm.index.vectors import damaged

    faiss = need("faiss", f"a dense index of kind {facts['kind']}", "lm")
    # graphs and codes are mapped by the one flag, inverted lists by the other; mapped indexes are read-only
    flag = getattr(faiss, "IO_FLAG_MMAP_IFC", 0) if facts["kind"] == "hnsw" else faiss.IO_FLAG_MMAP
    try:
        index = faiss.read_index(str(folder / part.name / "rows.faiss"), flag)
    except RuntimeError as e:
        raise damaged(folder, f"{part.name}/rows.faiss cannot be read ({str(e).splitlines()[-1][:120]})") from e
    found = Ann(facts["kind"], index, int(facts["rows"]), int(facts["effort"]))
    if index.ntotal != found.rows or index.d != rows.dim or found.rows > len(rows):
        raise damaged(folder, f"its FAISS index holds {index.ntotal} vectors of {index.d}, its manifest says {found.rows} "
                              f"of {rows.dim}")
    own = np.asarray(facts["self"], np.int64)
    if len(own) and not (found.search(rows.take(own).astype(np.float32), 5, None) == own[:, None]).any(1).all():
        raise damaged(folder, "stored vectors do not find themselves in its FAISS index")
    return found


# ---- making ---------------------------------------------------------------------------------------------------------


def refresh(store, folder: Path, now: manifest.Manifest, model, asked: str | None) -> manifest.Manifest:
    """Make the index, or add the tail to it; measure its recall; commit. Under the store's lock."""
    from ralm.index.vectors import Rows

    need("faiss", "a dense index above 100,000 chunks", "lm")
    rows = Rows(folder, now)
    kind, facts = kind_of(asked or now.settings["index"], len(rows)), now.facts.get("ann")
    old = next((p for p in now.parts if "rows.faiss" in p.files), None)
    if facts and old and facts["kind"] == kind and (kind == "hnsw" or len(rows) < 4 * facts["trained"]):
        index, trained = _reopen(folder / old.name / "rows.faiss"), facts["trained"]
    else:
        index, trained = _new(kind, rows), len(rows)
    with progress.task(f"index ({kind})", total=len(rows) - index.ntotal, unit="vectors") as advance:
        for _, vectors in rows.slices(index.ntotal, len(rows), BLOCK):
            index.add(np.ascontiguousarray(vectors, np.float32))
            advance(len(vectors))
    found = Ann(kind, index, len(rows), 0)
    queries = probes(store, rows, model)
    recall = _tune(found, rows, queries)
    if recall < TARGET:
        progress.note(f"{folder}: recall@10 of {kind} is {recall:.3f} at its largest effort; dense:index=flat is exact")
    path = manifest.new_part(folder)
    _write(index, path / "rows.faiss")
    part = manifest.seal(path, 0, 0, len(rows))
    facts = {"kind": kind, "rows": len(rows), "trained": trained, "effort": found.effort, "recall@10": round(recall, 4),
             "probes": len(queries), "self": _own(found, rows)}
    settings = dict(now.settings) | ({"index": asked} if asked else {})
    parts = tuple(p for p in now.parts if "rows.faiss" not in p.files)
    now = replace(now, settings=settings, parts=(*parts, part), facts=dict(now.facts) | {"ann": facts})
    manifest.commit(folder, now)
    return now


def _reopen(file: Path):
    import faiss

    return faiss.read_index(str(file))  # not mapped: mapped indexes cannot grow


def _write(index, file: Path) -> None:
    import faiss

    try:
        faiss.write_index(index, str(file))
    except RuntimeError as e:
        raise OSError(f"cannot write {file}: {str(e).splitlines()[-1][:120]}") from e


def _new(kind: str, rows):
    """An empty, trained FAISS index."""
    import faiss

    metric, dim = faiss.METRIC_INNER_PRODUCT, rows.dim
    if kind == "hnsw":
        index = faiss.IndexHNSWSQ(dim, faiss.ScalarQuantizer.QT_fp16, 32, metric)
        index.hnsw.efConstruction = 80
        index.train(rows.take(np.arange(min(256, len(rows)))).astype(np.float32))  # fp16 codes learn nothing; FAISS asks for it
        return index
    lists = max(4, min(2 * int(len(rows) ** 0.5), len(rows) // 40))
    if kind == "ivf":
        index = faiss.index_factory(dim, f"IVF{lists},SQfp16", metric)
    else:
        codes = max(m for m in range(1, dim // 2 + 1) if dim % m == 0 and m <= max(1, dim // 4))
        index = faiss.index_factory(dim, f"IVF{lists},PQ{codes}x4fsr", metric)
    rng = np.random.default_rng(0)
    sample = np.sort(rng.choice(len(rows), min(len(rows), max(64 * lists, 20_000)), replace=False))
    with progress.task(f"train ({kind})", total=len(sample), unit="vectors") as advance:
        index.train(rows.take(sample).astype(np.float32))
        advance(len(sample))
    return index


def probes(store, rows, model) -> np.ndarray:
    """float32 [n, D]: pieces of WORDS words out of stored texts, encoded as queries. A stored vector would be too easy a query."""
    rng = np.random.default_rng(len(rows))
    some = rng.choice(len(rows), min(PROBES, len(rows)), replace=False)
    pieces = []
    for chunk in store.chunks(np.sort(rows.ids[some]).tolist()):
        words = chunk.text.split()
        at = int(rng.integers(0, max(1, len(words) - WORDS)))
        pieces.append(" ".join(words[at:at + WORDS]))
    q_QD = model.encode(pieces, role="query")
    return q_QD[(q_QD != 0).any(1)]


def _tune(found: Ann, rows, q_QD: np.ndarray) -> float:
    """Set the least effort that reaches the target recall@10 against exact search; the recall reached."""
    from ralm.index.exact import score, top

    k = min(10, len(rows))
    truth = top(rows, q_QD, k, None)[0]
    recall = 0.0
    for effort in EFFORTS[found.kind]:
        found.effort = effort
        near = score(rows, q_QD, found.search(q_QD, k, None), k)[0]
        recall = float(np.mean([np.isin(a, b).mean() for a, b in zip(truth, near)])) if len(q_QD) else 1.0
        if recall >= TARGET or (found.kind != "hnsw" and effort >= found.index.nlist):
            break
    return recall


def _own(found: Ann, rows) -> list[int]:
    """Up to four rows that find themselves now, and must on every opening."""
    some = np.unique(np.linspace(0, len(rows) - 1, 64).astype(np.int64))
    near = found.search(rows.take(some).astype(np.float32), 5, None)
    hit = (near == some[:, None]).any(1)
    return some[hit][:: max(1, int(hit.sum()) // 4)][:4].tolist()
