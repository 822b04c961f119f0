"""What the loop (loop.py) is told: a task, its groups of parameters, and a recipe's [train] table.

A regime is a subclass of Task: independent.py, sequential.py, retro.py. It lives as long as the run and holds model and data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from ralm.errors import UsageError, unknown

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """The [train] table. Shares are of the whole run, in [0, 1]; what a task wants to know beyond these has its own table."""

    steps: int = 0  # how long the run is: one of these two
    minutes: float = 0.0  # on the clock, evaluations included
    seed: int = 0
    batch: int = 1  # rows a step, and rows of a part: the task's to obey
    micro: int = 0  # 0: one part
    threads: int = 1
    device: str = "auto"
    dtype: str = "float32"  # or bfloat16: of the matrix products (autocast); weights and moments are float32
    lr: float = 1e-3  # peak, for groups of the task that have no own one
    schedule: str = "cosine"  # or hold: level until `hold`, then straight down; or constant
    warmup: float = 0.0
    hold: float = 0.0
    floor: float = 0.0  # share of the peak at the end
    clip: float = 0.0  # largest norm of the gradient of all groups together; 0: none
    idle: int = 50  # steps after which a group whose gradient is still exactly zero is an error; 0: never
    evaluate_steps: int = 0  # 0: at the end only
    evaluate_minutes: float = 0.0
    save_steps: int = 0
    save_minutes: float = 3.0
    out: str = ""  # where the model goes; default: model/ in the run's folder

    @staticmethod
    def of(table: Mapping[str, Any]) -> Settings:
        """Raises UsageError for an unknown key, a wrong type, or a run without length."""
        known = {f.name: f.type for f in fields(Settings)}
        for key, value in table.items():
            if key not in known:
                raise unknown("setting in [train]", key, known)
            kinds = {"int": int, "float": (int, float), "str": str}[known[key]]
            if not isinstance(value, kinds) or isinstance(value, bool) or (known[key] != "str" and not 0 <= value < math.inf):
                raise UsageError(f"[train] {key} = {value!r}: expected {'a text' if kinds is str else 'a number of at least 0'}")
        s = Settings(**table)
        if (s.steps > 0) == (s.minutes > 0):
            raise UsageError(f"[train] has steps = {s.steps} and minutes = {s.minutes}; give one of them, it ends the run")
        for key, among in (("schedule", ("cosine", "hold", "constant")), ("dtype", ("float32", "bfloat16"))):
            if getattr(s, key) not in among:
                raise unknown(f"[train] {key}", getattr(s, key), among)
        if max(s.warmup, s.hold) >= 1 or s.floor > 1 or min(s.batch, s.threads) < 1:
            raise UsageError(f"[train] warmup = {s.warmup} and hold = {s.hold} are shares below 1, floor = {s.floor} at most 1, "
                             f"batch = {s.batch} and threads = {s.threads} at least 1")
        return s

    def rate(self, done: float) -> float:
        """Share of the peak learning rate when `done` of the run has passed: straight up, then down to `floor` by the schedule."""
        if done < self.warmup:
            return done / self.warmup
        if self.schedule == "constant":
            return 1.0
        if self.schedule == "hold":
            left = min(1.0, (1 - done) / (1 - self.hold))
        else:
            left = 0.5 + 0.5 * math.cos(math.pi * (done - self.warmup) / (1 - self.warmup))
        return self.floor + (1 - self.floor) * max(0.0, left)


def section(recipe: Mapping[str, Any], name: str, cls: type[T]) -> T:
    """A recipe's table as the dataclass that says what may stand in it; lists that are not given are empty.

    Raises UsageError for an unknown key or a value of another type than the default's."""
    table = dict(recipe.get(name) or {})
    known = {f.name: f for f in fields(cls)}
    for key, value in table.items():
        if key not in known:
            raise unknown(f"setting in [{name}]", key, known)
        kinds = {"int": int, "float": (int, float), "str": str, "bool": bool, "list": list}[known[key].type]
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            raise UsageError(f"[{name}] {key} = {value!r}: expected {known[key].type}")
    return cls(**{key: [] for key, f in known.items() if f.type == "list"} | table)


@dataclass
class Group:
    """Parameters that are trained alike, by names that stay the same from run to run."""

    name: str
    parameters: Mapping[str, nn.Parameter]
    lr: float
    optimiser: str = "adamw"  # or muon: for matrices of hidden layers
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.95
    after: int = 0  # first step it is moved at (its gradient is computed all the same)


class Task:
    """What is trained. A regime is a subclass; only the first three methods are a must."""

    kind = "task"

    def groups(self) -> list[Group]:
        """What is trained; everything else of the model is never saved and must not change."""
        raise NotImplementedError

    def batch(self, step: int) -> Sequence[Any]:
        """The parts of this step's batch, of equal weight: a function of seed and step, on every rank the same."""
        raise NotImplementedError

    def loss(self, part: Any) -> tuple[Tensor, Mapping[str, float]]:
        """The part's mean loss, and figures: whole numbers are counts and add up, all others are averaged. Runs under autocast;
        with threads, at the same time as others on the same weights, and then without drawing random numbers."""
        raise NotImplementedError

    def prepare(self, step: int) -> Mapping[str, float] | None:
        """Before each step, and first after a resume: here an index is refreshed. Figures for the step's line."""

    def evaluate(self) -> Mapping[str, Any]:
        """Figures and samples on held-out data; the model is afterwards as it was. On rank 0, without gradients."""
        return {}

    def export(self, folder: Path, trained: Mapping[str, Any]) -> None:
        """Write the model as users load it, with what `trained` says about the run."""

    def state(self) -> Mapping[str, Tensor]:
        """Tensors of the task's own that are saved with the run (an average of weights, a queue) and written to in resuming."""
        return {}

    def close(self) -> None:
        """After the run, however it ended: let go of processes and files."""
