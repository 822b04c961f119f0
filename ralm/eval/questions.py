"""Question files of every common shape as rows {"id": str, "question": str, "answers": [str, ...]}; no answers: not answerable.

JSON lines or one JSON list with `question` and `answers` (also `answer`, `golden_answers`, `possible_answers`: NQ-open,
EntityQuestions, FlashRAG, PopQA, DPR), SQuAD 1.1 and 2.0, DPR's two columns `question<TAB>['answer', ...]`, plain lines."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ralm.errors import ReadError
from ralm.eval.files import opened

Row = dict[str, Any]  # {"id": str, "question": str, "answers": list[str]}

_IDS = ("id", "qid", "question_id", "_id", "query_id")
_QUESTIONS = ("question", "query", "question_text", "input")
_ANSWERS = ("answers", "answer", "golden_answers", "possible_answers")


def read_questions(path: str | Path) -> list[Row]:
    """The questions of a file (.gz and .zst too), in order. Ids that a file does not give are line or list positions from 1.

    Raises ReadError for a missing or empty file, a row without a question, answers that are no texts, an id given twice."""
    with opened(path) as file:
        text = file.read()
    rows: list[Row] = []
    seen: set[str] = set()
    for place, row in _rows(path, text):
        if not row["question"].strip():
            raise ReadError(f"{path}, {place}, has an empty question")
        if row["id"] in seen:
            raise ReadError(f"{path}, {place}, gives the id '{row['id']}' a second time; ids must be unique")
        seen.add(row["id"])
        rows.append(row)
    if not rows:
        raise ReadError(f"{path} holds no question")
    return rows


def _rows(path: str | Path, text: str) -> Iterator[tuple[str, Row]]:
    head = text.lstrip()[:1]
    if head not in ("{", "["):
        yield from _plain(path, text)
        return
    numbered = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    try:
        first = json.loads(numbered[0][1])
        by_line = isinstance(first, dict) and "data" not in first
    except ValueError:
        by_line = head == "{" and len(numbered) > 1 and numbered[0][1].rstrip().endswith("}")
    if by_line:
        for n, line in numbered:
            yield f"line {n}", _row(path, f"line {n}", str(n), _json(path, f"line {n}", line))
        return
    whole = _json(path, "read as one JSON value", text)
    if isinstance(whole, dict) and isinstance(whole.get("data"), list):
        for row in squad_rows(path, whole):
            yield f"question {row['id']}", row
        return
    for n, raw in enumerate(whole if isinstance(whole, list) else [whole], 1):
        yield f"entry {n}", _row(path, f"entry {n}", str(n), raw)


def _plain(path: str | Path, text: str) -> Iterator[tuple[str, Row]]:
    """Lines `question`, or `question<TAB>list of answers` as a Python or JSON literal."""
    for n, line in enumerate(text.split("\n"), 1):
        question, tab, answers = line.strip().partition("\t")
        if not question:
            continue
        found: Any = []
        if tab:
            try:
                found = ast.literal_eval(answers.strip())
            except (ValueError, SyntaxError) as e:
                raise ReadError(f"{path}, line {n}, has '{answers[:40]}' behind the tab, expected a list of answers "
                                "like ['a', 'b']") from e
        yield f"line {n}", {"id": str(n), "question": question, "answers": _texts(path, f"line {n}", found)}


def _json(path: str | Path, place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as e:
        raise ReadError(f"{path}, {place}, is not JSON ({e})") from e


def _row(path: str | Path, place: str, number: str, raw: Any) -> Row:
    question = next((raw[key] for key in _QUESTIONS if key in raw), None) if isinstance(raw, dict) else None
    if not isinstance(question, str):
        keys = f"the keys {', '.join(raw)}" if isinstance(raw, dict) else f"a {type(raw).__name__}"
        raise ReadError(f"{path}, {place}, has no question: expected a key '{_QUESTIONS[0]}', found {keys}")
    answers = next((raw[key] for key in _ANSWERS if key in raw), [])
    name = next((raw[key] for key in _IDS if raw.get(key) is not None), number)
    return {"id": str(name), "question": question, "answers": _texts(path, place, answers)}


def _texts(path: str | Path, place: str, answers: Any) -> list[str]:
    """Answers in any of their shapes: texts, {"text": ...} of SQuAD, a JSON list inside a text (PopQA), yes or no, nothing."""
    if isinstance(answers, str) and answers.lstrip().startswith("["):
        try:
            answers = json.loads(answers)
        except ValueError:
            answers = [answers]  # an answer that happens to begin with a bracket
    if isinstance(answers, dict):
        answers = answers.get("text", [])
    if answers is None or isinstance(answers, (str, bool, int, float)):
        answers = [] if answers is None else [answers]
    out = []
    for answer in answers:
        answer = answer.get("text") if isinstance(answer, dict) else answer
        if isinstance(answer, bool):
            answer = "yes" if answer else "no"
        if not isinstance(answer, (str, int, float)):
            raise ReadError(f"{path}, {place}, has an answer that is a {type(answer).__name__}, expected texts")
        out.append(str(answer))
    return out


def squad_rows(path: str | Path, data: dict) -> Iterator[Row]:
    """The questions of a parsed SQuAD file, version 1.1 or 2.0. Raises ReadError where it has another structure."""
    try:
        for article in data["data"]:
            for paragraph in article["paragraphs"]:
                for qa in paragraph["qas"]:
                    yield {"id": str(qa["id"]), "question": qa["question"],
                           "answers": _texts(path, f"question {qa['id']}", qa.get("answers", []))}
    except (KeyError, TypeError) as e:
        raise ReadError(f"{path} is not in SQuAD's structure data/paragraphs/qas: {e!r} where a field was expected") from e
