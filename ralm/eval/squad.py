"""SQuAD's own scores for predictions that exist already: {question id: answer}, as the official scripts take them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ralm.errors import ReadError, UsageError
from ralm.eval.answers import em_squad, f1_squad
from ralm.eval.files import opened
from ralm.eval.interval import interval
from ralm.eval.questions import squad_rows
from ralm.lm.spans import normalised


def score_predictions(predictions: Mapping[str, str], data: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """EM and F1 in percent over every question of a SQuAD file (1.1 or 2.0, .gz and .zst too), or of one parsed already.

    A question without prediction counts as wrong and is reported in "missing" (the 1.1 script does so; the 2.0 script leaves
    it out of the mean, which rewards silence). In 2.0 files the empty answer says "not answerable", references that normalise
    to nothing are dropped, and HasAns_exact, HasAns_f1, NoAns_exact, NoAns_f1 and their totals are given. Predictions for
    other questions are counted in "unknown". Raises UsageError where none belongs to the file, ReadError where it is not SQuAD."""
    where = "the data" if isinstance(data, Mapping) else data
    parsed = data if isinstance(data, Mapping) else _load(data)
    rows = list(squad_rows(where, parsed))
    if not rows:
        raise ReadError(f"{where} holds no question")
    wanted = {row["id"] for row in rows}
    if not wanted & predictions.keys():
        raise UsageError(f"none of the {len(predictions)} predictions belongs to a question of {where} (for example "
                         f"'{next(iter(predictions), '')}' and '{rows[0]['id']}'): the two files do not belong together")
    two = str(parsed.get("version", "")).lstrip("v").startswith("2") or any(not row["answers"] for row in rows)
    exact, f1 = (np.array([_one(measure, predictions.get(row["id"]), row["answers"], two) for row in rows])
                 for measure in (em_squad, f1_squad))
    measures = {"EM": float(exact.mean()), "F1": float(f1.mean())}
    result: dict[str, Any] = {"measures": measures, "intervals": {"EM": interval(exact), "F1": interval(f1)}, "total": len(rows)}
    if two:
        known = np.array([bool(references(row["answers"], two)) for row in rows])
        for part, mask in (("HasAns", known), ("NoAns", ~known)):
            if mask.any():
                measures |= {f"{part}_exact": float(exact[mask].mean()), f"{part}_f1": float(f1[mask].mean())}
            result[f"{part}_total"] = int(mask.sum())
    return result | {"missing": [row["id"] for row in rows if row["id"] not in predictions],
                     "unknown": len(predictions.keys() - wanted),
                     "convention": {"rules": "SQuAD 2.0" if two else "SQuAD 1.1", "missing": "counts as wrong", "unit": "percent"}}


def _one(measure, answer: str | None, answers: list[str], two: bool) -> float:
    return 0.0 if answer is None else 100 * measure(answer, references(answers, two))


def references(answers: list[str], two: bool) -> list[str]:
    """The references that count: in 2.0 those with something left after normalisation; none means not answerable."""
    return [a for a in answers if normalised(a)] if two else answers


def read_predictions(path: str | Path) -> dict[str, str]:
    """{id: answer} of a JSON object as the official scripts take it, or of the JSON lines that `evaluate_qa` writes.

    Raises ReadError for anything else."""
    with opened(path) as file:
        text = file.read()
    try:
        raw = json.loads(text)
    except ValueError:
        raw = None
    if raw is None or (isinstance(raw, dict) and ("rows_of" in raw or {"id", "answer"} <= raw.keys())):
        try:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
            raw = {str(row["id"]): row["answer"] for row in rows if "rows_of" not in row}
        except (ValueError, KeyError, TypeError) as e:
            raise ReadError(f"{path} is neither a JSON object {{id: answer}} nor lines with id and answer ({e!r})") from e
    if not isinstance(raw, dict) or not all(isinstance(v, str) for v in raw.values()):
        raise ReadError(f"{path} is not a JSON object {{id: answer}} with texts as answers")
    return raw


def _load(path: str | Path) -> dict[str, Any]:
    with opened(path) as file:
        try:
            data = json.load(file)
        except ValueError as e:
            raise ReadError(f"{path} is not JSON ({e})") from e
    if not isinstance(data, dict) or "data" not in data:
        raise ReadError(f"{path} is not in SQuAD's structure: no key 'data'")
    return data
