"""Several systems on the same texts: one row a system, what it differs by from the first, and which stored documents did it.

Every system sees windows of at most the same number of tokens and moves them by the same stride. Passages at the input take the
place of text there, so what is left of the window for text differs, and each row says how much it is. Differences are in bits
per byte, which systems with different tokenizers share; their intervals are paired over the documents."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ralm import progress
from ralm.errors import UsageError
from ralm.eval.interval import interval
from ralm.eval.leakage import NEAREST, Leaks, leaks
from ralm.eval.perplexity import _documents, evaluate_perplexity, own_documents
from ralm.index.suffix_parts import tokenizer_fingerprint
from ralm.types import Document

if TYPE_CHECKING:
    from ralm.model import RALM

SHOWN = 2  # texts whose evidence is told, per system
READ = 2_048  # tokens of such a text that are looked at
FIGURES = ("ppl", "word_ppl", "bits_per_byte", "nats_per_token", "tokens", "retrievals", "passages_read", "passages_cut",
           "tokens_searched", "seconds", "intervals")


def compare(systems: Mapping[str, RALM], texts: Sequence[Document | str | tuple[str, str]], window: int | None = None,
            stride: int | None = None, exclude_self: bool = True, save: str | Path | None = None, neighbours: Any = None,
            evidence: int = SHOWN) -> dict[str, Any]:
    """Score the texts with every system (by name; over one datastore, or none).

    window: most tokens any system sees at once (default: the smallest of the models'); stride: by default half of the smallest
    room that is left for text. save: figures of each document, a file per system (rows.jsonl: rows.1.jsonl, ...), gone on with
    where they are there. neighbours: a NeighbourStore; the texts are then compared with what is stored (leakage.py). evidence:
    how many texts per system, those it improved most, have their evidence told.

    Returns {"systems": [{"name", "how", "lm", "ppl", "bits_per_byte", ..., "difference" (bits per byte less than the first's),
    "interval" (95 %, paired bootstrap over documents), "window", "text" (tokens of it that are the text's), "stride", "rows",
    "convention", "evidence": [{"text", "bits_per_byte" (saved), "read" (characters), "documents": {id: what it moved}}],
    "curve": bpb(alpha), None for another tokenizer than the neighbours'}], "overlap": {...} or None, "documents", "bytes",
    "window", "stride", "seconds"}. Raises UsageError without systems or texts, and what scoring raises."""
    began = time.perf_counter()
    if not systems:
        raise UsageError("there is no system to compare; name some, like none,prepend:k=1")
    documents = _documents(texts)
    window, stride = _windows(systems, window, stride)
    store = next((s.store for s in systems.values() if s.store is not None), None)
    own = own_documents(store, documents) if exclude_self and store is not None else {}
    alike = {} if neighbours is None else {n: tokenizer_fingerprint(s.lm.tokenizer) == neighbours.fingerprint
                                           for n, s in systems.items()}
    out: list[dict[str, Any]] = []
    with progress.task("compare", len(systems), "systems") as advance:
        for n, (name, system) in enumerate(systems.items(), 1):
            file = None if save is None else Path(save).with_suffix(f".{n}{Path(save).suffix}")
            got = evaluate_perplexity(system, documents, window, stride, exclude_self, file,
                                      neighbours.m if alike.get(name) else None, own)
            out.append({"name": name, "how": repr(system.how), "lm": system.lm.name} | {key: got[key] for key in FIGURES} | {
                "window": window, "text": window - got["convention"].get("evidence_tokens", 0), "stride": stride,
                "rows": got["rows"], "convention": got["convention"], **_difference(out[0] if out else None, got)})
            advance(1)
    for row in out[1:]:
        row["evidence"] = _evidence(systems[row["name"]], out[0], row, documents, own, evidence)
    found = _leaks(systems, out, alike, documents, own, neighbours) if any(alike.values()) else None
    return {"systems": out, "overlap": found, "documents": len(documents), "bytes": sum(r["bytes"] for r in out[0]["rows"]),
            "window": window, "stride": stride, "seconds": time.perf_counter() - began}


def _windows(systems: Mapping[str, RALM], window: int | None, stride: int | None) -> tuple[int, int]:
    """The window and the stride that all systems share. Raises UsageError where one of them has no room for text."""
    window = min(s.lm.window for s in systems.values()) if window is None else window
    rooms = {name: window - s.how.reserve(s.lm) for name, s in systems.items()}
    name = min(rooms, key=rooms.__getitem__)
    if rooms[name] < 2:
        raise UsageError(f"'{name}' may take {window - rooms[name]} tokens of a window of {window} for evidence, which leaves "
                         f"{rooms[name]} for the text; give it fewer (tokens={window // 2}) or use a larger window")
    return window, max(1, rooms[name] // 2) if stride is None else stride


def _leaks(systems: Mapping[str, RALM], out: Sequence[dict[str, Any]], alike: Mapping[str, bool], documents: Sequence[Document],
           own: Mapping[str, Sequence[str]], neighbours: Any) -> dict[str, Any]:
    """What the texts have in common with what is stored; every row gets its "curve"."""
    some = [row for row in out if alike[row["name"]]]
    system = systems[some[0]["name"]]
    found = leaks(neighbours, system.lm.tokenizer, documents, own, system.where)
    for row in out:
        row["curve"] = found.curve(chunk_nats(row["rows"])) if row in some else None
    return told(found, neighbours)


def told(found: Leaks, neighbours: Any) -> dict[str, Any]:
    """The statistics of an overlap, and what they were measured with."""
    return found.overlap.statistics() | {"m": neighbours.m, "nearest": NEAREST, "retriever": neighbours.retriever}


def chunk_nats(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Nats of the chunks of all texts, one behind the other."""
    return [x for row in rows for x in row["chunk_nats"]]


def _difference(first: dict[str, Any] | None, got: dict[str, Any]) -> dict[str, Any]:
    """Bits per byte that a system saves of the first one's (negative: it costs more), and the paired interval."""
    if first is None:
        return {"difference": 0.0, "interval": (0.0, 0.0)}
    saved = [(a["nats"] - b["nats"]) / math.log(2) for a, b in zip(first["rows"], got["rows"])]
    size = [r["bytes"] for r in got["rows"]]
    return {"difference": sum(saved) / sum(size) if sum(size) else math.nan, "interval": interval(saved, size)}


def _evidence(system: RALM, first: dict[str, Any], row: dict[str, Any], documents: Sequence[Document],
              own: Mapping[str, Sequence[str]], most: int) -> list[dict[str, Any]]:
    """The texts that a system improved most, and the stored documents that moved them, those that moved most first."""
    if system.how.how == "none":
        return []
    saved = [a["nats"] - b["nats"] for a, b in zip(first["rows"], row["rows"])]
    best = [i for i in sorted(range(len(saved)), key=lambda i: -saved[i])[:most] if saved[i] > 0]
    told = []
    with progress.task("what moved it", len(best), "texts") as advance:
        for i in best:
            d, size = documents[i], row["rows"][i]
            read = d.text[:len(d.text) * READ // max(READ, size["tokens"])]
            moved = system.explain(read, window=row["window"], stride=row["stride"], exclude=own.get(d.id, ())).documents
            told.append({"text": d.id, "bits_per_byte": saved[i] / math.log(2) / max(1, size["bytes"]), "read": len(read),
                         "documents": dict(sorted(moved.items(), key=lambda pair: -pair[1]))})
            advance(1)
    return told
