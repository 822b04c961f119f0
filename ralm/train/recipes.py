"""Recipes: one TOML a run. `kind` names the task (TASKS), [train] says for how long and how (task.py), the rest is the task's.

    title = "..."             what comes out, in a line
    kind = "dpr"
    needs = ["qa/a.json.zst"] files of the data folder
    [reached]                 figures of the run that was kept, with what they were measured on
    [train] ..."""

from __future__ import annotations

import importlib
import json
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ralm.errors import ReadError, UsageError, unknown

if TYPE_CHECKING:
    from ralm.train.task import Task

TASKS = {  # kind: where its task is, called with (recipe, data folder, run's folder); what it trains
    "dpr": ("ralm.train.independent:DualEncoder", "a retriever, from pairs of query and passage"),
    "ict": ("ralm.train.ict:InverseCloze", "a retriever, from sentences and their contexts"),
    "realm": ("ralm.train.joint_async:Realm", "a retriever and a masked language model, together"),
    "realm-qa": ("ralm.train.realm_qa:OpenQA", "a span reader and a query encoder, over passages that stay"),
    "trime": ("ralm.train.joint_in_batch:Trime", "a decoder whose memory is the batch: its tokens' states as keys"),
    "replug-lsr": ("ralm.train.sequential:Lsr", "a retriever, from a frozen language model's judgement of passages"),
    "ra-dit-lm": ("ralm.train.sequential:Reading", "a language model, to read what a frozen retriever finds"),
    "rag": ("ralm.train.rag:Rag", "a query encoder and a generator, over passages whose encoder stays"),
    "npm": ("ralm.train.npm:Npm", "a masked language model that fills gaps with stored phrases"),
    "retro": ("ralm.train.retro:Training", "a decoder that reads neighbours"),
}
ALONE = {  # kinds with a loop of their own, run as `python -m MODULE RECIPE`
    "gpt": ("ralm.train.gpt", "a decoder, from random weights"),
    "reader": ("ralm.train.reader", "a span reader"),
}


def read(path: str | Path) -> dict[str, Any]:
    """A recipe. Raises ReadError for a file that is none, UsageError for a kind that nothing here trains."""
    try:
        recipe = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise ReadError(f"{path}: {e.strerror or e}; give a recipe, see ralm train --list") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ReadError(f"{path} is not TOML ({e})") from e
    kind = recipe.get("kind")
    if kind is None:
        raise UsageError(f"{path} has no 'kind' and so trains nothing; known kinds: {', '.join(sorted(TASKS | ALONE))}")
    if kind not in TASKS | ALONE:
        raise unknown("kind of recipe", str(kind), TASKS | ALONE)
    return recipe


def make(recipe: Mapping[str, Any], root: str | Path, folder: str | Path) -> Task:
    """The task of a recipe, its weights drawn under the recipe's seed. root: where `needs` are; folder: the run's."""
    import torch

    where, _, name = TASKS[recipe["kind"]][0].partition(":")
    torch.manual_seed((recipe.get("train") or {}).get("seed", 0))
    Path(folder).mkdir(parents=True, exist_ok=True)
    return getattr(importlib.import_module(where), name)(recipe, Path(root), Path(folder))


def data_folder(given: str | Path | None = None) -> Path:
    """Where data files are: what is given, $RALM_DATA, or ../shared/data."""
    return Path(given or os.environ.get("RALM_DATA") or "../shared/data")


def run_folder(path: str | Path, given: str | Path | None = None) -> Path:
    """Where a recipe's run is kept: what is given, or its name in $RALM_RUNS or runs/."""
    return Path(given) if given else Path(os.environ.get("RALM_RUNS") or "runs") / Path(path).stem


def missing(recipe: Mapping[str, Any], root: Path) -> list[str]:
    """The files a recipe needs that are not there."""
    return [name for name in recipe.get("needs") or () if not (root / name).exists()]


def home() -> Path:
    """The folder of recipes: ./recipes, or the one beside the package in a checkout."""
    here = Path("recipes")
    return here if here.is_dir() else Path(__file__).parents[2] / "recipes"


def listed(folder: Path, root: Path) -> list[dict[str, Any]]:
    """Every recipe of a folder that trains something: {"recipe", "kind", "title", "trains", "needs", "missing", "reached", "run"}.

    run: {"step", "finished", "evaluation"} of the run kept under this name, None where there is none."""
    out = []
    for path in sorted(folder.glob("*.toml")):
        try:
            recipe = read(path)
        except UsageError:  # an experiment, not a training recipe
            continue
        out.append({"recipe": str(path), "kind": recipe["kind"], "title": recipe.get("title", ""),
                    "trains": recipe.get("trains", (TASKS | ALONE)[recipe["kind"]][1]), "needs": list(recipe.get("needs") or ()),
                    "missing": missing(recipe, root), "reached": recipe.get("reached") or {}, "run": standing(run_folder(path))})
    return out


def standing(folder: Path) -> dict[str, Any] | None:
    """Where the run in a folder stands, from its state's header alone."""
    path = folder / "state.safetensors"
    if not path.is_file():
        return None
    try:
        with path.open("rb") as f:
            header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
        state = json.loads(header["__metadata__"]["state"])
        evaluations = state.get("evaluations") or state.get("log") or []
        return {"step": state["step"] if "step" in state else state["steps"], "seconds": state["seconds"],
                "evaluation": evaluations[-1] if evaluations else None}
    except (ValueError, KeyError, TypeError, OSError):
        return None
