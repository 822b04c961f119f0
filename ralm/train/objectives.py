"""What a retriever or a retrieval-augmented model is trained for: pure functions of scores and log-probabilities.

    contrastive(q, d, positive)            pairs: DPR, and whatever has in-batch negatives
    distill(scores, utility, ...)          a language model's judgement of passages: REPLUG LSR, RA-DIT, Atlas' PDist, ADist, LOOP
    marginal(logp, log_w, per=...)         the passage is a latent variable: RAG-Sequence, RAG-Token, REALM, EMDR2

Shapes: B queries, N passages of the batch, K passages retrieved per query, T target tokens, D width. A score of -inf is padding.
Losses are means over B of what the papers sum over K or T. Papers, their code and re-implementations differ in direction of
the divergence, statistic, temperature and reduction; here these are arguments, and PRESETS says what was published.
Scores must come from live weights, whatever index proposed the passages: the loop ends a run whose retriever gets no gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ralm.errors import UsageError, unknown
from ralm.how.mixing import log_mix_sequences, log_mix_tokens, log_weights

PRESETS: Mapping[str, dict[str, Any]] = {
    # statistic of the utility, both temperatures, direction; `scale`: scores are divided by sqrt(D) before
    "replug-lsr": {"statistic": "token_prob", "tau_r": 0.1, "tau_u": 0.1, "direction": "p||q"},
    "ra-dit": {"statistic": "prob", "tau_r": 1.0, "tau_u": 0.01, "direction": "p||q"},
    "atlas-pdist": {"statistic": "mean", "tau_r": 0.01, "tau_u": 0.01, "direction": "q||p", "scale": True},
    "atlas-adist": {"statistic": "given", "tau_r": 0.01, "tau_u": 0.01, "direction": "q||p", "scale": True},
    "atlas-loop": {"statistic": "left_out", "tau_r": 0.01, "tau_u": 0.01, "direction": "q||p", "scale": True},
}
STATISTICS = ("sum", "mean", "prob", "token_prob", "left_out")


def contrastive(q_BD: Tensor, d_ND: Tensor, positive_B: Tensor, temperature: float = 1.0, mask_BN: Tensor | None = None,
                symmetric: bool = False) -> Tensor:
    """In-batch negatives (Karpukhin et al. 2020, eq. 2), s(q, d) = q . d / temperature, C all N passages of the batch:

        L = -(1/B) sum_i  ln  exp s(q_i, d_i+) / sum_{c in C} exp s(q_i, c)

    positive_B: index of each query's passage among the N; the others are negatives, but where mask_BN is True (false negatives:
    another passage with the answer, a copy of the positive), which then weigh nothing. symmetric: the mean of this and of each
    positive passage against all B queries. With several ranks: gather q and d first (ranks.py), positive_B counts the gathered."""
    s_BN = similarity(q_BD, d_ND) / _positive(temperature)
    if mask_BN is not None:
        own_BN = F.one_hot(positive_B, len(d_ND)).bool()
        s_BN = s_BN.masked_fill(mask_BN & ~own_BN, -math.inf)
    loss = F.cross_entropy(s_BN, positive_B)
    if not symmetric:
        return loss
    s_BB = s_BN[:, positive_B].T  # row i: the passage of query i against every query
    return (loss + F.cross_entropy(s_BB, torch.arange(len(s_BB), device=s_BB.device))) / 2


def similarity(q_BD: Tensor, d_ND: Tensor) -> Tensor:
    """q . d of all pairs [B, N] in float32 or wider, also under autocast: a cosine in bfloat16 has three digits, and dividing by a
    temperature of 0.05 makes a tenth of a nat of what is lost."""
    wide = torch.promote_types(torch.promote_types(q_BD.dtype, d_ND.dtype), torch.float32)
    with torch.autocast(q_BD.device.type, enabled=False):
        return q_BD.to(wide) @ d_ND.to(wide).T


def distill(scores_BK: Tensor, utility_BK: Tensor, tau_r: float = 1.0, tau_u: float = 1.0, direction: str = "p||q") -> Tensor:
    """The retriever learns what a language model found useful; gradients reach the scores only:

        P(z|x) = softmax(scores / tau_r),  Q(z|x,y) = softmax(utility / tau_u)
        "p||q":  L = (1/B) sum_x KL(P || Q)     REPLUG LSR (Shi et al. 2023), RA-DIT (Lin et al. 2023)
        "q||p":  L = (1/B) sum_x KL(Q || P)     Atlas (Izacard et al. 2022), FiD distilled into a retriever

    A passage that is padding on either side weighs nothing. Raises UsageError for temperatures that are not above 0."""
    if direction not in ("p||q", "q||p"):
        raise unknown("direction of the divergence", direction, ("p||q", "q||p"))
    there_BK = ~(torch.isneginf(scores_BK) | torch.isneginf(utility_BK))
    log_p = log_weights(scores_BK.masked_fill(~there_BK, -math.inf), _positive(tau_r))
    log_q = log_weights(utility_BK.detach().to(log_p.dtype).masked_fill(~there_BK, -math.inf), _positive(tau_u))
    a, b = (log_p, log_q) if direction == "p||q" else (log_q, log_p)
    a, b = a.masked_fill(~there_BK, 0.0), b.masked_fill(~there_BK, 0.0)  # before exp: -inf - -inf has no gradient
    return (a.exp() * (a - b)).masked_fill(~there_BK, 0.0).sum(-1).mean()


def marginal(logp_BKT: Tensor, log_w_BK: Tensor, mask_BT: Tensor | None = None, per: str = "sequence",
             over: str = "batch") -> Tensor:
    """-ln p(y|x) with the passage summed out: logp of the targets under each passage, log_w = log_weights(live scores).

        "sequence":  -ln sum_z p(z|x) prod_t p(y_t | x, z, y_<t)    RAG-Sequence (Lewis et al. 2020, 2.1), REALM's paper (eq. 1)
        "token":     -sum_t ln sum_z p(z|x) p(y_t | x, z, y_<t)     RAG-Token; REALM's released code; EMDR2 (with logp detached)

    mask_BT: 1 for tokens that count. over "batch": mean over B of whole sequences in nats; "tokens": per token that counts (REALM
    averages over its masks). A null document is one more passage, with empty text and a score of its own. The gradient of a score
    is p(z|x) - p(z|x,y): [1 - p(y|z,x) / p(y|x)] p(z|x)."""
    if per not in ("sequence", "token") or over not in ("batch", "tokens"):
        raise UsageError(f"per = '{per}' is sequence or token, over = '{over}' is batch or tokens")
    mask_BT = torch.ones_like(logp_BKT[:, 0]) if mask_BT is None else mask_BT.to(logp_BKT.dtype)
    if per == "sequence":
        logp_B = log_mix_sequences(logp_BKT, log_w_BK, mask_BT)
    else:
        logp_B = torch.where(mask_BT.bool(), log_mix_tokens(logp_BKT, log_w_BK), 0.0).sum(-1)
    return -logp_B.mean() if over == "batch" else -logp_B.sum() / mask_BT.sum()


def retrieval_utility(logp_BKT: Tensor, log_w_BK: Tensor, null_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """How much retrieval helps, in nats per target token: the mean over tokens of ln p(y_t|x) - ln p(y_t | no passage, x), with
    ln p(y_t|x) the per-token marginal and null_BT the targets' log-probabilities without a passage (as REALM's code logs it).
    Above 0 where passages help: the early sign that training works."""
    mask_BT = torch.ones_like(null_BT) if mask_BT is None else mask_BT.to(null_BT.dtype)
    gain_BT = torch.where(mask_BT.bool(), log_mix_tokens(logp_BKT, log_w_BK) - null_BT, 0.0)
    return gain_BT.sum() / mask_BT.sum()


def utility(logp_BKT: Tensor, mask_BT: Tensor | None = None, statistic: str = "mean") -> Tensor:
    """What a language model thinks of each passage [B, K], from the log-probabilities of the targets under it.

        sum         ln p(y|z,x): with tau_u = 1 and a flat prior the true posterior p(z|x,y)
        mean        (1/T) ln p(y|z,x): Atlas' PDist
        prob        p(y|z,x): as REPLUG and RA-DIT write it; all but zero for more than a few tokens
        token_prob  exp of the mean, the probability of a typical token: what REPLUG's temperature of 0.1 is made for
        left_out    minus the mean, of log-probabilities *without* passage k (all others read): Atlas' LOOP"""
    if statistic not in STATISTICS:
        raise unknown("statistic of the utility", statistic, STATISTICS)
    mask_BT = torch.ones_like(logp_BKT[:, 0]) if mask_BT is None else mask_BT.to(logp_BKT.dtype)
    sum_BK = torch.where(mask_BT.bool().unsqueeze(1), logp_BKT, 0.0).sum(-1)
    mean_BK = sum_BK / mask_BT.sum(-1, keepdim=True).clamp(min=1)
    return {"sum": sum_BK, "mean": mean_BK, "prob": sum_BK.exp(), "token_prob": mean_BK.exp(), "left_out": -mean_BK}[statistic]


def attention_mass(weights_BLHTKS: Tensor, values_BLHKS: Tensor, mask_BT: Tensor, there_BKS: Tensor) -> Tensor:
    """Atlas' ADist: cross-attention that passage k gets, weighted with the norm of the values it gives [B, K]:

        sum over its tokens, layers L and target tokens, mean over heads H, of weight * |value|, over (S * L * targets)

    weights: attention probabilities; values: norms |v|; mask: target tokens that count; there: real tokens of the passages."""
    mass = weights_BLHTKS * values_BLHKS.unsqueeze(3)
    mass = mass.mean(2) * mask_BT[:, None, :, None, None] * there_BKS[:, None, None]
    layers, size = weights_BLHTKS.shape[1], weights_BLHTKS.shape[-1]
    return mass.sum((1, 2, 4)) / (size * layers * mask_BT.sum(-1, keepdim=True).clamp(min=1))


def _positive(temperature: float) -> float:
    if not temperature > 0:
        raise UsageError(f"temperature {temperature} cannot scale scores; use a value above 0")
    return temperature
