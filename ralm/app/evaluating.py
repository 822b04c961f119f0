"""`ralm eval retrieval` and `ralm eval qa`: measures with intervals and with what they were measured under."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from ralm.app.asking import answering
from ralm.app.options import LM, AskHow, At, Finder, StoreArg, WhenArg, Where, positive, writable
from ralm.app.terminal import Output, duration, facts, number, table
from ralm.errors import UsageError


def retrieval(store: StoreArg, /, *, retriever: Finder = "auto",
              queries: Annotated[Path, Parameter(help="id<TAB>query lines, or BEIR's queries.jsonl.")],
              qrels: Annotated[Path, Parameter(help="Judgements: BEIR's three columns or TREC's four.")],
              measures: Annotated[str, Parameter(help="Names of ir-measures, separated by commas.")] = "nDCG@10,R@100",
              k: Annotated[int | None, Parameter(name=["-k", "--k"], help="Depth of the run; default: largest cut-off.")] = None,
              ignore_identical_ids: Annotated[bool | None, Parameter(
                  show_default=False, help="Leave out the document with the query's own id, or keep it. Default: left out where "
                  "it holds the query's text and is not judged relevant (ArguAna's queries are documents).")] = None,
              run: Annotated[Path | None, Parameter(help="Also write the TREC run to this file.")] = None,
              where: Where = None, at: At = None, out: Output = Output()) -> None:  # noqa: B008
    """Measure a retriever against judgements about documents; a document ranks where its best chunk does.

    JSON: measures {name: value, 0 to 1}, intervals {name: [low, high]} (95 %, bootstrap over queries), queries, convention,
    run, version, seconds."""
    from ralm.app.parts import opened
    from ralm.eval import retrieval as evaluation
    from ralm.eval import trec

    positive("-k", k)
    writable("--run", run)
    names = [m.strip() for m in measures.split(",") if m.strip()]
    if not names:
        raise UsageError("--measures names none; give some, like nDCG@10,R@100")
    for name in names:
        evaluation.parse(name)  # a wrong name is told before anything is searched
    wanted, judged = trec.read_queries(queries), trec.read_qrels(qrels)
    kb, finder = opened(store, at, retriever)
    result = evaluation.evaluate(finder, wanted, judged, names, k=k, ignore_identical_ids=ignore_identical_ids, where=where)
    if run is not None:
        trec.write_run(run, result["run"])
    data = {key: result[key] for key in ("measures", "intervals", "queries", "convention", "seconds")}
    data |= {"version": kb.version, "run": None if run is None else str(run)}
    out.show(data, lambda: _measure_lines(data, 4))


def qa(store: Annotated[Path | None, Parameter(name="STORE", help="Folder of the datastore; none with --predictions.")] = None,
       /, *, questions: Annotated[Path | None, Parameter(help='Rows {"id", "question", "answers": [...]}; SQuAD, NQ and DPR files '
                                                              "too. No answers: to be declined.")] = None,
       predictions: Annotated[Path | None, Parameter(help="Answers made elsewhere, {id: answer}; needs --gold.")] = None,
       gold: Annotated[Path | None, Parameter(help="SQuAD file, 1.1 or 2.0, to score --predictions against.")] = None,
       lm: LM = "bundled:reader", retriever: Finder = "auto",
       k: Annotated[int | None, Parameter(name=["-k", "--k"], help="How many passages are read.")] = None,
       how: AskHow = None, when: WhenArg = "once", where: Where = None, at: At = None,
       limit: Annotated[int | None, Parameter(help="Ask only the first questions of the file.")] = None,
       save: Annotated[Path | None, Parameter(help="Write every answer to this file as it is made (JSON lines, DPR's form); a run "
                                                   "that was stopped goes on from it.")] = None,
       out: Output = Output()) -> None:  # noqa: B008
    """Exact match and F1 with SQuAD's own normalisation: of answers asked of a datastore, or of --predictions against --gold.

    JSON: measures {EM, F1, abstained, accuracy@k, ... in percent}, intervals, questions, convention, seconds; with --predictions:
    measures {EM, F1, for SQuAD 2.0 also HasAns_exact, HasAns_f1, NoAns_exact, NoAns_f1}, questions, missing (how many)."""
    for name, value in (("-k", k), ("--limit", limit)):
        positive(name, value)
    writable("--save", save)
    if (predictions is None) != (gold is None):
        raise UsageError("--predictions and --gold belong together: the answers, and the SQuAD file they answer")
    if (predictions is None) == (questions is None):
        raise UsageError("give STORE --questions FILE to ask, or --predictions FILE --gold FILE to score answers made elsewhere")
    if predictions is not None:
        data = _made_elsewhere(predictions, gold)
    elif store is None:
        raise UsageError("--questions are asked of a datastore: ralm eval qa STORE --questions FILE")
    else:
        from ralm.eval.questions import read_questions

        rows = read_questions(questions)[:limit]  # a wrong file is told before the model is loaded
        data = _asked(answering(store, at, lm, how, when, retriever, where, k), rows, save)
    out.show(data, lambda: _measure_lines(data, 2))


def _made_elsewhere(predictions: Path, gold: Path) -> dict[str, Any]:
    from ralm.eval.squad import read_predictions, score_predictions

    began = time.perf_counter()
    result = score_predictions(read_predictions(predictions), gold)
    result["convention"] |= {"predictions": str(predictions), "gold": str(gold), "not_answered": len(result["missing"]),
                             "not_asked": result["unknown"]}
    return {"measures": result["measures"], "intervals": result["intervals"], "questions": result["total"],
            "missing": len(result["missing"]), "convention": result["convention"], "seconds": time.perf_counter() - began}


def _asked(asked: Any, questions: Sequence[Any], save: Path | None) -> dict[str, Any]:
    from ralm.eval.qa import evaluate_qa

    system, k = asked
    result = evaluate_qa(system, questions, k=k, predictions=save)
    kept = ("measures", "intervals", "questions", "answerable", "median_seconds", "convention", "seconds")
    return {key: result[key] for key in kept} | {"save": None if save is None else str(save), "version": system.store.version}


def _measure_lines(data: dict[str, Any], digits: int) -> Iterator[str]:
    """Measures with `digits` after the point: shares of one have four, percentages two, small ones too."""
    rows = []
    for name, value in data["measures"].items():
        low, high = (data.get("intervals") or {}).get(name) or (None, None)
        rows.append([name, number(value, digits), "" if low is None else f"{number(low, digits)} – {number(high, digits)}"])
    yield from table(rows, ["measure", "value", "95 % interval"], right=[1])
    yield ""
    asked = "queries" if "queries" in data else "questions"
    yield from facts({key.replace("_", " "): _short(value) for key, value in data["convention"].items() if value is not None}
                     | {asked: f"{data[asked]:,}", "took": duration(data["seconds"])})


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 100 else text[:97] + "..."
