"""The processes of one data-parallel run: started by `accelerate launch` or `torchrun`, one of them without either.

    world = ranks.world()      # rank 0 of 1 where nothing launched several
    world.mean_(tensors)       # in place, the same on every rank afterwards
    world.gather(x_ND)         # [size * N, D], with gradients to the rank each row came from
    with world.first(): ...    # what one rank makes and the others then find made

Every rank takes its share of a step's parts, so that the mean over ranks is the gradient of the whole batch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ralm.errors import UsageError


class World:
    """One rank among `size`."""

    rank, size = 0, 1

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum_(self, x: Tensor) -> Tensor:
        """x summed over the ranks, in place."""
        return x

    def all(self, x: Tensor) -> list[Tensor]:
        """x of every rank, in order; without gradients."""
        return [x]

    def wait(self) -> None:
        """Until every rank is here."""

    @contextmanager
    def first(self) -> Iterator[None]:
        """What one rank makes and the others then find made: the main one goes first, the others after it, one by one."""
        for rank in range(self.size):
            if rank == self.rank:
                yield
            self.wait()

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Each tensor's mean over the ranks, in place; one message per data type."""
        if self.size == 1:
            return
        for dtype in {t.dtype: None for t in tensors}:
            same = [t for t in tensors if t.dtype == dtype]
            flat = self.sum_(torch.cat([t.reshape(-1) for t in same])) / self.size
            for t, part in zip(same, flat.split([t.numel() for t in same])):
                t.copy_(part.view_as(t))

    def gather(self, x_ND: Tensor) -> Tensor:
        """The rows of every rank [size * N, D], rank by rank. Backward sums what every rank's loss asks of a row, so the mean of
        the ranks' losses has exactly the gradient that one rank with all rows would have. Raises UsageError for unequal N."""
        return x_ND if self.size == 1 else _Gather.apply(x_ND, self)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, world: World) -> Tensor:
        ctx.world = world
        rows = [int(n) for n in world.all(torch.tensor([len(x_ND)], device=x_ND.device))]
        if len(set(rows)) > 1:
            raise UsageError(f"ranks hold {rows} rows; give every rank as many (batch divisible by ranks)")
        return torch.cat(world.all(x_ND.detach().contiguous()))

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        world = ctx.world
        total = world.sum_(grad.contiguous().clone())
        return total.chunk(world.size)[world.rank], None


class Launched(World):
    """A rank of torch.distributed: gloo between processors, NCCL between GPUs."""

    def __init__(self):
        import torch.distributed as dist

        self.dist = dist
        if not dist.is_initialized():
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def sum_(self, x: Tensor) -> Tensor:
        self.dist.all_reduce(x)
        return x

    def all(self, x: Tensor) -> list[Tensor]:
        out = [torch.empty_like(x) for _ in range(self.size)]
        self.dist.all_gather(out, x)
        return out

    def wait(self) -> None:
        self.dist.barrier()


@lru_cache(maxsize=1)
def world() -> World:
    """The ranks this process was launched among."""
    return Launched() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else World()


def device(name: str = "auto") -> torch.device:
    """cpu, cuda, cuda:N, mps, or auto: this rank's GPU where there is one. Raises UsageError for what is not there."""
    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(name)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, ValueError) as e:
        raise UsageError(f"device '{name}' cannot be used here ({str(e).splitlines()[0][:100]}); use cpu or auto") from e
    if found.type == "cuda":
        torch.cuda.set_device(found)
    return found
