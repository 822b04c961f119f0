"""Exact nearest keys against brute force, and the promise that a distance depends on query and key alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ralm.errors import UsageError
from ralm.index import nearest


def make(rng, n, dim, parts=2, int8=False, spread=1.0, metric="l2"):
    x = (rng.normal(size=(n, dim)) * spread).astype(np.float16)
    step = None
    if int8:
        step = (np.abs(x.astype(np.float32)).max(0, initial=1e-3) / 127).astype(np.float32)
        x = np.round(x.astype(np.float32) / step).astype(np.int8)
    cut = np.array_split(x, parts)
    wide = [p.astype(np.float32) * (1 if step is None else step) for p in cut]
    norms = [(w.astype(np.float64) ** 2).sum(1).astype(np.float32) for w in wide]
    return nearest.Keys(cut, norms, dim, step, metric), np.concatenate(wide)


def brute(x, q, k, allowed, metric):
    d = -(q.astype(np.float64) @ x.T.astype(np.float64)) if metric == "ip" else (
        (q[:, None].astype(np.float64) - x[None]) ** 2).sum(-1)
    d[:, ~allowed] = np.inf
    order = np.lexsort((np.broadcast_to(np.arange(len(x)), d.shape), d))[:, :k]
    return order, np.take_along_axis(d, order, 1)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["l2", "ip"]), st.booleans(), st.integers(1, 40), st.sampled_from([3, 8, 33]))
def test_exact_is_brute_force(seed, metric, int8, k, dim):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 400))
    keys, x = make(rng, n, dim, int8=int8, metric=metric)
    allowed = rng.random(n) < rng.choice([0.0, 0.05, 0.5, 1.0])
    q = rng.normal(size=(int(rng.integers(1, 5)), dim)).astype(np.float32)
    rows, d = nearest.exact(keys, q, k, None if allowed.all() else allowed)
    assert rows.shape == d.shape == (len(q), k)
    _, true = brute(x, q, k, allowed, metric)
    there = min(k, int(allowed.sum()))
    assert (rows[:, there:] == -1).all() and np.isinf(d[:, there:]).all()
    assert np.allclose(d[:, :there], true[:, :there], rtol=1e-5, atol=1e-5)
    assert all(len(set(r)) == there and allowed[r].all() for r in rows[:, :there])
    assert (np.diff(d[:, :there], axis=1) >= 0).all()


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_however_many_ask_each_gets_the_same_bits(metric, monkeypatch):
    """Few queries are compared by our own loop, many by a library's product: only candidates come of either."""
    rng = np.random.default_rng(0)
    keys, x = make(rng, 900, 37, metric=metric)
    q = rng.normal(size=(nearest.FEW + 9, 37)).astype(np.float32)
    assert np.allclose(nearest._scores(q[:13], x), q[:13] @ x.T, rtol=1e-4, atol=1e-4)
    rows, d = nearest.exact(keys, q, 20)
    for n in (1, 3, 8, 13, nearest.FEW):
        some = nearest.exact(keys, q[:n], 20)
        assert np.array_equal(some[0], rows[:n]) and np.array_equal(some[1], d[:n])
    monkeypatch.setattr(nearest, "FEW", 0)
    assert np.array_equal(nearest.exact(keys, q[:5], 20)[1], d[:5])


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("int8", [False, True])
def test_the_way_a_gpu_goes_gives_the_same(metric, int8, monkeypatch):
    """The torch path, run on the CPU: same rows, same distances."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(nearest, "DEVICE_BLOCK", 300)
    rng = np.random.default_rng(0)
    keys, _ = make(rng, 2000, 32, int8=int8, metric=metric)
    there = nearest.Keys(keys.maps, keys.norms, 32, keys.step, metric, device="cpu")
    q = rng.normal(size=(6, 32)).astype(np.float32)
    for allowed in (None, rng.random(2000) < 0.3, np.zeros(2000, bool)):
        a, b = nearest.exact(keys, q, 25, allowed), nearest.exact(there, q, 25, allowed)
        assert np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1])
    assert len(there._there) == 8 and all(isinstance(x, torch.Tensor) for x in there._there.values())


def test_equal_keys_come_by_ascending_row():
    keys = nearest.Keys([np.ones((50, 8), np.float16)], [np.full(50, 8, np.float32)], 8)
    rows, d = nearest.exact(keys, np.zeros((1, 8), np.float32), 7)
    assert rows.tolist() == [[0, 1, 2, 3, 4, 5, 6]] and (d == 8).all()


def test_a_distance_depends_on_query_and_key_alone():
    """What removal needs: the same bits in a store of other rows, other parts, asked with other queries."""
    rng = np.random.default_rng(0)
    keys, x = make(rng, 5000, 64, parts=3)
    q = rng.normal(size=(9, 64)).astype(np.float32)
    allowed = rng.random(5000) < 0.7
    rows, d = nearest.exact(keys, q, 50, allowed)
    fewer = nearest.Keys([x[allowed].astype(np.float16)], [(x[allowed].astype(np.float64) ** 2).sum(1).astype(np.float32)], 64)
    for i in range(9):
        again, same = nearest.exact(fewer, q[i:i + 1], 50)
        assert np.array_equal(same[0], d[i]) and np.array_equal(np.flatnonzero(allowed)[again[0]], rows[i])


def test_rounding_cannot_hide_a_neighbour():
    """Far from the origin float32 products lose the differences: the search must notice and look further."""
    rng = np.random.default_rng(1)
    x = (200 + rng.normal(size=(4000, 16)) * 0.3).astype(np.float16)
    wide = x.astype(np.float32)
    keys = nearest.Keys([x], [(wide.astype(np.float64) ** 2).sum(1).astype(np.float32)], 16)
    q = (200 + rng.normal(size=(4, 16)) * 0.3).astype(np.float32)
    first = nearest.candidates(keys, q, 10, None)[0]
    truth, true = brute(wide, q, 10, np.ones(4000, bool), "l2")
    assert any(set(a) != set(b) for a, b in zip(first.tolist(), truth.tolist())), "this test needs products that err"
    assert np.allclose(nearest.exact(keys, q, 10)[1], true, rtol=1e-6)


def test_half_precision_is_widened_exactly():
    """Every float16 that is a number, subnormals and signed zeros among them."""
    every = np.arange(65_536, dtype=np.uint16).view(np.float16)
    every = every[np.isfinite(every)]
    keys = nearest.Keys([every[:, None]], [every.astype(np.float32) ** 2], 1, metric="ip")
    d = keys.distances(np.ones((1, 1), np.float32), np.arange(len(every))[None])
    assert np.array_equal(-d[0], every.astype(np.float32))


def test_an_unknown_metric_is_refused():
    with pytest.raises(UsageError, match="l2"):
        nearest.Keys([], [], 3, metric="cos")
