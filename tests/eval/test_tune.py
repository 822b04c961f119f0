"""Settings computed from one search equal the scores with those settings."""

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch")

from ralm.errors import UsageError
from ralm.eval.tune import tune_knn
from ralm.model import RALM
from ralm.types import Document
from ralm.what.token_store import TokenStore

TEXTS = ["The granite reef was built by Maria Holt in 1873.", "Snow melts on the mountain; the cell reads the passage. " * 3, ""]


@pytest.fixture(scope="module")
def ralm(store, lm):
    return RALM(lm, tokens=TokenStore.build(store, lm), how="knn")


@pytest.mark.parametrize("spec", ["knn", "knn:skip=0.12", "prepend:k=1,tokens=16+knn"])
def test_every_point_is_what_score_says(store, bm25, lm, ralm, spec):
    if "prepend" in spec:
        ralm = replace(ralm, retriever=bm25, how=spec, when="every:8")
    else:
        ralm = replace(ralm, how=spec)
    found = tune_knn(ralm, TEXTS, ks=[4, 33, 2000], lams=[0, 0.3, 0.8], temperatures=[0.5, 20], window=40, stride=20)
    assert len(found["table"]) == 18 and found["documents"] == 3
    for row in (found["table"][1], found["table"][8], found["table"][15], found["table"][9]):
        how = replace(ralm.how, k=row["k"], lam=row["lam"], temperature=row["temperature"])
        scored = [replace(ralm, how=how).score(t, window=40, stride=20) for t in TEXTS]
        assert abs(sum(s.nats for s in scored) / found["tokens"] - row["nats_per_token"]) < 1e-6
    least = min(found["table"], key=lambda row: row["nats_per_token"])
    assert {k: found["best"][k] for k in least} == least
    base = [replace(ralm, how=replace(ralm.how, k=0)).score(t, window=40, stride=20).nats for t in TEXTS]
    assert abs(found["model"]["nats_per_token"] - sum(base) / found["tokens"]) < 1e-6
    assert abs(found["gain"] - (found["model"]["nats_per_token"] - found["best"]["nats_per_token"])) < 1e-12
    assert found["gain_interval"][0] <= found["gain"] <= found["gain_interval"][1]
    assert found["searched"] <= found["tokens"] and (found["searched"] == found["tokens"]) == ("skip" not in spec)


def test_a_text_that_is_stored_does_not_find_itself(store, ralm):
    (own,) = store.get(["d3"]) if hasattr(store, "get") else [d for d in store.documents() if d.id == "d3"]
    seen = tune_knn(ralm, [own], ks=[8], lams=[0.5], temperatures=[1.0], exclude_self=False)
    hidden = tune_knn(ralm, [own], ks=[8], lams=[0.5], temperatures=[1.0])
    assert hidden["best"]["nats_per_token"] > seen["best"]["nats_per_token"] + 0.3
    apart = replace(ralm, how="knn:k=8,lam=0.5,temperature=1").score(own.text, exclude=["d3"])
    assert abs(apart.nats_per_token() - hidden["best"]["nats_per_token"]) < 1e-6


def test_an_edge_of_the_grid_is_told_and_nonsense_refused(lm, ralm):
    found = tune_knn(ralm, [Document("x", TEXTS[1])], ks=[1, 2], lams=[0.1], temperatures=[1e-3, 1e-2])
    assert "k" in found["edges"] and "lam" not in found["edges"]
    for bad in (dict(ks=[0]), dict(lams=[1.5]), dict(temperatures=[0.0]), dict(ks=[])):
        with pytest.raises(UsageError):
            tune_knn(ralm, TEXTS, **bad)
    with pytest.raises(UsageError, match="no neighbours"):
        tune_knn(RALM(lm), TEXTS)
    with pytest.raises(UsageError, match="no token"):
        tune_knn(ralm, [""])


def test_intervals_are_over_texts(ralm):
    """The same text twice has no spread."""
    found = tune_knn(ralm, [Document("a", TEXTS[0]), Document("b", TEXTS[0])], ks=[4], lams=[0.2], temperatures=[1.0])
    low, high = found["best"]["interval"]
    assert np.isclose(low, high) and np.isclose(low, found["best"]["nats_per_token"])
