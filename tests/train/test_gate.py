"""The learnt gate: it finds out where neighbours help, is kept with its token store, and is refused for another."""

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from ralm.errors import FingerprintError, StoreError, UsageError  # noqa: E402
from ralm.how.adaptive import about_neighbours, ranks  # noqa: E402
from ralm.model import RALM  # noqa: E402
from ralm.testing import check_causal, check_normalised, check_one_truth, check_stepwise, documents  # noqa: E402
from ralm.train.gate import fit_gate  # noqa: E402
from ralm.types import Document  # noqa: E402
from ralm.what.datastore import Datastore  # noqa: E402
from ralm.what.token_store import Neighbours, TokenStore  # noqa: E402

SPEC = "knn:k=12,temperature=0.5,lam=learned"
FITTING = dict(layers=3, width=32, epochs=6, dropout=0.0, rate=3e-3)


def words(n, seed):
    rng = np.random.default_rng(seed)
    return "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz   "), n))


@pytest.fixture(scope="module")
def kb(tmp_path_factory):
    return Datastore.build(tmp_path_factory.mktemp("gate") / "kb", documents([words(900, i) for i in range(3)] + ["Snow melts."]))


@pytest.fixture(scope="module")
def texts():
    """Half of each is copied from a stored document, where neighbours know what comes; half is noise, where nobody does."""
    return [Document(f"h{i}", words(900, i % 3)[40 * i:40 * i + 150] + words(160, 100 + i)) for i in range(13)]


@pytest.fixture(scope="module")
def fitted(kb, lm, texts):
    tokens = TokenStore.build(kb, lm)
    return tokens, fit_gate(RALM(lm, tokens=tokens, how=SPEC.replace(",lam=learned", "")), texts, **FITTING)


def test_it_beats_the_best_single_weight_and_spares_searches(fitted, lm):
    tokens, told = fitted
    assert told["late"] < told["fixed"] - 0.04 and told["fixed"] <= told["model"]
    assert told["early"] < told["model"]
    held = Document("new", words(900, 1)[500:700] + words(200, 999))
    gated = RALM(lm, tokens=tokens, how=SPEC)
    fixed = replace(gated, how=f"knn:k=12,temperature=0.5,lam={told['lam']}")
    a, b = gated.score(held.text), fixed.score(held.text)
    assert a.nats_per_token() < b.nats_per_token()
    half = replace(gated, how=SPEC + ",spare=0.5").score(held.text)
    assert half.convention["tokens_searched"] < 0.85 * a.convention["tokens_searched"]
    none = replace(gated, how=SPEC + ",spare=1").score(held.text)
    assert np.array_equal(none.logp, RALM(lm).score(held.text).logp)


@pytest.mark.parametrize("more", ["", ",spare=0.5", ",spare=0.3,automaton=2"])
def test_the_laws(fitted, lm, more):
    ralm = RALM(lm, tokens=fitted[0], how=SPEC + more)
    ids = lm.tokenizer.encode(words(900, 0)[300:340] + " Snow melts.")
    check_normalised(ralm, ids)
    check_causal(ralm, ids, range(1, len(ids), 9))
    check_stepwise(ralm, ids)
    check_one_truth(ralm, "Snow", tokens=6)
    whole = ralm.distributions(ids).gather(1, torch.tensor(ids)[:, None])[:, 0].numpy()
    assert np.abs(ralm.score(ids).logp - whole).max() < 2e-4


def test_it_is_kept_and_refused(fitted, kb, lm, texts, tmp_path):
    tokens, told = fitted
    ralm = RALM(lm, tokens=TokenStore(kb, lm), how=SPEC)
    same = replace(ralm, how=replace(ralm.how, gate=told["gate"])).score(texts[0].text)
    assert np.array_equal(ralm.score(texts[0].text).logp, same.logp)
    for spec in (SPEC.replace("k=12", "k=13"), SPEC.replace("0.5", "0.6")):
        with pytest.raises(FingerprintError, match="was fitted with"):
            RALM(lm, tokens=tokens, how=spec)
    other = TokenStore.build(kb, lm, "hidden", key="hidden")
    with pytest.raises(StoreError, match="no gate"):
        RALM(lm, tokens=other, how=SPEC)
    moved = replace(told["gate"], made_for=told["gate"].made_for | {"fingerprint": "0" * 32})
    moved.save(tokens)
    try:
        with pytest.raises(FingerprintError, match="fingerprint"):
            RALM(lm, tokens=tokens, how=SPEC)
    finally:
        told["gate"].save(tokens)
    with pytest.raises(UsageError, match="at least 2,560 tokens"):
        fit_gate(ralm, texts[:1])


def test_it_outlives_new_documents_and_compaction(fitted, kb, lm):
    from ralm.what import token_build

    tokens, _ = fitted
    before = RALM(lm, tokens=tokens, how=SPEC).score("Snow melts.").logp
    kb.add([Document("late", "Granite.")])
    kb.remove(["late"])
    kb.compact(purge=True)
    token_build.compact(kb, "default")
    after = RALM(lm, tokens=TokenStore(kb, lm), how=SPEC).score("Snow melts.").logp
    assert np.abs(after - before).max() < 1e-6


def test_features_of_neighbours_by_hand():
    d = np.array([[1.0, 2.0, 2.0, 5.0], [0.0, 3.0, np.inf, np.inf]], np.float32)
    near = Neighbours(np.array([[0, 1, 2, 3], [7, 8, -1, -1]]), d, np.array([[4, 4, 9, 4], [1, 2, -1, -1]]))
    x = about_neighbours(near, 2.0, 4).numpy()
    assert ranks(4) == [1, 2, 4] and ranks(5) == [1, 2, 4]
    w = np.exp(-(d[0] - 1) / 2)
    p = np.array([w[[0, 1, 3]].sum(), w[2]]) / w.sum()
    assert np.allclose(x[0], [0.5, 1, 2.5, 1, 0.5, 0.5, p.max(), -(p * np.log(p)).sum()], atol=1e-6)
    assert np.allclose(x[1, :6], [0, 1.5, 1.5, 1, 1, 0.5], atol=1e-6)
