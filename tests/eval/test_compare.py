"""Several systems on the same texts: one convention, paired differences, evidence that is in the datastore."""

import math

import pytest

from ralm.errors import UsageError
from ralm.eval.compare import compare
from ralm.eval.perplexity import evaluate_perplexity
from ralm.model import RALM
from ralm.types import Document
from ralm.what.datastore import Datastore
from ralm.what.token_store import TokenStore

TEXTS = [Document("a", "The lighthouse of Brennick stands on a reef of granite. Maria Holt drilled for two summers there."),
         Document("b", "Snow lies on the mountain in winter, and in spring the river carries stones to the sea."),
         Document("d3", "Another text by the name of one that is stored.")]
PREPEND, ENSEMBLE = "prepend:k=1,tokens=20", "ensemble:k=2,tokens=16"


@pytest.fixture
def systems(lm, bm25):
    plain = RALM(lm)
    return {"none": plain, PREPEND: RALM(lm, bm25, how=PREPEND, when="every:8"),
            ENSEMBLE: RALM(lm, bm25, how=ENSEMBLE, when="every:8")}


def test_all_are_scored_under_one_convention(systems):
    found = compare(systems, TEXTS)
    none, prepend, ensemble = found["systems"]
    assert [r["name"] for r in found["systems"]] == ["none", PREPEND, ENSEMBLE]
    assert [r["text"] for r in found["systems"]] == [64, 44, 48]  # of a window of 64
    assert {(r["window"], r["stride"]) for r in found["systems"]} == {(64, 22)}
    assert found["bytes"] == sum(len(d.text.encode()) for d in TEXTS) and found["documents"] == 3 and found["overlap"] is None
    for row in found["systems"]:
        alone = evaluate_perplexity(systems[row["name"]], TEXTS, window=64, stride=22)
        assert row["ppl"] == alone["ppl"] and row["bits_per_byte"] == alone["bits_per_byte"]
        assert row["retrievals"] == alone["retrievals"] and row["convention"]["stride"] == 22
    assert none["retrievals"] == 0 < prepend["retrievals"] and "d3" in prepend["rows"][2]["excluded"]
    assert (none["difference"], none["interval"]) == (0, (0, 0)) and "evidence" not in none
    for row in (prepend, ensemble):
        assert row["difference"] == pytest.approx(none["bits_per_byte"] - row["bits_per_byte"])
        low, high = row["interval"]
        assert low <= row["difference"] <= high and low < high


def test_windows_may_be_given_and_must_leave_room(systems):
    found = compare(systems, TEXTS[:1], window=48, stride=8, evidence=0)
    assert (found["window"], found["stride"]) == (48, 8) and [r["text"] for r in found["systems"]] == [48, 28, 32]
    with pytest.raises(UsageError, match=r"prepend.*20 tokens of a window of 21"):
        compare(systems, TEXTS, window=21)
    with pytest.raises(UsageError, match="no system"):
        compare({}, TEXTS)
    with pytest.raises(UsageError, match="no text"):
        compare(systems, [])


def test_evidence_is_that_of_the_texts_that_were_improved_most(systems, store):
    found = compare(systems, TEXTS, evidence=2)
    for row in found["systems"][1:]:
        saved = {a["id"]: a["nats"] - b["nats"] for a, b in zip(found["systems"][0]["rows"], row["rows"])}
        best = [name for name in sorted(saved, key=lambda n: -saved[n]) if saved[name] > 0][:2]
        assert [e["text"] for e in row["evidence"]] == best
        for e in row["evidence"]:
            size = next(len(d.text.encode()) for d in TEXTS if d.id == e["text"])
            assert e["bits_per_byte"] == pytest.approx(saved[e["text"]] / math.log(2) / size)
            assert e["documents"] and all(store.has(name) for name in e["documents"])
            assert list(e["documents"].values()) == sorted(e["documents"].values(), reverse=True)
            assert e["read"] == next(len(d.text) for d in TEXTS if d.id == e["text"])
            assert "d3" not in e["documents"] or e["text"] != "d3"


def test_evidence_of_a_long_text_is_that_of_its_beginning(systems, monkeypatch):
    from ralm.eval import compare as module

    monkeypatch.setattr(module, "READ", 8)
    told = [e for row in compare(systems, TEXTS)["systems"][1:] for e in row["evidence"]]
    assert told and all(0 < e["read"] < 40 for e in told)


def test_neighbours_of_tokens_in_the_same_table(lm, bm25, tmp_path):
    """A store that holds nearly the text itself: kNN-LM says which document it was, passages and both together too."""
    from ralm.index import retriever

    kb = Datastore.build(tmp_path / "kb", [Document("same", TEXTS[0].text[:-6]), Document("other", TEXTS[1].text)])
    tokens, finder = TokenStore.build(kb, lm), retriever("bm25", kb)
    knn = "knn:k=4,lam=0.5,temperature=1"
    systems = {"none": RALM(lm), knn: RALM(lm, how=knn, tokens=tokens),
               f"{PREPEND}+{knn}": RALM(lm, finder, how=f"{PREPEND}+{knn}", when="every:8", tokens=tokens)}
    found = compare(systems, TEXTS[:1])
    none, alone, both = found["systems"]
    assert alone["ppl"] < none["ppl"] and both["ppl"] < none["ppl"] and alone["difference"] > 0
    assert [next(iter(r["evidence"][0]["documents"])) for r in (alone, both)] == ["same", "same"]
    assert alone["text"] == 64 and both["text"] == 44 and alone["tokens_searched"] == alone["tokens"]


def test_what_was_saved_is_not_scored_again(systems, tmp_path):
    first = compare(systems, TEXTS, save=tmp_path / "rows.jsonl", evidence=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows.1.jsonl", "rows.2.jsonl", "rows.3.jsonl"]
    again = compare(systems, TEXTS, save=tmp_path / "rows.jsonl", evidence=0)
    assert [r["rows"] for r in again["systems"]] == [r["rows"] for r in first["systems"]]
    with pytest.raises(UsageError, match="rows made with"):
        compare(dict(reversed(systems.items())), TEXTS, save=tmp_path / "rows.jsonl")
