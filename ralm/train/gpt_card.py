"""The model card of the bundled language model, written from what the run knows about itself (`trained` in config.json).

The trainer writes it at every export; python -m ralm.train.gpt_card checkpoints/base writes it again."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ralm.errors import UsageError
from ralm.lm.gpt import GPTConfig

CARD = """# bundled:base

A small decoder that ships with ralm so that everything on the language-model side (In-Context RALM, REPLUG, RAG, kNN-LM)
runs without a download: `ralm.load_lm("bundled:base")` or `--lm bundled:base`.
{unfinished}
| | |
|---|---|
| parameters | {parameters:.2f} M, embeddings included (tied) |
| shape | {layers} layers, width {width}, {heads} heads, MLP {mlp} (SwiGLU), window {window}, vocabulary {vocab} (byte-level BPE) |
| arithmetic | that of Qwen3 in transformers: RMSNorm before each block, rotary positions, normed queries and keys |
| files | model.safetensors (float16, loaded as float32), config.json, tokenizer.json |
| gives | text, logits, hidden (the final normed state, width {width}) |
| BOS, EOS | `<\\|end\\|>`, id {end}: stands before the first token and after each document |
| {file} | **{bpb:.4f} bits per byte**; perplexity per token {token_ppl:.1f}, per whitespace word {word_ppl:.1f} |

The figure counts all {bytes:,} bytes of the text{part}, {tokens:,} tokens; window {eval_window}, stride {stride}, BOS {bos}.
Print it again: `python -m ralm.train.gpt_eval checkpoints/base`.

## How it was made

`python -m ralm.train.gpt recipes/base.toml`, from random weights: {minutes:.0f} minutes with {threads} threads of a processor
({machine}, matrix products in {dtype}) that did other work too, no accelerator; {steps:,} steps of {batch} rows of {window}
tokens, {seen:.1f} M tokens in all. Muon for matrices, AdamW for embeddings and norms; the learning rate goes to zero by the clock.

Rows seen, by source: {rows}.

- books: 149 public-domain books (57 MB).
- wikipedia: 378 English Wikipedia articles (13 MB), CC BY-SA; the same articles once more as `wikitext_form`, written the
  way WikiText writes text (spaces around punctuation, ` @-@ `, ` = Heading = `), so that WikiText measures words, not typography.
  No WikiText file was trained on, and none of the validation articles is among the 378 (by title).
- {evidence:.0%} of the rows begin with a passage in the form in which ralm prepends one (title, newline, passage, newline): from
  elsewhere in the same document and sharing rare words with the text, or, in {copies:.0%} of all rows, a piece of the text itself,
  so that it learns early to look back and copy.

Validation while training (bits per byte of the first part of {file}): {log}.

## What it is not good for

It is a few million parameters that read a few million words: its English hangs together for a phrase or a sentence, it knows
little and does not reason. It answers no questions worth reading (use `bundled:reader` or a larger model for that), follows no
instructions, knows no programming language, and nothing after its books and articles. Text it writes may
be false, or offensive as old books can be. Its purpose is to measure and show what retrieval changes. It cannot look beyond
{window} tokens.

## Licence

Weights: as the package. Training text: public domain (books) and CC BY-SA 3.0/4.0 (Wikipedia; no text is contained in these files
apart from the tokenizer's word pieces).
"""


SNAPSHOT = "\n**Training still runs; this is a snapshot, and its figures are of a part of the text.**\n"


def card(c: GPTConfig, trained: dict[str, Any]) -> str:
    """README.md of a checkpoint, from its config and the run's own record."""
    s, t = trained["scored"], trained["recipe"]["train"]
    log = ", ".join(f"{e['bits_per_byte']:.3f} at {e['seconds'] / 60:.0f} min" for e in trained["log"])
    part = "" if trained["finished"] else " (its beginning)"
    return CARD.format(
        unfinished="" if trained["finished"] else SNAPSHOT,
        parameters=trained["parameters"] / 1e6, layers=c.layers, width=c.width, heads=c.heads, mlp=c.mlp, window=c.window,
        vocab=c.vocab, end=c.end, file=s["file"], bpb=s["bits_per_byte"], token_ppl=s["token_ppl"], word_ppl=s["word_ppl"],
        bytes=s["bytes"], part=part, tokens=s["tokens"], eval_window=s["window"], stride=s["stride"], bos=s["bos"],
        minutes=trained["minutes"], threads=t["threads"], machine=trained["machine"],
        dtype=t["dtype"], steps=trained["steps"], batch=t["batch"],
        seen=trained["tokens"] / 1e6,
        rows=", ".join(f"{name} {n:,}" for name, n in trained["rows"].items()),
        copies=trained["recipe"]["data"]["copies"], evidence=trained["recipe"]["data"]["evidence"], log=log)


def machine() -> str:
    """The processor's name, as the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = (l.partition(":")[2].strip() for l in lines if l.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 1:
        raise UsageError("usage: python -m ralm.train.gpt_card CHECKPOINT")
    folder = Path(arguments[0])
    values = json.loads((folder / "config.json").read_text())
    values["trained"].setdefault("machine", machine())  # runs before it was recorded
    (folder / "config.json").write_text(json.dumps(values, indent=1) + "\n")
    config = GPTConfig.of(values, str(folder / "config.json"))
    (folder / "README.md").write_text(card(config, config.trained))


if __name__ == "__main__":
    main()
