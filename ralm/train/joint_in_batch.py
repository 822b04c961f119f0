"""Joint training with in-batch approximation (regime 4): the batch's tokens stand in for the datastore. TRIME (Zhong et al. 2022).

    kind = "trime"
    [data]      files = ["lm/wikipedia_articles.jsonl.zst"], form = "plain" | "wikitext", documents = 0 (most of each file; 0: all),
                copies = 1.0 (segments that repeat more than this share of earlier text are left out), segment = 256,
                held_out = "lm/wikitext.valid.raw.txt.zst", sample = 20000 (its first characters)
    [model]     start = "" (random weights of the shape below) or bundled:base, gpt:FOLDER; tokenizer = "bundled:base"
                width, layers, heads, mlp, window; adam_lr = 4e-3 (embeddings and norms; [train] lr is Muon's, of matrices)
    [memory]    kind = "local" | "long" | "external" | "none", segments = 8 (that share a memory; batch is a multiple),
                drop = 0.9 (external: how often a segment goes without its own earlier tokens), warm = 0 (steps without memory),
                batches = "" ("bm25" for external, "consecutive" for long, else "scattered"), temperature = 1.0, gradient = true

Every segment is a row [END, tokens]. The state g that predicts a token is its key and is compared with all keys of the memory
(memory.py); gradients reach both sides: in one forward where micro = 0, else `micro` segments at a time, each run again when its
gradient is due (GradCache): memory is that of `micro` segments, the gradient that of all. Ranks take a share of every group and
gather each other's keys with gradients: any number of ranks trains what one does (gradient = false holds the keys fixed, as the
released code does for keys of other devices).

What comes out is a decoder (gpt:FOLDER) to be read by the fusion `trime` (how/joint.py), which is the same distribution: the loss
with a given memory is -score() over a token store that holds it. BM25 batches put beside a segment what a token store would find
for it; among segments drawn at random a memory holds little that is worth looking at."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ralm.errors import UsageError, unknown
from ralm.lm import load
from ralm.lm.gpt import GPT, Decoder, GPTConfig, save
from ralm.train import batching, ranks
from ralm.train.batching import Segments, Text
from ralm.train.gpt_data import read_text
from ralm.train.kernels import causal_attention
from ralm.train.memory import KINDS, Seen, joint_loss
from ralm.train.task import Group, Settings, Task, section

BATCHES = ("bm25", "consecutive", "scattered")
USUAL = {"external": "bm25", "long": "consecutive", "local": "scattered", "none": "scattered"}


@dataclass(frozen=True)
class Data:
    files: list
    form: str = "plain"
    documents: int = 0
    segment: int = 256
    copies: float = 1.0
    held_out: str = ""
    sample: int = 20000


@dataclass(frozen=True)
class Model:
    start: str = ""
    tokenizer: str = "bundled:base"
    width: int = 256
    layers: int = 4
    heads: int = 4
    mlp: int = 640
    window: int = 512
    adam_lr: float = 4e-3


@dataclass(frozen=True)
class Memory:
    kind: str = "external"
    segments: int = 8
    drop: float = 0.9
    warm: int = 0
    batches: str = ""
    neighbours: int = 20
    temperature: float = 1.0
    gradient: bool = True


class Part(NamedTuple):
    """One rank's segments of a group, and the tokens of the whole group."""

    rows_BT: Tensor  # int64, T = segment + 1
    values_M: Tensor
    seen: Seen


class Trime(Task):
    kind = "trime"

    def __init__(self, recipe: Mapping[str, Any], root: Path, folder: Path):
        self.settings, self.root = Settings.of(recipe["train"]), root
        self.data, self.how = section(recipe, "data", Data), section(recipe, "memory", Memory)
        model = section(recipe, "model", Model)
        self._check()
        self.device = ranks.device(self.settings.device)
        self.bpe, self.model = decoder(model, self.device)
        self.adam_lr, self.config = model.adam_lr, self.model.config
        if self.data.segment > self.config.window:
            raise UsageError(f"[data] segment = {self.data.segment} does not fit the model's window of {self.config.window}")
        if self.settings.dtype == "bfloat16":
            for block in self.model.blocks:
                block.attention.attend = causal_attention
        paths = [root / name for name in self.data.files]
        text = Text.read(paths, self.bpe, self.config.end, folder, self.data.documents, self.data.form)
        self.segments = Segments(text, self.data.segment, self.config.end, self.data.copies)
        self.near = None
        if self.batches == "bm25":
            self.near = batching.neighbours(self.segments, self.bpe, self.how.neighbours, folder)
        self.epochs: dict[int, np.ndarray] = {}

    def _check(self) -> None:
        how, batch = self.how, self.settings.batch
        if how.kind not in KINDS:
            raise unknown("[memory] kind", how.kind, KINDS)
        self.batches = how.batches or USUAL[how.kind]
        if self.batches not in BATCHES:
            raise unknown("[memory] batches", self.batches, BATCHES)
        if how.kind == "long" and self.batches != "consecutive":
            raise UsageError("[memory] kind = long looks at earlier segments, so batches must be consecutive")
        if how.segments < 1 or batch % how.segments or how.segments % ranks.world().size:
            raise UsageError(f"[train] batch = {batch} must be a multiple of [memory] segments = {how.segments}, and that of the "
                             f"{ranks.world().size} ranks")
        if not 0 <= how.drop <= 1:
            raise UsageError(f"[memory] drop = {how.drop} is no probability; use 0 to 1")

    # ---- the task

    def groups(self) -> list[Group]:
        named = dict(self.model.named_parameters())
        matrices = {n: p for n, p in named.items() if p.ndim == 2 and n != "embed.weight"}
        rest = {n: p for n, p in named.items() if n not in matrices}
        return [Group("matrices", matrices, self.settings.lr, "muon", weight_decay=0.01),
                Group("embeddings and norms", rest, self.adam_lr, betas=(0.9, 0.95))]

    def batch(self, step: int) -> list[Part]:
        """Groups one after the other, and of each every rank's share. Local memory is dropped by (seed, step) alone."""
        count, size = self.settings.batch // self.how.segments, ranks.world().size
        kind = "none" if step < self.how.warm else self.how.kind
        rng = np.random.default_rng([self.settings.seed, step, 2])
        parts = []
        for n in range(step * count, (step + 1) * count):
            numbers = self._group(n)
            rows_GT = torch.from_numpy(self.segments.rows(numbers)).to(self.device)
            own_G = torch.from_numpy(rng.random(len(numbers)) >= self.how.drop)
            share = len(numbers) // size
            for r in range(size):
                mine, length = slice(r * share, (r + 1) * share), self.data.segment
                own_N = own_G[mine].repeat_interleave(length) if kind == "external" else None
                parts.append(Part(rows_GT[mine], rows_GT[:, 1:].flatten(), Seen(kind, r * share * length, length, own_N)))
        return parts

    def _group(self, n: int) -> np.ndarray:
        """The segments of group n, counted from the beginning of the run."""
        epoch, at = divmod(n, max(1, len(self.segments) // self.how.segments))
        if epoch not in self.epochs:
            args = self.how.segments, self.settings.seed, epoch
            count = len(self.segments)
            self.epochs = {epoch: batching.related(self.near, *args) if self.batches == "bm25" else
                           getattr(batching, self.batches)(count, *args)}
        if not len(self.epochs[epoch]):
            raise UsageError(f"[memory] segments = {self.how.segments}, but the text makes {len(self.segments)}; use fewer")
        return self.epochs[epoch][at]

    def states(self, rows_BT: Tensor) -> tuple[Tensor, Tensor]:
        """(hidden, key) of every token that is predicted, [B x (T - 1), D] each, `micro` rows at a time."""
        micro = self.settings.micro or len(rows_BT)
        again = len(rows_BT) > micro and torch.is_grad_enabled()
        out = []
        for some in rows_BT[:, :-1].split(micro):
            out.append(checkpoint(self._states, some, use_reentrant=False) if again else self._states(some))
        hidden, keys = zip(*out)
        return torch.cat(hidden).flatten(0, 1).float(), torch.cat(keys).flatten(0, 1).float()

    def _states(self, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        hidden_BTD, key_BTD, _ = self.model.states(ids_BT)
        return hidden_BTD, key_BTD

    def loss(self, part: Part) -> tuple[Tensor, dict[str, float]]:
        """The mean over this rank's tokens, which see the memory of the whole group."""
        hidden_ND, query_ND = self.states(part.rows_BT)
        keys_MD = ranks.world().gather(query_ND)
        if not self.how.gradient:
            keys_MD = keys_MD.detach()
        targets_N = part.rows_BT[:, 1:].flatten()
        loss, figures = joint_loss(hidden_ND, self.model.embed.weight, targets_N, query_ND, keys_MD, part.values_M, part.seen,
                                   self.how.temperature)
        return loss, figures | {"tokens": len(targets_N)}

    def evaluate(self) -> dict[str, float]:
        """Bits per byte of held-out text, by the model alone and with its window's own tokens as memory."""
        if not self.data.held_out:
            return {}
        from ralm.model import RALM

        text = read_text(self.root / self.data.held_out)[:self.data.sample]
        lm = GPT(self.model, self.bpe, "trime")
        try:
            return {f"bits_per_byte_{name}": RALM(lm, how=how).score(text).bits_per_byte()
                    for name, how in (("alone", "none"), ("local", f"trime:k=0,temperature={self.how.temperature}"))}
        finally:
            self.model.train()

    def export(self, folder: Path, trained: Mapping[str, Any]) -> None:
        told = {k: v for k, v in trained.items() if k != "evaluations"} | {"evaluations": trained["evaluations"][-20:]}
        save(folder, self.model, self.bpe, replace(self.config, trained=json.loads(json.dumps(told))))
        (folder / "README.md").write_text(card(trained))


def decoder(model: Model, device: torch.device) -> tuple[Any, Decoder]:
    """Tokenizer and network: a trained one's weights, or random ones. Raises UsageError where it is no decoder of this project."""
    begun = load(model.start or model.tokenizer)
    if not isinstance(begun, GPT):
        raise UsageError(f"'{begun.name}' is no decoder of this project; give bundled:base, or gpt:FOLDER")
    if model.start:
        network = Decoder(begun.config)
        network.load_state_dict(begun.model.state_dict())
    else:
        shape = {k: v for k, v in asdict(model).items() if k in ("width", "layers", "heads", "mlp", "window")}
        network = Decoder(GPTConfig(vocab=begun.vocab, end=begun.bos, **shape))
    return begun.tokenizer, network.to(device).train()


def card(trained: Mapping[str, Any]) -> str:
    """README.md of an exported decoder."""
    recipe = trained["recipe"]
    how = asdict(section(recipe, "memory", Memory))
    last = trained["evaluations"][-1] if trained["evaluations"] else {}
    rows = [f"| {k} | {v:g} |" for k, v in last.items() if k not in ("step", "seconds")]
    return "\n".join([
        f"# {recipe.get('title') or 'A decoder trained with in-batch memory'}", "",
        f"Trained by `ralm train`: {trained['steps']:,} steps of {recipe['train'].get('batch', 1)} segments, "
        f"{trained['seconds'] / 60:.1f} minutes, {trained['parameters'] / 1e6:.1f} M parameters, {how['kind']} memory of "
        f"{how['segments']} segments, from {(recipe.get('model') or {}).get('start') or 'random weights'}"
        f"{'' if trained['finished'] else '; the run goes on'}.", "",
        "Use: `--lm gpt:FOLDER --how trime:k=0` for its window's own tokens; `ralm tokens STORE --lm gpt:FOLDER --metric ip`, then",
        "`--how trime` for a datastore's too, or `trime:k=0+knn:lam=0.2,temperature=20`.", "",
        "| held-out figure | |", "|---|---|", *rows, ""])
