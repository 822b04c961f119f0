"""kNN-LM against brute force over all stored keys in float64, and the edges of its arithmetic."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from ralm.errors import StoreError, UsageError  # noqa: E402
from ralm.how import fusion  # noqa: E402
from ralm.how.input import Prepend  # noqa: E402
from ralm.how.output import Interpolate  # noqa: E402
from ralm.model import RALM  # noqa: E402
from ralm.testing import check_causal, check_normalised, check_one_truth, check_stepwise  # noqa: E402
from ralm.what.token_store import Neighbours, TokenStore  # noqa: E402

TEXT = "The granite reef was built by Maria Holt. Snow melts on the mountain of the sea, and the lighthouse of the cell reads."


@pytest.fixture(scope="module")
def tokens(store, lm):
    return TokenStore.build(store, lm)


@pytest.fixture(scope="module")
def ids(lm):
    return lm.tokenizer.encode(TEXT)


def keys_of(lm, ids):
    """float64 [T, D]: the state that predicts each token, one forward per token, in windows of 64 tokens that move by 32."""
    begins = [0 if t < 64 else 32 * (t // 32) - 32 for t in range(len(ids))]
    with torch.inference_mode():
        return np.stack([lm.keys(torch.tensor([[lm.bos, *ids[begin:t]]]), "ffn_in")[0, -1].double().numpy()
                         for t, begin in enumerate(begins)])


def brute(store, tokens, lm, ids, lam, temperature, alive=lambda name: True):
    """float64 [T, V]: softmax over every key of every living document, mixed with the model; nothing of ralm but stored keys."""
    rows = tokens.leaves[0].rows
    names = [p.document for p in tokens.places(np.arange(len(tokens)))]
    keep = np.array([alive(n) and n in {d.id for d in store.documents()} for n in names])
    x, values = rows.keys.take(np.arange(len(tokens))).astype(np.float64)[keep], rows.values(np.arange(len(tokens)))[keep]
    d = ((keys_of(lm, ids)[:, None] - x[None]) ** 2).sum(-1)
    w = np.exp(-(d - d.min(1, keepdims=True)) / temperature)
    w /= w.sum(1, keepdims=True)
    p = np.zeros((len(ids), lm.vocab))
    for t in range(len(ids)):
        np.add.at(p[t], values, w[t])
    return np.log((1 - lam) * np.exp(RALM(lm).distributions(ids).double().numpy()) + lam * p + 1e-300)


@pytest.mark.parametrize("lam, temperature", [(0.25, 10.0), (0.6, 0.5), (0.99, 100.0)])
def test_k_equal_n_is_a_softmax_over_everything(store, tokens, lm, ids, lam, temperature):
    how = Interpolate(k=len(tokens), lam=lam, temperature=temperature)
    ralm = RALM(lm, tokens=tokens, how=how)
    want = brute(store, tokens, lm, ids, lam, temperature)
    assert np.abs(ralm.distributions(ids).numpy() - want).max() < 2e-4
    assert np.abs(ralm.score(ids).logp - np.take_along_axis(want, np.array(ids)[:, None], 1)[:, 0]).max() < 2e-4
    want = brute(store, tokens, lm, ids, lam, temperature, lambda name: name not in ("d0", "d7"))
    assert np.abs(ralm.score(ids, exclude=["d0", "d7"]).logp
                  - np.take_along_axis(want, np.array(ids)[:, None], 1)[:, 0]).max() < 2e-4


@pytest.mark.parametrize("spec", ["knn:k=7,lam=0.4,temperature=2", "knn:k=7,lam=rrc,tau=0.3,alpha=0.8", "knn:k=5,lam=1",
                                  "knn:k=7,skip=0.12", "knn:k=9,automaton=2,skip=0.12"])
def test_the_laws_and_targets(tokens, lm, ids, spec):
    ralm = RALM(lm, tokens=tokens, how=spec)
    check_normalised(ralm, ids)
    check_causal(ralm, ids, range(1, len(ids), 7))
    check_stepwise(ralm, ids)
    check_stepwise(ralm, ids[7:], prompt=ids[:7], window=24, stride=5)
    check_one_truth(ralm, TEXT[:40], tokens=12)
    for more in (dict(), dict(window=24, stride=5)):
        whole = ralm.distributions(ids, **more).gather(1, torch.tensor(ids)[:, None])[:, 0].numpy()
        assert np.abs(ralm.score(ids, **more).logp - np.maximum(whole, -1e9)).max() < 1e-4 or "lam=1" in spec
    moved = np.abs(ralm.score(ids).logp - RALM(lm).score(ids).logp)
    assert np.median(moved[np.isfinite(moved)]) > (0 if "skip" in spec else 1e-3) and moved.max() > 0.1


@pytest.mark.parametrize("spec", ["knn:lam=0", "knn:k=0", "knn:skip=0", "knn:lam=0,automaton=3", "knn:lam=0,spare=0.5"])
def test_what_changes_nothing_is_the_model_bit_for_bit(tokens, lm, ids, spec):
    ralm = RALM(lm, tokens=tokens, how=spec)
    assert np.array_equal(ralm.score(ids).logp, RALM(lm).score(ids).logp)
    assert torch.equal(ralm.distributions(ids), RALM(lm).distributions(ids))


def test_a_weight_of_one_leaves_the_neighbours_alone(tokens, lm, ids):
    logp = RALM(lm, tokens=tokens, how="knn:k=3,lam=1").distributions(ids)
    assert not logp.isnan().any() and (torch.isneginf(logp).sum(1) >= lm.vocab - 3).all()


def test_over_passages_the_states_are_those_of_the_text(store, bm25, tokens, lm, ids):
    """prepend+knn: what the model that reads passages says, mixed with the neighbours kNN-LM alone would use."""
    how = replace(fusion("prepend:k=1,tokens=16+knn:k=6,lam=0.3,temperature=2"))
    both = RALM(lm, bm25, how=how, when="every:4", tokens=tokens)
    below = RALM(lm, bm25, how=how.inner, when="every:4")
    p_knn = RALM(lm, tokens=tokens, how="knn:k=6,lam=1,temperature=2").distributions(ids, window=48, stride=24).exp()
    want = (0.7 * below.distributions(ids).exp() + 0.3 * p_knn).log()
    assert (both.distributions(ids) - want).abs().max() < 2e-4
    assert np.abs(both.score(ids).logp - want.gather(1, torch.tensor(ids)[:, None])[:, 0].numpy()).max() < 2e-4
    check_stepwise(both, ids[:20], prompt=ids[20:26])
    check_stepwise(replace(both, how=replace(how, skip=0.12)), ids[:20])
    check_stepwise(replace(both, how=replace(how, automaton=2)), ids[:20])


def found(d, values, counts=None):
    d = np.asarray(d, np.float32)
    return Neighbours(np.where(np.isinf(d), -1, np.arange(d.shape[1])[None]), d, np.asarray(values, np.int64), counts)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2 ** 32 - 1), st.sampled_from([1e-30, 1e-3, 1.0, 10.0, 1e6]), st.sampled_from([0.0, 1e-6, 0.3, 1.0]))
def test_the_arithmetic_in_float64(seed, temperature, lam):
    rng = np.random.default_rng(seed)
    S, K, V = 3, 6, 5
    d = np.sort(rng.uniform(300, 900, (S, K)).astype(np.float32), 1)
    values = rng.integers(0, V, (S, K))
    for s in range(S):  # fewer than k
        n = rng.integers(1, K + 1)
        d[s, n:], values[s, n:] = np.inf, -1
    logp = torch.log_softmax(torch.from_numpy(rng.normal(size=(S, V)) * 20).float(), -1)
    with np.errstate(over="ignore", divide="ignore"):
        w = np.exp((d[:, :1].astype(np.float64) - d) / temperature)
        w /= w.sum(1, keepdims=True)
        p = np.stack([np.bincount(v[v >= 0], x[v >= 0], V) for v, x in zip(values, w)])
        want = np.log((1 - lam) * logp.double().exp().numpy() + lam * p)
    how = Interpolate(lam=lam, temperature=temperature)
    ours = how.mix(logp, found(d, values)).double().numpy()
    assert not np.isnan(ours).any()
    likely = want > -60  # below, weights of float32 are 0 and the model's share is all there is
    assert np.abs(ours[likely] - want[likely]).max() < 1e-4 and (ours[~likely] < -59).all()
    targets = torch.from_numpy(rng.integers(0, V, S))
    one = how.mix_targets(logp.gather(1, targets[:, None])[:, 0], targets, found(d, values)).double().numpy()
    there = ours[np.arange(S), targets.numpy()]
    assert np.array_equal(np.isinf(one), np.isinf(there)) and np.allclose(one, there, atol=1e-5)


def test_a_row_that_stands_for_three_is_three_rows():
    how, logp = Interpolate(lam=0.4, temperature=3.0), torch.log_softmax(torch.randn(1, 8), -1)
    heavy = found([[1.0, 2.0]], [[3, 4]], np.array([[3.0, 1.0]], np.float32))
    assert torch.allclose(how.mix(logp, heavy), how.mix(logp, found([[1.0, 1.0, 1.0, 2.0]], [[3, 3, 3, 4]])), atol=1e-6)


def test_relative_confidence_is_nests():
    """Weight of the model: sigmoid((min d / max d - alpha) / tau), over the neighbours there are."""
    how = Interpolate(lam="rrc", alpha=0.3, tau=0.1)
    near = found([[2.0, 5.0, 10.0, np.inf], [10.0, 10.0, 10.0, 10.0], [0.0, 0.0, 0.0, np.inf], [0.0, 1.0, 4.0, 4.0]], [[0] * 4] * 4)
    want = [1 - 1 / (1 + np.exp(-(r - 0.3) / 0.1)) for r in (0.2, 1.0, 1.0, 0.0)]
    assert np.allclose(how.lams(near)[:, 0], want, atol=1e-6)


def test_relative_confidence_needs_distances(store, lm):
    by_product = TokenStore.build(store, lm, "product", metric="ip")
    with pytest.raises(UsageError, match="metric=l2"):
        RALM(lm, tokens=by_product, how="knn:lam=rrc")
    check_normalised(RALM(lm, tokens=by_product, how="knn:k=5,lam=0.3"), lm.tokenizer.encode(TEXT))


@pytest.mark.parametrize("spec", ["knn:lam=2", "knn:lam=often", "knn:k=1.5", "knn:temperature=0", "knn:temperature=nan",
                                  "knn:skip=-1", "knn:tau=0", "knn:inner=5", "knn:gate=5", "knn:automaton=-1", "knn:spare=0.5",
                                  "knn:lam=learned,spare=2"])
def test_bad_options_are_one_line(spec):
    with pytest.raises(UsageError) as e:
        fusion(spec)
    assert "\n" not in str(e.value)


def test_a_batch_is_its_rows(store, tokens, lm, ids):
    """The contract takes several rows: they do not touch each other."""
    from ralm.run import _Fetch
    from ralm.types import Segment

    ids = ids[:50]
    other = ids[9:] + ids[:9]
    for spec in ("knn:k=6,lam=0.4", "knn:k=12,lam=0.4,automaton=2", "knn:k=6,skip=0.12"):
        ralm = RALM(lm, tokens=tokens, how=spec)
        run = ralm._run(ids, "", None, None, (), None)
        run.range = range(len(ids))
        with torch.inference_mode():
            ((_, both),) = ralm.how.logprobs(lm, torch.tensor([ids, other]), [Segment(0, len(ids), None)], _Fetch(run, 0), store)
        for row, text in zip(both, (ids, other)):
            assert (row - ralm.distributions(text)).abs().max() < 2e-4


def test_the_token_store_is_told_to_what_stands_below(store, lm):
    """A kNN-LM under another fusion at the output is checked against its token store, and gets its gate, as one above is."""
    from ralm.how.output import bound

    by_product = TokenStore.build(store, lm, "product", metric="ip")
    with pytest.raises(UsageError, match="metric=l2"):
        bound(fusion("knn:lam=rrc+infgram"), by_product)
    with pytest.raises(StoreError, match="no gate"):
        bound(fusion("knn:lam=learned+infgram"), by_product)


def test_prepend_still_reads(store, bm25, lm, ids):
    """The refactoring of targets leaves fusions without any alone."""
    ralm = RALM(lm, bm25, how=Prepend(k=1, tokens=16), when="every:8")
    assert np.allclose(ralm.score(ids).logp, ralm.distributions(ids).gather(1, torch.tensor(ids)[:, None])[:, 0].numpy(), atol=1e-5)
