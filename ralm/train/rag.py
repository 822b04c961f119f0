"""RAG trained end to end, the passage encoder frozen (Lewis et al. 2020): regime 4 with fixed documents in place of the batch's.

    kind = "rag"
    [data]       pairs = ["qa/squad-v1.1.train.json.zst"], held_out = [...], questions = 100 (of the held-out ones), store = ""
                 (a datastore of passages; none: one is made of the pairs' passages in the run's folder)
    [encoder]    as for dpr: model = "minilm", layers = 0, ...; the query's copy of it is trained
    [generator]  model = "bundled:base" (gpt:FOLDER, hf:FOLDER), train = true, lr = 1e-4, prompt = "{question}\\n",
                 answer = "{answer}"
    [rag]        marginal = "sequence" | "token", k = 4, tokens = 96 (of a passage that are read), temperature = 0.05, refresh = 1

    "sequence"   -ln sum_z p(z|x) prod_t p(y_t | z, x, y_<t)        "token"   -sum_t ln sum_z p(z|x) p(y_t | z, x, y_<t)
    p(z|x) = softmax over the k of q(x) . d(z) / temperature

q is the query encoder as it is now, d the stored vectors, which are those of the passage encoder for good: nothing becomes stale
but the question of which k are proposed. refresh = T proposes by the query encoder of every T-th step (scores are those of the live
one all the same); `overlap` says how many of the proposed the live encoder would have proposed.

The rows are those of `Ensemble` (how/input.py): [BOS, passage, prompt, answer], and the loss is -score() of the answer under

    RALM(generator, Dense(store, encoder), how="ensemble:weights=posterior,k=…,tokens=…,temperature=…")    weights=prior for token

An index of another encoder, or one whose vectors are not what the frozen encoder gives, is refused. The loop ends a run whose query
encoder gets no gradient (as where all k passages are the same)."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ralm import progress
from ralm.errors import CapabilityError, FingerprintError, UsageError
from ralm.how.input import Passages
from ralm.how.mixing import log_weights
from ralm.how.rows import left_pad
from ralm.index.dense import Dense
from ralm.lm import load
from ralm.train import ranks
from ralm.train.encoder import Encoder, Trainable
from ralm.train.objectives import marginal, retrieval_utility
from ralm.train.pairs import Pairs, read_pairs
from ralm.train.task import Group, Settings, Task, section
from ralm.types import Document
from ralm.what.datastore import Datastore

WEIGHTS = {"sequence": "posterior", "token": "prior"}  # how `Ensemble` writes the two


@dataclass(frozen=True)
class Data:
    pairs: list
    held_out: list
    questions: int = 100
    store: str = ""


@dataclass(frozen=True)
class Generator:
    model: str = "bundled:base"
    train: bool = True
    lr: float = 1e-4
    prompt: str = "{question}\n"
    answer: str = "{answer}"


@dataclass(frozen=True)
class How:
    marginal: str = "sequence"
    k: int = 4
    tokens: int = 96
    temperature: float = 0.05
    refresh: int = 1


class Example(NamedTuple):
    query: str
    prompt: list[int]
    answer: list[int]
    gold: tuple[str, ...]  # documents


class Rag(Task):
    kind = "rag"

    def __init__(self, recipe: Mapping[str, Any], root: Path, folder: Path):
        self.settings = Settings.of(recipe["train"])
        data, self.how, self.made = (section(recipe, n, c) for n, c in (("data", Data), ("rag", How), ("generator", Generator)))
        if self.how.marginal not in WEIGHTS or self.how.k < 1 or self.how.refresh < 1:
            raise UsageError(f"[rag] marginal = '{self.how.marginal}' is sequence or token, k = {self.how.k} and refresh = "
                             f"{self.how.refresh} at least 1")
        self.device = ranks.device(self.settings.device)
        wish = section({"encoder": {"dropout": 0.0} | dict(recipe.get("encoder") or {})}, "encoder", Encoder)
        self.encoder = Trainable(replace(wish, separate=True), self.device)
        self.encoder.freeze("passage")
        self.lm = load(self.made.model)
        if "logits" not in self.lm.gives or not hasattr(self.lm, "model"):
            raise CapabilityError(f"'{self.lm.name}' cannot be trained here; use bundled:base, gpt:FOLDER or hf:FOLDER")
        self.lm.model.to(self.device).requires_grad_(self.made.train)
        pairs, held = self._pairs(data.pairs, root), self._pairs(data.held_out, root)
        self.index = self._index(data, wish, pairs, held, root, folder)
        self.store = self.index.store
        self.passages = Passages(self.lm, self.store, self.how.tokens)
        self.train, self.held = self._examples(pairs), self._examples(held)
        if data.questions and len(self.held) > data.questions:
            self.held = [self.held[i] for i in np.linspace(0, len(self.held) - 1, data.questions).round().astype(int).tolist()]
        if self.settings.batch > len(self.train):
            raise UsageError(f"[train] batch = {self.settings.batch}, but {len(self.train)} examples fit the window; use fewer")
        self.proposer, self.age = self.encoder, 0
        if self.how.refresh > 1:
            self.proposer = copy.copy(self.encoder)
            self.proposer.model = copy.deepcopy(self.encoder.model).requires_grad_(False)
        self.before = self._before(folder)

    @staticmethod
    def _pairs(names: Sequence[str], root: Path) -> Pairs:
        pairs = Pairs()
        for name in names:
            pairs.take(read_pairs(root / name))
        return pairs

    def _index(self, data: Data, wish: Encoder, pairs: Pairs, held: Pairs, root: Path, folder: Path) -> Dense:
        """The passages' vectors: of the datastore that is given, or of one that is made. Raises FingerprintError where they are not
        what the passage encoder gives."""
        if data.store:
            self.names: dict[str, str] = {}
            index = Dense(Datastore.open(root / data.store), encoder=wish.model)
        else:
            start = folder / "start"  # the encoder as it was: what the index was made by
            if not start.is_dir() and ranks.world().main:
                self.encoder.save(start, {}, "The encoder before training: the index of this run was made by it.\n")
            ranks.world().wait()
            both = Pairs()
            both.take(pairs)
            both.take(held)
            texts = json.dumps([list(p) for p in both.passages])
            where = folder / f"passages-{hashlib.sha256(texts.encode()).hexdigest()[:16]}"
            if not where.is_dir() and ranks.world().main:
                part = where.with_name(f"{where.name}.part")
                shutil.rmtree(part, ignore_errors=True)
                documents = (Document(f"p{i}", p.text, title=p.title) for i, p in enumerate(both.passages))
                Datastore.build(part, documents, split="none")
                part.rename(where)
            ranks.world().wait()
            self.names = {p.whole: f"p{i}" for i, p in enumerate(both.passages)}
            index = Dense(Datastore.open(where), encoder=str(start))
        self._probe(index)
        return index

    def _probe(self, index: Dense) -> None:
        """Some stored vectors are those that the frozen encoder gives now."""
        ids = np.flatnonzero(index.store.allow())
        if len(ids) < self.how.k:
            raise UsageError(f"{index.store.path} holds {len(ids)} passages, [rag] k = {self.how.k}; use fewer, or store more")
        some = ids[np.unique(np.linspace(0, len(ids) - 1, 4).astype(int))]
        texts = [f"{c.title}\n{c.text}" if c.title else c.text for c in index.store.chunks(some.tolist())]
        live = self.encoder.many(texts, "passage")
        cosine = (live * vectors(index, some[:, None])[:, 0]).sum(1)
        if cosine.min() < 0.999:
            raise FingerprintError(f"the vectors in {index.store.path} are not what the recipe's passage encoder gives (cosine "
                                   f"{cosine.min():.3f}): make the index with that encoder, or name the one it was made with")

    def _examples(self, pairs: Pairs) -> list[Example]:
        """Those whose row fits the window with the longest passage in front."""
        encode, out = self.lm.tokenizer.encode, []
        room = self.lm.window - self.how.tokens - 1
        for query, good, answers in zip(pairs.queries, pairs.positives, pairs.answers):
            if not answers:
                continue
            prompt = encode(self.made.prompt.format(question=query))
            answer = encode(self.made.answer.format(answer=answers[0])) + ([] if self.lm.eos is None else [self.lm.eos])
            if len(prompt) + len(answer) <= room:
                gold = tuple(self.names.get(pairs.passages[i].whole, "") for i in good)
                out.append(Example(query, prompt, answer, gold))
        if pairs.queries and len(out) < len(pairs.queries):
            progress.note(f"{len(pairs.queries) - len(out)} of {len(pairs.queries)} questions are left out: no answer, or longer "
                          f"than the {room} tokens beside a passage")
        return out

    # ---- the task

    def groups(self) -> list[Group]:
        out = self.encoder.groups(self.settings.lr, "query encoder")
        if self.made.train:
            named = {f"generator.{n}": p for n, p in self.lm.model.named_parameters() if p.requires_grad}
            out.append(Group("generator", named, self.made.lr))
        return out

    def state(self) -> Mapping[str, Tensor]:
        """The query encoder that proposes, where it is not the live one."""
        return {} if self.proposer is self.encoder else dict(self.proposer.model.named_parameters())

    def prepare(self, step: int) -> dict[str, float]:
        """Let the live encoder propose from now on, every `refresh` steps."""
        self.age = step % self.how.refresh
        if self.age == 0 and self.proposer is not self.encoder:
            with torch.no_grad():
                for old, new in zip(self.proposer.model.parameters(), self.encoder.model.parameters()):
                    old.copy_(new)
        return {"index_age": float(self.age)}

    def batch(self, step: int) -> list[list[Example]]:
        size, micro = self.settings.batch, self.settings.micro or self.settings.batch
        if size % micro:
            raise UsageError(f"[train] batch = {size} must be a multiple of micro = {micro}: parts weigh alike")
        epoch, at = divmod(step, len(self.train) // size)
        order = np.random.default_rng([self.settings.seed, epoch]).permutation(len(self.train))[at * size:(at + 1) * size]
        some = [self.train[i] for i in order.tolist()]
        return [some[i:i + micro] for i in range(0, size, micro)]

    def loss(self, part: list[Example]) -> tuple[Tensor, dict[str, float]]:
        """Mean nats of an answer, and: retrieval_utility (nats a token against no passage), hit (the question's own passage is
        among the k), gold (its probability), index_age and overlap."""
        query_BD = self.encoder.encode([e.query for e in part], "query")
        ids_BK, overlap = self._propose([e.query for e in part], query_BD)
        d_BKD = torch.from_numpy(vectors(self.index, ids_BK)).to(query_BD.device)
        log_w_BK = log_weights((query_BD[:, None] * d_BKD).sum(-1), self.how.temperature)
        logp_BKT, mask_BT = self.logp(part, ids_BK)
        loss = marginal(logp_BKT, log_w_BK, mask_BT, per=self.how.marginal)
        with torch.no_grad():
            null_BT = self.logp(part, np.full((len(part), 1), -1))[0][:, 0]
            gain = retrieval_utility(logp_BKT.detach(), log_w_BK.detach(), null_BT, mask_BT)
            told = {"retrieval_utility": float(gain), "overlap": overlap, "questions": len(part)}
            if self.names:
                own_BK = torch.from_numpy(self._own(part, ids_BK)).to(log_w_BK.device)
                told |= {"hit": float(own_BK.any(1).float().mean()), "gold": float((log_w_BK.exp() * own_BK).sum(1).mean())}
        return loss, told

    def _own(self, part: Sequence[Example], ids_BK: np.ndarray) -> np.ndarray:
        """bool [B, K]: passages that the data names for the question."""
        names = np.array(self.store.document_ids(ids_BK.reshape(-1).tolist())).reshape(ids_BK.shape)
        return np.array([[n in e.gold for n in row] for e, row in zip(part, names.tolist())])

    def _propose(self, queries: list[str], query_BD: Tensor) -> tuple[np.ndarray, float]:
        """Chunk ids [B, k] of the proposing encoder, and the share of them that the live one proposes."""
        live = query_BD.detach().float().cpu().numpy()
        if self.proposer is self.encoder:
            return self.index.nearest(live, self.how.k).ids, 1.0
        ids_BK = self.index.nearest(self.proposer.many(queries, "query"), self.how.k).ids
        fresh_BK = self.index.nearest(live, self.how.k).ids
        return ids_BK, float((ids_BK[:, :, None] == fresh_BK[:, None]).any(2).mean())

    def logp(self, part: Sequence[Example], ids_BK: np.ndarray) -> tuple[Tensor, Tensor]:
        """ln p of every answer token under every passage (-1: none) [B, K, T], and which tokens there are [B, T]. One forward."""
        read = self.passages([i for i in ids_BK.reshape(-1).tolist() if i >= 0])
        found = iter(read)
        rows = []
        for e, ids in zip(part, ids_BK.tolist()):
            rows += [[self.lm.bos, *(next(found) if i >= 0 else []), *e.prompt, *e.answer[:-1]] for i in ids]
        ids_NL, mask_NL = left_pad(rows, self.lm.bos)
        sizes, (B, K) = [len(e.answer) for e in part], ids_BK.shape
        T = max(sizes)
        out = self.lm.forward(ids_NL.to(self.device), mask=None if mask_NL is None else mask_NL.to(self.device), keep=T)
        logp_NTV = torch.log_softmax(out.logits.float(), -1)
        targets_BT = torch.tensor([[0] * (T - n) + e.answer for e, n in zip(part, sizes)], device=logp_NTV.device)
        mask_BT = torch.tensor([[0.0] * (T - n) + [1.0] * n for n in sizes], device=logp_NTV.device)
        logp_NT = logp_NTV.gather(2, targets_BT.repeat_interleave(K, 0)[:, :, None])[:, :, 0]
        return logp_NT.view(B, K, T), mask_BT

    # ---- figures and files

    def _before(self, folder: Path) -> dict[str, float]:
        """The held-out figures before training, measured once a run."""
        kept = folder / "before.json"
        if not self.held:
            return {}
        if not kept.is_file() and ranks.world().main:
            with torch.no_grad():
                told = self._figures()
            part = kept.with_suffix(".part")
            part.write_text(json.dumps(told))
            part.replace(kept)
        ranks.world().wait()
        return json.loads(kept.read_text())

    def _figures(self) -> dict[str, float]:
        """Of the held-out questions: nats an answer with and without passages, percent whose own passage is first and among k."""
        nats = alone = first = among = 0.0
        for at in range(0, len(self.held), 4):
            some = self.held[at:at + 4]
            q = self.encoder.many([e.query for e in some], "query")
            hits = self.index.nearest(q, self.how.k)
            logp, mask = self.logp(some, hits.ids)
            log_w = log_weights(torch.from_numpy(hits.scores).to(logp.device), self.how.temperature)
            nats += float(marginal(logp, log_w, mask, per=self.how.marginal)) * len(some)
            null, _ = self.logp(some, np.full((len(some), 1), -1))
            alone -= float((null[:, 0] * mask).sum())
            own = self._own(some, hits.ids)
            first, among = first + own[:, 0].sum(), among + own.any(1).sum()
        n = len(self.held)
        found = {"gold1": 100 * float(first) / n, f"gold{self.how.k}": 100 * float(among) / n} if self.names else {}
        return {"nats": nats / n, "nats_alone": alone / n} | found

    def evaluate(self) -> dict[str, float]:
        return {} if not self.held else self._figures() | {f"before_{k}": v for k, v in self.before.items()}

    def export(self, folder: Path, trained: Mapping[str, Any]) -> None:
        """encoder/ (sentence-transformers, two towers) and generator/ (gpt: or hf:), with a card that says how to read them."""
        folder.mkdir(parents=True, exist_ok=True)
        said = card(trained, self.how)
        self.encoder.save(folder / "encoder", trained, said)
        if hasattr(self.lm, "rows"):  # a model of transformers
            self.lm.model.save_pretrained(folder / "generator")
            self.lm.tokenizer.inner.save_pretrained(folder / "generator")
        else:
            from ralm.lm.gpt import save

            config = replace(self.lm.config, trained={"kind": "rag", "steps": trained["steps"]})
            save(folder / "generator", self.lm.model, self.lm.tokenizer, config)
        (folder / "README.md").write_text(said)


def vectors(index: Dense, ids_BK: np.ndarray) -> np.ndarray:
    """float32 [B, K, D]: the stored vectors of chunks."""
    leaf, = index._opened().leaves
    rows = np.searchsorted(leaf.ids, ids_BK.reshape(-1))
    return leaf.rows.take(rows).astype(np.float32).reshape(*ids_BK.shape, -1)


def card(trained: Mapping[str, Any], how: How) -> str:
    """README.md of what was trained."""
    last = trained["evaluations"][-1] if trained["evaluations"] else {}
    rows = [f"| {k} | {v:g} |" for k, v in last.items() if k not in ("step", "seconds")]
    spec = f"ensemble:weights={WEIGHTS[how.marginal]},k={how.k},tokens={how.tokens},temperature={how.temperature}"
    return "\n".join([
        f"# {trained['recipe'].get('title') or 'RAG, trained end to end'}", "",
        f"RAG-{how.marginal.title()}, query encoder and generator trained by `ralm train`: {trained['steps']:,} steps of "
        f"{trained['recipe']['train'].get('batch', 1)} questions, {trained['seconds'] / 60:.1f} minutes, "
        f"{trained['parameters'] / 1e6:.1f} M parameters{'' if trained['finished'] else '; the run goes on'}.", "",
        f"Use: `--retriever dense:FOLDER/encoder --lm gpt:FOLDER/generator --how {spec}` (hf: where it is one of transformers).",
        "The passage encoder is what it was, so an index made by it need not be made again.", "",
        "| held-out figure | |", "|---|---|", *rows, ""])
