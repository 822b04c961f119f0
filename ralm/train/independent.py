"""Independent training (regime 1): a dual encoder from pairs, nothing else in the system changes. DPR (Karpukhin et al. 2020).

    kind = "dpr"
    [data]      train = ["qa/squad.json.zst"], held_out = [...], among = [...] (more passages to find them among)
    [encoder]   model = "minilm" (any sentence-transformers model), random = false, layers = 0, tokens = 256, separate = false
    [loss]      temperature = 0.05, symmetric = false, hard = 1 (negatives a query, of the `mined` best of BM25), cached = true

Vectors have length one, as index/dense compares them. A batch is encoded `micro` texts at a time, sorted by length. cached: what a
batch of texts needs for its gradient is computed again when it is due, so memory is that of `micro` texts whatever the batch,
and the gradient is exactly that of the whole batch (Gao et al. 2021, GradCache). Ranks gather each other's vectors, with gradients.
What is written loads in sentence-transformers, and here as `dense:FOLDER`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ralm import progress
from ralm.errors import UsageError
from ralm.train import ranks
from ralm.train.encoder import Encoder, Trainable
from ralm.train.heldout import HeldOut
from ralm.train.objectives import contrastive, similarity
from ralm.train.pairs import Pairs, mined, read_pairs
from ralm.train.task import Group, Settings, Task, section


@dataclass(frozen=True)
class Data:
    train: list
    held_out: list
    among: list
    questions: int = 0  # of the held-out ones, evenly spread; 0: all


@dataclass(frozen=True)
class Loss:
    temperature: float = 0.05
    symmetric: bool = False
    hard: int = 1
    mined: int = 8
    depth: int = 50
    cached: bool = True


class Part(NamedTuple):
    """One rank's queries and passages (texts), and the whole batch: which passage is whose, which are false negatives."""

    queries: list[str]
    passages: list[str]
    positive_B: Tensor
    mask_BN: Tensor


class DualEncoder(Task):
    kind = "dpr"

    def __init__(self, recipe: Mapping[str, Any], root: Path, folder: Path):
        self.settings = Settings.of(recipe["train"])
        data, self.how = section(recipe, "data", Data), section(recipe, "loss", Loss)
        self.pairs = Pairs()
        for name in data.train:
            self.pairs.take(read_pairs(root / name))
        if self.settings.batch > len(self.pairs.queries):
            raise UsageError(f"[train] batch = {self.settings.batch}, but there are {len(self.pairs.queries)} pairs; use fewer")
        self.hard_QK = self._negatives(folder)
        self.encoder = Trainable(section(recipe, "encoder", Encoder), ranks.device(self.settings.device))
        self.held = self.beside = None
        if data.held_out:
            self._prepare(data, root, folder)

    def _negatives(self, folder: Path) -> np.ndarray:
        """Hard negatives [queries, k]: the data's own where it has some, mined ones for the others."""
        k = max(1, self.how.mined)
        if not self.how.hard:
            return np.full((len(self.pairs.queries), 1), -1, np.int32)
        out = np.full((len(self.pairs.queries), k), -1, np.int32)
        for n, given in enumerate(self.pairs.negatives):
            out[n, :min(k, len(given))] = given[:k]
        bare = (out < 0).all(1)
        if bare.any():
            with ranks.world().first():
                out[bare] = mined(self.pairs, k, folder, self.how.depth)[bare]
        return out

    def _prepare(self, data: Data, root: Path, folder: Path) -> None:
        """Held-out questions, and what BM25 and the untrained encoder find for them, once a run."""
        asked, more = Pairs(), []
        for name in data.held_out:
            asked.take(read_pairs(root / name))
        for name in data.among:
            more += read_pairs(root / name).passages
        self.held = HeldOut(asked, more, data.questions)
        kept = folder / "baselines.npz"
        with ranks.world().first():
            if not kept.is_file():
                progress.note(f"before training: BM25 and the untrained encoder on {len(self.held.queries):,} held-out questions, "
                              f"{len(self.held.passages):,} passages")
                part = kept.with_suffix(".part.npz")
                np.savez(part, bm25=self.held.bm25(), untrained=self._found(), allow_pickle=False)
                part.replace(kept)
        with np.load(kept, allow_pickle=False) as z:
            self.beside = {name: z[name] for name in ("bm25", "untrained")}
        if len(self.beside["bm25"]) != len(self.held.queries):
            raise UsageError(f"{kept} is of {len(self.beside['bm25'])} questions, the recipe asks {len(self.held.queries)}; begin "
                             "anew in another folder")

    # ---- the task

    def groups(self) -> list[Group]:
        return self.encoder.groups(self.settings.lr)

    def batch(self, step: int) -> list[Part]:
        """One part a rank. Every epoch is another order; hard negatives are drawn anew each time a query comes."""
        size, world, p = self.settings.batch, ranks.world(), self.pairs
        if size % world.size:
            raise UsageError(f"[train] batch = {size} cannot be shared by {world.size} ranks; use a multiple")
        epoch, at = divmod(step, len(p.queries) // size)
        order = np.random.default_rng([self.settings.seed, epoch]).permutation(len(p.queries))
        rows = order[at * size:(at + 1) * size].tolist()
        rng = np.random.default_rng([self.settings.seed, step, 1])
        parts, numbers, positive = [], [], []
        for first in range(0, size, size // world.size):
            mine = rows[first:first + size // world.size]
            good = [int(rng.choice(p.positives[q])) for q in mine]
            bad = [self._hard(q, rng) for q in mine]
            positive += range(len(numbers), len(numbers) + len(good))
            here = [*good, *(b for some in bad for b in some)]
            numbers += here
            parts.append(([p.queries[q] for q in mine], [p.passages[i].whole for i in here]))
        known = [set(p.positives[q]) for q in rows]
        mask_BN = torch.tensor([[i in good for i in numbers] for good in known])
        return [Part(q, d, torch.tensor(positive), mask_BN) for q, d in parts]

    def _hard(self, query: int, rng: np.random.Generator) -> list[int]:
        """`hard` negatives of a query; passages at random where it has too few."""
        there = [i for i in self.hard_QK[query].tolist() if i >= 0]
        out = [int(i) for i in rng.permutation(there)[:self.how.hard]] if there and self.how.hard else []
        while len(out) < self.how.hard and len(self.pairs.passages) > len(self.pairs.positives[query]) + len(out):
            i = int(rng.integers(len(self.pairs.passages)))
            if i not in self.pairs.positives[query] and i not in out:
                out.append(i)
        return out

    def loss(self, part: Part) -> tuple[Tensor, dict[str, float]]:
        """The whole batch's loss on every rank, from the vectors of all (their mean has the whole batch's gradient)."""
        world = ranks.world()
        q_BD, d_ND = (world.gather(self.encoder.encode(texts, role, self.settings.micro, self.how.cached))
                      for texts, role in ((part.queries, "query"), (part.passages, "passage")))
        positive_B, mask_BN = part.positive_B.to(q_BD.device), part.mask_BN.to(q_BD.device)
        loss = contrastive(q_BD, d_ND, positive_B, self.how.temperature, mask_BN, self.how.symmetric)
        with torch.no_grad():
            s_BN = similarity(q_BD, d_ND)
            own_B = s_BN.gather(1, positive_B[:, None])[:, 0]
            best_B = s_BN.masked_fill(mask_BN, -2.0).amax(1)  # of the true negatives; a cosine is at least -1
            figures = {"right": float((own_B > best_B).float().mean()), "margin": float((own_B - best_B).mean())}
        return loss, figures | {"queries": len(part.queries)}

    def _found(self) -> np.ndarray:
        """What the encoder as it is now finds for the held-out questions, int32 [Q, DEPTH]."""
        held = self.held
        texts = [p.whole for p in held.passages]
        with progress.task("encode", total=len(texts) + len(held.queries), unit="texts") as advance:
            return held.top(self.encoder.many(held.queries, "query", advance), self.encoder.many(texts, "passage", advance))

    def evaluate(self) -> dict[str, float]:
        return {} if self.held is None else self.held.figures(self._found(), self.beside)

    def export(self, folder: Path, trained: Mapping[str, Any]) -> None:
        self.encoder.save(folder, trained, card(trained))


def card(trained: Mapping[str, Any]) -> str:
    """README.md of an exported encoder."""
    recipe = trained["recipe"]
    said = recipe.get("encoder") or {}
    begun = f"{said.get('model', 'minilm')}{', random weights' if said.get('random') else ''}"
    last = trained["evaluations"][-1] if trained["evaluations"] else {}
    rows = [f"| {k} | {v:g} |" for k, v in last.items() if k not in ("step", "seconds")]
    return "\n".join([
        f"# {recipe.get('title') or 'A dual encoder'}", "",
        f"Trained by `ralm train`: {trained['steps']:,} steps of {recipe['train'].get('batch', 1)} queries, "
        f"{trained['seconds'] / 60:.1f} minutes, {trained['parameters'] / 1e6:.1f} M parameters, from {begun}"
        f"{'' if trained['finished'] else '; the run goes on'}.", "",
        "Use: `SentenceTransformer(FOLDER)`, or `--retriever dense:FOLDER` in ralm. Vectors have length one.", "",
        "| held-out figure | percent |", "|---|---|", *rows, "",
        "topK: a passage with an answer among the first K; goldK: the question's own passage; A-B: the difference to B, paired,",
        "with the ends of its 95 % bootstrap interval.", ""])
