"""Sequential training (regime 2): one half is fixed, the other learns from it.

    kind = "replug-lsr"   a frozen language model says which passages helped it; the retriever learns that (REPLUG LSR, RA-DIT's
                          second step, Atlas' PDist, EMDR2)
    kind = "ra-dit-lm"    a frozen retriever gives passages; the language model learns to read them (RA-DIT's first step)

    [data]       questions = [...] (files of pairs: their passages are the store) or texts = [...] (continuations), held_out = [...]
    [lm]         model = "bundled:base"
    [encoder]    as for DPR; `trains` below says which side learns
    [retrieval]  k = 8, tokens = 128 (most of a passage), refresh = 0 (steps between indexes; 0: never), trains = "query" or "both"
    [objective]  preset = "replug-lsr", or any of objectives.PRESETS; name = "distill", "marginal-token", "marginal-sequence"

The index proposes k passages; scores are computed again with live weights. Where only queries are trained, passages have an encoder
of their own that stays fixed, and the index never ages. Every step logs the loss, how much retrieval helps (utility, nats a token
against no passage), the index's age and how many of its candidates a fresh one has (overlap, measured at each refresh)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ralm import progress
from ralm.errors import FingerprintError, UsageError, unknown
from ralm.eval.answers import has_answer
from ralm.eval.interval import interval
from ralm.how.input import Passages as Evidence
from ralm.how.mixing import log_mix_tokens, log_weights
from ralm.train import ranks
from ralm.train.encoder import Encoder, Trainable
from ralm.train.examples import Example, continuations, questions, target_logp
from ralm.train.objectives import PRESETS, distill, marginal, retrieval_utility, utility
from ralm.train.pairs import Pairs, read_pairs
from ralm.train.snapshot import Passages, Snapshot, prune
from ralm.train.task import Group, Settings, Task, section
from ralm.types import Document
from ralm.what.datastore import Datastore
from ralm.what.read import read

PROBES = 64  # queries the overlap of two indexes is measured with
AT_ONCE = 16  # passages encoded at a time with gradients


@dataclass(frozen=True)
class Data:
    questions: list
    texts: list
    held_out: list  # of the same kind
    split: str = "words:60"  # of texts
    query: int = 32  # tokens, of continuations
    target: int = 16
    asked: int = 0  # held-out examples, evenly spread; 0: all


@dataclass(frozen=True)
class Speaker:
    model: str = "bundled:base"


@dataclass(frozen=True)
class Retrieval:
    k: int = 8
    tokens: int = 128
    refresh: int = 0
    trains: str = "query"


@dataclass(frozen=True)
class Objective:
    name: str = "distill"
    preset: str = "replug-lsr"
    statistic: str = ""  # these four instead of the preset's
    direction: str = ""
    tau_r: float = 0.0
    tau_u: float = 0.0

    def __post_init__(self):
        if self.name not in ("distill", "marginal-token", "marginal-sequence"):
            raise unknown("[objective] name", self.name, ("distill", "marginal-token", "marginal-sequence"))
        if self.preset not in PRESETS:
            raise unknown("[objective] preset", self.preset, PRESETS)
        for key in ("statistic", "direction", "tau_r", "tau_u"):
            object.__setattr__(self, key, getattr(self, key) or PRESETS[self.preset][key])
        if self.statistic in ("given", "left_out"):
            raise UsageError(f"[objective] preset = '{self.preset}' judges by attention or by leaving passages out, which this "
                             "task does not compute; use replug-lsr, ra-dit or atlas-pdist")

    def __call__(self, scores_BK: Tensor, logp_BKT: Tensor, mask_BT: Tensor) -> Tensor:
        if self.name == "distill":
            judged_BK = utility(logp_BKT, mask_BT, self.statistic)
            return distill(scores_BK, judged_BK, self.tau_r, self.tau_u, self.direction)
        return marginal(logp_BKT, log_weights(scores_BK, self.tau_r), mask_BT, self.name.partition("-")[2])


@dataclass
class Judged:
    """A batch of examples with their candidates: scores [B, K] (-inf: none), ln p of the targets under each passage [B, K, T] and
    under none [B, T], which targets count [B, T]."""

    scores_BK: Tensor
    logp_BKT: Tensor
    null_BT: Tensor
    mask_BT: Tensor
    top_BK: np.ndarray = field(repr=False)


class Sequential(Task):
    """What both steps share: store, language model, encoder, index, judgement."""

    learns = ""  # the retriever or the lm

    def __init__(self, recipe: Mapping[str, Any], root: Path, folder: Path):
        self.settings, self.folder = Settings.of(recipe["train"]), folder
        self.data, self.retrieval = section(recipe, "data", Data), section(recipe, "retrieval", Retrieval)
        self.objective = section(recipe, "objective", Objective)
        if self.retrieval.trains not in ("query", "both") or self.retrieval.k < 1:
            raise UsageError(f"[retrieval] trains = '{self.retrieval.trains}' is query or both, k = {self.retrieval.k} at least 1")
        from ralm.lm import load

        device = ranks.device(self.settings.device)
        self.lm = load(section(recipe, "lm", Speaker).model)
        if "logits" not in self.lm.gives or not hasattr(self.lm, "model"):
            raise UsageError(f"'{self.lm.name}' gives no distributions to learn from; use a local model (bundled:base, hf:NAME)")
        self.lm.model.to(device).requires_grad_(False)
        wish = section(recipe, "encoder", Encoder)
        self.fixed = self.retrieval.trains == "query" or self.learns == "lm"  # vectors of passages never change
        self.encoder = Trainable(replace(wish, separate=wish.separate or (self.fixed and self.learns == "retriever")), device)
        self.store, self.examples, self.held = self._read(root)
        self.passages = Passages(self.store)
        self.evidence = Evidence(self.lm, self.store, self.retrieval.tokens)
        self.index = self.first = None  # the one in use, and the one made before training
        self.mark = torch.zeros(34, dtype=torch.float64)  # the index's step + 1, the overlap, the hash of its weights
        self.saved = 0
        self.before = self._before()

    def _read(self, root: Path) -> tuple[Datastore, list[Example], list[Example]]:
        d, path = self.data, self.folder / "passages.ralm"
        if bool(d.questions) == bool(d.texts):
            raise UsageError("[data] needs questions or texts, one of them")
        if d.texts:
            with ranks.world().first():
                store = Datastore.build(path, read(*(root / name for name in d.texts)), split=d.split)
            other = read(*(root / name for name in d.held_out)) if d.held_out else ()
            return (store, continuations(store.documents(), self.lm, d.query, d.target),
                    continuations(other, self.lm, d.query, d.target, d.asked))
        pairs, held = Pairs(), Pairs()
        for into, names in ((pairs, d.questions), (held, d.held_out)):
            for name in names:
                into.take(read_pairs(root / name))
        every = dict.fromkeys([*pairs.passages, *held.passages])
        with ranks.world().first():
            store = Datastore.build(path, (Document(str(i), p.text, title=p.title) for i, p in enumerate(every)), split="none")
        return store, questions(pairs, self.lm), questions(held, self.lm, d.asked)

    def _before(self) -> dict[str, np.ndarray]:
        """What held-out examples come to with the retriever and the model as they are before training, once a run."""
        kept = self.folder / "before.npz"
        if not self.held:
            return {}
        with ranks.world().first():
            if not kept.is_file():
                progress.note(f"before training: {len(self.held)} held-out examples, {len(self.passages):,} passages")
                part = kept.with_suffix(".part.npz")
                self.first = Snapshot.of(self.encoder, self.passages, 0)
                np.savez(part, allow_pickle=False, **self._held(self.first))
                part.replace(kept)
        with np.load(kept, allow_pickle=False) as z:
            return dict(z)

    # ---- the index

    def prepare(self, step: int) -> dict[str, float]:
        """A new index every `refresh` steps; after a resume the one that was used."""
        T = self.retrieval.refresh
        due = step - step % T if T else 0
        if self.index is None and self.mark[0] > 0:
            self.index = Snapshot.load(self.folder, self.passages, int(self.mark[0]) - 1, self._marked(), self.encoder.model.device)
        if self.index is None or self.index.step != due:
            if step != due:
                raise FingerprintError(f"the run goes on at step {step} and has no index of step {due}; begin anew")
            fresh = self.first if step == 0 and self.first is not None else Snapshot.of(self.encoder, self.passages, step)
            overlap = 1.0 if self.index is None else self._overlap(fresh)
            if ranks.world().main:
                fresh.save(self.folder)
            if self.index is None:
                self._estimate()
            self.index = fresh
            self.mark[0], self.mark[1] = step + 1, overlap
            self.mark[2:] = torch.tensor([ord(c) for c in fresh.weights], dtype=torch.float64)
        return {"index_age": float(step - self.index.step), "overlap": float(self.mark[1])}

    def _marked(self) -> str:
        return "".join(chr(int(c)) for c in self.mark[2:])

    def _overlap(self, fresh: Snapshot) -> float:
        rows = np.random.default_rng(self.settings.seed).permutation(len(self.examples))[:PROBES]
        q_BD = torch.from_numpy(self.encoder.many([self.examples[i].query for i in rows], "query"))
        return fresh.overlap(self.index, q_BD, min(self.retrieval.k, len(self.passages)))

    def _estimate(self) -> None:
        """What refreshing costs beside training, by arithmetic: two operations a weight and token, six where it learns."""
        T, r, n = self.retrieval.refresh, sum(p.numel() for p in self.encoder.model.parameters()), len(self.passages)
        if T:
            lm, rows = sum(p.numel() for p in self.lm.model.parameters()), self.settings.batch * self.retrieval.k
            share = n * 2 * r / (T * rows * (2 * lm + 6 * r))
            progress.note(f"an index of {n:,} passages every {T} steps adds about {100 * share:.0f}% to the work of training")

    def state(self) -> dict[str, Tensor]:
        """The loop saves: indexes older than that of the save before are needed no more."""
        prune(self.folder, self.saved)
        self.saved = max(0, int(self.mark[0]) - 1)
        return {"index": self.mark}

    # ---- judgement

    def batch(self, step: int) -> list[list[Example]]:
        size, micro, n = self.settings.batch, self.settings.micro or self.settings.batch, len(self.examples)
        if size > n:
            raise UsageError(f"[train] batch = {size}, but there are {n} examples; use fewer")
        epoch, at = divmod(step, n // size)
        rows = np.random.default_rng([self.settings.seed, epoch]).permutation(n)[at * size:(at + 1) * size]
        return [[self.examples[i] for i in rows[a:a + micro]] for a in range(0, size, micro)]

    def judge(self, examples: list[Example], index: Snapshot, grad: str = "") -> Judged:
        """Candidates by the index, scored by live weights, and the targets under each. grad: "retriever", "lm", or neither."""
        k = min(self.retrieval.k, len(self.passages))
        with torch.set_grad_enabled(grad == "retriever"):
            q_BD = self.encoder.encode([e.query for e in examples], "query") if grad == "retriever" else torch.from_numpy(
                self.encoder.many([e.query for e in examples], "query")).to(self.encoder.model.device)
            top_BK = index.top(q_BD, k, [e.exclude for e in examples])
            rows, back = np.unique(np.maximum(top_BK, 0), return_inverse=True)
            back_BK = torch.from_numpy(back.reshape(top_BK.shape)).to(q_BD.device)
            d_ND = index.vectors_ND[torch.from_numpy(rows)]
            if self.retrieval.trains == "both":
                texts = [self.passages.texts[i] for i in rows]
                d_ND = self.encoder.encode(texts, "passage", AT_ONCE) if grad == "retriever" else torch.from_numpy(
                    self.encoder.many(texts, "passage")).to(q_BD.device)
            scores_BK = (q_BD[:, None] * d_ND[back_BK]).sum(-1)
            scores_BK = scores_BK.masked_fill(torch.from_numpy(top_BK < 0).to(q_BD.device), -torch.inf)
        with torch.set_grad_enabled(grad == "lm"):
            logp_BKT, null_BT, mask_BT = self._targets(examples, top_BK)
        return Judged(scores_BK, logp_BKT, null_BT, mask_BT, top_BK)

    def _targets(self, examples: list[Example], top_BK: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        ids = [[int(self.passages.ids[i]) for i in row if i >= 0] for row in top_BK]
        read = dict(zip((every := sorted({i for row in ids for i in row})), self.evidence(every)))
        rows = [([*passage, *e.prefix], e.target) for e, some in zip(examples, ids)
                for passage in ([], *(read[i] for i in some), *([[]] * (top_BK.shape[1] - len(some))))]
        logp_NT, mask_NT = target_logp(self.lm, rows)
        K = top_BK.shape[1] + 1
        logp_BKT = logp_NT.view(len(examples), K, -1)
        return logp_BKT[:, 1:], logp_BKT[:, 0].detach(), mask_NT[::K]

    def _held(self, index: Snapshot) -> dict[str, np.ndarray]:
        """Of each held-out example: nats of its target under the per-token mixture (REPLUG) and without passages, its tokens, and
        the rank of the first candidate that holds an answer."""
        out: dict[str, list] = {"nats": [], "null": [], "tokens": [], "rank": []}
        size = max(1, 64 // self.retrieval.k)
        with torch.no_grad(), progress.task("held-out", total=len(self.held), unit="examples") as advance:
            for at in range(0, len(self.held), size):
                some = self.held[at:at + size]
                j = self.judge(some, index)
                mixed_BT = log_mix_tokens(j.logp_BKT, log_weights(j.scores_BK, self.objective.tau_r).to(j.logp_BKT.device))
                out["nats"] += (-(mixed_BT * j.mask_BT).sum(-1)).tolist()
                out["null"] += (-(j.null_BT * j.mask_BT).sum(-1)).tolist()
                out["tokens"] += j.mask_BT.sum(-1).tolist()
                out["rank"] += [self._rank(e, row) for e, row in zip(some, j.top_BK.tolist())]
                advance(len(some))
        return {key: np.array(values, np.float64) for key, values in out.items()}

    def _rank(self, e: Example, row: list[int]) -> int:
        holds = (i >= 0 and has_answer(self.passages.texts[i], e.answers) for i in row)
        return next((r for r, there in enumerate(holds) if there), len(row)) if e.answers else len(row)

    def evaluate(self) -> dict[str, float]:
        """Nats a token on held-out examples, beside those before training (difference and its 95 % interval) and without passages;
        for questions percent with an answer among the first 1 and k candidates."""
        if not self.held:
            return {}
        now, was = self._held(self.index if self.fixed else Snapshot.of(self.encoder, self.passages, -1)), self.before
        total = now["tokens"].sum()
        low, high = interval(now["nats"] - was["nats"], now["tokens"])
        out = {"nats": now["nats"].sum() / total, "nats-before": (now["nats"] - was["nats"]).sum() / total, "nats-before_low": low,
               "nats-before_high": high, "nats_without": now["null"].sum() / total, "ppl": float(np.exp(now["nats"].sum() / total))}
        if self.held[0].answers:
            for k in sorted({1, self.retrieval.k}):
                difference = 100.0 * (now["rank"] < k) - 100.0 * (was["rank"] < k)
                low, high = interval(difference)
                out |= {f"top{k}": 100.0 * float((now["rank"] < k).mean()), f"top{k}-before": float(difference.mean()),
                        f"top{k}-before_low": low, f"top{k}-before_high": high}
        return {key: float(value) for key, value in out.items()}


class Lsr(Sequential):
    """The retriever learns; the language model is frozen."""

    kind, learns = "replug-lsr", "retriever"

    def groups(self) -> list[Group]:
        if self.retrieval.trains == "query":
            self.encoder.freeze("passage")
        return self.encoder.groups(self.settings.lr, "retriever")

    def loss(self, part: list[Example]) -> tuple[Tensor, dict[str, float]]:
        j = self.judge(part, self.index, "retriever")
        logp_BKT, mask_BT = j.logp_BKT.to(j.scores_BK.device), j.mask_BT.to(j.scores_BK.device)
        loss = self.objective(j.scores_BK, logp_BKT, mask_BT)
        with torch.no_grad():
            helps = retrieval_utility(logp_BKT, log_weights(j.scores_BK, self.objective.tau_r), j.null_BT.to(loss.device), mask_BT)
        return loss, {"utility": float(helps), "examples": len(part), "tokens": int(mask_BT.sum())}

    def export(self, folder: Path, trained: Mapping[str, Any]) -> None:
        from ralm.train.independent import card

        self.encoder.save(folder, trained, card(trained))


class Reading(Sequential):
    """The language model learns to read what a frozen retriever finds: -sum over passages and targets of ln p(y | passage, x)."""

    kind, learns = "ra-dit-lm", "lm"

    def groups(self) -> list[Group]:
        self.encoder.model.requires_grad_(False)
        self.lm.model.requires_grad_(True)
        named = dict(self.lm.model.named_parameters())
        return [Group("lm", named, self.settings.lr, betas=(0.9, 0.95))]

    def loss(self, part: list[Example]) -> tuple[Tensor, dict[str, float]]:
        j = self.judge(part, self.index, "lm")
        weight_BKT = j.mask_BT[:, None] * torch.isfinite(j.scores_BK).to(j.mask_BT.device)[..., None]
        loss = -(j.logp_BKT * weight_BKT).sum() / weight_BKT.sum()
        log_w_BK = log_weights(j.scores_BK, self.objective.tau_r).to(loss.device)
        helps = retrieval_utility(j.logp_BKT.detach(), log_w_BK, j.null_BT, j.mask_BT)
        return loss, {"utility": float(helps), "examples": len(part), "tokens": int(j.mask_BT.sum())}

    def export(self, folder: Path, trained: Mapping[str, Any]) -> None:
        """A GPT's checkpoint, or what transformers saves."""
        from ralm.lm.gpt import GPT, save

        if isinstance(self.lm, GPT):
            save(folder, self.lm.model, self.lm.tokenizer, replace(self.lm.config, trained=dict(trained)))
        else:
            self.lm.model.save_pretrained(folder)
            self.lm.tokenizer.inner.save_pretrained(folder)
