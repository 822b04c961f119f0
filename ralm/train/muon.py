"""Muon: momentum whose matrices are orthogonalised before they are applied (Jordan et al. 2024).

A step then moves every direction of a weight matrix equally far, which in a few thousand steps gets further than AdamW.
For hidden matrices only; embeddings and norms stay with AdamW."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Executor

import torch
from torch import Tensor


def orthogonal(g_NRC: Tensor, steps: int = 5) -> Tensor:
    """U V^T of the singular value decomposition of each matrix, roughly: singular values end between 0.7 and 1.2.

    A quintic Newton-Schulz iteration; its coefficients trade exactness for speed of the smallest singular values."""
    x = g_NRC.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if tall else x).to(g_NRC.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; the step is scaled by sqrt(max(1, rows / columns)). Decay is decoupled.

    pool: where matrices of different shapes are worked on at the same time."""

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0,
                 pool: Executor | None = None):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.pool = pool

    def step(self, closure=None) -> None:
        jobs = []
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for (rows, columns), same in shapes.items():  # equal shapes are one batched product
                jobs.append((group, same, max(1.0, rows / columns) ** 0.5))
        list((self.pool.map if self.pool else map)(lambda job: self._step(*job), jobs))

    @torch.no_grad()
    def _step(self, group: dict, params: list[Tensor], scale: float) -> None:
        buffers = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in params]
        grads = [p.grad for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        g_NRC = orthogonal(torch.stack(torch._foreach_lerp(grads, buffers, group["momentum"])))
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, list(g_NRC.unbind()), alpha=-group["lr"] * scale)
