"""Joint training with an index that follows (regime 3): REALM (Guu et al. 2020), retriever and masked language model together.

    L = -ln p(y|x),   p(y|x) = sum_{z in top-k and the null document} p(z|x) prod_{masked j} p(y_j | z, x)       eq. 1
    p(z|x) = softmax over these z of Embed_q(x) . Embed_d(z) / temperature                                        eq. 2

    kind = "realm"
    [data]      corpus.py          [masking]  salient.py: kind, tagger        [index]  refresh.py: k, refresh, lag, background
    [encoder]   encoder.py: model = "minilm" or an ICT run's model, separate = true for two encoders
    [reader]    masked.py: model = "minilm" or a folder, layers = 0, text = 64, passage = 288 (word pieces), lr, embeddings = false
    [loss]      per = "sequence" (the paper) | "token" (its released code), temperature = 0.05, null, retriever (it learns)

x is a sentence of the corpus with one salient span masked; the passage it is from is never a candidate. The index only proposes:
scores are those of live weights, for passages and for the null document, which is an empty passage with a score of its own. Each
step logs retrieval_utility (nats per mask that retrieval gains over the null document), null (its weight), found (the share of x
whose answer stands in a candidate), index_age and overlap: the share of the stale top-k that live weights put in the top-k too,
among the proposals of `probe` queries. Written: retriever/ (sentence-transformers, dense:FOLDER), reader/ (BertForMaskedLM)."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ralm import progress
from ralm.errors import UsageError, unknown
from ralm.how.mixing import log_weights
from ralm.lm.masked import Lengths, MaskedReader
from ralm.train import ranks
from ralm.train.corpus import SPARE, Corpus, Data, Example, whole
from ralm.train.encoder import Encoder, Trainable
from ralm.train.objectives import marginal, retrieval_utility
from ralm.train.refresh import Index, Refresher
from ralm.train.salient import Masker
from ralm.train.task import Group, Settings, Task, section
from ralm.types import Chunk, Hits

ROWS = 16  # rows of the reader at a time, where no gradient is wanted


@dataclass(frozen=True)
class Reader:
    model: str = "minilm"
    layers: int = 0
    random: bool = False
    text: int = 64
    passage: int = 288
    masks: int = 10
    dropout: float = 0.0
    embeddings: bool = False
    lr: float = 0.0  # 0: as [train] lr


@dataclass(frozen=True)
class Loss:
    per: str = "sequence"
    temperature: float = 0.05
    null: bool = True
    retriever: bool = True


@dataclass
class Read:
    """What a part comes to: log-probabilities of the masks under each candidate [B, K, M], their weights [B, K], masks [B, M]."""

    logp_BKM: Tensor
    log_w_BK: Tensor
    mask_BM: Tensor
    candidates: list[list[Chunk]]


class Realm(Task):
    kind = "realm"

    def __init__(self, recipe: Mapping[str, Any], root: Path, folder: Path):
        self.settings, self.folder = Settings.of(recipe["train"]), Path(folder)
        self.how, wish = section(recipe, "loss", Loss), section(recipe, "reader", Reader)
        if self.how.per not in ("sequence", "token"):
            raise unknown("[loss] per", self.how.per, ("sequence", "token"))
        self.masker = section(recipe, "masking", Masker)
        self.corpus = Corpus(section(recipe, "data", Data), root, self.folder)
        device = ranks.device(self.settings.device)
        self.encoder = Trainable(section(recipe, "encoder", Encoder), device)
        self.encoder.model.requires_grad_(self.how.retriever)
        self.reader = MaskedReader.load(wish.model, Lengths(wish.text, wish.passage, wish.masks), wish.layers, wish.random,
                                        wish.dropout, wish.embeddings).to(device).train()
        self.reader_lr = wish.lr or self.settings.lr
        index = section(recipe, "index", Index)
        if not self.how.retriever:  # weights that do not move need no new index
            index = Index(**vars(index) | {"refresh": 0})
        self.refresher = Refresher(self.corpus.store, self.encoder, self.folder, index)
        self.k, self.probe = index.k, index.probe
        self.held = self.corpus.held_out()
        self.beside = baselines(self, self.folder) if self.held else None
        self.told = False

    # ---- the task

    def groups(self) -> list[Group]:
        reader = {f"reader.{n}": p for n, p in self.reader.named_parameters() if p.requires_grad}
        out = sides(self.encoder, self.settings.lr) if self.how.retriever else []
        return [*out, *decayed("reader", reader, self.reader_lr)]

    def state(self) -> dict[str, Tensor]:
        return self.refresher.state()

    def prepare(self, step: int) -> Mapping[str, float]:
        figures = self.refresher.before(step)
        if not self.told and step == 0 and ranks.world().main:
            self._estimate()
        self.told = True
        return figures if self.how.retriever else {"index_age": 0}

    def batch(self, step: int) -> list[list[Example]]:
        s = self.settings
        drawn = self.corpus.draw(self.masker, self.reader.cut, s.seed, step, s.batch)
        size = s.micro or s.batch
        if s.batch % size:
            raise UsageError(f"[train] batch = {s.batch} is not a multiple of micro = {size}; parts are of equal weight")
        return [drawn[at:at + size] for at in range(0, s.batch, size)]

    def loss(self, part: Sequence[Example]) -> tuple[Tensor, dict[str, float]]:
        read = self.read(part)
        loss = marginal(read.logp_BKM, read.log_w_BK, read.mask_BM, self.how.per)
        with torch.no_grad():
            weight_BK = read.log_w_BK.exp()
            held = [any(e.row.answer in c.text for c in some) for e, some in zip(part, read.candidates)]
            figures = {"examples": len(part), "masks": int(read.mask_BM.sum()), "found": float(np.mean(held)),
                       "top": float(weight_BK[:, int(self.how.null):].amax(1).mean())}
            if self.how.null:
                figures |= {"null": float(weight_BK[:, 0].mean()), "retrieval_utility": float(retrieval_utility(
                    read.logp_BKM, read.log_w_BK, read.logp_BKM[:, 0], read.mask_BM))}
            if self.probe and self.how.retriever:
                figures["overlap"] = self._overlap(part[:self.probe])
        return loss, figures

    def read(self, part: Sequence[Example]) -> Read:
        """Retrieve, score with live weights, read."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.how.retriever):
            q_BD = self.encoder.encode([e.row.query for e in part], "query")
            hits = self.refresher.propose(q_BD.detach().cpu().numpy(), self.k + SPARE)
            candidates = self.corpus.candidates(part, hits, self.k)
            log_w_BK = self.weights(q_BD, candidates)
        null: list[str | None] = [""] if self.how.null else []
        passages = [[*null, *(c.text for c in some), *[None] * (self.k - len(some))] for some in candidates]
        logp_BKM, mask_BM = self.reader.logp([e.row for e in part], passages, ROWS)
        return Read(logp_BKM, log_w_BK, mask_BM, candidates)

    def weights(self, q_BD: Tensor, candidates: Sequence[Sequence[Chunk]]) -> Tensor:
        """ln p(z|x) [B, K] under live weights, the null document first; each passage is encoded once a part."""
        unique = list({c.id: c for some in candidates for c in some}.values())
        place = {c.id: n + 1 for n, c in enumerate(unique)}
        d_ND = self.encoder.encode(["", *(whole(c) for c in unique)], "passage", self.settings.micro or ROWS)
        null = [0] if self.how.null else []
        at_BK = torch.tensor([[*null, *(place[c.id] for c in some), *[-1] * (self.k - len(some))] for some in candidates],
                             device=d_ND.device)
        s_BK = (q_BD[:, None].float() * d_ND[at_BK.clamp(min=0)].float()).sum(-1)  # no matrix product: autocast would round it
        return log_weights(s_BK.masked_fill(at_BK < 0, -math.inf), self.how.temperature)

    def _overlap(self, part: Sequence[Example]) -> float:
        """Share of the stale top-k that live weights rank among the first k of the proposals; 1 for an index that is not behind."""
        q_QD = self.encoder.many([e.row.query for e in part], "query")
        proposed = self.corpus.candidates(part, self.refresher.propose(q_QD, self.k + 2 * SPARE), self.k + SPARE)
        shares = []
        for q_D, some in zip(q_QD, proposed):
            if len(some) > self.k:
                live_K = self.encoder.many([whole(c) for c in some], "passage") @ q_D
                shares.append(float(np.mean(np.argsort(-live_K, kind="stable")[:self.k] < self.k)))
        return float(np.mean(shares)) if shares else 1.0

    def _estimate(self) -> None:
        """Say what the index will cost, before it does."""
        index, state = self.refresher.wish, torch.get_rng_state()
        if not index.refresh:
            progress.note(f"the index of {self.corpus.store.n_chunks:,} passages is made once")
            return
        part = self.batch(0)[0]
        began = time.process_time()
        loss, _ = self.loss(part)
        parameters = [p for g in self.groups() for p in g.parameters.values()]
        torch.autograd.grad(loss, parameters, allow_unused=True)
        each = (time.process_time() - began) * self.settings.batch / len(part)
        torch.set_rng_state(state)
        share = self.refresher.built / max(index.refresh * each, 1e-9)
        where = f"beside the training, which waits after {index.lag} steps" if index.background else "in between"
        progress.note(f"an index of {self.corpus.store.n_chunks:,} passages takes {self.refresher.built:.1f} s of a processor, a "
                      f"step about {each:.2f} s: every {index.refresh} steps it adds {100 * share:.0f}% ({where})")

    def close(self) -> None:
        self.refresher.close()

    # ---- what it reached

    def evaluate(self) -> dict[str, float]:
        """Zero-shot retrieval for held-out questions, and the loss of held-out masked sentences with a fresh index."""
        if self.held is None and not self.corpus.data.masks:
            return {}
        d_ND = vectors(self)
        out = {} if self.held is None else self.held.figures(found(self, d_ND), self.beside)
        return out | (self._masked(d_ND) if self.corpus.data.masks and len(self.corpus.reserved) else {})

    def _masked(self, d_ND: np.ndarray) -> dict[str, float]:
        """Nats per held-out sentence: marginal, and with the null document alone."""
        examples = self.corpus.draw(self.masker, self.reader.cut, 0, 0, self.corpus.data.masks, held=True)
        proposals, self.refresher = self.refresher, Fresh(self.corpus.ids, d_ND)
        self.encoder.model.eval()
        self.reader.eval()
        try:
            reads = [self.read(examples[at:at + ROWS]) for at in range(0, len(examples), ROWS)]
        finally:
            self.refresher = proposals
            self.encoder.model.train()
            self.reader.train()
        count, candidates = len(examples), [some for r in reads for some in r.candidates]
        nats = [float(marginal(r.logp_BKM, r.log_w_BK, r.mask_BM, self.how.per)) * len(r.candidates) for r in reads]
        out = {"masked_nats": sum(nats) / count,
               "masked_found": 100 * float(np.mean([any(e.row.answer in c.text for c in s) for e, s in zip(examples, candidates)]))}
        if self.how.null:
            out["masked_nats_null"] = -sum(float((r.logp_BKM[:, 0] * r.mask_BM).sum()) for r in reads) / count
        return out

    def export(self, folder: Path, trained: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.encoder.save(folder / "retriever", trained, card(trained))
        self.reader.save(folder / "reader")
        facts = {"format": 1, "k": self.k, "null": self.how.null, "per": self.how.per, "temperature": self.how.temperature,
                 "trained": trained}
        part = folder / "realm.json.part"
        part.write_text(json.dumps(facts, indent=1) + "\n")
        part.replace(folder / "realm.json")


class Fresh:
    """Proposals by vectors that are at hand: exact, all of live weights."""

    def __init__(self, ids: np.ndarray, d_ND: np.ndarray):
        self.ids, self.d_ND = ids, d_ND

    def propose(self, q_QD: np.ndarray, k: int) -> Hits:
        s_QN = q_QD @ self.d_ND.T
        top = np.argsort(-s_QN, axis=1, kind="stable")[:, :k]
        return Hits(self.ids[top], np.take_along_axis(s_QN, top, 1))


def sides(encoder: Trainable, lr: float) -> list[Group]:
    """The retriever's groups: one encoder, or queries and passages apart, so that neither can go without a gradient unseen."""
    named = {f"retriever.{n}": p for n, p in encoder.model.named_parameters() if p.requires_grad}
    query = {n: p for n, p in named.items() if ".sub_modules.query." in n}
    if not query:
        return decayed("retriever", named, lr)
    passage = {n: p for n, p in named.items() if n not in query}
    return [*decayed("query encoder", query, lr), *decayed("passage encoder", passage, lr)]


def decayed(name: str, named: Mapping[str, torch.nn.Parameter], lr: float) -> list[Group]:
    """Matrices decay, norms and biases do not."""
    wide, rest = {n: p for n, p in named.items() if p.ndim > 1}, {n: p for n, p in named.items() if p.ndim <= 1}
    return [Group(n, p, lr, weight_decay=d) for n, p, d in ((name, wide, 0.01), (f"{name} norms", rest, 0.0)) if p]


def vectors(task: Any) -> np.ndarray:
    """Live vectors of the whole corpus, float32 [N, D]."""
    texts = task.corpus.texts()
    with progress.task("encode", total=len(texts), unit="passages") as advance:
        return task.encoder.many(texts, "passage", advance)


def found(task: Any, d_ND: np.ndarray) -> np.ndarray:
    """What live weights find for the held-out questions, as numbers of `held`'s passages."""
    held, number = task.held, {}
    for n, p in enumerate(held.passages):
        number.setdefault(p.whole, n)
    order = [number.setdefault(t.strip(), len(number)) for t in task.corpus.texts()]  # copies are one there
    first = np.zeros(len(held.passages), np.int64)
    first[order[::-1]] = np.arange(len(order))[::-1]
    return held.top(task.encoder.many(held.queries, "query"), d_ND[first])


def baselines(task: Any, folder: Path) -> dict[str, np.ndarray]:
    """What BM25 and the retriever before training find, kept in the run's folder under a hash of what decides it."""
    digest = hashlib.sha256(json.dumps([task.corpus.store.path.name, task.held.queries]).encode())
    for p in task.encoder.model.parameters():
        digest.update(p.detach().cpu().numpy().tobytes())
    kept = folder / f"baselines-{digest.hexdigest()[:12]}.npz"
    if not kept.is_file() and ranks.world().main:
        progress.note(f"before training: BM25 and the retriever as it begins on {len(task.held.queries):,} held-out questions, "
                      f"{len(task.held.passages):,} passages")
        part = kept.with_suffix(".part.npz")
        np.savez(part, bm25=task.held.bm25(), before=found(task, vectors(task)), allow_pickle=False)
        part.replace(kept)
    ranks.world().wait()
    with np.load(kept, allow_pickle=False) as z:
        return {name: z[name] for name in ("bm25", "before")}


def card(trained: Mapping[str, Any]) -> str:
    """README.md of an exported retriever."""
    recipe, last = trained["recipe"], trained["evaluations"][-1] if trained["evaluations"] else {}
    rows = [f"| {k} | {v:g} |" for k, v in last.items() if k not in ("step", "seconds")]
    return "\n".join([f"# {recipe.get('title') or 'A retriever trained with a language model'}", "",
                      f"Trained by `ralm train` ({trained['kind']}): {trained['steps']:,} steps, {trained['seconds'] / 60:.1f} min"
                      f"{'' if trained['finished'] else '; the run goes on'}.", "",
                      "Use: `SentenceTransformer(FOLDER)`, or `--retriever dense:FOLDER` in ralm. Vectors have length one.", "",
                      "| figure | |", "|---|---|", *rows, ""])
