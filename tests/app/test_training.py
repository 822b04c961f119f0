"""`ralm train`: a recipe is run, goes on, is refused; the list says what there is."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("safetensors")

import torch

from ralm.train import recipes
from ralm.train.task import Group, Task

RECIPE = """
title = "three numbers"
kind = "toy"
needs = ["numbers.txt"]

[reached]
loss = 0.25

[train]
steps = 6
lr = 0.1
save_steps = 2
"""


class Toy(Task):
    kind = "toy"

    def __init__(self, recipe, root, folder):
        self.p = torch.nn.Parameter(torch.randn(3))
        self.wanted = torch.tensor([float(x) for x in (root / "numbers.txt").read_text().split()])

    def groups(self):
        return [Group("numbers", {"p": self.p}, 0.1)]

    def batch(self, step):
        return [step]

    def loss(self, part):
        return (self.p - self.wanted).square().sum(), {"rows": 1}

    def evaluate(self):
        return {"error": float((self.p - self.wanted).abs().max())}

    def export(self, folder, trained):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "p.json").write_text(json.dumps(self.p.tolist()))


@pytest.fixture
def toy(tmp_path, monkeypatch):
    monkeypatch.setitem(recipes.TASKS, "toy", (f"{__name__}:Toy", "numbers"))
    monkeypatch.setitem(sys.modules, __name__, sys.modules[Toy.__module__])
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RALM_RUNS", raising=False)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "numbers.txt").write_text("1 2 3")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "toy.toml").write_text(RECIPE)
    (tmp_path / "recipes" / "other.toml").write_text("title = 'an experiment'\n")
    return ["train", "recipes/toy.toml", "--data", "data"]


def test_runs_and_says_what_came_out(toy, ralm):
    first = ralm(*toy, "--json").json
    assert (first["steps"], first["finished"], first["folder"]) == (6, True, "runs/toy")
    assert Path(first["out"], "p.json").is_file() and first["evaluations"][-1]["error"] < 6
    again = ralm(*toy, "--json")
    assert again.json["steps"] == 6 and "going on with the run in runs/toy" in again.err
    text = ralm(*toy)
    assert text.out.startswith("done after 6 steps") and "error" in text.out
    other = ralm(*toy, "--restart", "--steps", "9", "--folder", "elsewhere", "--json").json
    assert (other["steps"], other["folder"]) == (9, "elsewhere")


def test_steps_of_a_run_cannot_change_but_anew(toy, ralm):
    ralm(*toy, "--steps", "4")
    refused = ralm(*toy)
    assert refused.code == 1 and "train.steps was 4, is 6" in refused.err and refused.err.count("\n") <= 2
    assert ralm(*toy, "--restart", "--json").json["steps"] == 6
    assert ralm(*toy, "--resume", "--json").json["steps"] == 6


def test_list(toy, ralm):
    rows = ralm("train", "--list", "--json", "--data", "data").json["recipes"]
    assert [r["recipe"] for r in rows] == ["recipes/toy.toml"]
    assert rows[0] | {"run": None} == {"recipe": "recipes/toy.toml", "kind": "toy", "title": "three numbers", "trains": "numbers",
                                       "needs": ["numbers.txt"], "missing": [], "reached": {"loss": 0.25}, "run": None}
    ralm(*toy)
    run = ralm("train", "--list", "--json").json["recipes"][0]
    assert run["run"]["step"] == 6 and "error" in run["run"]["evaluation"] and run["missing"] == ["numbers.txt"]
    text = ralm("train", "--list").out
    assert "three numbers" in text and "loss 0.25" in text and "at step 6, error" in text and "not there" in text
    assert ralm("train", "data", "--list").out == "no recipe here trains anything\n"


@pytest.mark.parametrize(("argv", "code", "says"), [
    (["train"], 2, "RECIPE is missing"), (["train", "none.toml"], 1, "No such file"),
    (["train", "recipes/other.toml"], 2, "no 'kind'"), (["train", "data/numbers.txt"], 1, "not TOML"),
    (["train", "recipes/toy.toml"], 1, "needs numbers.txt in"),
    (["train", "recipes/toy.toml", "--data", "data", "--resume"], 2, "no run to go on with"),
    (["train", "recipes/toy.toml", "--data", "data", "--resume", "--restart"], 2, "give one of them"),
    (["train", "recipes/toy.toml", "--data", "data", "--steps", "0"], 2, "--steps is 0")])
def test_wrong_use_is_one_line(toy, ralm, monkeypatch, argv, code, says):
    monkeypatch.setenv("RALM_DATA", "nowhere")
    ran = ralm(*argv)
    assert ran.code == code and says in ran.err and ran.err.count("\n") == 1 and not ran.out


def test_kinds_with_their_own_loop_take_no_options(toy, ralm):
    Path("recipes/gpt.toml").write_text('kind = "gpt"\n')
    assert ralm("train", "recipes/gpt.toml", "--steps", "3").code == 2
    Path("recipes/unknown.toml").write_text('kind = "gpd"\n')
    assert "Did you mean 'gpt'" in ralm("train", "recipes/unknown.toml").err


def test_our_own_recipes_can_be_read():
    rows = recipes.listed(recipes.home(), recipes.data_folder())
    assert {"base.toml", "reader.toml"} <= {Path(r["recipe"]).name for r in rows}
    assert all(r["title"] and r["needs"] for r in rows)
