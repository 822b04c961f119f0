"""Mixing distributions: pure functions in log space. Every weight is a log-softmax made by the caller's explicit temperature.

Shapes: B batch, K retrieved passages, T tokens, V vocabulary. Padding among the K is a weight of -inf.

Properties, tested: T=1 makes the two marginals equal; K=1 is the identity; the order of the K changes nothing; uniform
weights are the mean of probabilities; d log p(y) / d score_k = [p(y|k)/p(y) - 1] p(k) (REALM, the gradient in section 3.3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ralm.errors import UsageError


def log_weights(scores_BK: Tensor, temperature: float = 1.0) -> Tensor:
    """ln p(z|x) = log-softmax(scores / temperature) over the K retrieved, [B, K]; a score of -inf is padding and stays -inf.

    Computed with the maximum subtracted and in float32 or wider: raw inner products of several hundred stay finite.
    Raises UsageError for temperature <= 0. A row of padding alone comes back as -inf everywhere, never nan."""
    if not temperature > 0:
        raise UsageError(f"temperature {temperature} cannot scale scores; use a value above 0")
    s = scores_BK.to(torch.promote_types(scores_BK.dtype, torch.float32)) / temperature
    empty = torch.isneginf(s).all(-1, keepdim=True)
    return torch.log_softmax(s.masked_fill(empty, 0.0), -1).masked_fill(empty, -math.inf)


def log_mix_tokens(logp_BKTV: Tensor, log_w_BK: Tensor) -> Tensor:
    """Per-token marginal: ln sum_k w_k p_k(v) for every position. RAG-Token (Lewis et al. 2020, section 2.1), REPLUG (eq. 2).

    logp [B, K, T, V] (or [B, K, T] of the targets alone: the same numbers, cheaper); log_w [B, K], or [B, K, T] where the
    weights change along the sequence (`log_posterior`). Returns [B, T, V] (or [B, T])."""
    w = log_w_BK if log_w_BK.ndim == 3 else log_w_BK.unsqueeze(-1)  # [B, K, T or 1]
    if logp_BKTV.ndim == 4:
        w = w.unsqueeze(-1)
    return torch.logsumexp(logp_BKTV + w, 1)


def log_mix_sequences(logp_BKT: Tensor, log_w_BK: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """Per-sequence marginal: ln sum_k w_k prod_t p_k(y_t), [B]. RAG-Sequence (section 2.1), REALM (eq. 1), RA-DIT at inference.

    mask [B, T]: 1 for tokens that count. The weight enters exactly once per sequence, whatever its length."""
    if mask_BT is not None:  # where(), not a product: a masked position may hold -inf
        logp_BKT = torch.where(mask_BT.bool().unsqueeze(1), logp_BKT, torch.zeros_like(logp_BKT))
    return torch.logsumexp(logp_BKT.sum(-1) + log_w_BK, 1)


def log_posterior(log_w_BK: Tensor, logp_BKT: Tensor) -> Tensor:
    """ln p(z | x, y_<t) for every position t, [B, K, T]: the prior reweighted by how well each passage explained the tokens so far.

    Mixing tokens with these weights is the per-sequence marginal written token by token (chain rule), so RAG-Sequence
    streams: sum_t log_mix_tokens(logp, log_posterior(w, logp)) == log_mix_sequences(logp, w)."""
    # Exclusive sums: position t sees y_<t only. Made by shifting, not by subtracting the last term (-inf - -inf is nan), and
    # in float64: a few hundred tokens sum to thousands of nats, where float32 has lost the digits that tell passages apart.
    total_BKT = torch.cumsum(logp_BKT.double(), -1)
    before_BKT = torch.cat([torch.zeros_like(total_BKT[..., :1]), total_BKT[..., :-1]], -1)
    joint_BKT = log_w_BK.double().unsqueeze(-1) + before_BKT
    impossible = torch.isneginf(joint_BKT).all(1, keepdim=True)  # a past that no passage allows says nothing about them
    joint_BKT = torch.where(impossible, log_w_BK.double().unsqueeze(-1), joint_BKT)
    return (joint_BKT - torch.logsumexp(joint_BKT, 1, keepdim=True)).to(logp_BKT.dtype)


def log_interpolate(logp_lm: Tensor, logp_other: Tensor, lam: float | Tensor) -> Tensor:
    """ln [(1 - lam) p_lm + lam p_other], kNN-LM (Khandelwal et al. 2020, eq. 3). lam = 0 and lam = 1 give the parts bit for bit."""
    if not torch.is_tensor(lam):
        if not 0 <= lam <= 1:
            raise UsageError(f"lam={lam} is not a weight; use 0..1")
        if lam == 0 or lam == 1:
            return logp_other if lam else logp_lm
        return torch.logaddexp(math.log1p(-lam) + logp_lm, math.log(lam) + logp_other)
    lam = lam.to(logp_lm.dtype)
    mixed = torch.logaddexp(torch.log1p(-lam) + logp_lm, torch.log(lam) + logp_other)
    return torch.where(lam == 0, logp_lm, torch.where(lam == 1, logp_other, mixed))
