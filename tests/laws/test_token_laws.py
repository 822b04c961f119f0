"""The laws with the token side in: kNN-LM over exact and inverted search, alone and above methods at the input."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from ralm.errors import UsageError  # noqa: E402
from ralm.model import RALM  # noqa: E402
from ralm.testing import check_forgetting, check_ralm  # noqa: E402
from ralm.types import Document  # noqa: E402
from ralm.what.datastore import Datastore  # noqa: E402
from ralm.what.token_store import TokenStore  # noqa: E402

FUSIONS = ("knn:k=9,lam=0.3,temperature=5", "knn:k=400,lam=0.6,temperature=40", "knn:k=5,lam=rrc", "knn:k=6,lam=0.5,skip=0.3",
           "knn:k=9,lam=0.4,automaton=2",
           "prepend:k=1,query=12,tokens=24+knn:k=9,lam=0.3,temperature=5",
           "ensemble:k=2,temperature=3,query=12,tokens=24+knn:k=9,lam=0.3,temperature=5")
WORDS = ("the granite reef lighthouse Maria Holt mitochondria cell passage question snow mountain tower candle sailors in "
         "1873 , . é zzz").split()
texts = st.lists(st.sampled_from(WORDS), min_size=8, max_size=18).map(" ".join)
prompts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=20).map(" ".join)
quiet = dict(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.fixture(scope="module")
def tokens(store, lm):
    """Twelve documents, two of them removed since: their rows stand between the others."""
    return TokenStore.build(store, lm, "laws", index="exact")


def system(lm, bm25, tokens, how):
    return RALM(lm, bm25 if "+" in how else None, how=how, when="every:4" if "+" in how else "once", tokens=tokens)


def test_neighbours_matter(lm, tokens):
    """Without this every law could hold because neighbours change nothing."""
    ids = lm.tokenizer.encode("The lighthouse of Brennick was built by Maria Holt on granite.")
    base, knn = RALM(lm).score(ids), RALM(lm, how=FUSIONS[0], tokens=tokens).score(ids)
    assert np.abs(base.logp - knn.logp).mean() > 0.2
    skipped = RALM(lm, how=FUSIONS[3], tokens=tokens).score(ids)
    assert 0 < (skipped.logp == base.logp).sum() < len(ids)  # some tokens are passed over, not all


@settings(max_examples=4, **quiet)
@given(text=texts, prompt=prompts, how=st.sampled_from(FUSIONS))
def test_laws(lm, bm25, tokens, text, prompt, how):
    check_ralm(system(lm, bm25, tokens, how), text, prompt, positions=(1, 5))


@pytest.mark.slow
@pytest.mark.parametrize("how", FUSIONS)
def test_laws_everywhere(lm, bm25, tokens, how):
    for text in ("snow on the granite reef , the tower in 1873 zzz .", "é é é the question , the passage ."):
        check_ralm(system(lm, bm25, tokens, how), text, "the lighthouse of Maria Holt")


@pytest.mark.parametrize("how", FUSIONS[:5])
def test_forgetting_is_exact(tmp_path, lm, how):
    """After a removal every ln p is, to 1e-6, that of a store that never held the document; so it is after purging."""
    from ralm.what import token_build

    kept = [Document(f"k{i}", t) for i, t in enumerate(("The tower of granite stands on the reef. " * 3, "Snow on the mountain."))]
    gone = Document("gone", "Maria Holt built the lighthouse of Brennick in 1873, and nobody must read it. " * 2)
    ours = Datastore.build(tmp_path / "ours", [kept[0], gone, kept[1]])
    never = TokenStore.build(Datastore.build(tmp_path / "never", kept), lm)
    tokens = TokenStore.build(ours, lm)
    ids = lm.tokenizer.encode("Maria Holt built the lighthouse of Brennick in 1873.")
    before = RALM(lm, how=how, tokens=tokens).score(ids)
    ours.remove(["gone"])
    check_forgetting(RALM(lm, how=how, tokens=tokens), RALM(lm, how=how, tokens=never), ids, ["gone"])
    assert np.abs(before.logp - RALM(lm, how=how, tokens=tokens).score(ids).logp).max() > 0.01
    ours.compact(purge=True)
    token_build.compact(ours, "")
    check_forgetting(RALM(lm, how=how, tokens=TokenStore(ours, lm)), RALM(lm, how=how, tokens=never), ids, ["gone"])


def test_all_neighbours_are_the_brute_force_softmax(tmp_path, lm):
    """k = N: p_kNN is the softmax over every key that is alive, in float64, made here from documents and model alone."""
    keys, values = [], []
    tokens = TokenStore.build(Datastore.build(tmp_path / "kb", [Document(w, f"{w} on the granite reef, {w}") for w in WORDS]), lm)
    for d in tokens.store.documents():
        ids = lm.tokenizer.encode(d.text)
        with torch.inference_mode():
            keys.append(lm.keys(torch.tensor([[lm.bos, *ids[:-1]]]), "ffn_in")[0].half().double())
        values += ids
        assert len(ids) <= 64, "one window a document, or this oracle must know windows"
    keys, values = torch.cat(keys), torch.tensor(values)
    ids = lm.tokenizer.encode("snow on the granite reef")
    with torch.inference_mode():
        out = lm.forward(torch.tensor([[lm.bos, *ids[:-1]]]), key="ffn_in")
    d2 = ((out.key[0].double()[:, None] - keys[None]) ** 2).sum(-1)
    w = torch.softmax(-d2 / 7, -1)
    p_knn = torch.zeros(len(ids), lm.vocab, dtype=torch.double).scatter_add_(1, values.expand(len(ids), -1), w)
    want = (0.6 * torch.softmax(out.logits[0].double(), -1) + 0.4 * p_knn).log()
    ours = RALM(lm, how=f"knn:k={len(values) + 50},lam=0.4,temperature=7", tokens=tokens).distributions(ids)
    assert float((ours.double() - want).abs().max()) < 2e-4


def test_what_does_not_fit_is_refused(lm, bm25, tokens, tmp_path, store):
    with pytest.raises(UsageError, match="token store"):
        RALM(lm, how="knn")
    with pytest.raises(UsageError, match=r"skip=0\.9"):
        RALM(lm, how="knn", when="every:4", tokens=tokens)
    with pytest.raises(UsageError, match="without a model"):
        RALM(lm, how="knn", tokens=TokenStore(store, name="laws"))
    with pytest.raises(UsageError, match="one datastore"):
        other = Datastore.build(tmp_path / "other", [Document("a", "words")])
        RALM(lm, bm25, how="prepend+knn", tokens=TokenStore.build(other, lm))
    with pytest.raises(UsageError, match=r"prepend\+knn"):
        RALM(lm, bm25, how="knn+prepend", tokens=tokens)
    for wrong in ("knn:lam=1.5", "knn:temperature=0", "knn:k=-1", "knn:skip=2", "knn:lam=much"):
        with pytest.raises(UsageError):
            RALM(lm, how=wrong, tokens=tokens)
