"""Open-domain question answering from a trained retriever: REALM's (and ORQA's) fine-tuning. The passages' vectors stay.

    p(y|x) = sum_{z in top-k} p(z|x) sum_{spans s of z that are y} P(s | x, z)
    L = -ln p(y|x) - early * ln sum_{z in top-beam that hold an answer} p(z|x)          each term 0 where nothing is right

    kind = "realm-qa"
    [data]      as in corpus.py: train = questions to learn from, held_out, corpus
    [encoder]   model = a REALM, ICT or DPR run's retriever; questions get an encoder of their own, which is trained
    [reader]    model = "bundled:reader", "minilm", or the reader of a REALM run; layers = 0, trained = true, lr
    [index]     k = 5 (passages that are read), beam = 100
    [loss]      temperature = 0.05, early = 1.0

The span reader is ralm/lm/reader.py, and the loss is what it computes: p(z|x) = softmax(relevance(x, z) + score / temperature).
Written: retriever/ (queries by the trained encoder, passages by the old one; dense:FOLDER) and reader/ (Reader.load)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ralm.errors import UsageError
from ralm.eval.answers import em_squad, f1_squad, has_answer
from ralm.eval.interval import interval
from ralm.how.mixing import log_weights
from ralm.lm import reader as spans
from ralm.lm.bundled import bundled
from ralm.lm.reader import Cutter, Reader, ReaderConfig, ReaderModel, collate
from ralm.lm.spans import log_softmax, occurrences
from ralm.train import ranks
from ralm.train.corpus import Corpus, Data
from ralm.train.encoder import Encoder, Trainable
from ralm.train.joint_async import baselines, card, decayed, found
from ralm.train.refresh import Index, Refresher
from ralm.train.task import Group, Settings, Task, section
from ralm.types import Chunk


@dataclass(frozen=True)
class Wish:
    """The [reader] table."""

    model: str = "bundled:reader"
    layers: int = 0  # of minilm
    trained: bool = True
    lr: float = 0.0  # 0: as [train] lr


@dataclass(frozen=True)
class Search:
    """The [index] table."""

    k: int = 5
    beam: int = 100


@dataclass(frozen=True)
class Loss:
    temperature: float = 0.05
    early: float = 1.0


class Asked(NamedTuple):
    question: str
    answers: tuple[str, ...]


class OpenQA(Task):
    kind = "realm-qa"

    def __init__(self, recipe: Mapping[str, Any], root: Path, folder: Path):
        self.settings, self.folder = Settings.of(recipe["train"]), Path(folder)
        self.how, self.search = section(recipe, "loss", Loss), section(recipe, "index", Search)
        self.wish = section(recipe, "reader", Wish)
        if not 0 < self.search.k <= self.search.beam:
            raise UsageError(f"[index] k = {self.search.k} passages are read of the beam = {self.search.beam} that are retrieved")
        self.corpus = Corpus(section(recipe, "data", Data), root, self.folder)
        pairs = self.corpus.asked(self.corpus.data.train)
        self.asked = [Asked(q, a) for q, a in zip(pairs.queries, pairs.answers) if a]
        if not self.asked:
            raise UsageError("there is no question with an answer to learn from; give [data] train")
        device = ranks.device(self.settings.device)
        self.encoder = Trainable(replace(section(recipe, "encoder", Encoder), separate=True), device)
        for n, p in self.encoder.model.named_parameters():
            p.requires_grad_(".sub_modules.query." in n)
        self.model, self.config = span_reader(self.wish.model, self.wish.layers)
        self.model.to(device).train()
        if not self.wish.trained:
            self.model.requires_grad_(False)
        self.cutter = Cutter(self.config)
        once = Index(k=self.search.k, refresh=0, background=False)
        self.refresher = Refresher(self.corpus.store, self.encoder, self.folder, once)
        self.held = self.corpus.held_out()
        self.beside = baselines(self, self.folder) if self.held else None

    # ---- the task

    def groups(self) -> list[Group]:
        query = {f"retriever.{n}": p for n, p in self.encoder.model.named_parameters() if p.requires_grad}
        reader = {f"reader.{n}": p for n, p in self.model.named_parameters() if p.requires_grad}
        return [*decayed("query encoder", query, self.settings.lr), *decayed("reader", reader, self.wish.lr or self.settings.lr)]

    def state(self) -> dict[str, Tensor]:
        return self.refresher.state()

    def prepare(self, step: int) -> None:
        self.refresher.before(step)

    def batch(self, step: int) -> list[list[Asked]]:
        """Questions of an epoch in its own order, in parts of `micro`."""
        s = self.settings
        size = s.micro or s.batch
        if s.batch > len(self.asked) or s.batch % size:
            raise UsageError(f"[train] batch = {s.batch}: at most the {len(self.asked)} questions there are, and a multiple of "
                             f"micro = {size}")
        epoch, at = divmod(step, len(self.asked) // s.batch)
        rows = np.random.default_rng([s.seed, epoch, 3]).permutation(len(self.asked))[at * s.batch:(at + 1) * s.batch]
        return [[self.asked[int(i)] for i in rows[a:a + size]] for a in range(0, s.batch, size)]

    def loss(self, part: Sequence[Asked]) -> tuple[Tensor, dict[str, float]]:
        q_BD = self.encoder.encode([a.question for a in part], "query").float()
        hits = self.refresher.propose(q_BD.detach().cpu().numpy(), self.search.beam)
        d_BND = torch.from_numpy(self.refresher.vectors(np.maximum(hits.ids, 0))).to(q_BD.device)
        s_BN = (q_BD[:, None] * d_BND).sum(-1).masked_fill(torch.from_numpy(hits.ids < 0).to(q_BD.device), -math.inf)
        passages = [self.corpus.chunks([i for i in row if i >= 0]) for row in hits.ids.tolist()]
        right = [[has_answer(c.text, a.answers) for c in some] for a, some in zip(part, passages)]
        early_B = self._early(s_BN, right)
        k = min(self.search.k, s_BN.shape[1])
        full_B = torch.stack([self._read(a, some[:k], s_N[:k]) for a, some, s_N in zip(part, passages, s_BN)])
        loss = (_or_zero(full_B) + self.how.early * _or_zero(early_B)).mean()
        return loss, {"questions": len(part), "found": float(np.mean([any(r[:k]) for r in right])),
                      "in_beam": float(np.mean([any(r) for r in right])), "readable": float(torch.isfinite(full_B).float().mean())}

    def _early(self, s_BN: Tensor, right: Sequence[Sequence[bool]]) -> Tensor:
        """-ln of the weight of passages that hold an answer, infinite where none does [B]."""
        log_w_BN = log_weights(s_BN, self.how.temperature)
        mask_BN = torch.zeros_like(s_BN, dtype=torch.bool)
        for b, row in enumerate(right):
            mask_BN[b, :len(row)] = torch.tensor(row, dtype=torch.bool)
        none_B = ~mask_BN.any(1)
        return -torch.logsumexp(log_w_BN.masked_fill(~(mask_BN | none_B[:, None]), -math.inf), 1).masked_fill(none_B, -math.inf)

    def _read(self, a: Asked, passages: Sequence[Chunk], s_K: Tensor) -> Tensor:
        """-ln p(y|x) of one question over its passages, infinite where no passage holds a span that is an answer."""
        cuts = self.cutter.cut([c.text for c in passages])
        question, width = self.cutter.cut([a.question])[0].ids, self.config.window
        rows = [self.cutter.ids(question, [], cut.ids[:width]) for cut in cuts]
        spans_KTT, null_K, relevance_K = self.model(*(x.to(s_K.device) for x in collate(rows)))
        total_K = torch.logsumexp(torch.cat([spans_KTT.flatten(1), null_K[:, None]], 1), 1)
        prior_K = torch.log_softmax(relevance_K + log_weights(s_K[None, :len(passages)], self.how.temperature)[0], 0)
        parts = []
        for z, (c, cut, (_, _, begin)) in enumerate(zip(passages, cuts, rows)):
            right = [(i, j) for i, j in occurrences(c.text, a.answers, cut.offsets, self.config.max_span) if j < width]
            if right:
                i, j = (begin + torch.tensor(x, device=s_K.device) for x in zip(*right))
                parts.append(prior_K[z] + torch.logsumexp(spans_KTT[z][i, j], 0) - total_K[z])
        return -torch.logsumexp(torch.stack(parts), 0) if parts else (0 * prior_K.sum()).new_full((), math.inf)

    # ---- what it reached

    def reader(self) -> Reader:
        return Reader(self.model, self.config)

    def evaluate(self) -> dict[str, float]:
        """Retrieval of held-out questions, EM and F1 of the best span in their top k, with 95 % intervals."""
        if self.held is None:
            return {}
        top_QK = found(self, self.refresher.vectors(self.corpus.ids))
        out, held = self.held.figures(top_QK, self.beside), self.held
        q_QD = self.encoder.many(held.queries, "query")
        hits = self.refresher.propose(q_QD, self.search.k)
        read = [[c.text for c in self.corpus.chunks([i for i in row if i >= 0])] for row in hits.ids.tolist()]
        logps = [log_softmax(row[np.isfinite(row)].astype(np.float64) / self.how.temperature) for row in hits.scores]
        try:
            readings = self.reader().read_many(list(zip(held.queries, read)), logps)
        finally:
            self.model.train()
        said = [r.spans[0].text if r.spans else "" for r in readings]
        for name, metric in (("em", em_squad), ("f1", f1_squad)):
            values = [100.0 * metric(text, answers) for text, answers in zip(said, held.answers)]
            out[name], (out[f"{name}_low"], out[f"{name}_high"]) = float(np.mean(values)), interval(values)
        return out

    def export(self, folder: Path, trained: Mapping[str, Any]) -> None:
        from safetensors.torch import save_file

        self.encoder.save(folder / "retriever", trained, card(trained))
        out = folder / "reader"
        out.mkdir(parents=True, exist_ok=True)
        save_file({n: p.contiguous() for n, p in self.model.shipped().items()}, out / "reader.part")
        (out / "reader.part").replace(out / "reader.safetensors")
        facts = asdict(replace(self.config, trained={"recipe": trained["recipe"], "steps": trained["steps"]}))
        (out / "config.json").write_text(json.dumps(facts, indent=1) + "\n")


def span_reader(name: str, layers: int = 0) -> tuple[ReaderModel, ReaderConfig]:
    """The model a [reader] table names, and its config with the retriever's weight at 1: a span reader, MiniLM with a new head, or
    the body of a masked language model that a REALM run trained. Raises UsageError for other models."""
    folder = bundled(name.removeprefix("bundled:")) if name.startswith("bundled:") else Path(name).expanduser()
    if name != "minilm" and (folder / "reader.safetensors").is_file():
        config = replace(ReaderConfig(**json.loads((folder / "config.json").read_text())), retriever_weight=1.0)
        model = ReaderModel(config)
        spans.load_weights(model, folder / "reader.safetensors")
        return model, config
    base = ReaderConfig(retriever_weight=1.0)
    base = replace(base, base_sha256=spans._sha256(spans.base_folder(base) / "model.safetensors"))
    if name == "minilm":
        config = replace(base, layers=layers)
        return ReaderModel(config), config
    if not (folder / "model.safetensors").is_file():
        raise UsageError(f"'{name}' is no reader: give bundled:reader, minilm, a folder with reader.safetensors, or the reader of "
                         "a REALM run")
    from safetensors.torch import load_file

    told, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    config = replace(base, layers=told["num_hidden_layers"])
    model = ReaderModel(config)
    body = {n.removeprefix("bert."): t for n, t in tensors.items() if n.startswith("bert.")}
    mine = model.bert.state_dict()
    same = all(n in body and body[n].shape == t.shape for n, t in mine.items() if t.is_floating_point())
    if not same or not torch.equal(body["embeddings.word_embeddings.weight"], mine["embeddings.word_embeddings.weight"]):
        raise UsageError(f"'{name}' does not stand on MiniLM's embeddings, which a span reader does; train it with [reader] "
                         "model = \"minilm\" and embeddings = false")
    model.bert.load_state_dict({n: t for n, t in body.items() if n in mine}, strict=False)
    return model, config


def _or_zero(x_B: Tensor) -> Tensor:
    """A term in which nothing is right counts nothing (and has no gradient)."""
    return torch.where(torch.isfinite(x_B), x_B, torch.zeros_like(x_B))
