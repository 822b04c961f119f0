"""Question files in the shapes they are published in; the real ones where they are at hand."""

import json
import os
from pathlib import Path

import pytest
import zstandard

from ralm.errors import ReadError
from ralm.eval.questions import read_questions

DATA = Path(os.environ.get("RALM_DATA", "../shared/data"))
SQUAD = {"version": "v2.0", "data": [{"title": "T", "paragraphs": [{"context": "A cat.", "qas": [
    {"id": "s1", "question": "what?", "answers": [{"text": "cat", "answer_start": 2}, {"text": "A cat", "answer_start": 0}]},
    {"id": "s2", "question": "strings?", "answers": ["cat"]},
    {"id": "s3", "question": "no?", "answers": [], "is_impossible": True}]}]}]}


def test_json_lines_in_every_dialect(tmp_path):
    rows = [{"question": "nq?", "answer": ["a", "b"]}, {"id": 0, "question": "eq?", "answers": ["c"], "relation": "P1"},
            {"qid": "x", "question": "flash?", "golden_answers": ["d"]}, {"question": "popqa?", "possible_answers": '["e", "f"]'},
            {"question": "one?", "answer": "g"}, {"question": "bracket?", "answer": "[sic"}, {"question": "yes?", "answer": True},
            {"question": "none?"}, {"question": "null?", "answers": None}, {"question": "hub?", "answers": {"text": ["h"]}}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "q.json").write_text(json.dumps(rows, indent=1))
    for name in ("q.jsonl", "q.json"):
        read = read_questions(tmp_path / name)
        assert [r["answers"] for r in read] == [["a", "b"], ["c"], ["d"], ["e", "f"], ["g"], ["[sic"], ["yes"], [], [], ["h"]]
        assert [r["id"] for r in read] == ["1", "0", "x", "4", "5", "6", "7", "8", "9", "10"]
        assert [set(r) for r in read] == [{"id", "question", "answers"}] * 10


@pytest.mark.parametrize("indent", [None, 2])
def test_squad_packed_or_not(tmp_path, indent):
    (tmp_path / "s.json.zst").write_bytes(zstandard.compress(json.dumps(SQUAD, indent=indent).encode()))
    assert read_questions(tmp_path / "s.json.zst") == [
        {"id": "s1", "question": "what?", "answers": ["cat", "A cat"]}, {"id": "s2", "question": "strings?", "answers": ["cat"]},
        {"id": "s3", "question": "no?", "answers": []}]


def test_plain_lines_and_dpr_columns(tmp_path):
    (tmp_path / "q.txt").write_text("who?\n\nwho is [x]?\n")
    assert [tuple(r.values()) for r in read_questions(tmp_path / "q.txt")] == [("1", "who?", []), ("3", "who is [x]?", [])]
    (tmp_path / "dpr.csv").write_text("who?\t['Ann', \"Bob's\"]\n")
    assert read_questions(tmp_path / "dpr.csv")[0]["answers"] == ["Ann", "Bob's"]


@pytest.mark.parametrize(("text", "said"), [
    ("", "holds no question"),
    ('{"question": "a?"}\n{"answers": []}\n', "line 2, has no question: expected a key 'question', found the keys answers"),
    ('{"question": "a?"}\n{"question": \n', "line 2, is not JSON"),
    ('{"question": "a?", "id": 1}\n{"question": "b?", "id": "1"}\n', "line 2, gives the id '1' a second time"),
    ('{"question": "  "}\n', "line 1, has an empty question"),
    ('{"question": "a?", "answers": [["x"]]}\n', "line 1, has an answer that is a list"),
    ('["a?"]', "entry 1, has no question: expected a key 'question', found a str"),
    ('{"data": [{"paragraphs": [{"qas": [{"id": "1"}]}]}]}', "not in SQuAD's structure"),
    ("who?\tAnn\n", "line 1, has 'Ann' behind the tab"),
])
def test_bad_rows_are_named(tmp_path, text, said):
    (tmp_path / "q").write_text(text)
    with pytest.raises(ReadError) as e:
        read_questions(tmp_path / "q")
    assert said in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(("name", "count", "answerable"), [
    ("nq_open.dev.jsonl.zst", 3610, 3610), ("entityquestions.dev.jsonl.zst", 22068, 22068), ("squad-v2.0.dev.json.zst", 1974, None),
    ("popqa_1000_with_paragraphs.json.zst", 1000, 1000), ("squad-v1.1.dev.json.zst", 1252, 1252),
    ("strategyqa.train.json.zst", 2061, 2061), ("nq_open.oracle_passages.jsonl.gz", 2655, 2655)])
def test_published_sets(name, count, answerable):
    path = DATA / "qa" / name
    if not path.is_file():
        pytest.skip(f"{path} is not at hand")
    rows = read_questions(path)
    assert len(rows) == count
    known = sum(bool(r["answers"]) for r in rows)
    assert known == answerable if answerable else 0 < known < count
