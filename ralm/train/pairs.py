"""Pairs of query and passage to train a retriever with, and hard negatives for them.

    pairs = read_pairs("qa/squad.json.zst")            # SQuAD, DPR's JSON, a BEIR folder, or JSON lines: told apart by content
    hard = mined(pairs, k=8, folder=run)               # int32 [queries, k]: passages BM25 ranks high that hold no answer

Passages are stored once, by title and text; everything else counts them. Forms:

    SQuAD         {"data": [{"title", "paragraphs": [{"context", "qas": [{"question", "answers"}]}]}]}
    DPR           [{"question", "answers", "positive_ctxs": [{"title", "text"}], "hard_negative_ctxs", "negative_ctxs"}], or
                  lines of these; "ctxs" with "isgold" count too
    BEIR          a folder with corpus.jsonl, queries.jsonl and qrels/train.tsv; FOLDER#test takes qrels/test.tsv
    JSON lines    {"query", "positive": text or {"title", "text"} or a list, "negative": the same (optional), "answers": [...]}"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ralm import progress
from ralm.errors import ReadError
from ralm.eval.answers import dpr_tokens
from ralm.eval.files import opened
from ralm.eval.trec import read_qrels, read_queries

BATCH = 256  # queries of one search


class Passage(NamedTuple):
    title: str
    text: str

    @property
    def whole(self) -> str:
        """As index/dense encodes it and BM25 reads it."""
        return f"{self.title}\n{self.text}" if self.title else self.text


@dataclass
class Pairs:
    """Queries, and for each the passages that are right, those known to be wrong, and its answers (where they are known)."""

    passages: list[Passage] = field(default_factory=list)
    queries: list[str] = field(default_factory=list)
    positives: list[tuple[int, ...]] = field(default_factory=list)
    negatives: list[tuple[int, ...]] = field(default_factory=list)
    answers: list[tuple[str, ...]] = field(default_factory=list)
    _number: dict[Passage, int] = field(default_factory=dict, repr=False)

    def passage(self, title: str, text: str) -> int:
        """The number of a passage; a new one where it has not been seen."""
        p = Passage(title.strip(), text.strip())
        if p not in self._number:
            self._number[p] = len(self.passages)
            self.passages.append(p)
        return self._number[p]

    def add(self, query: str, positives: Iterable[int], negatives: Iterable[int] = (), answers: Iterable[str] = ()) -> None:
        positives = tuple(dict.fromkeys(positives))
        self.queries.append(query.strip())
        self.positives.append(positives)
        self.negatives.append(tuple(n for n in dict.fromkeys(negatives) if n not in positives))
        self.answers.append(tuple(answers))

    def take(self, other: Pairs) -> None:
        """Everything another one holds; passages they share are one."""
        number = [self.passage(*p) for p in other.passages]
        for q, good, bad, answers in zip(other.queries, other.positives, other.negatives, other.answers):
            self.add(q, (number[i] for i in good), (number[i] for i in bad), answers)


def read_pairs(path: str | Path) -> Pairs:
    """The pairs of a file or a BEIR folder (.gz and .zst too). Raises ReadError where nothing there is a pair, or one is broken."""
    name, _, part = str(path).partition("#")
    if Path(name).is_dir():
        return _beir(Path(name), part or "train")
    pairs = Pairs()
    rows, data = _rows(Path(name))
    if data is not None:
        _squad(name, data, pairs)
    for place, row in rows:
        if not isinstance(row, dict):
            raise ReadError(f"{name}, {place}, is a {type(row).__name__}, expected an object with question or query")
        try:
            (_dpr if "question" in row and "query" not in row else _plain)(row, pairs)
        except (KeyError, TypeError, AttributeError) as e:
            raise ReadError(f"{name}, {place}, is no pair: {e!r}; expected query and positive, or DPR's question and "
                            "positive_ctxs") from e
    return _filled(name, pairs)


def _filled(name: str, pairs: Pairs) -> Pairs:
    if not pairs.queries:
        raise ReadError(f"{name} holds no pair of a query and a passage that answers it")
    return pairs


def _rows(path: Path) -> tuple[Iterable[tuple[str, Any]], dict | None]:
    """(rows with their places, None), or (nothing, SQuAD's object)."""
    with opened(path) as file:
        text = file.read()
    try:
        data = json.loads(text)
    except ValueError:
        return _lines(path, text), None
    if isinstance(data, dict) and isinstance(data.get("data"), list):
        return (), data
    return ((f"entry {n}", row) for n, row in enumerate(data if isinstance(data, list) else [data], 1)), None


def _lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    for n, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"line {n}", json.loads(line)
            except ValueError as e:
                raise ReadError(f"{path}, line {n}, is not JSON ({e})") from e


def _squad(name: str, data: dict, pairs: Pairs) -> None:
    try:
        for article in data["data"]:
            title = article.get("title", "").replace("_", " ")
            for paragraph in article["paragraphs"]:
                number = pairs.passage(title, paragraph["context"])
                for qa in paragraph["qas"]:
                    answers = [a if isinstance(a, str) else a["text"] for a in qa.get("answers", [])]
                    if answers:  # 2.0: without an answer the paragraph is no answer
                        pairs.add(qa["question"], [number], answers=dict.fromkeys(answers))
    except (KeyError, TypeError, AttributeError) as e:
        raise ReadError(f"{name} is not in SQuAD's structure data/paragraphs/qas: {e!r} where a field was expected") from e


def _dpr(row: dict, pairs: Pairs) -> None:
    def all_of(key: str, keep: str | None = None) -> list[int]:
        return [pairs.passage(c.get("title") or "", c["text"]) for c in row.get(key) or () if keep is None or c.get(keep)]

    positives = all_of("positive_ctxs") or all_of("ctxs", "isgold")
    negatives = all_of("hard_negative_ctxs") or all_of("negative_ctxs")
    if positives:  # DPR leaves out questions for which none was found
        pairs.add(row["question"], positives, negatives, row.get("answers") or row.get("answer") or ())


def _plain(row: dict, pairs: Pairs) -> None:
    def all_of(value: Any) -> list[int]:
        given = value if isinstance(value, list) else [] if value is None else [value]
        return [pairs.passage("", p) if isinstance(p, str) else pairs.passage(p.get("title") or "", p["text"]) for p in given]

    positives = all_of(row["positive"])
    if not positives or not isinstance(row["query"], str):
        raise KeyError("positive")
    pairs.add(row["query"], positives, all_of(row.get("negative")), row.get("answers") or ())


def _beir(folder: Path, part: str) -> Pairs:
    def named(name: str) -> Path:
        return next((p for pack in ("", ".gz", ".zst") if (p := folder / f"{name}{pack}").is_file()), folder / name)

    qrels, corpus = named(f"qrels/{part}.tsv"), named("corpus.jsonl")
    if not qrels.is_file():
        there = sorted(p.name.partition(".")[0] for p in (folder / "qrels").glob("*.tsv*"))
        raise ReadError(f"{folder} has no qrels/{part}.tsv; write {folder.name}#PART with one of: {', '.join(there) or 'none'}")
    pairs, number = Pairs(), {}
    with opened(corpus) as file:
        for place, row in _lines(corpus, file.read()):
            try:
                number[str(row["_id"])] = pairs.passage(row.get("title") or "", row["text"])
            except (KeyError, TypeError) as e:
                raise ReadError(f"{corpus}, {place}, is no document: {e!r}") from e
    queries = read_queries(named("queries.jsonl"))
    for query, judged in read_qrels(qrels).items():
        good = [number[d] for d, grade in judged.items() if grade > 0 and d in number]
        bad = [number[d] for d, grade in judged.items() if grade <= 0 and d in number]
        if good and query in queries:
            pairs.add(queries[query], good, bad)
    return _filled(f"{folder}#{part}", pairs)


# ---- who holds an answer, who looks like it ----------------------------------------------------------------------------


class Holds:
    """Whether a passage's text holds one of the answers, as DPR asks it (`has_answer`), remembered per passage."""

    def __init__(self, passages: Sequence[Passage]):
        self.passages, self.known = passages, {}

    def __call__(self, passage: int, answers: Sequence[str]) -> bool:
        if passage not in self.known:
            self.known[passage] = _row_of_tokens(self.passages[passage].text)
        return any(_row_of_tokens(a) in self.known[passage] for a in answers if a.strip())


def _row_of_tokens(text: str) -> str:
    """Tokens hold no white space, so that tokens follow each other where their rows are one within the other."""
    return f" {' '.join(dpr_tokens(text))} "


def bm25_top(passages: Sequence[Passage], queries: Sequence[str], k: int) -> np.ndarray:
    """Numbers of the k best passages of each query by our own BM25, int32 [queries, k], -1 where there are fewer."""
    from ralm.index.sparse import BM25
    from ralm.types import Document
    from ralm.what.datastore import Datastore

    out = np.full((len(queries), k), -1, np.int32)
    with tempfile.TemporaryDirectory() as folder:
        documents = (Document(str(i), p.text, title=p.title) for i, p in enumerate(passages))
        store = Datastore.build(Path(folder) / "kb", documents, split="none")
        index = BM25(store)
        with progress.task("search", total=len(queries), unit="queries") as advance:
            for at in range(0, len(queries), BATCH):
                ids = index.search(list(queries[at:at + BATCH]), k=k).ids
                there = ids >= 0
                out[at:at + BATCH, :ids.shape[1]][there] = [int(d) for d in store.document_ids(ids[there].tolist())]
                advance(len(ids))
    return out


def mined(pairs: Pairs, k: int, folder: Path, depth: int = 50) -> np.ndarray:
    """Hard negatives: of the `depth` passages BM25 ranks first, those that are no positive of the query and hold none of its
    answers; int32 [queries, k], best first, -1 where there are fewer. Kept in `folder` under a hash of all that decides them."""
    decides = json.dumps([pairs.passages, pairs.queries, pairs.positives, pairs.answers, k, depth])
    kept = folder / f"negatives-{hashlib.sha256(decides.encode()).hexdigest()[:16]}.npy"
    if kept.is_file():
        return np.load(kept, allow_pickle=False)
    progress.note(f"hard negatives: BM25 over {len(pairs.passages):,} passages for {len(pairs.queries):,} queries")
    top, holds = bm25_top(pairs.passages, pairs.queries, depth), Holds(pairs.passages)
    out = np.full((len(pairs.queries), k), -1, np.int32)
    for n, (row, good, answers) in enumerate(zip(top.tolist(), pairs.positives, pairs.answers)):
        hard = [i for i in row if i >= 0 and i not in good and not holds(i, answers)][:k]
        out[n, :len(hard)] = hard
    part = kept.with_name(kept.name + ".part")
    with part.open("wb") as f:
        np.save(f, out)
    part.replace(kept)
    return out
