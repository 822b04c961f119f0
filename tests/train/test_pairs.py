"""Pairs from every form they come in, hard negatives that hold no answer, and figures of a retriever beside others."""

import gzip
import json

import numpy as np
import pytest

from ralm.errors import ReadError
from ralm.eval.answers import has_answer
from ralm.train.heldout import DEPTH, HeldOut
from ralm.train.pairs import Holds, Pairs, Passage, bm25_top, mined, read_pairs

TEXTS = ["Paris is the capital of France.", "Rome is the capital of Italy.", "Cheese is made in France.", "Bread is made in Italy."]
TEXTS.insert(2, "The capital of France was once Versailles, not Paris.")


def written(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def shown(pairs):
    """(query, texts of positives, texts of negatives, answers) of every pair."""
    return [(q, [pairs.passages[i].whole for i in good], [pairs.passages[i].whole for i in bad], list(a))
            for q, good, bad, a in zip(pairs.queries, pairs.positives, pairs.negatives, pairs.answers)]


def test_squad(tmp_path):
    data = {"data": [{"title": "Some_Place", "paragraphs": [
        {"context": "It is big.", "qas": [{"id": "1", "question": " How big? ", "answers": [{"text": "big"}, {"text": "big"}]},
                                          {"id": "2", "question": "Why?", "answers": [], "is_impossible": True}]},
        {"context": "It is big.", "qas": [{"id": "3", "question": "What is it?", "answers": ["big"]}]}]}]}
    pairs = read_pairs(written(tmp_path / "a.json", data))
    place = "Some Place\nIt is big."
    assert shown(pairs) == [("How big?", [place], [], ["big"]), ("What is it?", [place], [], ["big"])]
    assert len(pairs.passages) == 1


@pytest.mark.parametrize("lines", [False, True])
def test_dpr(tmp_path, lines):
    rows = [{"question": "q", "answers": ["a"], "positive_ctxs": [{"title": "T", "text": "p", "score": 3}],
             "hard_negative_ctxs": [{"title": "", "text": "n"}, {"title": "T", "text": "p"}], "negative_ctxs": [{"text": "x"}]},
            {"question": "none found", "answers": ["a"], "positive_ctxs": [], "negative_ctxs": []},
            {"question": "r", "answers": ["b"], "positive_ctxs": [{"text": "p2"}], "negative_ctxs": [{"text": "n2"}]},
            {"question": "s", "answers": ["c"], "ctxs": [{"title": "T", "text": "gold", "isgold": True}, {"text": "not"}]}]
    file = written(tmp_path / "a.json", "\n".join(map(json.dumps, rows)) if lines else rows)
    assert shown(read_pairs(file)) == [("q", ["T\np"], ["n"], ["a"]), ("r", ["p2"], ["n2"], ["b"]), ("s", ["T\ngold"], [], ["c"])]


def test_beir(tmp_path):
    (tmp_path / "qrels").mkdir()
    with gzip.open(tmp_path / "corpus.jsonl.gz", "wt") as f:
        f.write('{"_id": "d1", "title": "T", "text": "one"}\n\n{"_id": "d2", "text": "two"}\n')
    written(tmp_path / "queries.jsonl", '{"_id": "q1", "text": "first"}\n{"_id": "q2", "text": "second"}\n')
    written(tmp_path / "qrels" / "train.tsv", "query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\td2\t0\nq9\td1\t1\n")
    written(tmp_path / "qrels" / "test.tsv", "query-id\tcorpus-id\tscore\nq2\td2\t2\nq2\tmissing\t1\n")
    assert shown(read_pairs(tmp_path)) == [("first", ["T\none"], ["two"], [])]
    assert shown(read_pairs(f"{tmp_path}#test")) == [("second", ["two"], [], [])]
    with pytest.raises(ReadError, match=r"no qrels/dev.tsv; write .*#PART with one of: test, train"):
        read_pairs(f"{tmp_path}#dev")


def test_json_lines(tmp_path):
    rows = [{"query": "q", "positive": "p"},
            {"query": "r", "positive": ["p", {"title": "T", "text": "x"}], "negative": "n", "answers": ["a"]}]
    pairs = read_pairs(written(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)) + "\n"))
    assert shown(pairs) == [("q", ["p"], [], []), ("r", ["p", "T\nx"], ["n"], ["a"])]
    assert shown(read_pairs(written(tmp_path / "one.jsonl", json.dumps(rows[0])))) == shown(pairs)[:1]


@pytest.mark.parametrize(("text", "says"), [
    ("", "holds no pair"), ("[]", "holds no pair"), ('{"query": "q"}', "entry 1, is no pair: KeyError"),
    ('{"query": "q", "positive": "p"}\n{"a"', "line 2, is not JSON"), ('{"query": "q", "positive": "p"}\n[1]', "line 2, is a list"),
    ('{"data": [{"paragraphs": 3}]}', "SQuAD's structure"), ('{"data": []}', "holds no pair"),
    ('[{"question": "q", "positive_ctxs": [{"title": "t"}]}]', "entry 1, is no pair")])
def test_what_is_no_pair_is_told(tmp_path, text, says):
    with pytest.raises(ReadError, match=says):
        read_pairs(written(tmp_path / "a.json", text))
    with pytest.raises(ReadError, match="cannot be read"):
        read_pairs(tmp_path / "missing.json")


def test_taking_another_counts_shared_passages_once():
    a, b = Pairs(), Pairs()
    a.add("q", [a.passage("", "x"), a.passage("", "y")])
    b.add("r", [b.passage("", "y")], [b.passage("", "z"), b.passage("", "y")])
    a.take(b)
    assert shown(a) == [("q", ["x", "y"], [], []), ("r", ["y"], ["z"], [])] and len(a.passages) == 3


def test_holds_is_has_answer():
    passages = [Passage("", t) for t in (*TEXTS, "naïve café", "a U.S. town", "")]
    holds = Holds(passages)
    for i, p in enumerate(passages):
        for answer in ("Paris", "capital of", "of capital", "naïve", "café", "U.S.", "U.S", "made", "", "ris", "not Paris."):
            assert holds(i, [answer]) == has_answer(p.text, [answer]), (p.text, answer)
        assert holds(i, ["nothing", "in"]) == has_answer(p.text, ["nothing", "in"])


@pytest.fixture
def capitals():
    pairs = Pairs()
    for t in TEXTS:
        pairs.passage("", t)
    pairs.add("What is the capital of France?", [0], answers=["Paris"])
    pairs.add("What is the capital of Italy?", [1], answers=["Rome"])
    return pairs


def test_mined_negatives_hold_no_answer_and_are_no_positive(capitals, tmp_path):
    top = bm25_top(capitals.passages, capitals.queries, 5)
    assert top[0, 0] in (0, 2) and top[1, 0] == 1
    hard = mined(capitals, 3, tmp_path)
    assert 0 not in hard[0] and 2 not in hard[0] and hard[0, 0] == 1  # 2 is no positive, but says Paris
    assert 1 not in hard[1] and set(hard[1].tolist()) >= {0, 2}
    assert (mined(capitals, 3, tmp_path) == hard).all() and len(list(tmp_path.glob("*.npy"))) == 1
    capitals.answers[0] = ("Versailles",)
    assert mined(capitals, 3, tmp_path)[0, 0] != 2 and len(list(tmp_path.glob("*.npy"))) == 2
    capitals.answers[0] = ()
    assert 2 in mined(capitals, 3, tmp_path)[0]


def test_held_out_figures(capitals):
    held = HeldOut(capitals, [Passage("", "something else"), Passage("", TEXTS[0])])
    assert len(held.passages) == 6
    own = np.array([[0, 1, 3], [3, 4, 1]], np.int32)
    other = np.array([[2, 0, 3], [3, 4, -1]], np.int32)
    assert held.ranks(own).tolist() == [[0, 0], [2, 2]] and held.ranks(other).tolist() == [[0, 1], [DEPTH, DEPTH]]
    said = held.figures(own, {"other": other})
    assert (said["top1"], said["top5"], said["gold1"], said["mrr"]) == pytest.approx((50, 100, 50, 100 * (1 + 1 / 3) / 2))
    assert said["top5-other"] == 50 and said["gold1-other"] == 50 and said["top1-other"] == 0
    assert said["top5-other_low"] == 0 and said["top5-other_high"] == 100
    assert held.figures(held.bm25())["gold5"] == 100
    q, d = np.eye(6)[[4, 2]], np.eye(6)
    assert held.top(q, d)[:, 0].tolist() == [4, 2] and held.top(q, d)[0].tolist() == [4, 0, 1, 2, 3, 5]


def test_a_part_of_the_questions(capitals):
    for n in range(8):
        capitals.add(f"question {n}", [n % 5])
    held = HeldOut(capitals, limit=5)
    assert held.queries == [capitals.queries[i] for i in (0, 2, 4, 6, 8)]
