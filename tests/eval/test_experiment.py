"""Recipes of measurements: what is stored and held out, shares by a filter, expected figures that can be missed."""

import json

import pytest

pytest.importorskip("torch")

from ralm.errors import UsageError
from ralm.eval import experiment

KNN = "knn:k=20,lam=0.5,temperature=10"
RECIPE = {"name": "small", "title": "small", "lm": "bundled:base", "tolerance": 0.01,
          "store": {"source": "texts.jsonl"}, "held": {"every": 4, "total": 400},
          "run": [{"how": "none"}, {"how": KNN, "share": 0.4}, {"how": KNN}]}


@pytest.fixture
def data(tmp_path):
    rows = [{"id": f"t{i}", "text": f"The lamp of tower number {i} burns twelve litres of oil every night."} for i in range(12)]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_stored_and_held_out_are_apart(data):
    stored, held = experiment.documents(RECIPE, data)
    assert [d.id for d in held] == ["t0", "t4", "t8"] and len(stored) == 9 and not {d.id for d in stored} & {d.id for d in held}
    assert all(0 <= d.metadata["part"] < 100 for d in stored)
    assert sum(len(d.text) for d in experiment.documents(RECIPE | {"held": {"every": 4, "total": 100}}, data)[1]) == 100
    with pytest.raises(UsageError, match="--data"):
        experiment.documents(RECIPE | {"store": {"source": "nowhere.jsonl"}}, data)


def test_more_of_the_same_lowers_perplexity_and_expectations_can_be_missed(data, tmp_path):
    rows = experiment.run(RECIPE, data, tmp_path)
    alone, some, whole = (r["nats_per_token"] for r in rows)
    assert whole < some < alone and all(map(experiment.good, rows))
    twice = [{"how": "none", "nats": alone}, {"how": "none", "nats": alone + 0.5}]
    again = experiment.run(RECIPE | {"run": twice}, data, tmp_path)
    assert [experiment.good(r) for r in again] == [True, False]
    told = "\n".join(experiment.lines(RECIPE, again))
    assert "as expected" in told and "off by -0.500" in told and "window" in told


def test_wikitext_is_cut_at_its_articles(tmp_path):
    import zstandard

    text = " = One = \n\n Words of one . \n\n = = A part = = \n\n More . \n\n = Two = \n\n Words of two . \n"
    (tmp_path / "small.raw.txt.zst").write_bytes(zstandard.compress(text.encode()))
    found = list(experiment.texts({"source": "small.raw.txt.zst"}, tmp_path))
    assert [d.text[:7] for d in found] == ["= One =", "= Two ="] and "A part" in found[0].text


def test_the_plot_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="plots need ralm[plot]")
    rows = [{"how": h, "share": s, "ppl": p} for h, s, p in (("none", 1.0, 90.0), (KNN, 0.1, 60.0), (KNN, 1.0, 30.0))]
    experiment.plot(rows, tmp_path / "out.png", "small")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
