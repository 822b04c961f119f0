"""From ln p over the vocabulary to a token: greedy, temperature, top-k, top-p. Pure functions of their arguments."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ralm.errors import UsageError

if TYPE_CHECKING:
    import torch


def check(temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None) -> None:
    """Refuse settings that mean nothing, before any work. Raises UsageError naming the value and its range."""
    if not (math.isfinite(temperature) and temperature >= 0):
        raise UsageError(f"temperature={temperature} cannot scale scores; use 0 (greedy) or a finite value above it")
    if top_k is not None and (top_k != int(top_k) or top_k < 1):
        raise UsageError(f"top_k={top_k} keeps no token; use a whole number of at least 1, or none for all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise UsageError(f"top_p={top_p} is not a share of probability; use a value above 0 and at most 1")


def sample(logp_BV: torch.Tensor, temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None,
           generator: torch.Generator | None = None) -> torch.Tensor:
    """Draw one token per row: int64 ids_B on the device of logp_BV.

    temperature 0 takes the largest logp (the lowest id among equals). Otherwise logp / temperature is cut to the
    `top_k` largest, then to the smallest set of largest tokens that holds at least `top_p` of what is left (nucleus
    sampling, Holtzman et al. 2020), and drawn from with `generator`. Rows need not be normalised.
    Raises UsageError for settings out of range and for rows without a distribution (nan, +inf, or all -inf)."""
    import torch

    check(temperature, top_k, top_p)
    best_B = logp_BV.max(-1).values
    if not bool(best_B.isfinite().all()) or bool(logp_BV.isnan().any()):
        bad = int((~best_B.isfinite() | logp_BV.isnan().any(-1)).nonzero()[0])
        raise UsageError(f"row {bad} of the scores is no distribution (largest value {float(best_B[bad])}); "
                         "the model gave nan or infinity, try dtype=fp32")
    if temperature == 0:
        return logp_BV.argmax(-1)
    kept_BV, order_BV = filtered(logp_BV, temperature, top_k, top_p)
    device = generator.device if generator is not None else logp_BV.device
    # in the order of ids: the randomness belongs to tokens, not ranks, so a slightly different distribution mostly draws the same
    p_BV = torch.zeros_like(kept_BV).scatter_(-1, order_BV, kept_BV.exp())
    return torch.multinomial(p_BV.to(device), 1, generator=generator).to(logp_BV.device)[:, 0]


def filtered(logp_BV: torch.Tensor, temperature: float, top_k: int | None = None,
             top_p: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """What `sample` draws from: (logp_BV float64 sorted from the largest and normalised, -inf where cut; their ids_BV).

    Ties go to the lower id, so exactly `top_k` tokens stay. The largest token always stays."""
    # float64, and the largest taken away before the division: a tiny temperature must sharpen, not overflow
    logp_BV = logp_BV.double()
    scaled_BV, order_BV = ((logp_BV - logp_BV.max(-1, keepdim=True).values) / temperature).sort(
        dim=-1, descending=True, stable=True)
    if top_k is not None:
        scaled_BV[:, top_k:] = -math.inf
    scaled_BV = scaled_BV.log_softmax(-1)
    if top_p is not None:
        before_BV = scaled_BV.exp().cumsum(-1) - scaled_BV.exp()  # mass of the larger tokens
        before_BV[:, 0] = 0.0
        scaled_BV = scaled_BV.masked_fill(before_BV >= top_p, -math.inf).log_softmax(-1)
    return scaled_BV, order_BV
