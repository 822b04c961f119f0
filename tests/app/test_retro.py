"""A RETRO on the command line: score, generate and explain with the neighbours of a datastore that changes under it."""

import json

import pytest

pytest.importorskip("torch")
TEXT = "The Moon is the only natural satellite of the Earth. The Eiffel Tower is a wrought-iron lattice tower in Paris."
KNN = "knn:k=8,lam=0.4,temperature=1"


@pytest.fixture(scope="module")
def spec(tiny, tmp_path_factory) -> str:
    """A tiny decoder with random new weights under which each neighbour matters, as retro:FOLDER."""
    import importlib.util
    from pathlib import Path

    from ralm.lm import load
    from ralm.lm.retro import Retro, RetroConfig
    from ralm.lm.retro_files import Base, save

    made = importlib.util.spec_from_file_location("tiny_retro", Path(__file__).parents[1] / "lm" / "tiny_retro.py")
    module = importlib.util.module_from_spec(made)
    made.loader.exec_module(module)
    base, folder = load(tiny), tmp_path_factory.mktemp("retro")
    lm = Retro(base, RetroConfig(gate="none", **(module.SHAPE | dict(m=12, layers=(1, 2)))))
    module.loud(lm.adapter, 1)
    save(lm, folder, Base.of(base, tiny))
    return f"retro:{folder}"


@pytest.fixture(scope="module")
def held(shared, spec, tmp_path_factory):
    """A datastore with neighbours and a token store, to read."""
    import shutil

    from ralm.app import cli

    kb = shutil.copytree(shared, tmp_path_factory.mktemp("held") / "kb")
    assert cli.main(["neighbours", str(kb), "--lm", spec, "-q"]) == 0
    assert cli.main(["tokens", str(kb), "--lm", spec, "-q"]) == 0
    return kb


@pytest.fixture
def kb(held, tmp_path):
    import shutil

    return shutil.copytree(held, tmp_path / "kb")


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"id": "t", "text": TEXT}) + "\n")
    return path


def test_score_reads_neighbours_and_none_is_off(ralm, held, spec, tiny, texts):
    off = ralm("score", held, texts, "--lm", spec, "--json").json
    assert off["nats_per_token"] == pytest.approx(ralm("score", held, texts, "--lm", tiny, "--json").json["nats_per_token"])
    on = ralm("score", held, texts, "--lm", spec, "--how", "retro:k=2", "--json").json
    assert abs(on["nats_per_token"] - off["nats_per_token"]) > 0.01 and on["retrievals"] == on["chunks_searched"] > 5
    told = on["convention"]
    assert told["retriever"] == "bm25" and (told["m"], told["k"]) == (12, 2) and "chunks of 12 tokens" in told["neighbours"]
    assert on["passages_read"] > 2
    assert on["overlap"]["chunks"] == -(-on["tokens"] // 12) and on["overlap"]["nearest"] == 10 and "overlap" not in off
    assert on["curve"][-1]["bits_per_byte"] == pytest.approx(on["bits_per_byte"]) and 0 < on["overlap"]["common_tokens"] <= 1
    out = ralm("score", held, texts, "--lm", spec, "--how", "retro:k=2").out
    assert "the longest common run is" in out and "(their share of the bytes)" in out
    for other in (["--how", "retro:k=1"], ["--how", "retro:k=2", "--retriever", "dense:static"], ["--how", f"retro:k=2+{KNN}"]):
        more = ralm("score", held, texts, "--lm", spec, *other, "--json").json
        assert abs(more["nats_per_token"] - on["nats_per_token"]) > 1e-4, other
    assert more["tokens_searched"] == more["tokens"]
    none = ralm("score", held, texts, "--lm", spec, "--how", "retro", "--where", "licence = 'nobody'", "--json").json
    assert none["nats_per_token"] == off["nats_per_token"] and not none["chunks_searched"]


def test_what_is_missing_is_told_with_what_makes_it(ralm, shared, held, spec, tiny, texts):
    ran = ralm("score", shared, texts, "--lm", spec, "--how", "retro", "-q")
    assert ran.code == 1 and "ralm neighbours" in ran.err and "--lm" in ran.err and ran.err.count("\n") == 1
    ran = ralm("score", held, texts, "--lm", tiny, "--how", "retro", "-q")
    assert ran.code == 2 and ran.err.count("ralm: ") == 1 and "needs neighbours" in ran.err and "retro:FOLDER" in ran.err
    ran = ralm("score", held, texts, "--lm", spec, "--how", "retro", "--when", "every:4", "-q")
    assert ran.code == 2 and "leave it out" in ran.err
    ran = ralm("ask", held, "who?", "--lm", spec, "--how", "retro", "-q")
    assert ran.code == 2 and "generate" in ran.err


def test_generate_tells_the_neighbours(ralm, held, spec):
    prompt = "The Eiffel Tower is named after the engineer Gustave Eiffel, whose company"
    data = ralm("generate", held, prompt, "--lm", spec, "--how", "retro", "--max-tokens", "20", "--json").json
    assert data["tokens"] == 20 and "chunks of 12 tokens" in data["neighbours"] and data["retriever"] is None
    found = [p for e in data["evidence"] for p in e["passages"]]
    assert found and {e["kind"] for e in data["evidence"]} == {"neighbours"}
    for p in found:
        assert ralm("show", held, "--id", p["document"], "--json").json["text"][p["start"]:p["end"]] == p["quote"]
    text = ralm("generate", held, prompt, "--lm", spec, "--how", "retro", "--max-tokens", "20")
    assert text.out[:-1] == data["text"] and "tower.txt" in text.err
    off = ralm("generate", held, prompt, "--lm", spec, "--how", "none", "--max-tokens", "20", "--json").json
    assert data["text"] != off["text"] and off["evidence"] == []


def test_a_removed_document_is_never_read_again(ralm, kb, spec, texts, folder, tmp_path):
    """Not by score, generate or explain; and what they say is what they say of a datastore that never held it."""
    def read():
        made = ralm("explain", kb, TEXT, "--lm", spec, "--how", "retro", "--json").json
        drawn = ralm("generate", kb, "The Moon is the only natural satellite of the Earth.", "--lm", spec, "--how", "retro",
                     "--max-tokens", "24", "--json").json
        names = {p["document"] for data in (made, drawn) for e in data["evidence"] for p in e["passages"]}
        copied = {c["document"] for c in made["copies"]}
        return names | copied | set(made["documents"]), ralm("score", kb, texts, "--lm", spec, "--how", "retro", "--json").json

    before, first = read()
    assert "moon.md" in before
    assert ralm("remove", kb, "--id", "moon.md", "-q").code == 0
    after, second = read()
    assert after and "moon.md" not in after and abs(first["nats_per_token"] - second["nats_per_token"]) > 1e-3
    never = tmp_path / "never"
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "moon.md"]
    assert ralm("build", never, *files, "-q").code == 0
    assert ralm("neighbours", never, "--lm", spec, "-q").code == 0
    theirs = ralm("score", never, texts, "--lm", spec, "--how", "retro", "--json").json
    assert second["nats_per_token"] == pytest.approx(theirs["nats_per_token"], abs=1e-6)


def test_a_new_document_is_read_without_training(ralm, kb, spec, texts, tmp_path):
    before = ralm("score", kb, texts, "--lm", spec, "--how", "retro", "--json").json
    (tmp_path / "more.txt").write_text(TEXT + " It was built on granite.")
    assert ralm("add", kb, tmp_path / "more.txt", "-q").code == 0
    assert ralm("neighbours", kb, "--lm", spec, "-q").code == 0
    after = ralm("score", kb, texts, "--lm", spec, "--how", "retro", "--json").json
    assert abs(after["nats_per_token"] - before["nats_per_token"]) > 1e-3
    left_out = ralm("score", kb, texts, "--lm", spec, "--how", "retro", "--exclude-self", "--json").json
    assert left_out["nats_per_token"] == pytest.approx(after["nats_per_token"])  # another text: not its own


def test_explain_says_what_was_moved_and_copied(ralm, held, spec, tmp_path):
    args = ["explain", held, TEXT, "--lm", spec, "--how", "retro", "--html", tmp_path / "page.html"]
    data = ralm(*args, "--json").json
    assert data.keys() == {"tokens", "documents", "convention", "evidence", "copies"}
    assert {e["kind"] for e in data["evidence"]} == {"neighbours"}
    texts = [t["text"] for t in data["tokens"]]
    longest = max(data["copies"], key=lambda c: c["tokens"])
    assert longest["tokens"] >= 6 and longest["document"] in ("moon.md", "deep/tower.txt")
    for c in data["copies"]:
        assert c["stop"] - c["first"] == c["tokens"] >= 2
        text = ralm("show", held, "--id", c["document"], "--json").json["text"]
        assert "".join(texts[c["first"]:c["stop"]]) == text[c["start"]:c["end"]]
    for i, t in enumerate(data["tokens"]):
        if t["copied"]:
            assert t["copied"]["tokens"] >= 1 and any(e["first"] <= i < e["stop"] and e["passages"] for e in data["evidence"])
    import math

    moved = sum(math.log(data["tokens"][i]["p"] / data["tokens"][i]["p_lm"])
                for e in data["evidence"] if e["passages"] for i in range(e["first"], e["stop"]))
    assert sum(data["documents"].values()) == pytest.approx(moved, rel=1e-4, abs=1e-4)
    text = ralm(*args).out
    assert "copied spans" in text and "nats moved" in text and "moon.md" in text and max(map(len, text.splitlines())) <= 132
    page = (tmp_path / "page.html").read_text()
    assert "Neighbours in force" in page and '"copied"' in page
    both = ralm("explain", held, TEXT, "--lm", spec, "--how", f"retro+{KNN}", "--json").json
    assert both["copies"] and all(t["p_knn"] is not None for t in both["tokens"]) and "tokens" in both["convention"]
    off = ralm("explain", held, TEXT, "--lm", spec, "--how", "retro:k=0", "--json").json
    assert off["copies"] == [] and all(t["copied"] is None for t in off["tokens"]) and off["documents"] == {}
