import numpy as np
import pytest

from ralm.errors import UsageError
from ralm.eval.interval import interval


def test_covers_the_mean_as_often_as_it_says():
    """Of 200 samples of a known distribution, about 95 % of the intervals hold its mean (binomial: 0.90 to 0.99)."""
    rng = np.random.default_rng(3)
    held = 0
    for seed in range(200):
        low, high = interval(rng.random(60) < 0.3, resamples=200, seed=seed)
        held += low <= 0.3 <= high
    assert 0.88 <= held / 200 <= 0.99


def test_width_is_the_normal_one():
    values = np.random.default_rng(0).normal(5, 2, 2000)
    low, high = interval(values)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 2000 ** 0.5, rel=0.1)
    assert low < values.mean() < high


def test_ratio_of_sums_and_degenerate_cases():
    assert interval([2.0, 6.0], [1, 3]) == (2, 2)  # every document has two nats a token
    assert interval([0.25]) == (0.25, 0.25)
    assert np.isnan(interval([])).all()
    assert interval([1, 0, 1], seed=1) == interval([1, 0, 1], seed=1)
    with pytest.raises(UsageError):
        interval([1.0], level=1.0)
