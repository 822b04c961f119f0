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

{base}, with what RETRO adds to it (Borgeaud et al. 2022): an encoder of neighbours and chunked cross-attention. It reads, for every
{m} tokens of its text, passages of a datastore: `ralm neighbours STORE --lm {spec}`, then `--lm {spec} --how retro`. Without
neighbours (`--how none`, RETRO[OFF]) it is {off}.
{unfinished}
| | |
|---|---|
| new weights | {new:.2f} M: cross-attention in layers {layers}, encoder of {depth} layers, width {width} |
| decoder's weights | {whose} |
| chunks | {m} tokens; a neighbour is a chunk and the one that follows it, {r} tokens; trained with 1 to {k} a chunk |
| files | {files} |

## How it was made

`ralm train`, {minutes:.0f} minutes ({machine}, {device}, matrix products in {dtype}), {steps:,} steps of {batch} rows of {window}
tokens, {tokens:.1f} M tokens. Rows: {sources}.
{drop:.0%} of the parts of a step see no neighbours. Neighbours were found by {retriever}, {kinds}.

Nats per token on documents that this training held out (the decoder had read them before, where it had read the same files), on the
first {examples} rows, tokens that may read neighbours:

| step | none | other documents' | same document's | copies |
|---|---|---|---|---|
{log}
{scored}"""
KINDS = {"document": "of other documents than the row's (as published)",
         "row": "of the same document too, never touching the row (in a small corpus only a document itself says a name again)",
         "copy": "with a piece of the row itself among them, moved by up to half a chunk, so that copying is learnt early"}
SNAPSHOT = "\n**Training still runs; this is a snapshot.**\n"


def card(values: Mapping[str, Any]) -> str:
    """README.md of a RETRO from its config.json."""
    t, c, base = values["trained"], values["retro"], values["base"]
    recipe = t["recipe"]
    d, train = recipe.get("data", {}), recipe["train"]
    out = train.get("out", "")
    bundled = Path(out).parts[-2:] == ("checkpoints", "retro")
    spec = "bundled:retro" if bundled else f"retro:{Path(out or 'FOLDER').name}"
    kinds, total = d.get("kinds", {"document": 1.0}), sum(d.get("kinds", {"document": 1.0}).values())
    rows = [f"| {e['step']:,} | " + " | ".join(f"{e[k]:.3f}" if k in e else "" for k in ("off", "document", "row", "copy")) + " |"
            for e in t["evaluations"] if "off" in e]
    whose = "its own, trained too (base.safetensors)" if base["trained"] else "unchanged" if base["spec"] else "its own (base/)"
    return CARD.format(
        name=spec, spec=spec, base=f"`{base['spec']}`" if base["spec"] else "A decoder trained from random weights", m=c["m"],
        off="the decoder, bit for bit" if base["spec"] and not base["trained"] else "a decoder of its own",
        unfinished="" if t["finished"] else SNAPSHOT, new=t["new"] / 1e6, layers=", ".join(map(str, c["layers"])),
        depth=c["depth"], width=c["width"], whose=whose, r=2 * c["m"], k=d.get("k", 2), batch=train["batch"],
        files="adapter.safetensors, " + "base.safetensors, " * bool(base["spec"] and base["trained"]) + "config.json (float16)",
        minutes=t["seconds"] / 60, machine=t.get("machine") or machine(), device=t["device"], dtype=train.get("dtype", "float32"),
        steps=t["steps"], window=d.get("window") or "the decoder's window of", tokens=t["counts"].get("tokens", 0) / 1e6,
        sources=", ".join(f"{s['name']} {s.get('share', 1.0):g}" for s in d["source"]), drop=d.get("drop", 0.1),
        retriever=d.get("retriever", "bm25"), examples=d.get("examples", 32), log="\n".join(rows),
        kinds="; ".join(f"{v / total:.0%} {KINDS[k]}" for k, v in kinds.items() if v),
        scored="".join(f"\n{line}\n" for line in t.get("scored", ())))


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
