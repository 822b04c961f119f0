"""Training examples for the span reader: SQuAD questions, BM25 hard negatives, and clozes made from plain articles.

An example is (question, title, passage, correct spans); no correct span means that the null span is the right one."""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ralm.errors import ReadError
from ralm.lm.spans import occurrences


@dataclass(frozen=True, slots=True)
class Question:
    """A question on a paragraph; `answers` empty: the paragraph does not answer it."""

    id: str
    text: str
    paragraph: int
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Paragraphs:
    """The paragraphs of some articles and the questions asked on them."""

    titles: list[str]
    texts: list[str]
    questions: list[Question]


@dataclass(frozen=True, slots=True)
class Example:
    """Word-piece ids, correct spans (first, last piece) in the passage, and whether the passage is about the question:
    1 yes, 0 no, -1 not said (an unanswerable question on its own paragraph)."""

    question: list[int]
    title: list[int]
    passage: list[int]
    spans: list[tuple[int, int]]
    relevant: int


def read_lines(path: Path) -> Iterator[str]:
    """Lines of a text file, zstd-compressed where its name ends so. Raises ReadError where it is absent."""
    import zstandard

    if not path.is_file():
        raise ReadError(f"{path} is missing: set RALM_DATA to the folder of the training data")
    with zstandard.open(path, "rt", encoding="utf-8") if path.suffix == ".zst" else path.open(encoding="utf-8") as file:
        yield from file


def read_squad(path: Path, keep: Iterable[str] | None = None, drop: Iterable[str] = ()) -> Paragraphs:
    """A SQuAD file (1.1 or 2.0) restricted to the articles `keep`, without the articles `drop`."""
    out = Paragraphs([], [], [])
    for article in json.loads("".join(read_lines(path)))["data"]:
        if article["title"] in set(drop) or (keep is not None and article["title"] not in set(keep)):
            continue
        for paragraph in article["paragraphs"]:
            out.titles.append(article["title"].replace("_", " "))
            out.texts.append(paragraph["context"])
            for qa in paragraph["qas"]:
                answers = [a if isinstance(a, str) else a["text"] for a in qa["answers"]]
                answers = tuple(dict.fromkeys(answers))
                out.questions.append(Question(qa["id"], qa["question"], len(out.texts) - 1, answers))
    return out


def bm25_top(texts: Sequence[str], queries: Sequence[str], k: int, k1: float = 0.9,
             b: float = 0.4) -> tuple[np.ndarray, np.ndarray]:
    """The k best texts of each query and their BM25 scores (Lucene's idf, lower-cased words, no stemming), both [Q, k].

    For mining negatives among some thousand paragraphs in memory; the datastore's index is ralm.index.sparse."""
    words = [re.findall(r"\w+", text.lower()) for text in texts]
    lengths = np.array([len(w) for w in words], np.float64)
    postings: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for n, row in enumerate(words):
        for word, count in Counter(row).items():
            postings[word].append((n, count))
    norm = k1 * (1 - b + b * lengths / lengths.mean())
    ids, scores = np.zeros((len(queries), k), np.int64), np.zeros((len(queries), k))
    for q, query in enumerate(queries):
        total = np.zeros(len(texts))
        for word in re.findall(r"\w+", query.lower()):
            if rows := postings.get(word):
                at, count = np.array(rows).T
                idf = math.log(1 + (len(texts) - len(rows) + 0.5) / (len(rows) + 0.5))
                total[at] += idf * count / (count + norm[at])
        ids[q] = np.argsort(-total, kind="stable")[:k]
        scores[q] = total[ids[q]]
    return ids, scores


class Squad:
    """Examples of SQuAD epochs: every answerable question, every unanswerable one, and for a share of the answerable
    ones a paragraph that BM25 finds for it and that does not hold the answer."""

    def __init__(self, answerable: Paragraphs, unanswerable: Paragraphs, cutter: Any, negatives: float, titles: float,
                 crop: int):
        self.config, self.share, self.titles, self.crop = cutter.config, negatives, titles, crop
        self.data, self.cuts = answerable, cutter.cut(answerable.texts)
        self.names, self.asked = cutter.cut(answerable.titles), cutter.cut([q.text for q in answerable.questions])
        self.spans = [occurrences(answerable.texts[q.paragraph], q.answers, self.cuts[q.paragraph].offsets,
                                  self.config.max_span) for q in answerable.questions]
        self.no, self.no_cuts = [q for q in unanswerable.questions if not q.answers], cutter.cut(unanswerable.texts)
        self.no_names, self.no_asked = cutter.cut(unanswerable.titles), cutter.cut([q.text for q in self.no])
        top, _ = bm25_top(answerable.texts, [q.text for q in answerable.questions], min(20, len(answerable.texts)))
        low = [text.lower() for text in answerable.texts]
        self.hard = [[int(n) for n in row if n != q.paragraph and not any(a.lower() in low[n] for a in q.answers)][:8]
                     for q, row in zip(answerable.questions, top)]

    def epoch(self, rng: random.Random) -> list[Example]:
        out = []

        def title(piece) -> list[int]:
            return piece.ids if rng.random() < self.titles else []

        for q, asked, spans, hard in zip(self.data.questions, self.asked, self.spans, self.hard):
            if spans:
                out.append(_crop(asked.ids, title(self.names[q.paragraph]), self.cuts[q.paragraph].ids, spans, 1,
                                 self.crop, rng))
            if hard and rng.random() < self.share:
                n = rng.choice(hard)
                out.append(_crop(asked.ids, title(self.names[n]), self.cuts[n].ids, [], 0, self.crop, rng))
        for q, asked in zip(self.no, self.no_asked):
            out.append(_crop(asked.ids, title(self.no_names[q.paragraph]), self.no_cuts[q.paragraph].ids, [], -1,
                             self.crop, rng))
        return out


def _crop(question, title, passage, spans, relevant, size, rng) -> Example:
    """A window of `size` pieces around a random correct span; a passage that fits stays whole."""
    if len(passage) > size:
        i, j = rng.choice(spans) if spans else (rng.randrange(len(passage)),) * 2
        start = max(0, min((i + j - size) // 2 + rng.randint(-size // 4, size // 4), len(passage) - size))
        passage = passage[start : start + size]
        spans = [(i - start, j - start) for i, j in spans if start <= i and j < start + size]
    return Example(question, title, passage, spans, relevant)


# ---- clozes: questions for free --------------------------------------------------------------------------------------

_SMALL = (
    "a an the of in on at to for from by with and or but as is are was were be been has have had that which who "
    "it its this these those he she they his her their not also such than then into over after before "
    "between during when where while can may would could will more most other some many one"
)
_STOP = frozenset(_SMALL.split())
_NAME = re.compile(r"(?<![.\w] )(?<!^)\b[A-Z][\w'’-]+(?: (?:of |the |de |von )?[A-Z][\w'’-]+){0,4}")
_NUMBER = re.compile(r"(?<![\w.,])[$€£]?\d[\d,.]*(?:%| percent| million| billion| years| km| miles)?(?![\w])")
_SENTENCE = re.compile(r"(?<=[.!?]) +(?=[A-Z])")


def _answers(sentence: str) -> list[tuple[str, int, int]]:
    """Phrases of a sentence worth asking for: names, numbers, runs of content words; (kind, start, end)."""
    found = [("name", *m.span()) for m in _NAME.finditer(sentence)]
    for m in _NUMBER.finditer(sentence):
        text = m.group().rstrip(".,")
        kind = "year" if re.fullmatch(r"1[0-9]{3}|20[0-9]{2}", text) else "number"
        found.append((kind, m.start(), m.start() + len(text)))
    run: list[re.Match] = []
    for m in [*re.finditer(r"[\w'’-]+|[^\w\s]", sentence), None]:
        if m and m.group().islower() and m.group() not in _STOP and len(m.group()) > 2:
            run.append(m)
        else:
            if 1 <= len(run) <= 4 and sum(len(w.group()) for w in run) > 4:
                found.append(("phrase", run[0].start(), run[-1].end()))
            run = []
    return found


_ASK = {"name": ("what", "who", "which", "where", "what is the name of"), "year": ("when", "what year", "in what year"),
        "number": ("how many", "how much", "what number of"),
        "phrase": ("what", "what kind of", "how", "why", "what type of")}


def cloze(sentence: str, rng: random.Random) -> tuple[str, str] | None:
    """(question, answer) from a sentence: the answer is cut out, a question word put in front, other words dropped at
    random and sometimes swapped, so that matching needs more than order. None where nothing is worth asking."""
    phrases = _answers(sentence)
    if not phrases:
        return None
    kinds = sorted({kind for kind, *_ in phrases})
    kind = rng.choices(kinds, [1 if kind == "phrase" else 3 for kind in kinds])[0]
    _, start, end = rng.choice([p for p in phrases if p[0] == kind])
    rate = rng.uniform(0.1, 0.6)
    before, after = ([w for w in re.findall(r"[\w'’-]+", part) if rng.random() > rate]
                     for part in (sentence[:start], sentence[end:]))
    near = before[-10:], after[:10]
    words = [*near[1], *near[0]] if rng.random() < 0.3 else [*near[0], *near[1]]
    for n in range(len(words) - 1):
        if rng.random() < 0.1:
            words[n], words[n + 1] = words[n + 1], words[n]
    if len(words) < 3:
        return None
    return f"{rng.choice(_ASK[kind])} {' '.join(words)}?", sentence[start:end]


class Clozes:
    """Examples from plain articles; a share of the questions gets another paragraph of its article and no answer."""

    def __init__(self, path: Path, cutter: Any, drop: Iterable[str], negatives: float, titles: float, crop: int):
        self.cutter, self.config, self.share, self.titles, self.crop = cutter, cutter.config, negatives, titles, crop
        self.articles: list[tuple[str, list[str]]] = []
        for line in read_lines(path):
            text = json.loads(line)["text"]
            title = text.partition("\n")[0].removeprefix("Title:").strip()
            paragraphs = [p for p in text.split("\n") if 200 < len(p) < 1500]
            if title not in set(drop) and len(paragraphs) > 1:
                self.articles.append((title, paragraphs))

    def epoch(self, rng: random.Random) -> list[Example]:
        rows = []
        for title, paragraphs in self.articles:
            for n, paragraph in enumerate(paragraphs):
                sentences = [s for s in _SENTENCE.split(paragraph) if len(s) > 40]
                for sentence in rng.sample(sentences, min(2, len(sentences))):
                    if made := cloze(sentence, rng):
                        question, answer = made
                        if rng.random() < self.share:
                            other = paragraphs[n - 1 if n else 1]
                            if answer.lower() not in other.lower():
                                rows.append((question, title, other, (), 0))
                        else:
                            rows.append((question, title, paragraph, (answer,), 1))
        rng.shuffle(rows)
        return self._cut(rows[:20000], rng)

    def _cut(self, rows: list[tuple], rng: random.Random) -> list[Example]:
        asked, names, cuts = (self.cutter.cut([row[c] for row in rows]) for c in range(3))
        out = []
        for (_, _, text, answers, relevant), q, name, cut in zip(rows, asked, names, cuts):
            spans = occurrences(text, answers, cut.offsets, self.config.max_span)
            if spans or not answers:
                title = name.ids if rng.random() < self.titles else []
                out.append(_crop(q.ids, title, cut.ids, spans, relevant, self.crop, rng))
        return out
