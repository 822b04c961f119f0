"""One loop for every training regime: `fit(task, recipe, folder)`.

A task says what is trained, what a batch is and what its loss is (task.py); the recipe's [train] table says for how long and
how. The folder then holds

    state.safetensors   parameters, moments of the optimisers, the task's own tensors, counters: one file, replaced atomically
    metrics.jsonl       a line a step {"step", "loss", "lr", "gradient", "seconds", the task's figures}, and one an evaluation
    tensorboard/        the same numbers, where tensorboard is installed

A run counted in steps that is killed at any moment and started again ends with the same losses and the same weights, bit for
bit: a batch depends on (seed, step) alone, every part of a batch is computed under a random state that depends on (seed,
step, part) alone, and what was written behind the last save is cut off. A run on the clock goes on where it stood.

A step's batch is a list of parts of equal weight. They are added up (accumulation), taken by `threads` threads (whole parts each:
inside an operation threads would meet thousands of times) and shared out among ranks (ranks.py); the sum is in the same order."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ralm import progress
from ralm.errors import FingerprintError, RalmError, UsageError, unknown
from ralm.train import ranks
from ralm.train.muon import Muon
from ralm.train.task import Group, Settings, Task
from ralm.what.lock import WriteLock

__all__ = ["Group", "Settings", "Task", "fit"]

SAY = 30.0  # seconds between lines of talk
FREE = ("device", "threads", "evaluate_steps", "evaluate_minutes", "save_steps", "save_minutes", "out")  # change no weight
SAYS = ("title", "trains", "needs", "reached")  # what a recipe says about itself


@dataclass
class State:
    """Where a run stands; saved in the tensors' own file, so the two cannot disagree."""

    step: int = 0
    seconds: float = 0.0  # on the clock, evaluations included, time between runs not
    metrics: int = 0  # bytes of metrics.jsonl that belong to it
    evaluated: float = 0.0  # at which second
    counts: dict[str, int] = field(default_factory=dict)
    idle: dict[str, int] = field(default_factory=dict)  # steps without a gradient, by group
    evaluations: list[dict[str, Any]] = field(default_factory=list)


def fit(task: Task, recipe: Mapping[str, Any], folder: str | Path, steps: int | None = None, resume: bool = True,
        until: int | None = None) -> dict[str, Any]:
    """Train to the end of the recipe, evaluating, exporting and saving on the way.

    steps: how long the run is, instead of what the recipe says. until: save and stop at this step, the schedule untouched.
    resume: go on with the run in `folder` where there is one; False: begin anew. Returns what `export` is told: kind, steps,
    seconds, counts, parameters, finished, evaluations, ranks, device, torch, recipe.
    SIGTERM and Ctrl-C save after the step under way and then do what they always do. Raises FingerprintError where the folder
    holds a run of another recipe, RalmError for a loss that is no number and for a group that gets no gradient."""
    table = dict(recipe.get("train") or {})
    if steps is not None:
        table = {k: v for k, v in table.items() if k != "minutes"} | {"steps": steps}
    settings = Settings.of(table)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    world = ranks.world()
    with WriteLock(folder / "lock").hold() if world.main else nullcontext():
        run = _Run(task, settings, dict(recipe) | {"train": table}, folder, world)
        return run.fit(resume, until)


class _Run:
    def __init__(self, task: Task, settings: Settings, recipe: dict[str, Any], folder: Path, world: ranks.World):
        self.task, self.settings, self.recipe, self.folder, self.world = task, settings, recipe, folder, world
        self.device = ranks.device(settings.device)
        self.groups = task.groups()
        self.named = _named(self.groups)
        self.parameters = list(self.named.values())
        many = settings.threads > 1 and self.device.type == "cpu" and world.size == 1
        self.pool = ThreadPoolExecutor(settings.threads) if many else None
        self.optimisers = self._optimisers()
        self.state, self.stop, self.board = State(), None, None
        world.mean_([p.data for p in self.parameters])  # ranks that were made alike stay bit for bit what they are

    def _optimisers(self) -> dict[str, torch.optim.Optimizer]:
        """At most one of each kind, over the groups that want it; `peak` is a group's own learning rate."""
        out: dict[str, torch.optim.Optimizer] = {}
        for kind in ("muon", "adamw"):
            mine = [{"params": list(g.parameters.values()), "peak": g.lr, "lr": g.lr, "after": g.after,
                     "weight_decay": g.weight_decay}
                    | ({"momentum": g.momentum} if kind == "muon" else {"betas": g.betas, "eps": g.eps})
                    for g in self.groups if g.optimiser == kind]
            if mine and kind == "muon":
                out[kind] = Muon(mine, mine[0]["lr"], pool=self.pool)
            elif mine:
                out[kind] = torch.optim.AdamW(mine, foreach=True)
        return out

    # ---- state on disk

    def save(self) -> None:
        """Everything in one file that takes the old one's place at once."""
        if not self.world.main:
            return
        from safetensors.torch import save_file

        os.fsync(self.metrics.fileno())
        self.state.metrics = os.fstat(self.metrics.fileno()).st_size
        tensors = {f"model.{n}": p.detach() for n, p in self.named.items()}
        tensors |= {f"task.{n}": t for n, t in self.task.state().items()}
        for kind, optimiser in self.optimisers.items():
            for n, p in self.named.items():
                tensors |= {f"{kind}.{key}.{n}": v for key, v in optimiser.state.get(p, {}).items()}
        part = self.folder / "state.part"
        save_file({n: t.contiguous() for n, t in tensors.items()}, part,
                  metadata={"state": json.dumps(asdict(self.state)), "recipe": json.dumps(self.recipe, sort_keys=True)})
        with part.open("rb") as f:
            os.fsync(f.fileno())
        part.replace(self.folder / "state.safetensors")

    def _resume(self) -> None:
        from safetensors import SafetensorError, safe_open

        path = self.folder / "state.safetensors"
        try:
            with safe_open(path, "pt") as f:
                tensors = {n: f.get_tensor(n) for n in f.keys()}  # noqa: SIM118 - not a mapping
                state, recipe = (json.loads(f.metadata()[key]) for key in ("state", "recipe"))
        except (SafetensorError, KeyError, TypeError, ValueError) as e:
            raise FingerprintError(f"{path} is not the state of a run ({e}); begin anew in another folder") from e
        if difference := _differs(recipe, json.loads(json.dumps(self.recipe))):
            raise FingerprintError(f"{self.folder} holds a run of another recipe ({difference}); go on with that one, or begin "
                                   "anew (in another folder, or without resuming)")
        own = self.task.state()
        wanted = {f"model.{n}": p for n, p in self.named.items()} | {f"task.{n}": t for n, t in own.items()}
        held = {n: t for n, t in tensors.items() if n.partition(".")[0] in ("model", "task")}
        wrong = sorted(wanted.keys() ^ held.keys()) or [n for n, t in wanted.items() if t.shape != held[n].shape]
        if wrong:
            raise FingerprintError(f"{path} is the state of another model ('{wrong[0]}' is not in both, or of another shape); "
                                   "begin anew in another folder")
        with torch.no_grad():
            for n, t in wanted.items():
                t.copy_(held[n])
        for name, value in tensors.items():
            kind, _, rest = name.partition(".")
            key, _, parameter = rest.partition(".")
            if kind in self.optimisers:
                p = self.named[parameter]
                self.optimisers[kind].state[p][key] = value if key == "step" else value.to(p.device)
        self.state = State(**state)

    @contextmanager
    def _files(self) -> Iterator[None]:
        """metrics.jsonl, cut off where the state ends, and TensorBoard's events."""
        path = self.folder / "metrics.jsonl"
        if not self.world.main:
            path = Path(os.devnull)
        with path.open("a", encoding="utf-8") as self.metrics:
            if self.world.main:
                self.metrics.truncate(min(self.state.metrics, path.stat().st_size))
                self.metrics.seek(0, os.SEEK_END)
                if find_spec("tensorboard"):
                    from torch.utils.tensorboard import SummaryWriter

                    self.board = SummaryWriter(self.folder / "tensorboard", purge_step=self.state.step + 1)
            try:
                yield
            finally:
                if self.board is not None:
                    self.board.close()

    def _write(self, line: Mapping[str, Any]) -> None:
        self.metrics.write(json.dumps(line) + "\n")
        self.metrics.flush()  # whoever watches sees it at once
        if self.board is not None:
            for key, value in (line.get("evaluation") or line).items():
                if isinstance(value, int | float) and key != "step":
                    self.board.add_scalar(("evaluation/" if "evaluation" in line else "") + key, value, line["step"])

    # ---- the loop

    def done(self) -> float:
        """How much of the run has passed, in [0, 1]."""
        s = self.settings
        return self.state.step / s.steps if s.steps else self.state.seconds / (60 * s.minutes)

    def fit(self, resume: bool, until: int | None) -> dict[str, Any]:
        if resume and (self.folder / "state.safetensors").is_file():
            self._resume()
        elif self.world.main:
            (self.folder / "state.safetensors").unlink(missing_ok=True)
        try:
            with _threads(self.pool), _signals(self), self._files(), self._bar() as advance:
                self._loop(until, advance)
        finally:
            self.task.close()
            if self.pool is not None:
                self.pool.shutdown()
        if self.stop is not None:
            signal.raise_signal(self.stop)
        return self.trained()

    @contextmanager
    def _bar(self) -> Iterator[Any]:
        s = self.settings
        total, unit = (s.steps - self.state.step, "steps") if s.steps else (60 * s.minutes - self.state.seconds, "s")
        with progress.task(f"train {self.task.kind}", total=max(total, 0), unit=unit) as advance:
            yield advance if s.steps else lambda _: advance(self.state.seconds - self.before)

    def _loop(self, until: int | None, advance: Any) -> None:
        s, losses = self.settings, []
        finished = self.done() >= 1
        began = time.monotonic() - self.state.seconds
        said = saved = self.before = self.state.seconds
        while self.done() < 1 and (until is None or self.state.step < until):
            stopped, line = self.step()
            losses.append(line["loss"])
            self.before, self.state.seconds = self.state.seconds, self._clock(began)
            self._write(line | {"seconds": round(self.state.seconds, 3)})
            advance(1)
            step, now = self.state.step, self.state.seconds
            if now - said > SAY:
                self._say(losses, line, now - said)
                said, losses = now, []
            if self.done() < 1 and _due(step, now - self.state.evaluated, s.evaluate_steps, s.evaluate_minutes):
                self.evaluate()
            if _due(step, now - saved, s.save_steps, s.save_minutes) or stopped:
                saved = now
                self.save()
            if stopped:
                return
        self.state.seconds = max(self.state.seconds, time.monotonic() - began)
        if self.done() >= 1 and not finished:
            self.evaluate()
        self.save()

    def _clock(self, began: float) -> float:
        """Seconds of the run: the main rank's, for what is due by the clock must be due on all."""
        now = time.monotonic() - began
        if self.world.size == 1:
            return now
        return float(self.world.sum_(torch.tensor([now if self.world.main else 0.0], dtype=torch.float64, device=self.device)))

    def step(self) -> tuple[bool, dict[str, Any]]:
        """One batch: (whether some rank was asked to stop, the step's line)."""
        step, share = self.state.step, self.settings.rate(self.done())
        for optimiser in self.optimisers.values():
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * share if step >= group["after"] else 0.0
        figures = dict(self.task.prepare(step) or {})
        parts = list(self.task.batch(step))
        if not parts or len(parts) % self.world.size:
            raise UsageError(f"step {step} has {len(parts)} parts for {self.world.size} ranks; every rank takes as many (set micro "
                             "so that batch / micro divides by the ranks)")
        mine = range(self.world.rank, len(parts), self.world.size)
        random = torch.get_rng_state() if self.pool else None
        losses, told, grads = [], [], None
        for loss, said, more in (self.pool.map if self.pool else map)(lambda i: self._gradient(i, parts[i]), mine):
            losses.append(loss)
            told.append(said)
            grads = more if grads is None else [b if a is None else a if b is None else a + b for a, b in zip(grads, more)]
        if random is not None and not torch.equal(random, torch.get_rng_state()):
            raise UsageError(f"the loss of '{self.task.kind}' draws random numbers (dropout?), which threads would draw in any "
                             "order; use threads = 1, or no dropout")
        for p, g in zip(self.parameters, grads):
            p.grad = None if g is None else g / len(losses)
        loss, stopped, figures_of_parts = self._over_ranks(sum(losses) / len(losses), told)
        norms = self._norms()
        if not math.isfinite(loss) or not all(map(math.isfinite, norms.values())):
            raise RalmError(f"step {step}: the loss is {loss}, the norms of its gradients {norms}; the state of an earlier step is "
                            "kept, try a lower lr, a longer warmup, or clip")
        self._moved(norms)
        total = math.sqrt(sum(n * n for n in norms.values()))
        if self.settings.clip and total > self.settings.clip:
            torch._foreach_mul_([p.grad for p in self.parameters if p.grad is not None], self.settings.clip / total)
        for optimiser in self.optimisers.values():
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.state.step += 1
        for key, value in figures_of_parts.items():
            if isinstance(value, int):
                self.state.counts[key] = self.state.counts.get(key, 0) + value
        line = {"step": self.state.step, "loss": loss, "lr": self.groups[0].lr * share, "gradient": total}
        if len(norms) > 1:
            line |= {f"gradient_{name}": n for name, n in norms.items()}
        return stopped, line | figures | figures_of_parts

    def _gradient(self, i: int, part: Any) -> tuple[float, Mapping[str, float], Sequence[Tensor | None]]:
        """Loss, figures and gradients of part i; several threads may do this on the same weights."""
        if self.pool is None:
            drawn = np.random.SeedSequence([self.settings.seed, self.state.step, i]).generate_state(1, np.uint64)
            torch.manual_seed(int(drawn[0] >> np.uint64(1)))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.dtype == "bfloat16"):
            loss, figures = self.task.loss(part)
        return float(loss.detach()), figures, torch.autograd.grad(loss, self.parameters, allow_unused=True)

    def _over_ranks(self, loss: float, told: list[Mapping[str, float]]) -> tuple[float, bool, dict[str, float]]:
        """Gradients, loss and figures of all ranks; whether one of them was told to stop."""
        whole = {k for k, v in told[0].items() if isinstance(v, int) and not isinstance(v, bool)}
        figures = {k: sum(float(t[k]) for t in told) / (1 if k in whole else len(told)) for k in sorted(told[0])}
        size = self.world.size
        if size > 1:
            used = torch.tensor([p.grad is not None for p in self.parameters], dtype=torch.float32, device=self.device)
            for p, u in zip(self.parameters, self.world.sum_(used).tolist()):
                if u and p.grad is None:
                    p.grad = torch.zeros_like(p)
            self.world.mean_([p.grad for p in self.parameters if p.grad is not None])
            sums = self.world.sum_(torch.tensor([loss, float(self.stop is not None), *figures.values()], dtype=torch.float64,
                                                device=self.device)).tolist()
            loss, figures = sums[0] / size, {k: v / (1 if k in whole else size) for k, v in zip(figures, sums[2:])}
            return loss, sums[1] > 0, {k: round(v) if k in whole else v for k, v in figures.items()}
        return loss, self.stop is not None, {k: round(v) if k in whole else v for k, v in figures.items()}

    def _norms(self) -> dict[str, float]:
        """Norm of each group's gradient."""
        out = {}
        for group in self.groups:
            grads = [p.grad for p in group.parameters.values() if p.grad is not None]
            out[group.name] = float(torch.stack(torch._foreach_norm(grads)).double().norm()) if grads else 0.0
        return out

    def _moved(self, norms: Mapping[str, float]) -> None:
        """A group that gets no gradient for `idle` steps is not trained, whatever the loss does: an error."""
        for name, norm in norms.items():
            idle = self.state.idle[name] = 0 if norm > 0 else self.state.idle.get(name, 0) + 1
            if 0 < self.settings.idle <= idle:
                raise RalmError(f"'{name}' has got no gradient for {idle} steps: the loss does not depend on it; mend the task (are"
                                " its scores computed with live weights?), or leave it out of what is trained")

    def _say(self, losses: list[float], line: Mapping[str, Any], seconds: float) -> None:
        counts = ", ".join(f"{n / 1e6:.2f}M {k}" if n > 1e6 else f"{n} {k}" for k, n in self.state.counts.items())
        progress.note(f"step {self.state.step} ({100 * self.done():.0f}%, {self.state.seconds / 60:.1f} min): loss "
                      f"{sum(losses) / len(losses):.4f}, lr {line['lr']:.2g}, {len(losses) / seconds:.2f} steps a second"
                      + (f", {counts}" if counts else ""))

    def evaluate(self) -> None:
        """Figures on held-out data into the log, and the model as it is now into `out`."""
        if self.world.main:
            with torch.no_grad():
                figures = dict(self.task.evaluate() or {})
            if figures:
                self._write({"step": self.state.step, "evaluation": figures})
                numbers = {k: round(v, 5) for k, v in figures.items() if isinstance(v, int | float)}
                self.state.evaluations.append({"step": self.state.step, "seconds": round(self.state.seconds)} | numbers)
                progress.note(f"step {self.state.step}: " + ", ".join(f"{k} {v:g}" for k, v in numbers.items()))
            self.task.export(Path(self.settings.out or self.folder / "model"), self.trained())
        self.state.evaluated = self.state.seconds  # on every rank
        self.world.wait()

    def trained(self) -> dict[str, Any]:
        """What a model card says about the run."""
        s = self.state
        return {"kind": self.task.kind, "steps": s.step, "seconds": round(s.seconds), "counts": s.counts,
                "parameters": sum(p.numel() for p in self.parameters), "finished": self.done() >= 1, "evaluations": s.evaluations,
                "ranks": self.world.size, "device": str(self.device), "torch": torch.__version__, "recipe": self.recipe}


# ---- small parts ------------------------------------------------------------------------------------------------------


def _named(groups: Sequence[Group]) -> dict[str, nn.Parameter]:
    """All parameters by name. Raises UsageError where one is in two groups, frozen, or a name is given twice."""
    out: dict[str, nn.Parameter] = {}
    seen: dict[int, str] = {}
    for group in groups:
        if group.optimiser not in ("adamw", "muon"):
            raise unknown("optimiser", group.optimiser, ("adamw", "muon"))
        for name, p in group.parameters.items():
            if name in out or id(p) in seen:
                raise UsageError(f"parameter '{name}' is also '{seen.get(id(p), name)}'; what is trained has one name, one group")
            if not p.requires_grad or (group.optimiser == "muon" and p.ndim != 2):
                raise UsageError(f"parameter '{name}' {tuple(p.shape)} cannot be trained by {group.optimiser}: it is "
                                 f"{'no matrix' if p.requires_grad else 'frozen'}")
            out[name], seen[id(p)] = p, name
    if not out:
        raise UsageError("the task trains nothing: its groups hold no parameter")
    return out


def _due(step: int, passed: float, steps: int, minutes: float) -> bool:
    return bool(steps and step % steps == 0) or bool(minutes and not steps and passed > 60 * minutes)


def _differs(a: Any, b: Any, path: str = "") -> str:
    """Where two recipes differ in what decides the weights, '' where nowhere."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(a.keys() | b.keys()):
            free = FREE if path == "train." else SAYS if path == "" else ()
            if key not in free and (said := _differs(a.get(key), b.get(key), f"{path}{key}.")):
                return said
        return ""
    return "" if a == b else f"{path.rstrip('.')} was {a!r}, is {b!r}"


@contextmanager
def _threads(pool: ThreadPoolExecutor | None) -> Iterator[None]:
    """Where threads take whole parts, an operation is for one thread."""
    before = torch.get_num_threads()
    if pool is not None:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _signals(run: _Run) -> Iterator[None]:
    """The first SIGTERM or Ctrl-C ends the step under way and saves; a second one does what it always does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {n: signal.getsignal(n) for n in numbers}

    def told(number: int, frame: Any) -> None:
        run.stop = number
        for n, handler in before.items():
            signal.signal(n, handler)

    for n in numbers:
        signal.signal(n, told)
    try:
        yield
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)
