"""How well a retriever finds what was judged relevant: nDCG@10, R@100 and the rest of ir-measures, and DPR's top-k accuracy.

    evaluate(BM25(store), read_queries("queries.jsonl"), read_qrels("qrels/test.tsv"))["measures"]

A datastore finds chunks, judgements are about documents: a document ranks where its best chunk does (max passage)."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ralm import progress
from ralm.errors import UsageError, need
from ralm.eval.answers import has_answer
from ralm.eval.interval import interval
from ralm.eval.trec import Qrels, Run, falling

if TYPE_CHECKING:
    from ralm.types import Hits, Retriever

BATCH = 64  # queries a search: large enough to share work, small enough that progress moves
NO_CUTOFF = 1000  # depth of runs for measures without one (AP, RR), as TREC and BEIR do


def search(retriever: Retriever, queries: Mapping[str, str], k: int, unit: str = "document", where: str | None = None,
           ignore_identical_ids: bool | Collection[str] = False) -> Run:
    """{query id: [(id, score), ...]}: the k best documents of each query, best first; fewer only where no more match.

    unit "document": a document's score is its best chunk's; "chunk": ids are 'document#start-end' in characters.
    ignore_identical_ids: a document whose id is the query's own is left out, for every query or for those named.
    Raises UsageError for another unit or k < 1."""
    if unit not in ("document", "chunk"):
        raise UsageError(f"unit '{unit}' is neither 'document' nor 'chunk'")
    if k < 1:
        raise UsageError(f"k={k} asks for nothing; use at least 1")
    run: Run = {}
    names = list(queries)
    without = set(names if ignore_identical_ids is True else ignore_identical_ids or ())
    labels = _Labels(retriever.store, unit)
    with progress.task("search", total=len(names), unit="queries") as advance:
        for at in range(0, len(names), BATCH):
            batch = names[at:at + BATCH]
            own = [name if name in without else None for name in batch]
            run |= zip(batch, _ranked(retriever, [queries[name] for name in batch], own, k, labels, where))
            advance(len(batch))
    return run


def _ranked(retriever: Retriever, texts: Sequence[str], drop: Sequence[str | None], k: int, labels: _Labels,
            where: str | None) -> list[list[tuple[str, float]]]:
    """k units per text, none of document drop[n]. Over-retrieved, twice as much each time, until k are there or none is left."""
    store = retriever.store
    most = max(1, store.n_chunks)
    ask = min(most, k + 1 if labels.unit == "chunk" or store.n_chunks == len(store) else 2 * k)
    out: list[list[tuple[str, float]]] = [[]] * len(texts)
    waiting = list(range(len(texts)))
    while waiting:
        hits = retriever.search([texts[n] for n in waiting], k=ask, where=where)
        labels.learn(hits.ids)
        short = []
        for row, n in enumerate(waiting):
            one = hits.row(row)
            out[n] = _collapse(one, labels, drop[n])[:k]
            if len(out[n]) < k and one.ids.shape[1] == ask < most:
                short.append(n)
        waiting, ask = short, min(most, 2 * ask)
    return out


def _collapse(hits: Hits, labels: _Labels, drop: str | None) -> list[tuple[str, float]]:
    """Hits [1, K] as units, each at its first (best) chunk's rank and score."""
    best: dict[str, float] = {}
    for id, score in zip(hits.ids[0].tolist(), hits.scores[0].tolist()):
        document, name = labels.of[id]
        if document != drop:
            best.setdefault(name, score)
    return list(best.items())


class _Labels:
    """Chunk id -> (document, name of the unit), looked up once for all hits of a batch: a look-up is a read from disk."""

    MOST = 2_000_000

    def __init__(self, store, unit: str):
        self.store, self.unit, self.of = store, unit, {}

    def learn(self, ids_QK: np.ndarray) -> None:
        if len(self.of) > self.MOST:
            self.of = {}
        new = [i for i in np.unique(ids_QK).tolist() if i >= 0 and i not in self.of]
        if not new:
            return
        if self.unit == "document":
            self.of |= {i: (name, name) for i, name in zip(new, self.store.document_ids(new))}
        else:
            self.of |= {c.id: (c.document, f"{c.document}#{c.start}-{c.end}") for c in self.store.chunks(new)}


def evaluate(retriever: Retriever, queries: Mapping[str, str], qrels: Qrels, measures: Sequence[str] = ("nDCG@10", "R@100"),
             k: int | None = None, ignore_identical_ids: bool | None = None, where: str | None = None) -> dict[str, Any]:
    """Search every query that has judgements and measure: {"measures": {name: 0 to 1}, "intervals", "per_query", "queries",
    "convention", "run", "seconds"}. k: depth of the run, default the largest cut-off asked for (1000 where a measure has none).
    ignore_identical_ids: leave out the document with the query's own id, or not; None: where that document holds the query's
    text and is not judged relevant to it, so that a query which is itself a document of the corpus (ArguAna) does not find itself.

    Queries without judgements are counted and left out; so are judgements whose query is not given. Raises UsageError for measures
    ir-measures does not know and a k below a cut-off, MissingDependency where it is not installed."""
    began = time.perf_counter()
    parsed = [parse(m) for m in measures]
    deepest = max((_cutoff(m) for m in parsed), default=NO_CUTOFF)
    if k is not None and k < max((m.params.get("cutoff", 0) for m in parsed), default=0):
        raise UsageError(f"k={k} retrieves less than {' '.join(measures)} look at; use k={deepest} or leave it out")
    asked = {name: text for name, text in queries.items() if name in qrels}
    if not asked:
        raise UsageError(f"none of the {len(queries)} queries has a judgement ({len(qrels)} judged queries, for example "
                         f"'{next(iter(qrels), '')}'): the two files do not belong together")
    own = {n for n in asked if _is_document(retriever.store, n, asked[n], qrels[n])} if ignore_identical_ids is None else set()
    run = search(retriever, asked, k or deepest, "document", where, own if ignore_identical_ids is None else ignore_identical_ids)
    result = evaluate_run(run, {name: qrels[name] for name in asked}, measures)
    result["convention"] |= {
        "retriever": repr(retriever), "depth": k or deepest, "where": where, "unit": "document, scored by its best chunk",
        "identical_ids": f"dropped where the document is the query ({len(own)} of {len(asked)})" if own else
                         "dropped (a document with the query's id)" if ignore_identical_ids else "kept",
        "queries_without_judgements": len(queries) - len(asked), "judged_queries_not_given": len(qrels) - len(asked)}
    return result | {"run": run, "seconds": time.perf_counter() - began}


def _is_document(store, name: str, text: str, judged: Mapping[str, int]) -> bool:
    """Whether the query is a document of the store that it is not meant to find."""
    if judged.get(name, 0) > 0 or not store.has(name):
        return False
    document = store.document(name)
    return " ".join(text.split()) in " ".join(f"{document.title} {document.text}".split())


def evaluate_run(run: Mapping[str, Sequence[tuple[str, float]]], qrels: Qrels,
                 measures: Sequence[str] = ("nDCG@10", "R@100")) -> dict[str, Any]:
    """Measure a run over the judged queries; a judged query that the run lacks counts as one for which nothing was found.

    Returns {"measures": {name: value}, "intervals": {name: (low, high)}, "per_query": {query: {name: value}}, "queries",
    "convention"}. Raises UsageError for unknown measures, MissingDependency without ir-measures."""
    ir = need("ir_measures", "measuring retrieval", "eval")
    parsed = [parse(m) for m in measures]
    scored = {query: dict(falling(row)) for query, row in run.items() if query in qrels}
    results = ir.calc(parsed, qrels, scored)
    per_query: dict[str, dict[str, float]] = {query: {} for query in qrels}
    for metric in results.per_query:
        per_query[metric.query_id][str(metric.measure)] = float(metric.value)
    names = [str(m) for m in parsed]
    return {
        "measures": {str(m): float(v) for m, v in sorted(results.aggregated.items(), key=lambda item: names.index(str(item[0])))},
        "intervals": {name: interval([row[name] for row in per_query.values()]) for name in names},
        "per_query": per_query, "queries": len(qrels),
        "convention": {"measures_by": f"ir-measures {ir.__version__}", "ties": "broken by our rank, not by document id",
                       "interval": "95 % percentile bootstrap over queries, 1000 resamples",
                       "judged_queries_without_results": sum(not run.get(query) for query in qrels)}}


def parse(name: str):
    """A measure of ir-measures by its name. Raises UsageError for one that it does not know or cannot compute here."""
    ir = need("ir_measures", "measuring retrieval", "eval")
    try:
        measure = ir.parse_measure(name)
        ir.evaluator([measure], {"q": {"d": 1}})
    except Exception as e:  # NameError, ValueError, SyntaxError, RuntimeError: one request, many ways to say no
        raise UsageError(f"unknown measure '{name}' ({e}); use names like nDCG@10, R@100, AP, RR@10, P@5, Success@1") from e
    return measure


def _cutoff(measure) -> int:
    return int(measure.params.get("cutoff", NO_CUTOFF))


def topk_accuracy(passages: Sequence[Sequence[str]], references: Sequence[Sequence[str]], ks: Sequence[int] = (1, 5, 20, 100),
                  holds=has_answer) -> dict[int, float]:
    """Share (0 to 1) of questions with the answer in one of the first k passages, for each k (DPR, table 2).

    passages: texts per question, best first; holds: `has_answer`, or `has_answer_regex` for CuratedTREC.
    Raises UsageError where the two lists have different lengths or there is no question."""
    if len(passages) != len(references) or not len(passages):
        raise UsageError(f"{len(passages)} lists of passages for {len(references)} lists of answers; give one of each per question")
    ranks = [first_rank(row, answers, holds) for row, answers in zip(passages, references)]
    return {k: float(np.mean([r < k for r in ranks])) for k in ks}


def first_rank(passages: Sequence[str], references: Sequence[str], holds=has_answer) -> float:
    """Rank from 0 of the first passage that holds an answer, infinity where none does."""
    return next((float(n) for n, text in enumerate(passages) if holds(text, references)), float("inf"))
