"""score --compare: how systems are named, what is told before any work, and one table of what the library measures."""

import json

import pytest

from ralm.app.options import systems
from ralm.errors import UsageError

PREPEND, ENSEMBLE = "prepend:k=1,tokens=64", "ensemble:k=2,tokens=64,weights=posterior"


def test_a_comma_begins_a_system_unless_an_option_follows():
    told = systems(["none, prepend:k=1,tokens=200,ensemble:k=4,weights=prior,knn:8,0.5,"
                    "prepend:k=1+knn:lam=0.2,k=3@hf:x,dtype=bf16"], "L")
    assert told == {
        "none": ("none", "L"), "prepend:k=1,tokens=200": ("prepend:k=1,tokens=200", "L"),
        "ensemble:k=4,weights=prior": ("ensemble:k=4,weights=prior", "L"), "knn:8,0.5": ("knn:8,0.5", "L"),
        "prepend:k=1+knn:lam=0.2,k=3@hf:x,dtype=bf16": ("prepend:k=1+knn:lam=0.2,k=3", "hf:x,dtype=bf16")}
    assert list(systems(["none@bundled:base", "retro+knn,none"], "L").values()) == [
        ("none", "bundled:base"), ("retro+knn", "L"), ("none", "L")]
    assert systems([], "L") == {}


@pytest.mark.parametrize(("given", "said"), [("none,,knn", "empty system"), ("none,none", "itself"), ("none@", "HOW@MODEL"),
                                             ("@bundled:base", "HOW@MODEL"), ("k=1,none", "fusion")])
def test_wrong_names_are_told(given, said):
    from ralm.how import fusion

    with pytest.raises(UsageError, match=said):
        for how, _ in systems([given], "L").values():
            fusion(how)


def test_one_table_of_what_each_is_by_itself(ralm, shared, folder, tiny, tmp_path):
    args = ["score", shared, folder, "--lm", tiny, "--when", "every:32", "--exclude-self"]
    data = ralm(*args, "--compare", f"none,{PREPEND},{ENSEMBLE}", "--json").json
    assert [r["name"] for r in data["systems"]] == ["none", PREPEND, ENSEMBLE] and data["overlap"] is None
    assert data["documents"] == 5 and len(data["skipped"]) == 1 and data["version"] >= 1
    assert [r["text"] for r in data["systems"]] == [512, 448, 448] and data["stride"] == 224
    for row in data["systems"]:
        alone = ralm("score", shared, folder, "--lm", tiny, "--exclude-self", "--how", row["name"], "--stride", "224",
                     *([] if row["name"] == "none" else ["--when", "every:32"]), "--json").json
        assert row["ppl"] == alone["ppl"] and row["retrievals"] == alone["retrievals"]
        assert row["rows"][0]["id"] == alone["rows"][0]["id"]
    none, prepend, _ = data["systems"]
    assert prepend["difference"] == pytest.approx(none["bits_per_byte"] - prepend["bits_per_byte"])
    text = ralm(*args, "--compare", f"none,{PREPEND}", "--compare", ENSEMBLE, "--save", tmp_path / "rows.jsonl")
    assert text.code == 0 and all(name in text.out for name in ("none", PREPEND, ENSEMBLE, "saved", "moved by 224"))
    assert "own documents" in text.out and "excluded from retrieval" in text.out
    first = json.loads((tmp_path / "rows.2.jsonl").read_text().splitlines()[1])
    assert first["nats"] == prepend["rows"][0]["nats"]


def test_evidence_of_what_is_better_than_the_first_is_told(ralm, shared, folder, tiny):
    args = ["score", shared, folder, "--lm", tiny, "--when", "every:32", "--compare"]
    rows = ralm(*args, f"{PREPEND},{ENSEMBLE}", "--json").json["systems"]
    worst, best = sorted((PREPEND, ENSEMBLE), key=lambda name: -next(r["bits_per_byte"] for r in rows if r["name"] == name))
    data = ralm(*args, f"{worst},{best}", "--json").json["systems"][1]
    assert data["difference"] > 0 and data["evidence"]
    out = ralm(*args, f"{worst},{best}").out
    for e in data["evidence"]:
        assert f"bits a byte of {e['text']}: " in out
        assert all(f"{name} " in out for name, moved in list(e["documents"].items())[:3] if moved > 0)


def test_models_are_named_with_an_at(ralm, shared, folder, tiny):
    data = ralm("score", shared, folder / "moon.md", "--lm", "hf:nowhere", "--compare", f"none@{tiny},{PREPEND}@{tiny}", "--json",
                "--exclude-self").json
    assert [r["name"] for r in data["systems"]] == [f"none@{tiny}", f"{PREPEND}@{tiny}"]


@pytest.mark.parametrize(("compare", "said"), [
    ("none,knn", "ralm tokens"), ("none,retro", "ralm neighbours"), ("none,prepnd", "Did you mean"),
    ("none,knn:lam=2", "lam=2"), ("none,prepend:tokens=600", "600")])
def test_what_is_missing_or_wrong_is_one_line_before_any_work(ralm, shared, folder, compare, said, tiny):
    ran = ralm("score", shared, folder / "moon.md", "--lm", tiny, "--compare", compare, "--exclude-self", "-q")
    assert ran.code in (1, 2) and said in ran.err and ran.err.count("ralm: ") == 1 and ran.out == ""


def test_a_model_that_reads_no_neighbours_is_told_before_anything_is_scored(ralm, kb, folder, tiny):
    assert ralm("neighbours", kb, "--lm", tiny, "-q").code == 0
    ran = ralm("score", kb, folder / "moon.md", "--lm", tiny, "--compare", "none,retro", "--exclude-self")
    assert ran.code == 2 and ran.out == "" and "neighbours" in ran.err.splitlines()[-1] and "RETRO" in ran.err.splitlines()[-1]


def test_a_store_that_is_not_there_is_told_first(ralm, folder, tmp_path):
    for more in (["--compare", "none"], []):
        ran = ralm("score", tmp_path / "nowhere", folder / "moon.md", "--lm", "hf:nowhere-either", *more)
        assert ran.code == 1 and "nowhere" in ran.err and "either" not in ran.err


def test_how_and_schedules_that_go_with_nothing_are_refused(ralm, shared, folder, tiny):
    args = ["score", shared, folder / "moon.md", "--lm", tiny]
    ran = ralm(*args, "--how", "prepend", "--compare", "none,prepend")
    assert ran.code == 2 and "exclude each other" in ran.err
    ran = ralm(*args, "--when", "every:4", "--compare", "none")
    assert ran.code == 2 and "every:4" in ran.err and "passages" in ran.err


def test_a_text_that_may_find_itself_is_noted(ralm, shared, folder, tiny):
    args = ["score", shared, folder / "moon.md", "--lm", tiny, "--json", "--compare"]
    assert "--exclude-self" in ralm(*args, f"none,{PREPEND}").err
    assert "--exclude-self" not in ralm(*args, f"none,{PREPEND}", "--exclude-self").err
    assert "--exclude-self" not in ralm(*args, "none").err
