"""Sampling against transformers' own filters, against counts, and at its edges."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ralm.errors import UsageError
from ralm.lm.sample import check, filtered, sample


def rows(b=3, v=17, seed=0, scale=2.0):
    return (torch.randn(b, v, generator=torch.Generator().manual_seed(seed)) * scale).log_softmax(-1)


def oracle(logp, temperature, top_k, top_p):
    """p over the vocabulary by transformers' warpers."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = TemperatureLogitsWarper(temperature)(None, logp.double())
    if top_k is not None:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p is not None:
        scores = TopPLogitsWarper(top_p)(None, scores)
    return scores.softmax(-1)


def spread(logp, *settings):
    kept, order = filtered(logp, *settings)
    return torch.zeros_like(kept).scatter(-1, order, kept.exp())


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), temperature=st.floats(0.2, 3.0), top_k=st.none() | st.integers(1, 17),
       top_p=st.none() | st.floats(0.05, 0.99))
def test_filters_equal_transformers(seed, temperature, top_k, top_p):
    logp = rows(seed=seed)
    assert torch.allclose(spread(logp, temperature, top_k, top_p), oracle(logp, temperature, top_k, top_p), atol=1e-9)


def test_greedy_takes_the_largest_and_the_lowest_id_among_equals():
    logp = torch.tensor([[0.1, 0.4, 0.4, 0.1], [0.7, 0.1, 0.1, 0.1]]).log()
    assert sample(logp).tolist() == [1, 0]
    assert sample(logp, temperature=1.0, top_k=1).tolist() == [1, 0]


def test_draws_follow_the_distribution():
    logp = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(20_000, -1)
    counts = torch.bincount(sample(logp, 1.0, generator=torch.Generator().manual_seed(1)), minlength=4) / 20_000
    assert torch.allclose(counts, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.015)
    counts = torch.bincount(sample(logp, 1.0, top_p=0.75, generator=torch.Generator().manual_seed(1)), minlength=4)
    assert counts[2:].tolist() == [0, 0] and abs(counts[0] / 20_000 - 0.625) < 0.015


def test_a_seed_repeats_and_the_input_is_left_alone():
    logp = rows(64)
    before = logp.clone()
    a, b = (sample(logp, 0.8, 9, 0.9, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(a, b) and torch.equal(logp, before) and a.dtype == torch.int64
    assert not torch.equal(a, sample(logp, 0.8, 9, 0.9, torch.Generator().manual_seed(6)))


def test_forbidden_tokens_are_never_drawn_and_k_above_v_is_all():
    logp = rows(2000, 6)
    logp[:, [1, 4]] = -math.inf
    drawn = set(sample(logp, 5.0, 99, 1.0, torch.Generator().manual_seed(0)).tolist())
    assert drawn == {0, 2, 3, 5}


def test_tiny_temperature_is_greedy_and_does_not_overflow():
    logp = rows(50, 30).float()
    assert torch.equal(sample(logp, 1e-30, generator=torch.Generator().manual_seed(0)), sample(logp))


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"temperature": math.nan}, {"temperature": math.inf},
                                 {"top_k": 0}, {"top_k": 1.5}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_p": math.nan}])
def test_settings_out_of_range_are_one_clear_line(bad):
    with pytest.raises(UsageError, match=next(iter(bad))) as e:
        check(**bad)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_distribution_is_refused(value):
    logp = rows()
    logp[1, 3] = value
    with pytest.raises(UsageError, match="row 1"):
        sample(logp)
    with pytest.raises(UsageError, match="row 0"):
        sample(torch.full((1, 4), -math.inf), 1.0)


def test_a_slightly_different_distribution_mostly_draws_the_same():
    """With the same seed: what speculation lives on. Ranks may change all over, the randomness stays with the tokens."""
    g = torch.Generator().manual_seed(0)
    logp = torch.randn(1, 500, generator=g).log_softmax(-1)
    other = (logp + 0.05 * torch.randn(1, 500, generator=g)).log_softmax(-1)
    draws = [[int(sample(x, temperature=1.0, generator=torch.Generator().manual_seed(seed))) for x in (logp, other)]
             for seed in range(200)]
    assert sum(a == b for a, b in draws) > 180 and len({a for a, _ in draws}) > 60
