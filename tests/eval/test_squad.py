"""SQuAD's scores against hand-worked cases and against the official scripts' procedure, written again step by step."""

import collections
import json
import re
import string

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from ralm.errors import ReadError, UsageError
from ralm.eval.squad import read_predictions, score_predictions


def squad(answers, version="v2.0"):
    """A parsed SQuAD file from {id: [gold, ...]}."""
    qas = [{"id": name, "question": f"{name}?", "answers": [{"text": g, "answer_start": 0} for g in golds]}
           for name, golds in answers.items()]
    return {"version": version, "data": [{"title": "T", "paragraphs": [{"context": "c", "qas": qas}]}]}


def test_by_hand():
    data = squad({"a": ["the cat", "cat sat"], "b": ["dog"], "c": [], "d": [], "e": ["x"]})
    found = score_predictions({"a": "Cat", "b": "a big dog", "c": "", "d": "something", "zz": "?"}, data)
    # a: exact. b: P 1/2 R 1 F1 2/3. c: rightly declined. d: wrongly answered. e: no prediction, wrong.
    assert found["measures"] == pytest.approx({
        "EM": 40, "F1": 100 * (1 + 2 / 3 + 1) / 5, "HasAns_exact": 100 / 3, "HasAns_f1": 100 * (5 / 3) / 3,
        "NoAns_exact": 50, "NoAns_f1": 50})
    assert (found["total"], found["HasAns_total"], found["NoAns_total"], found["missing"], found["unknown"]) == (5, 3, 2, ["e"], 1)
    assert found["intervals"]["EM"][0] <= 40 <= found["intervals"]["EM"][1]


def test_version_one_has_no_breakdown():
    found = score_predictions({"a": "cat"}, squad({"a": ["cat"], "b": ["dog"]}, "1.1"))
    assert found["measures"] == {"EM": 50, "F1": 50} and found["missing"] == ["b"]
    assert found["convention"]["rules"] == "SQuAD 1.1" and "NoAns_total" not in found


def test_a_reference_of_articles_only_does_not_count_in_two():
    data = squad({"a": ["the", "cat"], "b": ["!"]})
    # of a only "cat" is left, of b nothing, so that "" is right
    assert score_predictions({"a": "an", "b": ""}, data)["measures"]["EM"] == 50
    assert score_predictions({"a": "an", "b": ""}, squad({"a": ["the", "cat"], "b": ["!"]}, "1.1"))["measures"]["EM"] == 100


def official(predictions, data):
    """The 2.0 procedure with total per class; a missing prediction scores nothing."""
    def norm(s):
        s = s.lower()
        s = "".join(c for c in s if c not in set(string.punctuation))
        s = re.compile(r"\b(a|an|the)\b", re.UNICODE).sub(" ", s)
        return " ".join(s.split())

    sums = collections.defaultdict(list)
    for article in data["data"]:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                golds = [a["text"] for a in qa["answers"] if norm(a["text"])]
                kind = "HasAns" if golds else "NoAns"
                best_em = best_f1 = 0.0
                for gold in golds or [""]:
                    if qa["id"] not in predictions:
                        break
                    p, g = norm(predictions[qa["id"]]).split(), norm(gold).split()
                    best_em = max(best_em, float(p == g))
                    same = sum((collections.Counter(p) & collections.Counter(g)).values())
                    if not p or not g:
                        f1 = float(p == g)
                    else:
                        f1 = 0.0 if not same else 2 * (same / len(p)) * (same / len(g)) / (same / len(p) + same / len(g))
                    best_f1 = max(best_f1, f1)
                for key, value in (("EM", best_em), ("F1", best_f1), (f"{kind}_exact", best_em), (f"{kind}_f1", best_f1)):
                    sums[key].append(100 * value)
    return {key: sum(v) / len(v) for key, v in sums.items()}


PHRASE = st.lists(st.sampled_from(["the", "cat", "Cat!", "sat", "an", "-", "on", "mat"]), max_size=4).map(" ".join)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from("abcdef"), st.lists(PHRASE, max_size=3), min_size=1),
       st.dictionaries(st.sampled_from("abcdefg"), PHRASE, min_size=1))
def test_against_the_official_procedure(answers, predictions):
    data = squad(answers)
    if not answers.keys() & predictions.keys():
        with pytest.raises(UsageError, match="do not belong together"):
            score_predictions(predictions, data)
    else:
        assert score_predictions(predictions, data)["measures"] == pytest.approx(official(predictions, data))


def test_files(tmp_path):
    data = squad({"a": ["cat"]})
    (tmp_path / "d.json.zst").write_bytes(zstandard.compress(json.dumps(data).encode()))
    assert score_predictions({"a": "cat"}, tmp_path / "d.json.zst")["measures"]["EM"] == 100
    (tmp_path / "p.json").write_text('{"a": "cat"}')
    (tmp_path / "p.jsonl").write_text('{"rows_of": {"system": "s"}}\n{"id": "a", "answer": "cat"}\n')
    (tmp_path / "one.jsonl").write_text('{"id": "a", "answer": "cat"}\n')
    assert [read_predictions(tmp_path / n) for n in ("p.json", "p.jsonl", "one.jsonl")] == [{"a": "cat"}] * 3
    for text in ('{"a": 3}', "[1]", "hello"):
        (tmp_path / "bad").write_text(text)
        with pytest.raises(ReadError, match="id"):
            read_predictions(tmp_path / "bad")
    for text in ("[]", "{}", "no"):
        (tmp_path / "bad").write_text(text)
        with pytest.raises(ReadError):
            score_predictions({"a": "cat"}, tmp_path / "bad")
