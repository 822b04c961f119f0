import gzip
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ralm.errors import ReadError, UsageError
from ralm.eval.trec import falling, read_qrels, read_queries, read_run, write_run


def test_queries_of_every_shape(tmp_path):
    want = {"q1": "first query", "7": "second: a\tb"}
    (tmp_path / "a.tsv").write_text("q1\tfirst query\n\n7\tsecond: a\tb\n")
    (tmp_path / "b.tsv").write_text("query-id\ttext\nq1\tfirst query\n7\tsecond: a\tb\n")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress("\n".join(json.dumps(r) for r in (
        {"_id": "q1", "text": "first query", "metadata": {}}, {"id": 7, "query": "second: a\tb"})).encode()))
    for path in tmp_path.iterdir():
        assert read_queries(path) == want, path
    (tmp_path / "d.txt").write_text("first query\n\nsecond query\n")
    assert read_queries(tmp_path / "d.txt") == {"1": "first query", "3": "second query"}


@pytest.mark.parametrize(("text", "said"), [
    ("a\tx\nb\n", "line 2, needs an id and a text"),
    ("a\tx\na\ty\n", "line 2, gives the id 'a' a second time"),
    ('{"_id": "a", "text": "x"}\n{"_id": "b"}\n', "line 2, needs an id"),
    ('{"_id": "a", "text": "x"}\n{"_id": \n', "line 2, is not JSON"),
    ("", "holds no query"),
    ("query-id\ttext\n", "holds no query"),
])
def test_bad_queries_name_the_line(tmp_path, text, said):
    (tmp_path / "q").write_text(text)
    with pytest.raises(ReadError, match=said) as e:
        read_queries(tmp_path / "q")
    assert "\n" not in str(e.value) and str(tmp_path / "q") in str(e.value)


def test_qrels_of_both_shapes(tmp_path):
    want = {"q1": {"d1": 1, "d 2": 0}, "q2": {"d1": 2}}
    (tmp_path / "beir").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\td 2\t0\nq2\td1\t2\n")
    (tmp_path / "bare").write_text("q1\td1\t1\nq1\td 2\t0\nq2\td1\t2\n")
    assert read_qrels(tmp_path / "beir") == read_qrels(tmp_path / "bare") == want
    (tmp_path / "trec").write_text("q1 0 d1 1\nq1\t0\td2\t0\nq2 Q0 d1 2\nq2 Q0 d1 2\n")
    assert read_qrels(tmp_path / "trec") == {"q1": {"d1": 1, "d2": 0}, "q2": {"d1": 2}}


@pytest.mark.parametrize(("text", "said"), [
    ("q1 0 d1 1\nq1 0 d1\n", "line 2, has 3 columns"),
    ("query-id\tcorpus-id\tscore\nq1\td1\thigh\n", "line 2, grades with 'high'"),
    ("q1 0 d1 1\nq1 0 d1 2\n", "line 2, grades 'd1' for 'q1' 2, an earlier line 1"),
    ("query-id\tcorpus-id\tscore\n", "holds no relevance judgement"),
])
def test_bad_qrels_name_the_line(tmp_path, text, said):
    (tmp_path / "q").write_text(text)
    with pytest.raises(ReadError, match=said):
        read_qrels(tmp_path / "q")


IDS = st.text(st.characters(codec="utf-8", exclude_categories=("Z", "C")), min_size=1, max_size=5)
SCORES = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=6).map(lambda s: sorted(s, reverse=True))


@settings(deadline=None)
@given(st.dictionaries(IDS, SCORES, min_size=1, max_size=3), st.data())
def test_round_trip_keeps_order_with_ties(tmp_path_factory, scores, data):
    """What is read back has the order that was written, also as an evaluator sees it that sorts by score and then by id."""
    run = {q: list(zip(data.draw(st.lists(IDS, min_size=len(s), max_size=len(s), unique=True)), s)) for q, s in scores.items()}
    path = tmp_path_factory.mktemp("run") / "run.trec"
    assert write_run(path, run) == sum(map(len, run.values()))
    back = read_run(path)
    for query, row in run.items():
        assert [d for d, _ in back[query]] == [d for d, _ in row]
        assert sorted(back[query], key=lambda p: (-np.float32(p[1]), p[0])) == back[query]  # whichever way ties are broken
        assert [s for _, s in back[query]] == pytest.approx([s for _, s in row], rel=1e-6, abs=1e-37)


def test_the_six_columns(tmp_path):
    write_run(tmp_path / "r", {"q1": [("d2", 2.5), ("d1", 2.5), ("d3", 0.0), ("d4", 0.0)]}, tag="bm25")
    rows = [line.split(" ") for line in (tmp_path / "r").read_text().splitlines()]
    assert [row[:4] for row in rows] == [["q1", "Q0", d, str(n)] for n, d in enumerate(("d2", "d1", "d3", "d4"), 1)]
    values = [float(row[4]) for row in rows]
    assert values[0] == 2.5 and 2.4999 < values[1] < 2.5 and values[2] == 0 and -1e-30 < values[3] < 0
    assert {row[5] for row in rows} == {"bm25"}


def test_what_a_run_cannot_carry(tmp_path):
    for query, document, tag in (("q 1", "d", "t"), ("q", "my file.md", "t"), ("q", "d", "my tag"), ("", "d", "t")):
        with pytest.raises(UsageError, match="white space"):
            write_run(tmp_path / "r", {query: [(document, 1.0)]}, tag)
    with pytest.raises(UsageError, match="best first"):
        write_run(tmp_path / "r", {"q": [("a", 1.0), ("b", 2.0)]})
    assert not list(tmp_path.iterdir())
    assert falling([]) == []


@pytest.mark.parametrize(("text", "said"), [
    ("q Q0 d 1 2.0\n", "line 1, has 5 columns"),
    ("q Q0 d first 2.0 t\n", "line 1, has rank 'first'"),
    ("q Q0 d 1 nan t\n", "finite"),
    ("q Q0 d 1 2 t\nq Q0 d 2 1 t\n", "line 2, lists 'd' for 'q' a second time"),
    ("\n", "holds no line"),
])
def test_bad_runs_name_the_line(tmp_path, text, said):
    (tmp_path / "r").write_text(text)
    with pytest.raises(ReadError, match=said):
        read_run(tmp_path / "r")
