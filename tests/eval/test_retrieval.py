"""Retrieval measured end to end on a real datastore, against values worked by hand and against brute force."""

import json
import math
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ralm.errors import UsageError
from ralm.eval.retrieval import evaluate, evaluate_run, first_rank, parse, search, topk_accuracy
from ralm.eval.trec import read_qrels, read_queries, read_run, write_run
from ralm.index.sparse import BM25
from ralm.types import Document, Hits
from ralm.what.datastore import Datastore

DATA = Path(os.environ.get("RALM_DATA", "../shared/data"))


class Given:
    """A retriever with scores given per chunk id: search by brute force, so that only what uses it is tested."""

    def __init__(self, store, scores_QN):
        self.store, self.scores, self.asked = store, {str(q): row for q, row in enumerate(scores_QN)}, []

    def search(self, queries, k=10, where=None, exclude=()):
        self.asked.append((len(queries), k))
        hits = Hits.empty(len(queries), k)
        for n, q in enumerate(queries):
            ids = sorted(self.store.chunk_ids().tolist(), key=lambda i: (-self.scores[q][i], i))[:k]
            hits.ids[n, :len(ids)], hits.scores[n, :len(ids)] = ids, [self.scores[q][i] for i in ids]
        return hits


@pytest.fixture(scope="module")
def chunked(tmp_path_factory):
    """Five documents of 12, 1, 2, 5 and 1 chunks."""
    sizes = {"a": 12, "b": 1, "c": 2, "d": 5, "e": 1}
    docs = [Document(name, " ".join(f"{name}{i}" for i in range(2 * n))) for name, n in sizes.items()]
    return Datastore.build(tmp_path_factory.mktemp("s") / "kb", docs, split="words:2")


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(st.sampled_from([0.0, 1.0, 2.0, 2.5, 7.0]), min_size=21, max_size=21), min_size=1, max_size=3),
       st.integers(1, 7), st.sampled_from([None, "a"]))
def test_max_passage_is_brute_force(chunked, scores, k, own):
    """Exactly k documents where there are so many, each at its best chunk, in the order of those chunks."""
    assert chunked.n_chunks == 21
    names = dict(enumerate(chunked.document_ids(list(range(21)))))
    queries = {own or f"q{n}": str(n) for n in range(len(scores))} if own is None else {own: "0"}
    run = search(Given(chunked, scores), queries, k, ignore_identical_ids=own is not None)
    for name, text in queries.items():
        row, order = scores[int(text)], []
        for i in sorted(range(21), key=lambda i: (-row[i], i)):
            if names[i] not in order and not (own and names[i] == name):
                order.append(names[i])
        best = {d: max(s for i, s in enumerate(row) if names[i] == d) for d in order}
        assert run[name] == [(d, best[d]) for d in order[:k]]


def test_only_the_queries_that_need_more_are_asked_again(chunked):
    flat = np.zeros(21)
    flat[:12] = np.arange(12, 0, -1)  # document a fills the first 12 places
    spread = np.zeros(21)
    spread[[0, 12, 13]] = 3, 2, 1
    finder = Given(chunked, [flat, spread])
    assert [d for d, _ in search(finder, {"x": "0", "y": "1"}, 3)["x"]] == ["a", "b", "c"]
    assert finder.asked == [(2, 6), (1, 12), (1, 21)]


def test_chunks_as_units(chunked):
    row = np.arange(21, 0, -1.0)
    run = search(Given(chunked, [row]), {"a": "0"}, 13, unit="chunk")
    assert run["a"][0] == ("a#0-5", 21.0) and run["a"][12][0] == "b#0-5" and len(run["a"]) == 13
    run = search(Given(chunked, [row]), {"a": "0"}, 3, unit="chunk", ignore_identical_ids=True)
    assert [name for name, _ in run["a"]] == ["b#0-5", "c#0-5", "c#6-11"]
    for wrong in (dict(k=0), dict(k=1, unit="page")):
        with pytest.raises(UsageError):
            search(Given(chunked, [row]), {"a": "0"}, **wrong)


def test_ndcg_by_hand():
    """Grades a 2, b 1, c 1; found x, a, c: DCG = 2/log2(3) + 1/log2(4), ideal 2/log2(2) + 1/log2(3) + 1/log2(4)."""
    run = {"q": [("x", 9.0), ("a", 3.0), ("c", 1.0)]}
    found = evaluate_run(run, {"q": {"a": 2, "b": 1, "c": 1}}, ["nDCG@10", "R@2", "RR", "P@2", "nDCG@1"])
    want = (2 / math.log2(3) + 1 / 2) / (2 + 1 / math.log2(3) + 1 / 2)
    assert found["measures"] == pytest.approx({"nDCG@10": want, "R@2": 1 / 3, "RR": 1 / 2, "P@2": 1 / 2, "nDCG@1": 0})
    assert list(found["measures"]) == ["nDCG@10", "R@2", "RR", "P@2", "nDCG@1"]


def test_ties_keep_our_order():
    """An evaluator breaks ties by document id, downwards: z would stand first."""
    run = {"q": [("a", 1.0), ("z", 1.0)]}
    assert evaluate_run(run, {"q": {"a": 1}}, ["RR@10", "P@1", "nDCG@1"])["measures"] == {"RR@10": 1, "P@1": 1, "nDCG@1": 1}
    assert evaluate_run(run, {"q": {"z": 1}}, ["RR", "P@1"])["measures"] == {"RR": 0.5, "P@1": 0}


def test_queries_without_results_count_zero_and_others_are_left_out():
    run = {"q1": [("a", 1.0)], "unjudged": [("a", 1.0)]}
    found = evaluate_run(run, {"q1": {"a": 1}, "q2": {"b": 1}}, ["R@10"])
    assert found["measures"]["R@10"] == 0.5 and found["queries"] == 2
    assert found["per_query"] == {"q1": {"R@10": 1}, "q2": {"R@10": 0}}
    assert found["convention"]["judged_queries_without_results"] == 1


@pytest.fixture(scope="module")
def animals(tmp_path_factory):
    docs = [Document("cats", "the cat sleeps on the mat all day"), Document("dogs", "the dog barks at the cat"),
            Document("fish", "fish swim in the sea"), Document("q3", "birds fly over the sea")]
    return Datastore.build(tmp_path_factory.mktemp("s") / "kb", docs)


def test_end_to_end_with_files(animals, tmp_path):
    (tmp_path / "q.tsv").write_text("q1\tdog barks\nq2\tswimming fish\nq3\tbirds  fly over the sea\nq4\tnot judged\n")
    (tmp_path / "qrels").write_text("q1 0 dogs 1\nq2 0 fish 1\nq3 0 fish 1\nq9 0 cats 1\n")
    queries, qrels = read_queries(tmp_path / "q.tsv"), read_qrels(tmp_path / "qrels")
    kept = evaluate(BM25(animals), queries, qrels, ["nDCG@10", "RR@10"], ignore_identical_ids=False)
    assert kept["convention"]["identical_ids"] == "kept"
    assert kept["per_query"]["q3"]["RR@10"] == 0.5  # the query's own document stands first
    dropped = evaluate(BM25(animals), queries, qrels, ["nDCG@10", "RR@10"], ignore_identical_ids=True)
    assert dropped["measures"] == {"nDCG@10": 1, "RR@10": 1} and dropped["queries"] == 3
    itself = evaluate(BM25(animals), queries, qrels, ["nDCG@10", "RR@10"])
    assert itself["run"] == dropped["run"] and itself["convention"]["identical_ids"].endswith("(1 of 3)")
    for text, judged in (("birds", {"q3": 1}), ("the sea of birds", {"fish": 1})):  # meant to be found; another text of that id
        as_is = evaluate(BM25(animals), {"q3": text}, {"q3": judged}, ["RR@10"])
        assert "q3" in [d for d, _ in as_is["run"]["q3"]] and as_is["convention"]["identical_ids"] == "kept"
    convention = dropped["convention"]
    assert (convention["queries_without_judgements"], convention["judged_queries_not_given"], convention["depth"]) == (1, 1, 10)
    assert "q3" not in [d for d, _ in dropped["run"]["q3"]] and json.dumps(dropped)
    write_run(tmp_path / "run", dropped["run"])
    again = evaluate_run(read_run(tmp_path / "run"), {q: qrels[q] for q in dropped["run"]}, ["nDCG@10", "RR@10"])
    assert again["per_query"] == dropped["per_query"]


def test_wrong_requests(animals):
    with pytest.raises(UsageError, match=r"unknown measure 'ndgc@10'.*nDCG@10"):
        parse("ndgc@10")
    with pytest.raises(UsageError, match="k=10 retrieves less than R@100"):
        evaluate(BM25(animals), {"q": "x"}, {"q": {"d": 1}}, ["R@100"], k=10)
    with pytest.raises(UsageError, match="do not belong together"):
        evaluate(BM25(animals), {"q": "x"}, {"p": {"d": 1}})


def test_topk_accuracy():
    passages = [["nothing", "In 1972 it was", "1972"], ["no", "no", "no"], ["Ann won"]]
    answers = [["1972"], ["1972"], ["ann", "Bob"]]
    assert topk_accuracy(passages, answers, (1, 2, 100)) == pytest.approx({1: 1 / 3, 2: 2 / 3, 100: 2 / 3})
    assert first_rank(passages[0], answers[0]) == 1 and first_rank([], ["x"]) == math.inf
    with pytest.raises(UsageError):
        topk_accuracy(passages, answers[:2])


@pytest.mark.slow
def test_arguana_as_published(tmp_path):
    """BM25 with k1 = 0.9, b = 0.4 over whole documents, beside Anserini's flat index (another tokenizer: within 0.01)."""
    archive = DATA / "retrieval" / "arguana.zip"
    if not archive.is_file():
        pytest.skip(f"{archive} is not at hand")
    zipfile.ZipFile(archive).extractall(tmp_path)
    docs = (json.loads(line) for line in (tmp_path / "arguana/corpus.jsonl").open(encoding="utf-8"))
    store = Datastore.build(tmp_path / "kb", (Document(d["_id"], d["text"], d["title"]) for d in docs), split="none")
    published = json.loads((DATA / "retrieval/reference_scores.json").read_text())["bm25_beir_anserini"]["arguana.flat"]
    found = evaluate(BM25(store, k1=0.9, b=0.4), read_queries(tmp_path / "arguana/queries.jsonl"),
                     read_qrels(tmp_path / "arguana/qrels/test.tsv"), list(published))
    assert found["queries"] == 1406
    assert found["measures"] == pytest.approx(published, abs=0.01)
