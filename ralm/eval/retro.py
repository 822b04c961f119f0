"""What RETRO gains by its neighbours: the size of the database, how many are read, what finds them, and how much is only copied.

    python -m ralm.eval.retro recipes/retro_docs.toml [--data ../shared/data] [--work FOLDER] [--json]

[store] and [held] are those of experiment.py. The first [[run]] is the baseline; each may name its `lm`, `how`, the `share` of the
datastore that is read (0: none of it) and the `retriever` that searches the neighbours. Beside every run stands how much of the
held-out text is stored in that share, and bits per byte, its own and the baseline's, of the chunks that are not copied from there
(leakage.py). Expected figures are in nats per token; a run that misses its own by more than `tolerance` makes the command fail."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ralm import progress
from ralm.eval.compare import chunk_nats
from ralm.eval.experiment import arguments, command, documents, good
from ralm.eval.interval import interval
from ralm.eval.leakage import HALF, NEAREST, Leaks, leaks
from ralm.eval.perplexity import evaluate_perplexity, own_documents
from ralm.types import Document

FEW = (0.125, 0.5)  # of the curve, in a table
FIGURES = ("nats_per_token", "ppl", "bits_per_byte", "word_ppl", "tokens", "bytes", "documents", "seconds", "convention", "rows")
FIRST = "bm25"  # searches the neighbours where a run does not say what does, and finds what the texts are compared with


class Bench:
    """A datastore, its held-out texts, and what the runs of a recipe share: models, neighbours by retriever, overlap by share."""

    def __init__(self, recipe: dict[str, Any], stored: Sequence[Document], held: Sequence[Document], work: Path):
        from ralm.what.datastore import Datastore

        self.recipe, self.held = recipe, held
        self.kb = Datastore.build(work / f"{recipe['name']}.ralm", stored)
        self.own = own_documents(self.kb, held)
        self._models: dict[str, Any] = {}
        self._neighbours: dict[tuple[str, str], Any] = {}
        self._leaks: dict[str | None, Leaks] = {}

    def model(self, spec: str) -> Any:
        from ralm.lm import load

        if spec not in self._models:
            self._models[spec] = load(spec)
        return self._models[spec]

    def neighbours(self, spec: str, retriever: str) -> Any:
        """The database as the model `spec` reads it, searched by `retriever`; made where it is not there."""
        from ralm.what.neighbours import NeighbourStore

        if (spec, retriever) not in self._neighbours:
            self._neighbours[spec, retriever] = NeighbourStore.build(self.kb, self.model(spec), retriever=retriever)
        return self._neighbours[spec, retriever]

    def leaks(self, where: str | None) -> Leaks:
        """Overlap of the held-out texts with what is stored under a filter: one database and one retriever for all runs."""
        if where not in self._leaks:
            spec = self.recipe["lm"]
            self._leaks[where] = leaks(self.neighbours(spec, FIRST), self.model(spec).tokenizer, self.held, self.own, where)
        return self._leaks[where]

    def run(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """Score the held-out texts as one [[run]] says."""
        from ralm.how import fusion
        from ralm.how.output import asking, innermost
        from ralm.model import RALM
        from ralm.what.token_store import TokenStore

        spec, how, share = wanted.get("lm", self.recipe["lm"]), fusion(wanted["how"]), wanted.get("share", 1.0)
        where = None if share == 1 else f"part < {round(100 * share)}"
        retriever, beside = wanted.get("retriever", FIRST), {}
        if innermost(how).how == "intermediate":
            beside["neighbours"] = self.neighbours(spec, retriever)
        if asking(how, "tokens") is not None:
            beside["tokens"] = TokenStore.build(self.kb, self.model(spec))
        system = RALM(self.model(spec), how=how, where=where, **beside)
        got = evaluate_perplexity(system, self.held, wanted.get("window"), wanted.get("stride"), own=self.own,
                                  m=self.neighbours(self.recipe["lm"], FIRST).m)
        return {key: got[key] for key in FIGURES} | {
            "lm": spec, "how": wanted["how"], "share": share, "where": where,
            "retriever": retriever if "neighbours" in beside else None, "expected": wanted.get("nats"),
            "off": got["nats_per_token"] - wanted["nats"] if "nats" in wanted else None,
            "tolerance": wanted.get("tolerance", self.recipe.get("tolerance", 0.02))}


def run(recipe: dict[str, Any], data: Path, work: Path) -> list[dict[str, Any]]:
    """Every run of a recipe, with "saved" (bits per byte of the first run's), its paired "interval", "overlap", "curve": per alpha
    the share of the bytes, bits per byte of the first run and of this one, and "clean": the interval at the smallest alpha."""
    bench = Bench(recipe, *documents(recipe, data), work)
    rows: list[dict[str, Any]] = []
    with progress.task(recipe["name"], total=len(recipe["run"]), unit="runs") as advance:
        for wanted in recipe["run"]:
            row = bench.run(wanted)
            first, found = rows[0] if rows else row, bench.leaks(row["where"])
            saved = [(a["nats"] - b["nats"]) / math.log(2) for a, b in zip(first["rows"], row["rows"])]
            curves = [found.curve(chunk_nats(x["rows"])) for x in (row, first)]
            rows.append(row | {"saved": sum(saved) / row["bytes"], "interval": interval(saved, [r["bytes"] for r in row["rows"]]),
                               "clean": _clean(found, first["rows"], row["rows"]),
                               "overlap": found.overlap.statistics(),
                               "curve": [ours | {"first": theirs["bits_per_byte"]} for ours, theirs in zip(*curves)]})
            advance(1)
    return rows


def _clean(found: Leaks, first: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """95 % interval, paired over documents, of the bits per byte saved of chunks that have least in common with what is stored."""
    kept = found.overlap.ratio <= FEW[0]
    saved = np.where(kept, np.subtract(chunk_nats(first), chunk_nats(rows)) / math.log(2), 0)
    begin = np.cumsum([0] + [len(r["chunk_nats"]) for r in rows])
    each = [slice(a, b) for a, b in pairwise(begin.tolist()) if kept[a:b].any()]
    return interval([saved[s].sum() for s in each], [np.where(kept, found.bytes, 0)[s].sum() for s in each])


def lines(recipe: dict[str, Any], rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    from ralm.app.terminal import number, table

    yield f"{recipe['name']}: {recipe['title']}"
    head = ["system", "share", "neighbours by", "nats a token", "bits a byte", "saved", "95 %",
            *(x for a in FEW for x in (f"of runs <= {100 * a:g} %", "95 %"))][:-1] + [""]
    body = []
    for n, r in enumerate(rows):
        at = {p["alpha"]: p["first"] - p["bits_per_byte"] for p in r["curve"]}
        (low, high), (least, most) = r["interval"], r["clean"]
        gains = [f"{r['saved']:+.4f}", f"{low:+.4f} to {high:+.4f}", f"{at[FEW[0]]:+.4f}", f"{least:+.4f} to {most:+.4f}",
                 f"{at[FEW[1]]:+.4f}"]
        verdict = "" if r["off"] is None else "as expected" if good(r) else f"expected {r['expected']:.4f}: {r['off']:+.4f}"
        body.append([f"{r['how']}@{r['lm']}", f"{r['share']:g}", r["retriever"] or "", number(r["nats_per_token"]),
                     number(r["bits_per_byte"]), *(gains if n else [""] * len(gains)), verdict])
    yield from ("  " + line for line in table(body, head, right=range(3, len(head) - 1)))
    for share in dict.fromkeys(r["share"] for r in rows):
        yield from _stored(next(r for r in rows if r["share"] == share))
    c = rows[0]["convention"]
    yield (f"  {rows[0]['tokens']:,} tokens of {c['tokenizer']} in {rows[0]['documents']:,} documents, {rows[0]['bytes']:,} bytes; "
           f"window {c['window']}, stride {c['stride']}; one BOS a window; saved: bits a byte less than the first row")


def _stored(r: dict[str, Any]) -> Iterator[str]:
    """How much of the held-out text is stored in the share that a run reads."""
    o, at = r["overlap"], {p["alpha"]: p["bytes"] for p in r["curve"]}
    kept = ", ".join(f"{100 * at[a]:.0f} % of the bytes at {100 * a:g} %" for a in FEW)
    yield (f"  share {r['share']:g}: the longest run in common with one of the {NEAREST} nearest stored chunks is "
           f"{100 * o['mean_run']:.1f} % of a chunk, above {100 * HALF:.0f} % in {100 * o['copied']:.1f} % of {o['chunks']:,}; "
           f"{100 * o['common_tokens']:.1f} % of tokens in common; left: {kept}")


def main() -> int:
    from ralm.app.terminal import dumps

    a = arguments(__doc__).parse_args()
    return command(a, lambda recipe: run(recipe, a.data, a.work), lines, lambda rows: dumps({"rows": rows}))


if __name__ == "__main__":
    sys.exit(main())
