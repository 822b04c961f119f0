"""Recipes of RETRO: a share of the database by a filter, nothing at all is RETRO[OFF], overlap and leakage beside every run."""

import json

import pytest

torch = pytest.importorskip("torch")

from ralm.eval import leakage, retro  # noqa: E402
from ralm.eval.experiment import documents, good, texts  # noqa: E402
from ralm.eval.perplexity import evaluate_perplexity  # noqa: E402
from ralm.model import RALM  # noqa: E402

RUNS = [{"how": "none", "lm": "bundled:base"}, {"how": "none"}, {"how": "retro:k=2", "share": 0.0}, {"how": "retro:k=2"},
        {"how": "retro:k=2", "share": 0.5}, {"how": "retro:k=2", "retriever": "dense:static"}]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Towers that differ in a number, a quarter of them held out; one of these is also stored, under another name."""
    root = tmp_path_factory.mktemp("data")
    say = "The lamp of tower number {} burns twelve litres of oil every night, and {} keepers watch it until the morning comes."
    rows = [{"id": f"t{i}", "text": say.format(i, i * 7)} for i in range(12)]
    rows += [{"id": "other", "text": "Nothing is said here."}, {"id": "copy", "text": rows[4]["text"]}]
    (root / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "more.jsonl").write_text(json.dumps({"id": "m0", "text": "Snow lies on the mountain in winter."}))
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A RETRO around the bundled decoder, untrained but with its gates open."""
    from ralm.lm import load
    from ralm.lm.retro import Retro, RetroConfig
    from ralm.lm.retro_files import Base, save

    torch.manual_seed(0)
    lm = Retro(load("bundled:base"), RetroConfig(m=8, width=16, depth=1, heads=2, mlp=16, cross_heads=2, cross_size=8))
    with torch.no_grad():
        for name, p in lm.adapter.named_parameters():
            if "gate" in name:
                p.fill_(0.5)
    folder = tmp_path_factory.mktemp("lm") / "retro"
    save(lm, folder, Base.of(lm, "bundled:base"))
    return f"retro:{folder}"


@pytest.fixture(scope="module")
def recipe(model):
    return {"name": "small", "title": "small", "lm": model, "store": {"source": "texts.jsonl"}, "held": {"every": 4}, "run": RUNS}


def test_shares_and_retrievers_are_told_apart_and_nothing_is_off(data, recipe, tmp_path):
    rows = retro.run(recipe, data, tmp_path)
    base, off, nothing, on, half, dense = rows
    assert off["nats_per_token"] == base["nats_per_token"] == pytest.approx(nothing["nats_per_token"], abs=1e-6)
    assert len({r["nats_per_token"] for r in (off, on, half, dense)}) == 4
    assert (on["share"], half["where"], nothing["where"]) == (1, "part < 50", "part < 0")
    assert [r["retriever"] for r in rows] == [None, None, "bm25", "bm25", "bm25", "dense:static"]
    for r in rows:
        assert r["saved"] == pytest.approx(base["bits_per_byte"] - r["bits_per_byte"], abs=1e-9)
        assert r["curve"][-1]["bits_per_byte"] == pytest.approx(r["bits_per_byte"])
        assert r["curve"][-1]["first"] == pytest.approx(base["bits_per_byte"])
    assert nothing["clean"] == pytest.approx((0, 0), abs=1e-6)
    assert nothing["overlap"]["mean_run"] == 0 < half["overlap"]["mean_run"] <= on["overlap"]["mean_run"] < 1
    told = "\n".join(retro.lines(recipe, rows))
    assert told.count("share ") == 4 and "dense:static" in told and "every night" not in told


def test_what_is_held_out_does_not_find_its_copy(data, recipe, tmp_path):
    bench = retro.Bench(recipe, *documents(recipe, data), tmp_path)
    assert bench.own["t4"] == ["copy"]
    on = bench.run({"how": "retro:k=2"})
    assert next(r for r in on["rows"] if r["id"] == "t4")["excluded"] == ["copy"]
    neighbours = bench.neighbours(recipe["lm"], "bm25")
    run, leaky = bench.leaks(None).overlap.run, retro.leaks(neighbours, neighbours.lm.tokenizer, bench.held, {}).overlap.run
    assert run.sum() < leaky.sum() and (run <= leaky).all()
    system = RALM(bench.model(recipe["lm"]), how="retro:k=2", neighbours=neighbours)
    leaked = evaluate_perplexity(system, bench.held, exclude_self=False)
    assert [r["nats"] for r in leaked["rows"]] != [r["nats"] for r in on["rows"]]


def test_clean_chunks_are_those_with_little_in_common():
    import numpy as np

    found = leakage.Leaks(leakage.Overlap(np.array([1, 8, 0, 9]), np.zeros(4), np.full(4, 64), 64), np.array([10, 10, 20, 5]))
    first = [{"chunk_nats": [3.0, 9.0]}, {"chunk_nats": [4.0]}, {"chunk_nats": [7.0]}]
    rows = [{"chunk_nats": [1.0, 9.0]}, {"chunk_nats": [2.0]}, {"chunk_nats": [0.0]}]
    low, high = retro._clean(found, first, rows)  # documents of 20 bytes each save 2 nats each; the third one is copied
    assert low == high == pytest.approx(0.1 / np.log(2))


def test_comparison_tells_overlap_and_evidence(data, recipe, model, tmp_path):
    """Beside kNN-LM on the same datastore; a model with another tokenizer has no part in the curve."""
    from ralm.app import comparing, options
    from ralm.app.parts import Parts
    from ralm.what.datastore import Datastore
    from ralm.what.neighbours import NeighbourStore
    from ralm.what.token_store import TokenStore

    stored, held = documents(recipe, data)
    kb, parts = Datastore.build(tmp_path / "kb", stored), Parts(tmp_path / "kb", retriever="bm25")
    base, lm = parts.model("bundled:base"), parts.model(model)
    NeighbourStore.build(kb, lm, retriever="bm25")
    TokenStore.build(kb, base)  # its decoder's, so it is its own too
    named = options.systems(["none@bundled:base,retro:k=2,retro:k=2+knn:k=8,lam=0.5,temperature=20,none"], model)
    got = comparing.compared(parts, named, held, "once", None, None, None, True, None)
    first, on, both, off = got["systems"]
    assert off["ppl"] == first["ppl"] != on["ppl"] and both["ppl"] < on["ppl"]
    assert got["overlap"]["m"] == 8 and got["overlap"]["chunks"] == sum(-(-r["tokens"] // 8) for r in on["rows"])
    assert got["overlap"]["retriever"] == "bm25" and 0 < got["overlap"]["copied"] <= 1
    for r in got["systems"]:
        assert [p["chunks"] for p in r["curve"]] == [p["chunks"] for p in first["curve"]]
        assert r["curve"][-1]["bits_per_byte"] == pytest.approx(r["bits_per_byte"]) and sum(r["rows"][0]["chunk_nats"]) > 0
    assert all(kb.has(d) for r in (on, both) for e in r["evidence"] for d in e["documents"]) and both["evidence"]
    told = "\n".join(comparing.lines(got))
    assert "the longest common run is" in told and "(their share of the bytes)" in told and "saves" in told


def test_expectations_can_be_missed(data, recipe, tmp_path):
    runs = [{"how": "none", "nats": 0.0}, {"how": "none", "nats": 0.0, "tolerance": 100.0}]
    rows = retro.run(recipe | {"run": runs}, data, tmp_path)
    assert [good(r) for r in rows] == [False, True]
    told = "\n".join(retro.lines(recipe, rows))
    assert "expected 0.0000: +" in told and "as expected" in told


def test_several_sources_are_read_one_after_the_other(data, tmp_path):
    found = list(texts({"source": ["texts.jsonl", "more.jsonl"], "documents": 2}, data))
    assert [d.id for d in found] == ["t0", "t1", "m0"]
    row = json.dumps({"file": "a.md", "text": "Title: The_lamp\nIt burns (well-known) oil, at night."})
    (tmp_path / "articles.jsonl.zst").write_bytes(pytest.importorskip("zstandard").compress(row.encode()))
    (one,) = texts({"source": "articles.jsonl.zst", "spaced": ["articles.jsonl.zst"]}, tmp_path)
    assert one.title == "The lamp" and " = The lamp = " in one.text and "well @-@ known" in one.text
