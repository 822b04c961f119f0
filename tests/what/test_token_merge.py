"""Merged rows stand for what they took in, never cross a document, and are still forgotten exactly."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from ralm.errors import UsageError  # noqa: E402
from ralm.model import RALM  # noqa: E402
from ralm.testing import documents  # noqa: E402
from ralm.types import Document  # noqa: E402
from ralm.what import token_build  # noqa: E402
from ralm.what.datastore import Datastore  # noqa: E402
from ralm.what.token_merge import merged  # noqa: E402
from ralm.what.token_store import TokenStore  # noqa: E402

TEXTS = ["The lighthouse of Brennick was built in 1873. " * 5, "A granite reef is hard to build on.", "",
         "Snow melts in spring; the river carries stones to the sea. " * 4]


@pytest.fixture
def kb(tmp_path):
    return Datastore.build(tmp_path / "kb", documents(TEXTS))


def test_rows_that_stay_stand_for_all(kb, lm):
    whole = TokenStore.build(kb, lm)
    small = merged(whole, "small")
    assert 0.1 * len(whole) < len(small) < 0.9 * len(whole)
    rows = np.arange(len(small))
    counts = small.counts(rows)
    assert counts.sum() == len(whole) and counts.max() <= 10
    by_value = [np.bincount(s.values(np.arange(len(s))), w, lm.vocab) for s, w in ((whole, None), (small, counts))]
    assert np.array_equal(*by_value)  # what merges has the same value
    ids = {d.id: lm.tokenizer.encode(d.text) for d in kb.documents()}
    held = dict.fromkeys(ids, 0.0)
    for place, value, count in zip(small.places(rows), small.values(rows).tolist(), counts):
        assert ids[place.document][place.position] == value
        held[place.document] += count
    assert held == {name: len(x) for name, x in ids.items()}
    with pytest.raises(UsageError, match="there already"):
        merged(whole, "small")


def test_weights_are_those_of_the_rows_taken_in(kb, lm):
    """p_kNN over all rows moves little, though half of the rows are gone; without counts it moves more."""
    whole = TokenStore.build(kb, lm)
    small = merged(whole, "small")
    how = "knn:k=1000,lam=0.5,temperature=50"
    a, b = (RALM(lm, tokens=t, how=how).distributions("The river was built in 1873.").exp() for t in (whole, small))
    assert (a - b).abs().sum(-1).max() < 0.2 and (a - b).abs().max() > 0
    ralm = RALM(lm, tokens=small, how=how)
    one = ralm.explain("The river was built in 1873.")
    assert np.allclose(one.logp, ralm.score("The river was built in 1873.").logp, atol=1e-6)
    assert {n.target for n in one.neighbours[5]}


def test_removal_is_exact(tmp_path, lm):
    gone = Document("gone", TEXTS[3] + TEXTS[0])
    with_it = Datastore.build(tmp_path / "a", [*documents(TEXTS[:2]), gone, *documents(TEXTS[2:], "e")])
    never = Datastore.build(tmp_path / "b", [*documents(TEXTS[:2]), *documents(TEXTS[2:], "e")])
    size = len(merged(TokenStore.build(with_it, lm), "small"))
    with_it.remove(["gone"])
    theirs = merged(TokenStore.build(never, lm), "small")
    how, text = "knn:k=40,lam=0.5,temperature=5", "Snow carries the lighthouse to the sea."
    a = RALM(lm, tokens=TokenStore(with_it, lm, "small"), how=how).score(text).logp
    assert np.array_equal(a, RALM(lm, tokens=theirs, how=how).score(text).logp)
    with_it.compact(purge=True)
    token_build.compact(with_it, "small")
    compacted = TokenStore(with_it, lm, "small")
    assert len(compacted) < size
    assert np.array_equal(a, RALM(lm, tokens=compacted, how=how).score(text).logp)


def test_new_documents_are_appended_as_they_are(kb, lm):
    small = merged(TokenStore.build(kb, lm), "small")
    before = small.counts(np.arange(len(small)))
    kb.add([Document("late", TEXTS[0])])
    small = TokenStore(kb, lm, "small")
    new = len(lm.tokenizer.encode(TEXTS[0]))
    assert np.array_equal(small.counts(np.arange(len(small))), np.append(before, np.ones(new)))
    assert [p.position for p in small.places(np.arange(len(small) - new, len(small)))] == list(range(new))


@pytest.mark.parametrize("how", [dict(dtype="int8"), dict(project="pca:12"), dict(metric="ip")])
def test_every_kind_of_key(kb, lm, how):
    small = merged(TokenStore.build(kb, lm, **how), "small")
    found = RALM(lm, tokens=small, how="knn:k=8,automaton=2").score("Snow melts in spring.")
    assert np.isfinite(found.logp).all() and small.settings["merged"]


def test_pointers_go_to_the_token_that_follows(kb, lm):
    """Not to the next row, where the row between is gone."""
    small = merged(TokenStore.build(kb, lm), "small")
    rows = np.arange(len(small))
    values, places = small.values(rows), small.places(rows)
    next_rows = small.successors(rows[:, None], values)[:, 0]
    for row, then in zip(rows.tolist(), next_rows.tolist()):
        there = [r for r, p in enumerate(places) if p[:3] == (places[row].document, places[row].revision, places[row].position + 1)]
        assert [then] == (there or [-1])
    assert (next_rows >= 0).sum() > 20 and (small.successors(rows[:, None], values + 1) == -1).all()


def test_a_radius_keeps_what_is_not_near(kb, lm):
    whole = TokenStore.build(kb, lm)
    sizes = [len(merged(whole, f"r{i}", radius=r)) for i, r in enumerate((-1.0, 3.0, np.inf))]
    assert sizes[0] == len(whole) > sizes[1] > sizes[2] == len(merged(whole, "all"))
    with pytest.raises(UsageError, match="radius"):
        merged(whole, "none", radius=np.nan)
