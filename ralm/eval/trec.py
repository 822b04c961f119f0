"""Queries, relevance judgements and runs in the forms that TREC, BEIR and MS MARCO left behind; .gz and .zst as well.

    queries   TSV `id<TAB>text`, JSON lines (`_id`, `text` of BEIR), or plain lines (the id is the line number)
    qrels     `query-id<TAB>corpus-id<TAB>score` of BEIR, or TREC's four columns `query 0 document grade`
    run       TREC's six columns `query Q0 document rank score tag`

All three are told apart by what is in them, never by their names. A bad line is an error that names it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ralm.errors import ReadError, UsageError
from ralm.eval.files import lines, whole

Qrels = dict[str, dict[str, int]]  # {query id: {document id: grade}}
Run = dict[str, list[tuple[str, float]]]  # {query id: [(document id, score), ...] best first}

_ID, _TEXT = ("_id", "id", "qid", "query_id", "query-id"), ("text", "query", "question")


def read_queries(path: str | Path) -> dict[str, str]:
    """{id: text} in file order. Raises ReadError for a missing or empty file, a line that is no query, an id given twice."""
    rows = list(lines(path))
    kind = "plain" if not rows else "jsonl" if rows[0][1].lstrip().startswith("{") else "tsv" if "\t" in rows[0][1] else "plain"
    if kind == "tsv" and rows[0][1].split("\t")[0].strip().lower() in _ID:
        rows = rows[1:]
    queries: dict[str, str] = {}
    for number, line in rows:
        name, text = _json_query(path, number, line) if kind == "jsonl" else (
            line.partition("\t")[::2] if kind == "tsv" else (str(number), line))
        name, text = name.strip(), text.strip()
        if not name or not text:
            raise _bad(path, number, f"needs an id and a text, has '{_short(line)}'")
        if name in queries:
            raise _bad(path, number, f"gives the id '{name}' a second time; ids must be unique")
        queries[name] = text
    if not queries:
        raise ReadError(f"{path} holds no query; write one a line, 'id<TAB>text' or the text alone")
    return queries


def _json_query(path: str | Path, number: int, line: str) -> tuple[str, str]:
    try:
        row = json.loads(line)
    except ValueError as e:
        raise _bad(path, number, f"is not JSON ({e})") from e
    name, text = (next((row[key] for key in keys if key in row), None) if isinstance(row, dict) else None for keys in (_ID, _TEXT))
    if not isinstance(name, (str, int)) or not isinstance(text, str):
        raise _bad(path, number, f"needs an id ({', '.join(_ID)}) and a text ({', '.join(_TEXT)}), has '{_short(line)}'")
    return str(name), text


def read_qrels(path: str | Path) -> Qrels:
    """{query: {document: grade}}. Raises ReadError for a bad line, and where two lines grade the same pair differently."""
    rows = list(lines(path))
    if rows and rows[0][1].split("\t")[0].strip().lower() in _ID:
        rows, first = rows[1:], rows[0][1].split("\t")
    else:
        first = rows[0][1].split("\t") if rows else []
    beir = len(first) == 3  # by tab: ids in BEIR files may hold spaces
    qrels: Qrels = {}
    for number, line in rows:
        cells = [c.strip() for c in line.split("\t")] if beir else line.split()
        if len(cells) != (3 if beir else 4):
            wanted = "query-id<TAB>corpus-id<TAB>score" if beir else "'query 0 document grade' (or three columns separated by tabs)"
            raise _bad(path, number, f"has {len(cells)} columns, expected {wanted}")
        query, document, grade = cells[0], cells[-2], cells[-1]
        try:
            value = int(grade)
        except ValueError:
            raise _bad(path, number, f"grades with '{grade}', expected a whole number") from None
        if qrels.setdefault(query, {}).setdefault(document, value) != value:
            raise _bad(path, number, f"grades '{document}' for '{query}' {value}, an earlier line {qrels[query][document]}")
    if not qrels:
        raise ReadError(f"{path} holds no relevance judgement; expected lines 'query 0 document grade'")
    return qrels


def write_run(path: str | Path, run: Mapping[str, Sequence[tuple[str, float]]], tag: str = "ralm") -> int:
    """Write a run in one step; the number of lines. Ranks count from 1, scores fall strictly (`falling`).

    Raises UsageError where an id or the tag holds white space, which the format cannot carry, before anything is written."""
    for name in [tag, *run, *(document for row in run.values() for document, _ in row)]:
        if not name or name.split() != [name]:
            raise UsageError(f"'{name}' is empty or holds white space, which separates the columns of a TREC run; use other ids")
    count = 0
    with whole(path) as file:
        for query, row in run.items():
            for rank, (document, score) in enumerate(falling(row), 1):
                file.write(f"{query} Q0 {document} {rank} {score:.9g} {tag}\n")
                count += 1
    return count


def read_run(path: str | Path) -> Run:
    """{query: [(document, score), ...]} best first, as evaluators see it: by score; equal scores stay in rank order.

    Raises ReadError for a bad line, and for a document that a query lists twice."""
    found: dict[str, list[tuple[float, int, str]]] = {}
    seen = set()
    for number, line in lines(path):
        cells = line.split()
        if len(cells) != 6:
            raise _bad(path, number, f"has {len(cells)} columns, expected the six of a run: query Q0 document rank score tag")
        query, _, document, rank, score, _ = cells
        try:
            row = (-float(score), int(rank), document)
        except ValueError:
            raise _bad(path, number, f"has rank '{rank}' and score '{score}', expected numbers") from None
        if not np.isfinite(row[0]):
            raise _bad(path, number, f"has the score '{score}', expected a finite number")
        if (query, document) in seen:
            raise _bad(path, number, f"lists '{document}' for '{query}' a second time")
        seen.add((query, document))
        found.setdefault(query, []).append(row)
    if not found:
        raise ReadError(f"{path} holds no line of a run; expected 'query Q0 document rank score tag'")
    return {query: [(document, -score) for score, _, document in sorted(rows)] for query, rows in found.items()}


def falling(row: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """The same documents in the same order with float32 scores that fall strictly.

    Evaluators sort by score and break ties by document id; a score that ties with the one before is lowered by one float32 step,
    so that they see our order and not theirs. Raises UsageError where the scores do not come best first."""
    scores = np.array([score for _, score in row], np.float32)
    if (np.diff(scores) < 0).all():  # the usual case
        return [(document, score) for (document, _), score in zip(row, scores.tolist())]
    out, last = [], np.float32(np.inf)
    for (document, _), value in zip(row, scores):
        if value > last and not np.isclose(value, last, rtol=1e-5, atol=1e-30):
            raise UsageError(f"scores must come best first, '{document}' has {value:g} after {last:g}")
        if value >= last:
            value = min(np.nextafter(last, np.float32(-np.inf)), np.float32(last - np.finfo(np.float32).tiny))
        out.append((document, float(value)))
        last = value
    return out


def _bad(path: str | Path, number: int, what: str) -> ReadError:
    return ReadError(f"{path}, line {number}, {what}")


def _short(line: str) -> str:
    return line if len(line) <= 60 else line[:57] + "..."
