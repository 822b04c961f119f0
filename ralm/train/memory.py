"""In-batch memory: what the tokens of a batch are to each other when they stand in for a datastore. Pure functions.

    memory_nll(scores, positive, seen, logits, targets)      the objective, [N]; TRIME with a vocabulary, NPM without one
    joint_loss(hidden, weight, targets, query, keys, ...)    TRIME's mean over N, made without a matrix of logits, both ways

Shapes: N predicted tokens, M tokens of the memory, V vocabulary, D width."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ralm.errors import unknown

KINDS = ("local", "long", "external", "none")
CHUNK = 256  # rows of logits and scores at a time


@dataclass(frozen=True)
class Seen:
    """Which tokens of the memory each predicted token may look at. Tokens are numbered through the whole group of segments.

    local      earlier tokens of the own segment
    long       all earlier tokens of the group, whose segments follow each other
    external   all tokens of other segments, and earlier ones of the own where own_N says so (the paper drops them with p = 0.9)
    none       nothing"""

    kind: str
    first: int  # number of the first predicted token in the group
    length: int  # tokens of a segment
    own_N: Tensor | None = None  # bool: external only

    def __post_init__(self):
        if self.kind not in KINDS:
            raise unknown("kind of memory", self.kind, KINDS)

    def mask(self, rows: slice, size: int, device: Any = None) -> Tensor:
        """bool [n, M] for some of the predicted tokens and a memory of `size` tokens."""
        i = torch.arange(rows.start, rows.stop, device=device)[:, None] + self.first
        j = torch.arange(size, device=device)[None]
        same, before = i // self.length == j // self.length, j < i
        if self.kind == "external":
            own = before if self.own_N is None else before & self.own_N[rows].to(i.device)[:, None]
            return ~same | (same & own)
        if self.kind == "none":
            return torch.zeros_like(same)
        return before & same if self.kind == "local" else before.expand_as(same)


def memory_nll(scores_NM: Tensor, positive_NM: Tensor, seen_NM: Tensor, logits_NV: Tensor | None = None,
               targets_N: Tensor | None = None) -> Tensor:
    """-ln of the probability of what is right under one softmax over a memory, and over a vocabulary where one is given, [N]:

        L_i = -ln  (exp l_i,y + sum_{j right} exp s_ij) / (sum_v exp l_iv + sum_{j seen} exp s_ij)

    With logits l: TRIME (Zhong et al. 2022, eq. 2; right = the same next word). Without: NPM (Min et al. 2023, eq. 3; right = the
    same phrase in another sequence), where a row without anything right is +inf, without gradient. positive counts where seen."""
    s_NM = scores_NM.masked_fill(~seen_NM, -math.inf)
    right_NM = s_NM.masked_fill(~positive_NM, -math.inf)
    if logits_NV is not None:
        right_NM = torch.cat([logits_NV.gather(1, targets_N[:, None]), right_NM], 1)
        s_NM = torch.cat([logits_NV, s_NM], 1)
    there = (right_NM > -math.inf).any(1)
    right_NM, s_NM = right_NM.masked_fill(~there[:, None], 0.0), s_NM.masked_fill(~there[:, None], 0.0)
    loss_N = torch.logsumexp(s_NM, 1) - torch.logsumexp(right_NM, 1)
    return loss_N.masked_fill(~there, math.inf)


class JointLoss(torch.autograd.Function):
    """TRIME's mean loss, CHUNK rows at a time; gradients are made on the way, so nothing of size N x (V + M) is kept."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, query_ND: Tensor, keys_MD: Tensor,
                values_M: Tensor, seen: Seen, scale: float) -> tuple[Tensor, Tensor]:
        N, V = len(targets_N), len(weight_VD)
        d_hidden, d_query = torch.empty_like(hidden_ND), torch.empty_like(query_ND)
        d_weight, d_keys = torch.zeros_like(weight_VD), torch.zeros_like(keys_MD)
        told = hidden_ND.new_zeros(4)  # sums of: loss, the model's own loss, the memory's share, tokens the memory holds
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for at in range(0, N, CHUNK):
                rows = slice(at, min(at + CHUNK, N))
                h_CD, q_CD, y_C1 = hidden_ND[rows], query_ND[rows], targets_N[rows, None]
                s_CM = (q_CD @ keys_MD.T) * scale
                s_CM = s_CM.masked_fill_(~seen.mask(rows, len(values_M), s_CM.device), -math.inf)
                l_CV = h_CD @ weight_VD.T
                own_C1 = torch.logsumexp(l_CV, 1, keepdim=True) - l_CV.gather(1, y_C1)
                p_CA = torch.softmax(torch.cat([l_CV, s_CM], 1), 1)  # A = V + M: one softmax over both
                same_CM = values_M == y_C1
                right_C1 = p_CA[:, :V].gather(1, y_C1) + (p_CA[:, V:] * same_CM).sum(1, keepdim=True)
                right_C1 = right_C1.clamp_(min=1e-38)
                share_C1 = p_CA[:, V:].sum(1, keepdim=True)
                told += torch.stack([-right_C1.log().sum(), own_C1.sum(), share_C1.sum(),
                                     (same_CM & (s_CM > -math.inf)).any(1).sum().to(told.dtype)])
                # d loss / d score = p - p given that it is right
                d_CA = p_CA.clone()
                d_CA[:, V:] -= p_CA[:, V:] * same_CM / right_C1
                d_CA[:, :V].scatter_add_(1, y_C1, -p_CA[:, :V].gather(1, y_C1) / right_C1)
                d_CA /= N
                d_hidden[rows], d_query[rows] = d_CA[:, :V] @ weight_VD, (d_CA[:, V:] @ keys_MD) * scale
                d_weight += d_CA[:, :V].T @ h_CD
                d_keys += (d_CA[:, V:].T @ q_CD) * scale
        ctx.save_for_backward(d_hidden, d_weight, d_query, d_keys)
        told /= N
        ctx.mark_non_differentiable(told)
        return told[0].clone(), told

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor):
        d_hidden, d_weight, d_query, d_keys = ctx.saved_tensors
        return d_hidden * grad, d_weight * grad, None, d_query * grad, d_keys * grad, None, None, None


def joint_loss(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, query_ND: Tensor, keys_MD: Tensor, values_M: Tensor,
               seen: Seen, temperature: float = 1.0) -> tuple[Tensor, dict[str, float]]:
    """The mean of memory_nll with logits hidden @ weight.T and scores query . key / (sqrt(D) temperature), and figures:

    own: what the model alone would lose (nats a token), share: of the probability held by the memory, covered: of the targets that
    stand in the memory. Gradients reach hidden, weight, query and keys."""
    scale = 1.0 / (math.sqrt(query_ND.shape[1]) * temperature)
    loss, told = JointLoss.apply(hidden_ND, weight_VD, targets_N, query_ND, keys_MD, values_M, seen, scale)
    return loss, dict(zip(("own", "share", "covered"), told[1:].tolist()))
