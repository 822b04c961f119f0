"""`ralm train`: a recipe run to its end, or the list of recipes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from ralm import progress
from ralm.app.options import positive
from ralm.app.terminal import Output, bold, duration, facts
from ralm.errors import ReadError, UsageError

RecipeArg = Annotated[Path | None, Parameter(name="RECIPE", help="A TOML file; ralm train --list shows those there are.")]
Steps = Annotated[int | None, Parameter(help="Length of the run, instead of what the recipe says.")]
Resume = Annotated[bool, Parameter(show_default=False, help="Go on with the run that is there. That is done anyway; with this, it "
                                                            "is an error where there is none.")]
Restart = Annotated[bool, Parameter(show_default=False, help="Begin anew, over the run that is there.")]
Folder = Annotated[Path | None, Parameter(help="Of the run; default: runs/NAME OF THE RECIPE.")]
Data = Annotated[Path | None, Parameter(help="Where the recipe's files are; default: $RALM_DATA, or ../shared/data.")]
Listing = Annotated[bool, Parameter(name="--list", show_default=False, help="Show every recipe (of the folder RECIPE): what it "
                                    "trains, what it needs, what it reached.")]


def train(recipe: RecipeArg = None, /, *, steps: Steps = None, resume: Resume = False, restart: Restart = False,
          folder: Folder = None, data: Data = None, listing: Listing = False, out: Output = Output()) -> None:  # noqa: B008
    """Train a model by a recipe. A run that was stopped, by whatever, goes on when the same command is given again; with the same
    recipe it ends with the same weights. For several GPUs or machines: accelerate launch -m ralm.app.cli train RECIPE.

    JSON: kind, steps, seconds, counts, parameters, finished, evaluations [{step, seconds, figures}], ranks, device, torch, recipe,
    folder, out. With --list: recipes [{recipe, kind, title, trains, needs, missing, reached, run {step, seconds, evaluation}}]."""
    from ralm.train import recipes

    root = recipes.data_folder(data)
    if listing:
        rows = recipes.listed(recipes.home() if recipe is None else recipe, root)
        out.show({"recipes": rows}, lambda: _list_lines(rows))
        return
    if recipe is None:
        raise UsageError("RECIPE is missing: give a TOML file, or see ralm train --list")
    if resume and restart:
        raise UsageError("--resume goes on with a run and --restart begins anew; give one of them")
    positive("--steps", steps)
    said = recipes.read(recipe)
    if absent := recipes.missing(said, root):
        raise ReadError(f"{recipe} needs {', '.join(absent)} in {root}, which has none; give the folder with --data or RALM_DATA")
    if said["kind"] in recipes.ALONE:
        _alone(recipe, said["kind"], (steps is not None, "--steps"), (restart, "--restart"), (folder is not None, "--folder"))
        return
    where = recipes.run_folder(recipe, folder)
    if resume and not (where / "state.safetensors").is_file():
        raise UsageError(f"{where} holds no run to go on with; leave --resume out to begin one")
    from ralm.train.loop import fit

    main = os.environ.get("RANK", "0") == "0"
    if not main:
        progress.use(progress.Silent())  # one rank talks
    if (where / "state.safetensors").is_file() and not restart:
        progress.note(f"going on with the run in {where}")
    trained = fit(recipes.make(said, root, where), said, where, steps=steps, resume=not restart)
    data_out = trained | {"folder": str(where), "out": said.get("train", {}).get("out") or str(where / "model")}
    if main:
        out.show(data_out, lambda: _trained_lines(data_out))


def _alone(recipe: Path, kind: str, *given: tuple[bool, str]) -> None:
    """Kinds with a loop of their own go on by themselves and take no options."""
    from importlib import import_module

    from ralm.train.recipes import ALONE

    for there, name in given:
        if there:
            raise UsageError(f"{name} is not for recipes of kind '{kind}': change the recipe")
    import_module(ALONE[kind][0]).main([str(recipe)])


def _trained_lines(data: Mapping[str, Any]) -> Iterator[str]:
    state = "done" if data["finished"] else "stopped"
    yield f"{state} after {data['steps']:,} steps ({duration(data['seconds'])}): {data['out']}"
    if data["evaluations"]:
        last = {k: v for k, v in data["evaluations"][-1].items() if k not in ("step", "seconds")}
        yield from facts({k: f"{v:g}" for k, v in last.items()})


def _list_lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        yield bold(row["recipe"]) + f"  {row['title'] or row['trains']}"
        about = {"kind": f"{row['kind']}: {row['trains']}", "needs": ", ".join(row["needs"]) or "nothing"}
        if row["missing"]:
            about["not there"] = ", ".join(row["missing"])
        if row["reached"]:
            about["reached"] = ", ".join(f"{k} {v}" for k, v in row["reached"].items())
        if row["run"]:
            last = {k: v for k, v in (row["run"]["evaluation"] or {}).items() if isinstance(v, float)}
            about["run"] = f"at step {row['run']['step']}" + "".join(f", {k} {v:g}" for k, v in last.items())
        yield from (f"  {line}" for line in facts(about))
        yield ""
    if not rows:
        yield "no recipe here trains anything"
