"""TRIME's distribution: one softmax over vocabulary and memory, the laws, and what is refused."""

import math
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from ralm.errors import UsageError  # noqa: E402
from ralm.how import fusion  # noqa: E402
from ralm.model import RALM  # noqa: E402
from ralm.testing import (  # noqa: E402
    check_causal,
    check_forgetting,
    check_normalised,
    check_one_truth,
    check_stepwise,
    check_targets,
)
from ralm.types import Document  # noqa: E402
from ralm.what.datastore import Datastore  # noqa: E402
from ralm.what.token_store import TokenStore  # noqa: E402

TEXT = "The lighthouse of Brennick was built by Maria Holt on granite, and the granite reef was built by snow."
FUSIONS = ("trime:k=9,temperature=2", "trime:k=400", "trime:k=0", "trime:k=7,local=false",
           "trime:k=0+knn:k=9,lam=0.3,temperature=20")


@pytest.fixture(scope="module")
def tokens(store, lm):
    return TokenStore.build(store, lm, "inner", metric="ip", index="exact")


def brute(lm, ids, keys_ND, values_N, temperature, local):
    """p(. | x_<t) by the equation in float64, everything in one row: [T, V]."""
    with torch.inference_mode():
        out = lm.forward(torch.tensor([[lm.bos, *ids[:-1]]]), key="ffn_in")
    g, logits = out.key[0].double(), out.logits[0].double()
    mass = torch.exp(logits - 20)
    for t in range(len(ids)):
        pairs = list(zip(keys_ND.double(), values_N)) + (list(zip(g[:t], ids[:t])) if local else [])
        for key, value in pairs:
            mass[t, value] += math.exp(float(g[t] @ key) / (math.sqrt(len(key)) * temperature) - 20)
    return (mass / mass.sum(-1, keepdim=True)).log()


@pytest.mark.parametrize("local", [True, False])
def test_it_is_the_equation(tmp_path, lm, local):
    texts = ("snow on the granite reef, snow", "the tower of the reef", "Maria Holt built it on granite")
    tokens = TokenStore.build(Datastore.build(tmp_path / "kb", [Document(w, w) for w in texts]), lm, metric="ip")
    keys, values = [], []
    for d in tokens.store.documents():
        ids = lm.tokenizer.encode(d.text)
        with torch.inference_mode():
            keys.append(lm.keys(torch.tensor([[lm.bos, *ids[:-1]]]), "ffn_in")[0].half())
        values += ids
    ids = lm.tokenizer.encode("snow on the granite, granite reef")
    want = brute(lm, ids, torch.cat(keys), values, 1.5, local)
    how = f"trime:k={len(values) + 9},temperature=1.5,local={str(local).lower()}"
    ours = RALM(lm, how=how, tokens=tokens).distributions(ids)
    assert float((ours.double() - want).abs().max()) < 2e-4
    alone = brute(lm, ids, torch.empty(0, 1), [], 1.5, local)
    nothing = RALM(lm, how=how, tokens=tokens).distributions(ids, exclude=list(texts))
    assert float((nothing.double() - alone).abs().max()) < 2e-4


@pytest.mark.parametrize("how", FUSIONS)
def test_laws(lm, tokens, how):
    ids = lm.tokenizer.encode(TEXT)[:40]
    ralm = RALM(lm, how=how, tokens=tokens)
    check_normalised(ralm, ids)
    check_causal(ralm, ids, (1, 7, 20))
    check_stepwise(ralm, ids)
    check_targets(ralm, ids)
    check_targets(ralm, ids[8:], ids[:8])
    check_one_truth(ralm, "the lighthouse of Maria Holt", tokens=5)
    assert float(np.abs(ralm.score(ids).logp - RALM(lm).score(ids).logp).mean()) > 0.1  # the memory matters


def test_windows_see_their_own_tokens_only(lm, tokens):
    """A text of several windows, token by token and whole, with the memory of states that streaming keeps."""
    ids = lm.tokenizer.encode(TEXT * 2)[:90]
    ralm = RALM(lm, how="trime:k=5", tokens=tokens)
    whole = ralm.distributions(ids, window=24, stride=10)
    steps = ralm.distributions(ids, window=24, stride=10, stepwise=True)
    assert float((whole - steps).abs().max()) < 2e-4


def test_without_memory_it_is_the_model(lm, store, tokens):
    ids = lm.tokenizer.encode(TEXT)[:30]
    base = RALM(lm).score(ids).logp
    for how, settings in (("trime:k=0,local=false", {}), ("trime:k=5,local=false", {"exclude": [d.id for d in store.documents()]})):
        np.testing.assert_array_equal(RALM(lm, how=how, tokens=tokens).score(ids, **settings).logp, base)
    local = RALM(lm, how="trime:k=0").score(ids).logp  # no store needed
    assert local[0] == pytest.approx(base[0], abs=1e-5) and np.abs(local - base).max() > 0.1
    everything = RALM(lm, how="trime:k=5", tokens=tokens).score(ids, exclude=[d.id for d in store.documents()]).logp
    np.testing.assert_allclose(everything, local, atol=1e-5)


def test_forgetting_is_exact(tmp_path, lm):
    kept = [Document(f"k{i}", t) for i, t in enumerate(("The tower of granite stands on the reef. " * 3, "Snow on the mountain."))]
    gone = Document("gone", "Maria Holt built the lighthouse of Brennick in 1873, and nobody must read it. " * 2)
    ours = Datastore.build(tmp_path / "ours", [kept[0], gone, kept[1]])
    never = TokenStore.build(Datastore.build(tmp_path / "never", kept), lm, metric="ip")
    tokens = TokenStore.build(ours, lm, metric="ip")
    ours.remove(["gone"])
    ids = lm.tokenizer.encode("Maria Holt built the lighthouse of Brennick in 1873.")
    check_forgetting(RALM(lm, how="trime:k=9", tokens=tokens), RALM(lm, how="trime:k=9", tokens=never), ids, ["gone"])


def test_explanations_name_the_documents(lm, tokens):
    made = RALM(lm, how="trime:k=6", tokens=tokens).explain(TEXT[:60])
    assert made.documents and all(share >= 0 for share in made.documents.values())
    assert sum(len(x) for x in made.neighbours) > 20 and np.nanmax(made.p_knn) <= 1 + 1e-6
    assert 0 < sum(made.documents.values()) < len(made.logp)


def test_what_does_not_fit_is_refused(store, lm, bm25, tokens):
    for wrong in ("trime:temperature=0", "trime:k=-1", "trime:local=2", "trime:key=other", "infgram+trime", "prepend+trime"):
        with pytest.raises(UsageError):
            RALM(lm, bm25, how=wrong, tokens=tokens)
    with pytest.raises(UsageError, match="token store"):
        RALM(lm, how="trime")
    far = TokenStore.build(store, lm, "far", metric="l2", index="exact")
    with pytest.raises(UsageError, match="--metric ip"):
        RALM(lm, how="trime", tokens=far)
    assert fusion("trime:k=0").asks == "nothing" and replace(fusion("trime"), k=0).needs == {"logits", "hidden"}
