"""Figures of a span reader: F1 and EM on SQuAD paragraphs, its abstention threshold, the weight of the retriever.

    python -m ralm.train.reader_eval checkpoints/reader      (SQuAD dev articles under $RALM_DATA; JSON on stdout)"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ralm.errors import UsageError
from ralm.eval.answers import em_squad, f1_squad
from ralm.lm.reader import Reader, Reading
from ralm.lm.spans import log_softmax
from ralm.train.reader_data import Paragraphs, Question, bm25_top, read_squad


def pick(questions: Sequence[Question], sample: int | None) -> list[Question]:
    """At most `sample` questions, evenly spread, always the same ones."""
    if sample is None or sample >= len(questions):
        return list(questions)
    return [questions[int(n)] for n in np.linspace(0, len(questions) - 1, sample)]


def best_text(reading: Reading) -> str:
    return reading.spans[0].text if reading.spans else ""


def evaluate(reader: Reader, data: Paragraphs, sample: int | None = None) -> dict[str, float]:
    """F1, EM (percent) of always answering, and of abstaining where the reader does, each given its own paragraph."""
    asked = pick(data.questions, sample)
    readings = reader.read_many([(q.text, [data.texts[q.paragraph]]) for q in asked])
    always = [(best_text(r), q.answers) for r, q in zip(readings, asked)]
    free = [("" if r.abstain else best_text(r), q.answers) for r, q in zip(readings, asked)]
    return {"questions": len(asked)} | {
        name: 100 * float(np.mean([metric(text, golds) for text, golds in rows]))
        for name, metric, rows in (("f1", f1_squad, always), ("em", em_squad, always),
                                   ("f1_abstaining", f1_squad, free), ("em_abstaining", em_squad, free))}


def fit_threshold(reader: Reader, data: Paragraphs, sample: int | None = None) -> float:
    """The margin ln p_null - ln p_best above which abstaining gives the best F1 on `data` (SQuAD 2.0), each paragraph given."""
    asked = pick(data.questions, sample)
    readings = reader.read_many([(q.text, [data.texts[q.paragraph]]) for q in asked])
    return best_threshold(np.array([r.margin for r in readings]),
                          np.array([f1_squad(best_text(r), q.answers) for r, q in zip(readings, asked)]),
                          np.array([f1_squad("", q.answers) for q in asked]))


def fit_retrieved_threshold(reader: Reader, held: Paragraphs, every: Paragraphs, search: Callable, sample: int = 260,
                            k: int = 10) -> float:
    """The same for passages that were retrieved: each held-out question once among all paragraphs of `every`, where it has an
    answer, and once among those of other articles, where it has none. F1 over both halves."""
    asked = pick(held.questions, sample)
    margins, answer, silent = [], [], []
    for there in (True, False):
        rows = [n for n, title in enumerate(every.titles) if there or title not in set(held.titles)]
        texts, titles = [every.texts[n] for n in rows], [every.titles[n] for n in rows]
        ids, scores = search(texts, [q.text for q in asked], k)
        _, readings = open_domain(reader, asked, texts, ids, log_softmax(scores), titles)
        margins += [r.margin for r in readings]
        answer += [f1_squad(best_text(r), q.answers) * there for r, q in zip(readings, asked)]
        silent += [float(not there)] * len(asked)
    return best_threshold(np.array(margins), np.array(answer), np.array(silent))


def best_threshold(margins: np.ndarray, answer: np.ndarray, silent: np.ndarray) -> float:
    """The threshold t with the best mean of (answer where margin <= t, silent elsewhere): a middle between two margins."""
    order = np.argsort(margins)
    # after sorting: answer the first n, abstain on the rest
    scores = np.concatenate([[0], answer[order].cumsum()]) + np.concatenate([silent[order][::-1].cumsum()[::-1], [0]])
    n = int(scores.argmax())
    edges = np.concatenate([[margins[order[0]] - 1], margins[order], [margins[order[-1]] + 1]])
    return float(np.clip((edges[n] + edges[n + 1]) / 2, -20, 20))


def open_domain(reader: Reader, asked: Sequence[Question], texts: Sequence[str], ids: np.ndarray,
                logps: np.ndarray | None,
                titles: Sequence[str] | None = None) -> tuple[dict[str, float], list[Reading]]:
    """F1 and EM of reading the retrieved texts[ids[q]]; ids [Q, K], logps [Q, K] the retriever's log-prior."""
    rows = [[int(n) for n in row] for row in ids]
    readings = reader.read_many([(q.text, [texts[n] for n in row]) for q, row in zip(asked, rows)],
                                None if logps is None else list(logps), 3,
                                None if titles is None else [[titles[n] for n in row] for row in rows])
    return {"questions": len(asked), "found": 100 * float(np.mean([q.paragraph in row for q, row in zip(asked, rows)])),
            "f1": 100 * float(np.mean([f1_squad(best_text(r), q.answers) for r, q in zip(readings, asked)])),
            "em": 100 * float(np.mean([em_squad(best_text(r), q.answers) for r, q in zip(readings, asked)]))}, readings


def fit_retriever_weight(reader: Reader, held: Paragraphs, every: Paragraphs, search: Callable, sample: int = 100,
                         k: int = 5, weights: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)) -> float:
    """The weight of log-softmax(BM25 scores) with the best F1 of held-out questions in the paragraphs `every`."""
    asked = pick(held.questions, sample)
    ids, scores = search(every.texts, [q.text for q in asked], k)
    logps, texts = log_softmax(scores), [[every.texts[int(n)] for n in row] for row in ids]
    reads, cuts = reader.score_passages([(q.text, text, "") for q, row in zip(asked, texts) for text in row], k, 32)
    best = (-1.0, 0.0)
    for weight in weights:
        readings = [reader.marginalise(texts[n], cuts[n * k : n * k + k], reads[n * k : n * k + k], logps[n], k, weight)
                    for n in range(len(asked))]
        best = max(best, (float(np.mean([f1_squad(best_text(r), q.answers) for r, q in zip(readings, asked)])), weight))
    return best[1]


def figures(reader: Reader, root: Path, ks: Sequence[int] = (1, 3, 5)) -> dict:
    """What the model card reports: given the paragraph, with abstention, and end to end among all dev paragraphs."""
    one, two = (read_squad(root / "qa" / f"squad-v{v}.dev.json.zst") for v in ("1.1", "2.0"))
    out = {"given the paragraph, SQuAD 1.1": evaluate(reader, one), "SQuAD 2.0": evaluate(reader, two)}
    ids, scores = bm25_top(one.texts, [q.text for q in one.questions], max(ks))
    for k in ks:
        figure, _ = open_domain(reader, one.questions, one.texts, ids[:, :k], log_softmax(scores[:, :k]))
        out[f"end to end, BM25 among {len(one.texts)} paragraphs, k={k}"] = figure
    return out


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise UsageError("usage: python -m ralm.train.reader_eval checkpoints/reader")
    shown = figures(Reader.load(sys.argv[1]), Path(os.environ.get("RALM_DATA", "../shared/data")))
    sys.stdout.write(json.dumps(shown, indent=1) + "\n")
