"""How often the index is made anew, and what it is worth: REALM's ablation in a toy world (ralm/train/toy.py).

    python benchmarks/realm_refresh.py FOLDER [--seeds 3] [--steps 240] [--letters 12]

Rows: the retriever frozen; the index never made anew (T = 0); every 100 and every 10 steps, on the spot. A line of JSON a run in
FOLDER/runs.jsonl (a run that is there is not repeated), then the table: means over seeds, with the least and the largest."""

import argparse
import json
import time
from pathlib import Path

import numpy as np

from ralm.lm.realm import Realm
from ralm.train import recipes, toy
from ralm.train.loop import fit

VARIANTS = {"frozen": (0, False), "T=0": (0, True), "T=100": (100, True), "T=10": (10, True)}


def recipe(world: Path, seed: int, steps: int, refresh: int, learns: bool) -> dict:
    return {"kind": "realm", "data": {"texts": ["texts.jsonl"], "held_out": ["facts.json"], "split": "none"},
            "encoder": {"model": str(world / "retriever")},
            "reader": {"model": str(world / "reader"), "text": 16, "passage": 16, "embeddings": True, "lr": 1e-5},
            "masking": {"words": 3}, "index": {"k": 8, "refresh": refresh, "lag": 0, "background": False},
            "loss": {"temperature": 0.05, "retriever": learns},
            "train": {"seed": seed, "steps": steps, "batch": 16, "lr": 3e-3, "schedule": "constant", "warmup": 0.02, "clip": 1.0,
                      "evaluate_steps": steps // 4, "save_minutes": 60.0}}


def measured(world: Path, folder: Path, seed: int, steps: int, name: str) -> dict:
    r = recipe(world, seed, steps, *VARIANTS[name])
    began, task = time.process_time(), recipes.make(r, world, folder)
    said = fit(task, r, folder)
    seconds = time.process_time() - began
    rows = [json.loads(x) for x in (folder / "metrics.jsonl").open()]
    last = [x for x in rows if "loss" in x][-steps // 8:]
    realm = Realm(folder / "model", task.corpus.store)
    right = [realm.fill(q).words[0] == a[0].lower() for q, a in zip(task.held.queries, task.held.answers)]
    final = said["evaluations"][-1]
    made = [json.loads(x) for x in (folder / "refresh.jsonl").open()]
    out = {"seed": seed, "variant": name, "steps": steps, "people": len(task.corpus.ids), "processor_s": round(seconds, 1),
           "indexes": len(made), "refresh_s": round(sum(x["seconds"] for x in made[1:]), 1), "em": 100 * float(np.mean(right)),
           "curve": [(e["step"], round(e["gold5"], 1)) for e in said["evaluations"]]}
    out |= {key: final[key] for key in ("gold1", "gold5", "gold20")}
    logged = [key for key in ("loss", "found", "retrieval_utility", "overlap", "index_age", "null") if key in last[0]]
    return out | {key: float(np.mean([x[key] for x in last])) for key in logged}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("folder", type=Path)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--steps", type=int, default=240)
    p.add_argument("--letters", type=int, default=12)
    o = p.parse_args()
    o.folder.mkdir(parents=True, exist_ok=True)
    kept = o.folder / "runs.jsonl"
    done = [json.loads(x) for x in kept.open()] if kept.is_file() else []
    for seed in range(o.seeds):
        world = o.folder / f"world{seed}"
        if not (world / "retriever" / "modules.json").is_file():
            toy.write(world, toy.World(letters=o.letters, seed=seed, seen=0.1))
        for name in VARIANTS:
            if not any(d["seed"] == seed and d["variant"] == name for d in done):
                done.append(measured(world, o.folder / f"{seed}-{name}", seed, o.steps, name))
                with kept.open("a") as f:
                    f.write(json.dumps(done[-1]) + "\n")
                print(json.dumps(done[-1]), flush=True)
    keys = ("loss", "found", "retrieval_utility", "overlap", "gold1", "gold5", "em", "processor_s", "refresh_s")
    print(f"| | {' | '.join(keys)} |\n|---|{'---|' * len(keys)}")
    for name in VARIANTS:
        mine = [d for d in done if d["variant"] == name]
        cells = [[d[key] for d in mine if key in d] for key in keys]
        print(f"| {name} | {' | '.join(f'{np.mean(c):.2f} ({min(c):.2f}, {max(c):.2f})' if c else '-' for c in cells)} |")


if __name__ == "__main__":
    main()
