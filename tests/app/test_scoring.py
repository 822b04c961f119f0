"""score: the promised fields, agreement with the library, and exclusion of the scored text itself."""

import math

import pytest

FIELDS = {"ppl", "bits_per_byte", "nats_per_token", "tokens", "bytes", "convention", "seconds"}


def test_score_has_every_field_and_they_agree(ralm, shared, folder, tiny):
    data = ralm("score", shared, folder / "moon.md", "--lm", tiny, "--json").json
    assert data.keys() >= FIELDS
    text = (folder / "moon.md").read_text()
    assert data["bytes"] == len(text.encode())
    assert data["ppl"] == pytest.approx(math.exp(data["nats_per_token"]))
    assert data["bits_per_byte"] == pytest.approx(data["nats_per_token"] * data["tokens"] / math.log(2) / data["bytes"])
    assert data["convention"]["window"] == 512 and data["convention"]["how"] == "Plain()"
    assert data["retrievals"] == 0


def test_score_is_the_librarys(ralm, shared, folder, tiny):
    from ralm import RALM

    data = ralm("score", shared, folder / "moon.md", "--lm", tiny, "--window", "64", "--stride", "16", "--json").json
    scored = RALM(tiny).score((folder / "moon.md").read_text(), window=64, stride=16)
    assert data["nats_per_token"] == pytest.approx(scored.nats_per_token(), rel=1e-6)


@pytest.mark.parametrize("how", ["prepend:tokens=64", "ensemble:k=2,tokens=64"])
def test_a_text_in_the_store_is_not_its_own_evidence(ralm, shared, folder, tiny, how):
    args = ["score", shared, folder / "moon.md", "--lm", tiny, "--how", how, "--when", "every:32", "--json"]
    alone, leaked = ralm(*args, "--exclude-self").json, ralm(*args).json
    assert alone["retrievals"] > 0 and alone["excluded_documents"] == 1
    assert leaked["excluded_documents"] == 0
    assert alone["nats_per_token"] != leaked["nats_per_token"]


def test_passages_that_were_cut_are_told(ralm, shared, folder, tiny):
    args = ["score", shared, folder / "moon.md", "--lm", tiny, "--when", "every:32"]
    data = ralm(*args, "--how", "prepend:tokens=9", "--json").json
    assert data["passages_read"] >= data["passages_cut"] > 0
    assert "cut to the tokens they may take" in ralm(*args, "--how", "prepend:tokens=9").out
    assert "cut to the tokens" not in ralm(*args, "--how", "none").out


def test_several_files_are_scored_one_by_one(ralm, shared, folder, tiny, tmp_path):
    saved = tmp_path / "rows.jsonl"
    data = ralm("score", shared, folder, "--lm", tiny, "--save", saved, "--json").json
    assert data["documents"] == len(data["rows"]) == 5 and len(data["skipped"]) == 1
    assert sum(r["tokens"] for r in data["rows"]) == data["tokens"]
    again = ralm("score", shared, folder, "--lm", tiny, "--save", saved, "--json").json
    assert again["nats_per_token"] == data["nats_per_token"]
    text = ralm("score", shared, folder, "--lm", tiny, "--save", saved).out
    assert "perplexity" in text and "bits per byte" in text and "convention" in text


def test_evidence_that_leaves_no_room_is_refused(ralm, shared, folder, tiny):
    ran = ralm("score", shared, folder / "moon.md", "--lm", tiny, "--how", "prepend:tokens=600", "-q")
    assert ran.code == 2 and "600" in ran.err and "512" in ran.err


@pytest.mark.parametrize("how", ["prepend:k=2", "ensemble:k=2"])
def test_evidence_leaves_half_of_a_small_window_to_the_text(ralm, shared, folder, tiny, how):
    args = ["score", shared, folder / "moon.md", "--lm", tiny, "--how", how, "--when", "every:16", "--json"]
    convention = ralm(*args, "--window", "128", "--stride", "64").json["convention"]
    assert (convention["window"], convention["stride"], convention["evidence_tokens"]) == (128, 64, 64)
    assert ralm(*args).json["convention"]["evidence_tokens"] == 256


def test_a_text_that_may_find_itself_is_noted(ralm, shared, folder, tiny):
    args = ["score", shared, folder / "moon.md", "--lm", tiny, "--json"]
    assert "--exclude-self" in ralm(*args, "--how", "prepend").err
    assert "--exclude-self" not in ralm(*args, "--how", "prepend", "--exclude-self").err
    assert "--exclude-self" not in ralm(*args).err
