"""Bits per byte of a checkpoint on held-out text: python -m ralm.train.gpt_eval checkpoints/base

The number is ralm's own: RALM(lm).score over windows of 512 tokens, stride 256, one BOS per window; every byte counts."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ralm.errors import UsageError
from ralm.train.gpt_data import read_text

HELD_OUT = "lm/wikitext.valid.raw.txt.zst"
WINDOW, STRIDE = 512, 256


def bits_per_byte(lm: Any, path: Path, sample: int | None = None) -> dict[str, Any]:
    """Score a .txt.zst file (its first `sample` characters; None: all). Returns the number and its convention."""
    from ralm.model import RALM

    text = read_text(path)[:sample]
    window = min(WINDOW, lm.window)
    s = RALM(lm).score(text, window=window, stride=min(STRIDE, window // 2))
    return {"file": path.name, "bits_per_byte": round(s.bits_per_byte(), 5), "word_ppl": round(s.word_ppl(), 3),
            "token_ppl": round(s.ppl(), 3), "bytes": s.bytes, "words": s.words, "tokens": len(s.logp),
            "window": s.convention["window"], "stride": s.convention["stride"], "bos": s.convention["bos"],
            "seconds": round(s.seconds, 1)}


def main(arguments: Sequence[str] | None = None) -> None:
    import torch

    from ralm.lm.gpt import load

    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) not in (1, 2):
        raise UsageError("usage: python -m ralm.train.gpt_eval CHECKPOINT [TEXT.txt.zst]")
    root = Path(os.environ.get("RALM_DATA", "../shared/data"))
    torch.set_num_threads(os.cpu_count() or 1)
    path = Path(arguments[1]) if len(arguments) == 2 else root / HELD_OUT
    for key, value in bits_per_byte(load(arguments[0]), path).items():
        sys.stdout.write(f"{key} {value}\n")


if __name__ == "__main__":
    main()
