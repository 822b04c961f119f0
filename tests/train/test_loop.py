"""The training loop: killed and resumed is uninterrupted, threads, parts and ranks change nothing, what cannot go well is told."""

import importlib.util
import json
import os
import signal
import sys
import threading
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from safetensors.torch import load_file  # noqa: E402

from ralm import progress  # noqa: E402
from ralm.errors import FingerprintError, RalmError, StoreError, UsageError  # noqa: E402
from ralm.train import loop, ranks  # noqa: E402
from ralm.train.loop import fit  # noqa: E402
from ralm.train.task import Group, Settings, Task  # noqa: E402

_spec = importlib.util.spec_from_file_location("stepkill", Path(__file__).parents[1] / "stepkill.py")
stepkill = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(stepkill)


class Regress(Task):
    """A small network learns x -> Wx from rows that depend on seed and step."""

    kind = "regress"

    def __init__(self, recipe):
        t = self.train = recipe["train"]
        torch.manual_seed(t.get("seed", 0))
        self.net = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Dropout(recipe.get("dropout", 0.0)),
                                       torch.nn.Linear(16, 3))
        self.target = torch.randn(6, 3, generator=torch.Generator().manual_seed(7))
        self.seen = torch.zeros((), dtype=torch.int64)
        self.still = torch.nn.Parameter(torch.ones(2)) if recipe.get("still") else None
        self.bad = recipe.get("bad", -1)

    def groups(self):
        named = dict(self.net.named_parameters())
        matrices = {n: p for n, p in named.items() if p.ndim == 2}
        out = [Group("matrices", matrices, 0.02, "muon", weight_decay=0.01),
               Group("biases", {n: p for n, p in named.items() if n not in matrices}, 0.01)]
        return out if self.still is None else [*out, Group("still", {"still": self.still}, 0.1)]

    def batch(self, step):
        x = torch.randn(self.train["batch"], 6, generator=torch.Generator().manual_seed(1000 + step))
        return [(part, step) for part in x.split(self.train.get("micro") or len(x))]

    def prepare(self, step):
        self.seen += 1
        return {"prepared": float(step)}

    def state(self):
        return {"seen": self.seen}

    def loss(self, part):
        x, step = part
        loss = (self.net(x) - x @ self.target).square().mean()
        if self.still is not None:
            loss = loss + 0 * self.still.sum()
        return loss * (float("nan") if step == self.bad else 1), {"rows": len(x), "size": float(x.abs().mean())}

    def evaluate(self):
        x = torch.randn(64, 6, generator=torch.Generator().manual_seed(5))
        return {"error": float((self.net(x) - x @ self.target).square().mean()), "sample": "text"}

    def export(self, folder, trained):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "card.json").write_text(json.dumps(trained))


def recipe(**changes):
    train = {"steps": 24, "batch": 12, "micro": 4, "warmup": 0.1, "clip": 1.0, "evaluate_steps": 7, "save_steps": 5}
    top = {k: changes.pop(k) for k in ("dropout", "still", "bad", "title") if k in changes}
    return {"kind": "regress", "train": train | changes} | top


def run(folder, r, **options):
    task = Regress(r)
    return task, fit(task, r, folder, **options)


def lines(folder):
    """metrics.jsonl without its clock."""
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in (folder / "metrics.jsonl").open()]


def same(a, b):
    x, y = load_file(a / "state.safetensors"), load_file(b / "state.safetensors")
    assert x.keys() == y.keys() and lines(a) == lines(b)
    assert [n for n in x if not torch.equal(x[n], y[n])] == []


def dies(call):
    """Whether `call` ended by SIGKILL, in a child of its own; any other failure of the child is one here."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            call()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or status == 0, status
    return os.WIFSIGNALED(status)


def test_learns_and_leaves_what_it_says(tmp_path):
    _, said = run(tmp_path / "a", recipe(steps=300))
    rows = lines(tmp_path / "a")
    steps = [r for r in rows if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 301)) and said["steps"] == 300 and said["finished"]
    assert steps[-1]["loss"] < 0.05 * steps[0]["loss"]
    assert said["counts"] == {"rows": 3600} and all(r["rows"] == 12 and r["prepared"] == r["step"] - 1 for r in steps)
    assert {"gradient", "gradient_matrices", "gradient_biases", "lr", "size"} <= steps[0].keys()
    evaluations = [r for r in rows if "evaluation" in r]
    assert [r["step"] for r in evaluations] == [*range(7, 300, 7), 300] and evaluations[0]["evaluation"]["sample"] == "text"
    assert [e["error"] for e in said["evaluations"]] == pytest.approx([e["evaluation"]["error"] for e in evaluations], abs=1e-5)
    card = json.loads((tmp_path / "a" / "model" / "card.json").read_text())
    assert card["finished"] and card["recipe"]["train"]["steps"] == 300 and card["parameters"] == 163


@pytest.mark.parametrize("changes", [{}, {"dropout": 0.3}, {"threads": 2}, {"dtype": "bfloat16", "schedule": "hold", "hold": 0.5}])
def test_killed_and_resumed_is_uninterrupted(tmp_path, changes, monkeypatch):
    r = recipe(**changes)
    run(tmp_path / "whole", r)
    kills = 0
    for n in (1, 3, 9, 4, 21, 2, 17, 6, 30, 12, 13):
        def child(n=n):
            watched = stepkill.after(n)
            for owner, name in ((loop._Run, "_write"), (loop._Run, "step"), (os, "fsync"), (Path, "replace"), (Regress, "export")):
                monkeypatch.setattr(owner, name, watched(getattr(owner, name)))
            run(tmp_path / "killed", r)
        kills += dies(child)
    run(tmp_path / "killed", r)
    assert kills >= 8
    same(tmp_path / "whole", tmp_path / "killed")


def test_stopped_in_parts_is_uninterrupted_and_finished_is_left_alone(tmp_path):
    r = recipe()
    run(tmp_path / "whole", r)
    for until in (1, 8, 8, 20, None, None):
        _, said = run(tmp_path / "parts", r, until=until)
        assert said["steps"] == (until or 24) and said["finished"] == (until is None)
    same(tmp_path / "whole", tmp_path / "parts")
    run(tmp_path / "parts", r, resume=False)
    same(tmp_path / "whole", tmp_path / "parts")


def test_threads_and_parts_change_the_sum_only(tmp_path):
    run(tmp_path / "one", recipe())
    run(tmp_path / "two", recipe(threads=2))
    same(tmp_path / "one", tmp_path / "two")
    task, _ = run(tmp_path / "whole", recipe(micro=0))
    other = load_file(tmp_path / "one" / "state.safetensors")
    for n, p in task.net.named_parameters():
        torch.testing.assert_close(p.detach(), other[f"model.{n}"], atol=2e-3, rtol=1e-2)  # Muon computes in bfloat16


def test_threads_refuse_random_numbers(tmp_path):
    with pytest.raises(UsageError, match="threads = 1, or no dropout"):
        run(tmp_path, recipe(dropout=0.5, threads=2))


class Rank(ranks.World):
    """Ranks that are threads, and meet at a barrier."""

    def __init__(self, rank, size, shared):
        self.rank, self.size, self.shared = rank, size, shared

    @staticmethod
    def several(size):
        shared = {"barrier": threading.Barrier(size), "held": [None] * size}
        return [Rank(i, size, shared) for i in range(size)]

    def all(self, x):
        self.shared["held"][self.rank] = x.clone()
        self.wait()
        out = list(self.shared["held"])
        self.wait()
        return out

    def sum_(self, x):
        return x.copy_(sum(self.all(x)))

    def wait(self):
        self.shared["barrier"].wait()


def together(monkeypatch, r, folder, size=2):
    """The tasks of `size` ranks after fitting them side by side."""
    local = threading.local()
    monkeypatch.setattr(ranks, "world", lambda: local.world)
    tasks, errors = [Regress(r) for _ in range(size)], []

    def one(task, world):
        local.world = world
        try:
            task.said = fit(task, r, folder)
        except BaseException as e:
            errors.append(e)
            world.shared["barrier"].abort()

    workers = [threading.Thread(target=one, args=pair) for pair in zip(tasks, Rank.several(size))]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert errors == []
    return tasks


def test_ranks_take_their_share_and_agree(tmp_path, monkeypatch):
    r = recipe(batch=16, micro=4, steps=6)
    alone, _ = run(tmp_path / "alone", r)
    tasks = together(monkeypatch, r, tmp_path / "ranks")
    for a, b, c in zip(*(t.net.parameters() for t in (alone, *tasks))):
        assert torch.equal(b, c)
        torch.testing.assert_close(a, b, atol=2e-3, rtol=1e-2)
    for a, b in zip(lines(tmp_path / "alone"), lines(tmp_path / "ranks")):
        assert a == pytest.approx(b, rel=1e-2) if "loss" in a else a["step"] == b["step"]


def test_ranks_end_by_one_clock(tmp_path, monkeypatch):
    train = {"minutes": 0.02, "batch": 8, "micro": 4, "evaluate_minutes": 0.004, "save_minutes": 0.003}
    a, b = together(monkeypatch, {"train": train}, tmp_path)
    assert a.said["steps"] == b.said["steps"] > 2 and a.said["finished"] and b.said["finished"]


def test_gather_has_the_gradient_of_one_rank():
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))

    def loss(rows, first, everything):  # each row against all rows
        scores = rows @ everything.T
        return torch.nn.functional.cross_entropy(scores, torch.arange(first, first + len(rows)))

    whole = x.clone().requires_grad_()
    loss(whole, 0, whole).backward()
    grads, worlds = [None, None], Rank.several(2)

    def one(i):
        mine = x.chunk(2)[i].clone().requires_grad_()
        loss(mine, 3 * i, worlds[i].gather(mine)).backward()
        grads[i] = mine.grad / 2  # the mean over ranks

    workers = [threading.Thread(target=one, args=(i,)) for i in range(2)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    torch.testing.assert_close(torch.cat(grads), whole.grad)


@pytest.mark.slow
def test_processes_of_accelerate_launch(tmp_path):
    """Two real processes: same weights as one."""
    import subprocess

    pytest.importorskip("accelerate")
    script = tmp_path / "two.py"
    script.write_text(f"""
import importlib.util
from pathlib import Path
spec = importlib.util.spec_from_file_location("test_loop", {__file__!r})
t = importlib.util.module_from_spec(spec)
spec.loader.exec_module(t)
t.run(Path({str(tmp_path / 'two')!r}), t.recipe(batch=16, micro=4, steps=6))
""")
    alone, _ = run(tmp_path / "alone", recipe(batch=16, micro=4, steps=6))
    subprocess.run([sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
                    "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", str(script)], check=True,
                   cwd=Path(__file__).parents[2], timeout=300)
    two = load_file(tmp_path / "two" / "state.safetensors")
    for n, p in alone.net.named_parameters():
        torch.testing.assert_close(p.detach(), two[f"model.{n}"], atol=2e-3, rtol=1e-2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_saves_first(tmp_path, number, monkeypatch):
    r = recipe(save_steps=0)
    run(tmp_path / "whole", r)

    class Asked(Regress):
        def loss(self, part):
            if part[1] == 10 and not asked:
                asked.append(True)
                signal.raise_signal(number)
            return super().loss(part)

    asked = []
    told = []
    before = signal.signal(number, lambda n, frame: told.append(n))
    try:
        said = fit(Asked(r), r, tmp_path / "stopped")
    finally:
        signal.signal(number, before)
    assert told == [number] and said["steps"] == 11 and not said["finished"]
    run(tmp_path / "stopped", r)
    same(tmp_path / "whole", tmp_path / "stopped")


def test_another_recipe_is_refused_and_words_are_free(tmp_path):
    run(tmp_path, recipe(), until=3)
    with pytest.raises(FingerprintError, match=r"train\.warmup was 0\.1, is 0\.2"):
        run(tmp_path, recipe(warmup=0.2))
    with pytest.raises(FingerprintError, match=r"train\.steps was 24, is 30"):
        run(tmp_path, recipe(), steps=30)
    with pytest.raises(FingerprintError, match="another model"):
        fit(Regress(recipe(still=True)), recipe(), tmp_path)
    (tmp_path / "state.safetensors").write_bytes(b"not a state")
    with pytest.raises(FingerprintError, match="not the state of a run"):
        run(tmp_path, recipe())
    run(tmp_path, recipe(), resume=False, until=4)
    assert run(tmp_path, recipe(title="T", save_steps=9, threads=2), until=5)[1]["steps"] == 5


def test_a_loss_that_is_no_number_ends_the_run_and_spoils_nothing(tmp_path):
    with pytest.raises(RalmError, match="step 12: the loss is nan"):
        run(tmp_path, recipe(bad=12))
    kept = load_file(tmp_path / "state.safetensors")
    assert all(torch.isfinite(t).all() for t in kept.values())


def test_a_group_without_gradient_is_an_error(tmp_path):
    with pytest.raises(RalmError, match="'still' has got no gradient for 8 steps"):
        run(tmp_path, recipe(still=True, idle=8))
    assert run(tmp_path / "b", recipe(still=True, idle=0))[1]["finished"]


def test_a_group_begins_when_it_is_told(tmp_path):
    class Late(Regress):
        def groups(self):
            first, second = super().groups()
            second.after = 5
            return [first, second]

    task = Late(recipe())
    begun = {n: p.detach().clone() for n, p in task.net.named_parameters()}
    fit(task, recipe(), tmp_path, until=5)
    now = dict(task.net.named_parameters())
    assert all(torch.equal(now[n], begun[n]) == (now[n].ndim == 1) for n in begun)
    again = Late(recipe())
    fit(again, recipe(), tmp_path)
    assert not any(torch.equal(p, begun[n]) for n, p in again.net.named_parameters())


def test_one_run_a_folder(tmp_path):
    class Greedy(Regress):
        def evaluate(self):
            with pytest.raises(StoreError, match="writing to"):
                fit(Regress(recipe()), recipe(), tmp_path)
            return {}

    fit(Greedy(recipe()), recipe(), tmp_path)


@pytest.mark.parametrize(("table", "match"), [
    ({"steps": 5, "minutes": 1}, "give one of them"), ({}, "give one of them"), ({"steps": 5, "stepz": 1}, "Did you mean"),
    ({"steps": "5"}, "expected a number"), ({"steps": 5, "lr": -1.0}, "expected a number"), ({"steps": 5, "warmup": 1.0}, "shares"),
    ({"steps": 5, "schedule": "linear"}, "schedule"), ({"steps": 5, "dtype": "float16"}, "dtype"), ({"steps": True}, "expected"),
    ({"steps": 5, "device": 3}, "expected a text")])
def test_settings_that_cannot_be(table, match):
    with pytest.raises(UsageError, match=match):
        Settings.of(table)


def test_rates():
    hold = Settings.of({"steps": 1, "schedule": "hold", "warmup": 0.1, "hold": 0.5})
    assert [hold.rate(x) for x in (0, 0.05, 0.1, 0.5, 0.75, 1)] == pytest.approx([0, 0.5, 1, 1, 0.5, 0])
    cosine = Settings.of({"steps": 1, "warmup": 0.2, "floor": 0.1})
    assert [cosine.rate(x) for x in (0.1, 0.2, 0.6, 1)] == pytest.approx([0.5, 1, 0.55, 0.1])
    assert Settings.of({"steps": 1, "schedule": "constant"}).rate(0.9) == 1
    from ralm.train.gpt import rate

    assert all(hold.rate(x / 50) == pytest.approx(rate(x / 50, 0.1, 0.5)) for x in range(51))


def test_device_that_is_not_there():
    with pytest.raises(UsageError, match="device 'warp' cannot be used"):
        ranks.device("warp")


def test_groups_that_cannot_be():
    p, m = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3, 3))
    for groups, match in (([Group("a", {"p": p, "q": p}, 1)], "'q' is also 'p'"), ([Group("a", {"p": p}, 1, "muon")], "no matrix"),
                          ([Group("a", {"p": p}, 1), Group("b", {"p": m}, 1)], "'p' is also"), ([], "trains nothing"),
                          ([Group("a", {"p": p}, 1, "sgd")], "unknown optimiser"),
                          ([Group("a", {"p": torch.nn.Parameter(torch.ones(1), requires_grad=False)}, 1)], "frozen")):
        with pytest.raises(UsageError, match=match):
            loop._named(groups)


def test_talk(tmp_path, monkeypatch):
    heard = []

    class Ear(progress.Silent):
        def note(self, text):
            heard.append(text)

    monkeypatch.setattr(loop, "SAY", -1.0)
    monkeypatch.setattr(progress, "_sink", Ear())
    run(tmp_path, recipe(steps=8, evaluate_steps=4))
    assert sum("loss" in t and "rows" in t for t in heard) == 8 and any(t.startswith("step 4: error") for t in heard)


def test_by_the_clock(tmp_path):
    _, said = run(tmp_path, {"train": {"minutes": 0.004, "batch": 12, "save_minutes": 0.001}})
    assert said["finished"] and said["steps"] > 2 and said["seconds"] <= 5


def test_first_goes_one_after_the_other():
    order = []

    def one(world):
        with world.first():
            order.append(world.rank)

    workers = [threading.Thread(target=one, args=(w,)) for w in reversed(Rank.several(3))]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert order == [0, 1, 2]
