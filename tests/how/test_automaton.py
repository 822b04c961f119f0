"""RetoMaton's pointers against a slow automaton written from the paper, one token at a time."""

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from ralm.how import automaton  # noqa: E402
from ralm.model import RALM  # noqa: E402
from ralm.testing import check_ralm, documents  # noqa: E402
from ralm.what.datastore import Datastore  # noqa: E402
from ralm.what.token_store import TokenStore  # noqa: E402

TEXTS = ["The lighthouse of Brennick was built in 1873 by Maria Holt.", "Snow melts in spring. The river then carries stones.",
         "The lighthouse stands on a reef. The river carries snow."]
TEXT = "The lighthouse of Brennick carries stones. The river was built in spring."


@pytest.fixture(scope="module")
def tokens(lm, tmp_path_factory):
    return TokenStore.build(Datastore.build(tmp_path_factory.mktemp("automaton") / "kb", documents(TEXTS)), lm)


def slow(tokens, lm, ids, k, least, lam, temperature, block, out=()):
    """(ln p of every token, how many were searched)."""
    names = [p.document for p in tokens.places(np.arange(len(tokens)))]
    values = tokens.values(np.arange(len(tokens)))
    keys = tokens.leaves[0].rows.keys.take(np.arange(len(tokens))).astype(np.float64)
    base, logp, searched = RALM(lm).distributions(ids).double().exp().numpy(), [], 0
    pointers: set[int] = set()
    for t, token in enumerate(ids):
        if t % block == 0:
            pointers = set()
        with torch.inference_mode():
            q = lm.keys(torch.tensor([[lm.bos, *ids[:t]]]), "ffn_in")[0, -1].double().numpy()
        d = ((keys - q) ** 2).sum(1)
        if len(pointers) >= least:
            near = sorted(pointers, key=lambda r: (d[r], r))[:k]
        else:
            near = [r for r in np.argsort(d, kind="stable").tolist() if names[r] not in out][:k]
            searched += 1
        w = np.exp(-(d[near] - d[near].min()) / temperature)
        w /= w.sum()
        logp.append(np.log((1 - lam) * base[t, token] + lam * w[values[near] == token].sum()))
        pointers = {r + 1 for r in near if values[r] == token and r + 1 < len(values) and names[r + 1] == names[r]}
    return np.array(logp), searched


@pytest.mark.parametrize("k, least, block, out", [(12, 1, 64, ()), (12, 3, 8, ()), (40, 2, 16, ("d0",)), (5, 1, 5, ())])
def test_it_is_the_papers_automaton(tokens, lm, monkeypatch, k, least, block, out):
    monkeypatch.setattr(automaton, "BLOCK", block)
    ids = lm.tokenizer.encode(TEXT)[:60]
    ralm = RALM(lm, tokens=tokens, how=f"knn:k={k},lam=0.4,temperature=3,automaton={least}")
    want, searched = slow(tokens, lm, ids, k, least, 0.4, 3.0, block, out)
    found = ralm.score(ids, exclude=out)
    assert np.abs(found.logp - want).max() < 2e-4
    assert found.convention["tokens_searched"] == searched < len(ids)
    steps = ralm.distributions(ids, exclude=out, stepwise=True).gather(1, torch.tensor(ids)[:, None])[:, 0].numpy()
    assert np.abs(steps - want).max() < 2e-4


def test_more_pointers_than_neighbours_asked_for_is_knn_lm(tokens, lm):
    ids = lm.tokenizer.encode(TEXT)
    always, plain = (RALM(lm, tokens=tokens, how=f"knn:k=7,lam=0.4{x}").score(ids) for x in (",automaton=8", ""))
    assert np.abs(always.logp - plain.logp).max() < 1e-5 and always.convention["tokens_searched"] >= len(ids)


def test_a_window_in_pieces_and_a_prompt_change_nothing(tokens, lm, monkeypatch):
    """Positions are computed from wherever their block begins, by whoever asks."""
    from ralm.how import rows

    ids = lm.tokenizer.encode(TEXT)[:60]
    ralm = RALM(lm, tokens=tokens, how="knn:k=9,lam=0.4,automaton=2")
    whole = ralm.distributions(ids)
    assert (ralm.distributions(ids[13:], prompt=ids[:13]) - whole[13:]).abs().max() < 2e-4
    assert (ralm.distributions(ids[13:], prompt=ids[:13], stepwise=True) - whole[13:]).abs().max() < 2e-4
    monkeypatch.setattr(rows, "BATCH_LOGITS", 7 * lm.vocab)
    assert (ralm.distributions(ids) - whole).abs().max() < 2e-4


def test_the_laws_and_what_is_shown(tokens, lm):
    ralm = RALM(lm, tokens=tokens, how="knn:k=9,lam=0.4,automaton=2")
    check_ralm(ralm, TEXT[:45], prompt="The river", positions=(1, 9, 20))
    told = ralm.explain(TEXT)
    plain = replace(ralm, how="none", when="once").score(TEXT)
    p = np.exp(told.logp)
    assert np.allclose(p, 0.6 * np.exp(plain.logp) + 0.4 * told.p_knn, atol=1e-5)
    assert all(told.neighbours) and min(map(len, told.neighbours)) < 8  # some positions have a few pointers and no more


def test_a_stream_speculated_is_the_stream(tokens, lm):
    """Pointers are remembered per text: guesses that were wrong must not leave any behind."""
    import inspect

    ralm = RALM(lm, tokens=tokens, how="knn:k=9,lam=0.6,automaton=2")
    if "speculate" not in inspect.signature(ralm.stream).parameters:
        pytest.skip("no speculation here")
    plain = ralm.generate("The lighthouse", max_tokens=20)
    assert ralm.generate("The lighthouse", max_tokens=20, speculate=4) == plain


def test_a_removed_document_is_forgotten(lm, tmp_path):
    """Also by pointers: nothing differs from a store that never held it."""
    with_it = Datastore.build(tmp_path / "a", [*documents(TEXTS[:1]), *documents([TEXT], "gone"), *documents(TEXTS[1:], "e")])
    never = Datastore.build(tmp_path / "b", [*documents(TEXTS[:1]), *documents(TEXTS[1:], "e")])
    how, found = "knn:k=9,lam=0.4,automaton=2", []
    for kb in (with_it, never):
        tokens = TokenStore.build(kb, lm)
        if kb is with_it:
            before = RALM(lm, tokens=tokens, how=how).score(TEXT).logp
            kb.remove(["gone0"])
        found.append(RALM(lm, tokens=tokens, how=how).score(TEXT).logp)
    assert np.array_equal(*found) and np.abs(before - found[0]).max() > 0.5
