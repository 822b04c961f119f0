"""Loss of a tied output layer without the [B x T, V] matrix of logits: chunk by chunk, gradients made on the way.

On a CPU the softmax over the vocabulary costs as much as the whole network because its logits leave the cache; in chunks
they do not."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 256  # rows of logits at a time


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy in nats of targets_N under softmax(hidden_ND @ weight_VD.T). Both gradients are made in forward."""

    @staticmethod
    def forward(ctx, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, dtype: torch.dtype) -> Tensor:
        weight = weight_VD.to(dtype)
        d_hidden, d_weight = torch.empty_like(hidden_ND), torch.zeros_like(weight_VD)
        total = hidden_ND.new_zeros(())
        scale = 1.0 / len(targets_N)
        for at in range(0, len(targets_N), CHUNK):
            h_CD, y_C1 = hidden_ND[at:at + CHUNK].to(dtype), targets_N[at:at + CHUNK, None]
            logits_CV = (h_CD @ weight.T).float()
            total -= logits_CV.gather(1, y_C1).sum()
            norm_C1 = logits_CV.logsumexp(1, keepdim=True)
            total += norm_C1.sum()
            p_CV = logits_CV.sub_(norm_C1).exp_()
            p_CV.scatter_add_(1, y_C1, torch.full_like(norm_C1, -1.0))
            p_CV = p_CV.to(dtype)
            d_hidden[at:at + CHUNK] = (p_CV @ weight) * scale
            d_weight.add_((p_CV.T @ h_CD).float(), alpha=scale)
        ctx.save_for_backward(d_hidden, d_weight)
        return total * scale

    @staticmethod
    def backward(ctx, grad: Tensor):
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * grad, d_weight * grad, None, None


def head_loss(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """As torch.nn.functional.cross_entropy(hidden @ weight.T, targets); `dtype` is that of the matrix products."""
    return HeadLoss.apply(hidden_ND, weight_VD, targets_N, dtype)
