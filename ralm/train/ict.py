"""Inverse cloze task (Lee et al. 2019): which passage is a sentence from? What a retriever begins joint training with.

    kind = "ict"
    [data]     as in corpus.py          [encoder]  as in encoder.py
    [loss]     temperature = 0.05, kept = 0.1 (share of sentences that stay in their passage), words = 5, symmetric = false

A query is a sentence of a passage, which is taken out of the passage in 90 % of the cases; in the others it stays, so that the
retriever does not unlearn that equal words are a good sign. All other passages of the batch are negatives:

    L = -(1/B) sum_i ln  exp s(q_i, d_i) / sum_j exp s(q_i, d_j)"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ralm.errors import UsageError
from ralm.how.cite import sentences
from ralm.train import ranks
from ralm.train.corpus import Corpus, Data, squeezed
from ralm.train.encoder import Encoder, Trainable
from ralm.train.joint_async import baselines, card, found, sides, vectors
from ralm.train.objectives import contrastive
from ralm.train.task import Group, Settings, Task, section
from ralm.types import Chunk


@dataclass(frozen=True)
class Loss:
    temperature: float = 0.05
    kept: float = 0.1
    words: int = 5  # of the shortest sentence that is a query
    symmetric: bool = False


class Cloze(NamedTuple):
    """A sentence and the passage it is from, mostly without it."""

    query: str
    passage: str
    kept: bool


class InverseCloze(Task):
    kind = "ict"

    def __init__(self, recipe: Mapping[str, Any], root: Path, folder: Path):
        self.settings, self.how = Settings.of(recipe["train"]), section(recipe, "loss", Loss)
        self.corpus = Corpus(section(recipe, "data", Data), root, Path(folder))
        self.encoder = Trainable(section(recipe, "encoder", Encoder), ranks.device(self.settings.device))
        self.held = self.corpus.held_out()
        self.beside = baselines(self, Path(folder)) if self.held else None

    def groups(self) -> list[Group]:
        return sides(self.encoder, self.settings.lr)

    def batch(self, step: int) -> list[list[Cloze]]:
        """Different passages, a sentence of each; one part a rank, whose vectors are gathered."""
        size, world, rng = self.settings.batch, ranks.world().size, np.random.default_rng([self.settings.seed, step, 5])
        if size % world:
            raise UsageError(f"[train] batch = {size} cannot be shared by {world} ranks; use a multiple")
        out: list[Cloze] = []
        for chunk in self.corpus.chunks(rng.permutation(self.corpus.free)[:20 * size]):
            if (made := cloze(chunk, rng, self.how)) is not None:
                out.append(made)
                if len(out) == size:
                    return [out[at:at + size // world] for at in range(0, size, size // world)]
        raise UsageError(f"{self.corpus.store.path} has {len(out)} passages of several sentences among {20 * size}, a batch is "
                         f"{size}; use a smaller batch, or longer passages ([data] split)")

    def loss(self, part: Sequence[Cloze]) -> tuple[Tensor, dict[str, float]]:
        world = ranks.world()
        q_BD, d_BD = (world.gather(self.encoder.encode(texts, role, self.settings.micro)) for texts, role in (
            ([c.query for c in part], "query"), ([c.passage for c in part], "passage")))
        own_B = torch.arange(len(q_BD), device=q_BD.device)
        loss = contrastive(q_BD, d_BD, own_B, self.how.temperature, symmetric=self.how.symmetric)
        with torch.no_grad():
            right = (q_BD @ d_BD.T).argmax(1) == own_B
        return loss, {"queries": len(part), "right": float(right.float().mean()), "kept": float(np.mean([c.kept for c in part]))}

    def evaluate(self) -> dict[str, float]:
        return {} if self.held is None else self.held.figures(found(self, vectors(self)), self.beside)

    def export(self, folder: Path, trained: Mapping[str, Any]) -> None:
        self.encoder.save(folder, trained, card(trained))


def cloze(chunk: Chunk, rng: np.random.Generator, how: Loss) -> Cloze | None:
    """A sentence of a passage and the rest of it; None for a passage of one sentence."""
    spans = [(a, b) for a, b in sentences(chunk.text) if len(chunk.text[a:b].split()) >= how.words]
    if len(spans) < 2:
        return None
    start, end = spans[int(rng.integers(len(spans)))]
    kept = bool(rng.random() < how.kept)
    body = chunk.text if kept else f"{chunk.text[:start]} {chunk.text[end:]}"
    text = squeezed(body)
    return Cloze(squeezed(chunk.text[start:end]), f"{chunk.title}\n{text}" if chunk.title else text, kept)
