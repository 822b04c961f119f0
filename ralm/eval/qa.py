"""Question answering, end to end: ask a system every question of a set, keep what it said, measure it.

    evaluate_qa(RALM("bundled:reader", BM25(store)), read_questions("nq.jsonl"), k=5, predictions="nq.predictions.jsonl")

Percent everywhere. Questions without answers are there to be declined: the empty answer is right and nothing else is."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from ralm import progress
from ralm.errors import RalmError, UsageError
from ralm.eval.answers import em_squad, f1_squad, has_answer, match_substring
from ralm.eval.files import Ledger
from ralm.eval.interval import interval
from ralm.types import Answer

KS = (1, 3, 5, 10, 20, 50, 100)


def evaluate_qa(answerer: Any, rows: Iterable[Mapping[str, Any]], k: int | None = None, ks: Sequence[int] = KS,
                predictions: str | Path | None = None) -> dict[str, Any]:
    """Ask every question of `rows` ({"id", "question", "answers"}; see `questions.read_questions`) and measure the answers.

    answerer: has `answer(question, k=...) -> Answer` (a RALM), or is such a function. k: passages to read, handed on where given.
    predictions: JSON lines of what was said, in DPR's form with `ctxs`; a file begun earlier is continued, not asked again.

    Returns {"measures": {"EM", "F1", "match_substring", "abstained", "accuracy@k" for the ks that were read, and where some rows
    have no answers "HasAns_EM", "HasAns_F1", "NoAns_EM", "NoAns_F1"}, "intervals", "questions", "convention", "rows", "seconds"}.
    A question that fails stops the evaluation and is named. Raises UsageError for rows without id or question, or ids given twice,
    and where `predictions` was made by another system."""
    began = time.perf_counter()
    rows = _checked(rows)
    convention = {"system": describe(answerer), "k": k} | _datastore(answerer)
    ask: Callable[..., Answer] = getattr(answerer, "answer", answerer)
    with Ledger(predictions, convention) as ledger, progress.task("answer", total=len(rows), unit="questions") as advance:
        for row in rows:
            if (said := ledger.rows.get(row["id"])) is None:
                ledger.add(_ask(ask, row, k))
            elif said["question"] != row["question"]:
                raise UsageError(f"{predictions} holds another question under the id '{row['id']}' ('{said['question'][:60]}', "
                                 f"now '{row['question'][:60]}'); write to another file, or delete it to begin again")
            advance(1)
        said = [ledger.rows[row["id"]] for row in rows]
    return measure(rows, said, ks, k) | {"seconds": time.perf_counter() - began, "convention": convention | CONVENTION}


CONVENTION = {"answers": "EM and F1 of SQuAD: lower case, no ASCII punctuation, no articles; best over references; percent",
              "abstention": "scored as the empty answer; right only for questions without references",
              "accuracy@k": "DPR: a reference's tokens in one of the first k passages that were read; answerable questions only",
              "interval": "95 % percentile bootstrap over questions, 1000 resamples"}


def _checked(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    out, seen = [], set()
    for n, row in enumerate(rows, 1):
        if not isinstance(row.get("question"), str) or not row["question"].strip() or row.get("id") is None:
            raise UsageError(f"row {n} needs an id and a question, has {dict(row)!r:.120}")
        if (name := str(row["id"])) in seen:
            raise UsageError(f"row {n} gives the id '{name}' a second time; ids must be unique")
        seen.add(name)
        out.append({"id": name, "question": row["question"], "answers": list(row.get("answers") or ())})
    if not out:
        raise UsageError("there is no question to ask")
    return out


def describe(answerer: Any) -> str:
    """What a system is, the same in every process (no addresses), so that predictions can be continued."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(answerer))


def _datastore(answerer: Any) -> dict[str, Any]:
    store, where = getattr(answerer, "store", None), getattr(answerer, "where", None)
    return {} if store is None else {"datastore": str(store.id), "version": str(store.version), "where": where}


def _ask(ask: Callable[..., Answer], row: Mapping[str, Any], k: int | None) -> dict[str, Any]:
    """One question, one row of predictions; the error of a question that fails names it."""
    try:
        answer = ask(row["question"]) if k is None else ask(row["question"], k=k)
    except RalmError as e:
        e.args = (f"question '{row['id']}' failed, nothing is scored without it: {e}",)
        raise
    except Exception as e:
        e.add_note(f"while answering the question '{row['id']}': {row['question']}")
        raise
    ctxs = [{"id": f"{p.document}#{p.start}-{p.end}", "title": p.title, "text": p.quote,
             "score": p.score if math.isfinite(p.score) else None, "has_answer": has_answer(p.quote, row["answers"])}
            for p in answer.evidence]
    return {"id": row["id"], "question": row["question"], "answers": row["answers"],
            "answer": "" if answer.abstained else answer.answer, "abstained": answer.abstained,
            "citations": [{key: c[key] for key in ("document", "start", "end", "quote")} for c in map(asdict, answer.citations)],
            "ctxs": ctxs, "seconds": answer.seconds}


def measure(rows: Sequence[Mapping[str, Any]], said: Sequence[Mapping[str, Any]], ks: Sequence[int] = KS,
            k: int | None = None) -> dict[str, Any]:
    """Measures of predictions `said` (rows of a predictions file) for `rows`, in the same order: the dict of `evaluate_qa`.

    k: how many passages were asked for; a retriever may have found fewer."""
    known = np.array([bool(row["answers"]) for row in rows])
    values = {name: np.array([100 * of(one["answer"], row["answers"]) for row, one in zip(rows, said)])
              for name, of in (("EM", em_squad), ("F1", f1_squad), ("match_substring", match_substring))}
    values["abstained"] = np.array([100.0 * bool(one["abstained"]) for one in said])
    measures = {name: float(v.mean()) for name, v in values.items()}
    if not known.all():
        for part, mask in (("HasAns", known), ("NoAns", ~known)):
            if mask.any():
                measures |= {f"{part}_{name}": float(values[name][mask].mean()) for name in ("EM", "F1")}
    ranks = np.array([_rank(row, one) for row, one in zip(rows, said) if row["answers"]])
    deepest = max([k or 0, *(len(one["ctxs"]) for one in said)])
    if len(ranks):
        measures |= {f"accuracy@{n}": 100 * float((ranks < n).mean()) for n in ks if n <= deepest}
    return {"measures": measures, "intervals": {name: interval(values[name]) for name in ("EM", "F1")},
            "questions": len(rows), "answerable": int(known.sum()),
            "median_seconds": median(one["seconds"] for one in said), "rows": list(said)}


def _rank(row: Mapping[str, Any], one: Mapping[str, Any]) -> float:
    """Rank from 0 of the first passage that holds an answer; what was noted then counts only while the references are the same."""
    same = one["answers"] == list(row["answers"])
    flags = (c["has_answer"] if same else has_answer(c["text"], row["answers"]) for c in one["ctxs"])
    return next((float(n) for n, flag in enumerate(flags) if flag), math.inf)
