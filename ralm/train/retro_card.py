"""The model card of a RETRO, written from what its config.json knows (`trained`): by the trainer at every export, and again by
python -m ralm.train.retro_card FOLDER, after figures were added under trained.scored."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ralm.errors import UsageError
from ralm.train.gpt_card import machine

CARD = """# {name}

{base}, with what RETRO adds to it (Borgeaud et al. 2022): an encoder of neighbours and chunked cross-attention. For every {m}
tokens of its text it reads passages of a datastore: `ralm neighbours STORE --lm {spec}`, then `--lm {spec} --how retro`.
Without neighbours (`--how none`, RETRO[OFF]) it is {off}.
{unfinished}
| | |
|---|---|
| new weights | {new:.2f} M: cross-attention in layers {layers}, encoder of {depth} layers, width {width} |
| decoder's weights | {whose} |
| chunks | {m} tokens; a neighbour is a chunk and the one that follows it, {r} tokens; trained with 1 to {k} a chunk |
| files | {files} |

## How it was made
{stages}{scored}
## Licence

Weights: as the package. See the decoder's own card for its text and for what a model of this size is not good for.
"""
STAGE = """
{title}: `ralm train`, {minutes:.0f} minutes ({machine}, {device}, matrix products in {dtype}),
{steps:,} steps of {batch} rows of {window} tokens, {tokens:.1f} M tokens. Share of the rows: {sources}.
{drop:.0%} of the parts of a step see no neighbours. Neighbours were found by {retriever}:

{kinds}

Nats per token on {examples} rows of documents that this training held out (a decoder trained on the same files before had read
them), of the tokens that may read neighbours, under none and under {k} of each of these kinds:

| step | none | other documents' | same document's | copies |
|---|---|---|---|---|
{log}
"""
KINDS = {"document": "other documents than those of the row, as published",
         "row": "the same document too, never touching the row: in a small corpus nobody else says a name again",
         "copy": "the row itself, moved by up to half a chunk, one beside a real neighbour: so copying is learnt early"}
SNAPSHOT = "\n**Training still runs; this is a snapshot.**\n"


def card(values: Mapping[str, Any]) -> str:
    """README.md of a RETRO from its config.json."""
    t, c, base = values["trained"], values["retro"], values["base"]
    out = t["recipe"]["train"].get("out", "")
    bundled = Path(out).parts[-2:] == ("checkpoints", "retro")
    spec = "bundled:retro" if bundled else f"retro:{Path(out or 'FOLDER').name}"
    whose = "its own, trained too (base.safetensors)" if base["trained"] else "unchanged" if base["spec"] else "its own (base/)"
    stages = [t]
    while "before" in stages[0]:
        stages.insert(0, stages[0]["before"])
    return CARD.format(
        name=spec, spec=spec, base=f"`{base['spec']}`" if base["spec"] else "A decoder trained from random weights", m=c["m"],
        off="the decoder, bit for bit" if base["spec"] and not base["trained"] else "the decoder that was trained with it",
        unfinished="" if t["finished"] else SNAPSHOT, new=t["new"] / 1e6, layers=", ".join(map(str, c["layers"])),
        depth=c["depth"], width=c["width"], whose=whose, r=2 * c["m"], k=t["recipe"].get("data", {}).get("k", 2),
        files="adapter.safetensors, " + "base.safetensors, " * bool(base["spec"] and base["trained"]) + "config.json (float16)",
        stages="".join(map(_stage, stages)), scored="".join(f"\n{line}\n" for line in t.get("scored", ())))


def _stage(t: Mapping[str, Any]) -> str:
    """One run: a RETRO that was trained on has several."""
    d, train = t["recipe"].get("data", {}), t["recipe"]["train"]
    kinds = d.get("kinds", {"document": 1.0})
    total = sum(kinds.values())
    rows = [f"| {e['step']:,} | " + " | ".join(f"{e[k]:.3f}" if k in e else "" for k in ("off", "document", "row", "copy")) + " |"
            for e in t["evaluations"] if "off" in e]
    said = [f"- {v / total:.0%} of the rows: {KINDS[k]}" for k, v in kinds.items() if v]
    if d.get("leak"):
        said.append(f"- none of them with {d['leak']} words in a row in common with the row")
    return STAGE.format(
        minutes=t["seconds"] / 60, machine=t.get("machine") or machine(), device=t["device"], dtype=train.get("dtype", "float32"),
        steps=t["steps"], window=d.get("window") or "the decoder's window of", tokens=t["counts"].get("tokens", 0) / 1e6,
        batch=train["batch"], sources=", ".join(f"{s['name']} {s.get('share', 1.0):g}" for s in d["source"]), k=d.get("k", 2),
        drop=d.get("drop", 0.1), retriever=d.get("retriever", "bm25"), examples=d.get("examples", 32), log="\n".join(rows),
        kinds="\n".join(said), title=t["recipe"].get("title", ""))


def main(arguments: Sequence[str] | None = None) -> None:
    from ralm.lm.retro_files import described

    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 1:
        raise UsageError("usage: python -m ralm.train.retro_card FOLDER")
    folder = Path(arguments[0])
    values = described(folder)
    values["trained"].setdefault("machine", machine())
    (folder / "config.json").write_text(json.dumps(values, indent=1) + "\n")
    (folder / "README.md").write_text(card(values))


if __name__ == "__main__":
    main()
