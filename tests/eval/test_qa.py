"""Question answering end to end over a real datastore and BM25; the answerer is a lookup, so every figure can be worked by hand."""

import json

import pytest

from ralm import progress
from ralm.errors import CapabilityError, UsageError
from ralm.eval.qa import evaluate_qa, measure
from ralm.eval.questions import read_questions
from ralm.eval.squad import read_predictions, score_predictions
from ralm.how.cite import passages
from ralm.model import RALM
from ralm.types import Answer

ROWS = [{"id": "when", "question": "When was the lighthouse of Brennick built?", "answers": ["1873", "in 1873"]},
        {"id": "who", "question": "Who described mitochondria?", "answers": ["Albert von Kolliker", "Albert von Kölliker"]},
        {"id": "snow", "question": "Where does snow lie in winter?", "answers": ["Mount Teide"]},
        {"id": "none", "question": "Which tower sells tickets?", "answers": []},
        {"id": "trap", "question": "How many rooms has the tower?", "answers": []}]
SAID = {"when": "In 1873.", "who": "Robert Hooke von Kölliker", "snow": "", "none": "", "trap": "42"}


class Lookup:
    """Answers from a table, evidence from a retriever; counts what it is asked."""

    def __init__(self, retriever, said=SAID, fail=None):
        self.retriever, self.said, self.fail, self.asked = retriever, said, fail, []
        self.store, self.where = retriever.store, None

    def answer(self, question, k=5):
        name = next(r["id"] for r in ROWS if r["question"] == question)
        if name == self.fail:
            raise CapabilityError("cannot do this one")
        self.asked.append(name)
        hits = self.retriever.search([question], k).row(0)
        evidence = passages(self.store, hits.ids[0], hits.scores[0])
        text = self.said[name]
        return Answer(text, not text, evidence[:1] if text else [], evidence, 0.25)


def test_figures_by_hand(bm25):
    found = evaluate_qa(Lookup(bm25), ROWS, k=4, ks=(1, 2, 4, 5))  # the store has fewer than four passages for some of them
    m = found["measures"]
    # when exact; who: 2 of 4 words said, of 3 wanted, F1 = 2·2/7; snow declined wrongly; none declined; trap answered wrongly
    assert (m["EM"], m["F1"]) == pytest.approx((40, 100 * (1 + 4 / 7 + 0 + 1 + 0) / 5))
    assert (m["HasAns_EM"], m["NoAns_EM"], m["abstained"]) == pytest.approx((100 / 3, 50, 40))
    assert (m["HasAns_F1"], m["NoAns_F1"]) == pytest.approx((100 * (11 / 7) / 3, 50))
    assert m["accuracy@4"] == 100 and m["accuracy@1"] <= m["accuracy@2"] <= 100
    assert "accuracy@5" not in m  # nobody read five passages
    assert (found["questions"], found["answerable"], found["median_seconds"]) == (5, 3, 0.25)
    assert found["intervals"]["F1"][0] <= m["F1"] <= found["intervals"]["F1"][1]
    assert json.dumps(found)


def test_accuracy_counts_ranks_from_one():
    """The answer in the second passage is not in the first one, is in the first two, and a fourth question finds none."""
    def said(name, *held):
        return {"id": name, "answers": ["x"], "answer": "", "abstained": True, "seconds": 0.0,
                "ctxs": [{"text": "", "has_answer": h} for h in held]}

    rows = [{"id": name, "answers": ["x"]} for name in "abcd"]
    found = measure(rows, [said("a", True, False), said("b", False, True, True), said("c", False, False, True), said("d", False)],
                    (1, 2, 3, 4))["measures"]
    assert {n: found.get(f"accuracy@{n}") for n in (1, 2, 3, 4)} == {1: 25, 2: 50, 3: 75, 4: None}


def test_what_is_said_while_abstaining_is_no_answer():
    found = evaluate_qa(lambda question: Answer("1873", True, [], [], 0.0), ROWS[:1])
    assert found["measures"]["EM"] == 0 and found["measures"]["abstained"] == 100 and found["rows"][0]["answer"] == ""


def test_rows_are_kept_in_dpr_form(bm25, tmp_path):
    path = tmp_path / "said.jsonl"
    found = evaluate_qa(Lookup(bm25), ROWS, k=2, predictions=path)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert lines[1:] == found["rows"] and lines[0]["rows_of"]["k"] == 2
    first = lines[1]
    assert set(first["ctxs"][0]) == {"id", "title", "text", "score", "has_answer"} and first["question"] == ROWS[0]["question"]
    name, _, span = first["ctxs"][0]["id"].partition("#")
    start, end = map(int, span.split("-"))
    assert bm25.store.document(name).text[start:end] == first["ctxs"][0]["text"]
    assert first["ctxs"][0]["has_answer"] and not any(c["has_answer"] for c in lines[4]["ctxs"])
    assert read_predictions(path) == SAID
    squad = {"version": "2.0", "data": [{"paragraphs": [{"qas": ROWS}]}]}
    scored = score_predictions(SAID, squad)["measures"]
    assert (scored["EM"], scored["F1"], scored["NoAns_exact"]) == tuple(found["measures"][n] for n in ("EM", "F1", "NoAns_EM"))


def test_interrupted_goes_on_and_a_failure_is_no_smaller_set(bm25, tmp_path):
    path = tmp_path / "said.jsonl"
    broken = Lookup(bm25, fail="snow")
    broken.__class__.__repr__ = lambda self: f"Lookup at 0x{id(self):x}"  # an address is no part of what a system is
    with pytest.raises(CapabilityError, match="question 'snow' failed, nothing is scored without it: cannot do this one"):
        evaluate_qa(broken, ROWS, k=2, predictions=path)
    assert broken.asked == ["when", "who"]
    again = Lookup(bm25)
    found = evaluate_qa(again, ROWS, k=2, predictions=path)
    assert again.asked == ["snow", "none", "trap"]
    assert found["measures"] == evaluate_qa(Lookup(bm25), ROWS, k=2)["measures"]
    with pytest.raises(UsageError, match="made with k = 2, this run has 3"):
        evaluate_qa(Lookup(bm25), ROWS, k=3, predictions=path)
    with pytest.raises(UsageError, match="another question under the id 'when'"):
        evaluate_qa(Lookup(bm25), [ROWS[0] | {"question": "When?"}], k=2, predictions=path)


def test_other_references_are_scored_anew(bm25, tmp_path):
    path = tmp_path / "said.jsonl"
    evaluate_qa(Lookup(bm25), ROWS[:1], predictions=path)
    other = [ROWS[0] | {"answers": ["1874"]}]
    found = evaluate_qa(Lookup(bm25), other, predictions=path)
    assert found["measures"]["EM"] == 0 and found["measures"]["accuracy@1"] == 0


def test_other_exceptions_name_the_question(bm25):
    class Bad:
        def answer(self, question):
            raise KeyError("x")

    with pytest.raises(KeyError) as e:
        evaluate_qa(Bad(), ROWS)
    assert "'when'" in e.value.__notes__[0]


@pytest.mark.parametrize(("rows", "said"), [
    ([], "no question"), ([{"id": "1", "question": " "}], "row 1 needs an id and a question"),
    ([{"question": "a?"}], "row 1 needs"),
    ([{"id": 1, "question": "a?"}, {"id": "1", "question": "b?"}], "row 2 gives the id '1' a second time")])
def test_bad_rows(rows, said):
    with pytest.raises(UsageError, match=said):
        evaluate_qa(lambda q: None, rows)


def test_a_function_will_do_and_progress_is_told(bm25, monkeypatch):
    told = []

    class Sink(progress.Silent):
        def advance(self, task, amount):
            told.append(amount)

    monkeypatch.setattr(progress, "_sink", Sink())
    found = evaluate_qa(Lookup(bm25).answer, ROWS)
    assert sum(told) == 5 and found["questions"] == 5


def test_without_unanswerable_rows_there_is_no_breakdown(bm25):
    assert not any("Ans" in name for name in evaluate_qa(Lookup(bm25), ROWS[:3])["measures"])
    nothing = [{"answer": "", "abstained": True, "answers": [], "ctxs": [], "seconds": 0.0}]
    assert set(measure([{"answers": []}], nothing)["measures"]) == {
        "EM", "F1", "match_substring", "abstained", "NoAns_EM", "NoAns_F1"}


def test_a_language_model_answers_a_file_of_questions(lm, bm25, tmp_path):
    """The whole way: file, RALM with a tiny model and BM25, predictions. Its figures are as bad as a random model is."""
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS[:2]))
    ralm = RALM(lm, bm25, how="prepend:k=2,tokens=24")
    found = evaluate_qa(ralm, read_questions(tmp_path / "q.jsonl"), k=1, predictions=tmp_path / "p.jsonl")
    assert found["convention"]["datastore"] == bm25.store.id and "Prepend" in found["convention"]["system"]
    assert all(row["ctxs"] for row in found["rows"]) and found["measures"]["accuracy@1"] == 100
    assert evaluate_qa(ralm, read_questions(tmp_path / "q.jsonl"), k=1, predictions=tmp_path / "p.jsonl")["rows"] == found["rows"]
