"""Bootstrap intervals: how much a figure would move with other questions of the same kind."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ralm.errors import UsageError


def interval(values: Sequence[float] | np.ndarray, weights: Sequence[float] | np.ndarray | None = None, level: float = 0.95,
             resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap of sum(values) / sum(weights) over rows drawn with replacement (Efron 1979); weights None: the mean.

    A ratio of sums is what micro averages are (nats over tokens). Returns (low, high); (nan, nan) of no rows.
    Raises UsageError for a level outside (0, 1) or fewer than 1 resample."""
    if not 0 < level < 1 or resamples < 1:
        raise UsageError(f"level {level} must lie between 0 and 1 and resamples {resamples} be at least 1")
    values = np.asarray(values, np.float64)
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, np.float64)
    if not len(values):
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    drawn = np.empty(resamples)
    for r in range(resamples):  # one resample at a time: memory stays that of one row of indices
        rows = rng.integers(0, len(values), len(values))
        drawn[r] = values[rows].sum() / max(weights[rows].sum(), 1e-300)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
