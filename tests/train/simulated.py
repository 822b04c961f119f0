"""What tests of regimes share: ranks that are threads, runs that are killed, gradients of parts."""

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import torch

from ralm.train import loop, ranks, recipes


def lines(folder):
    """metrics.jsonl without its clock."""
    return [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "search_seconds")}
            for line in (folder / "metrics.jsonl").open()]


def gradients(task, parts):
    """(mean loss, {name: mean gradient}) over the parts."""
    named = {n: p for g in task.groups() for n, p in g.parameters.items()}
    total, sums = 0.0, {n: torch.zeros_like(p) for n, p in named.items()}
    for part in parts:
        loss, _ = task.loss(part)
        total += float(loss.detach()) / len(parts)
        for n, g in zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True)):
            if g is not None:
                sums[n] += g / len(parts)
    return total, sums


def on_ranks(size, monkeypatch, make, step=0):
    """(losses, mean gradients) of a step whose parts `size` ranks share: each makes its own task and takes its parts."""
    local, shared = threading.local(), {"barrier": threading.Barrier(size), "held": [None] * size}

    class Rank(ranks.World):
        def __init__(self, rank):
            self.rank, self.size = rank, size

        def all(self, x):
            shared["held"][self.rank] = x.clone()
            self.wait()
            out = list(shared["held"])
            self.wait()
            return out

        def sum_(self, x):
            return x.copy_(sum(self.all(x)))

        def wait(self):
            if not making:
                shared["barrier"].wait(300)

    making = [True]

    monkeypatch.setattr(ranks, "world", lambda: getattr(local, "world", ranks.World()))
    local.world = Rank(0)
    tasks = []
    for i in range(size):
        local.world = Rank(i)
        tasks.append(make())
    got = [None] * size
    making.clear()

    def one(i):
        local.world = Rank(i)
        torch.autograd.set_multithreading_enabled(False)
        got[i] = gradients(tasks[i], tasks[i].batch(step)[i::size])

    workers = [threading.Thread(target=one, args=(i,)) for i in range(size)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    return [x[0] for x in got], {n: sum(x[1][n] for x in got) / size for n in got[0][1]}


CHILD = """
import json, os, signal, sys
from pathlib import Path
from ralm.train import loop, recipes
recipe, data, folder, at = json.loads(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
whole = loop._Run.step
def step(self):
    out = whole(self)
    if self.state.step == at:
        os.kill(os.getpid(), signal.SIGKILL)
    return out
loop._Run.step = step
loop.fit(recipes.make(recipe, data, folder), recipe, folder)
"""


def killed_and_resumed(recipe, data, folder, steps):
    """Run in processes that are killed (SIGKILL) in the middle of the given steps, then to the end here; what `fit` returns."""
    for at in steps:
        child = subprocess.run([sys.executable, "-c", CHILD, json.dumps(recipe), str(data), str(folder), str(at)], check=False,
                               cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
        assert child.returncode == -signal.SIGKILL, child.stderr[-2000:]
    return loop.fit(recipes.make(recipe, data, folder), recipe, folder)
