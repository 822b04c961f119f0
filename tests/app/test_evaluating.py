"""eval retrieval and eval qa over the shared store, by hand-worked figures."""

import json

import pytest


@pytest.fixture
def judged(tmp_path):
    (tmp_path / "q.tsv").write_text("a\tnatural satellite\nb\toceanic trench\nc\tgreen cheese\n")
    (tmp_path / "beir.tsv").write_text("query-id\tcorpus-id\tscore\na\tmoon.md\t1\nb\teverest\t1\nc\ttrench\t1\n")
    (tmp_path / "trec.txt").write_text("a 0 moon.md 1\nb 0 everest 1\nc 0 trench 1\n")
    return tmp_path


@pytest.mark.parametrize("qrels", ["beir.tsv", "trec.txt"])
def test_retrieval_measures(ralm, shared, judged, qrels):
    pytest.importorskip("ir_measures")
    args = ["eval", "retrieval", shared, "--queries", judged / "q.tsv", "--qrels", judged / qrels]
    data = ralm(*args, "--measures", "nDCG@10,R@100,RR@10", "--json").json
    assert data["measures"] == pytest.approx({"nDCG@10": 1 / 3, "R@100": 1 / 3, "RR@10": 1 / 3})
    assert data["queries"] == 3 and "retriever" in data["convention"]
    assert "nDCG@10" in ralm(*args, "--run", judged / "out.trec").out
    assert (judged / "out.trec").read_text().startswith("a Q0 moon.md 1 ")


def test_an_unknown_measure_is_told_before_searching(ralm, shared, judged):
    pytest.importorskip("ir_measures")
    ran = ralm("eval", "retrieval", shared, "--queries", judged / "q.tsv", "--qrels", judged / "beir.tsv", "-q",
               "--measures", "nDGC@10")
    assert ran.code == 2 and "nDGC@10" in ran.err and ran.err.count("\n") == 1


def test_answers_made_elsewhere(ralm, tmp_path):
    gold = {"version": "1.1", "data": [{"paragraphs": [{"context": "", "qas": [
        {"id": "1", "question": "?", "answers": [{"text": "the Cat"}]},
        {"id": "2", "question": "?", "answers": [{"text": "two dogs"}]},
        {"id": "3", "question": "?", "answers": [{"text": "a bird"}]}]}]}]}
    (tmp_path / "gold.json").write_text(json.dumps(gold))
    (tmp_path / "said.json").write_text(json.dumps({"1": "cat!", "2": "dogs"}))
    args = ["eval", "qa", "--predictions", tmp_path / "said.json", "--gold", tmp_path / "gold.json"]
    data = ralm(*args, "--json").json
    assert data["measures"] == pytest.approx({"EM": 100 / 3, "F1": (100 + 200 / 3) / 3})
    assert (data["questions"], data["missing"]) == (3, 1)
    assert "EM" in ralm(*args).out


def test_questions_asked_of_a_store(ralm, shared, reader, tmp_path):
    rows = [{"id": "moon", "question": "Who was the first person to walk on the Moon?", "answers": ["Neil Armstrong"]},
            {"id": "cheese", "question": "zyzzyva?", "answers": []}]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    args = ["eval", "qa", shared, "--questions", tmp_path / "q.jsonl", "--lm", reader, "--save", tmp_path / "said.jsonl"]
    data = ralm(*args, "--json").json
    assert data["measures"]["EM"] == data["measures"]["F1"] == 100 and data["measures"]["abstained"] == 50
    assert data["measures"]["accuracy@1"] == 100
    assert data["questions"] == 2
    assert ralm(*args, "--json").json["measures"] == data["measures"]  # from the file, nothing is asked again
    assert ralm(*args, "--limit", "1", "--json").json["questions"] == 1


def test_percentages_below_one_are_still_percentages_for_people(ralm, tmp_path):
    """1 right of 200 is 0.50 %, shown as 0.50 beside 100.00, not as a share with four digits."""
    answers = [{"id": str(i), "question": "?", "answers": [f"answer {i}"]} for i in range(200)]
    (tmp_path / "gold.json").write_text(json.dumps({"data": [{"paragraphs": [{"context": "", "qas": answers}]}]}))
    (tmp_path / "said.json").write_text(json.dumps({str(i): "answer 0" if i == 0 else "no" for i in range(200)}))
    args = ["eval", "qa", "--predictions", tmp_path / "said.json", "--gold", tmp_path / "gold.json"]
    assert ralm(*args, "--json").json["measures"]["EM"] == pytest.approx(0.5)
    (line,) = [line for line in ralm(*args).out.splitlines() if line.startswith("EM ")]
    assert line.split()[1] == "0.50"


def test_no_measures_at_all(ralm, shared, judged):
    ran = ralm("eval", "retrieval", shared, "--queries", judged / "q.tsv", "--qrels", judged / "beir.tsv", "--measures", " , ")
    assert ran.code == 2 and "--measures" in ran.err and ran.err.count("\n") == 1


def test_a_wrong_questions_file_is_told_before_the_model_is_loaded(ralm, shared, tmp_path):
    ran = ralm("eval", "qa", shared, "--questions", tmp_path / "none.jsonl", "--lm", "hf:no/such-model")
    assert ran.code == 1 and "none.jsonl" in ran.err
