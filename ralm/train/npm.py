"""A nonparametric masked language model with in-batch positives (regime 4). NPM (Min et al. 2023).

    kind = "npm"
    [data]      files = [...], form = "plain", documents = 0, segment = 64, held_out = "lm/wikitext.valid.raw.txt.zst",
                sample = 40000 (its first characters), copies = 1.0 (as for trime)
    [model]     tokenizer = "bundled:base", width = 128, layers = 3, heads = 4: a BERT with random weights (lm/phrases.py)
    [mask]      ratio = 0.15 (of a sequence's tokens), geometric = 0.5, most = 10 (tokens of a span), batches = "bm25" | "scattered"

A span is masked where the same words stand in another sequence of the batch: their places there are right, every other token of
the other sequences is wrong. A masked span is two masks, whatever its length; with q_s, q_e their states and y the states of the
sequences without masks (section 3.2, eq. 3):

    L = sum over b in (s, e) of  -ln  sum_{y right} exp(q_b . y / sqrt(D)) / sum_{y of other sequences} exp(q_b . y / sqrt(D))

Right for s are the first tokens of the phrase's places, for e the last ones. Lengths are geometric; a length for which the sequence
has no shared span gives way to the next shorter one. Spans are whole words. Chains of BM25 neighbours (batching.py) put
sequences together that share more than function words. Ranks gather each other's states with gradients."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ralm.errors import UsageError
from ralm.lm import load
from ralm.lm.phrases import Phrases, pieces
from ralm.train import batching, ranks
from ralm.train.batching import Segments, Text
from ralm.train.gpt_data import read_text
from ralm.train.memory import memory_nll
from ralm.train.task import Group, Settings, Task, section


@dataclass(frozen=True)
class Data:
    files: list
    form: str = "plain"
    documents: int = 0
    segment: int = 64
    copies: float = 1.0
    held_out: str = ""
    sample: int = 40000


@dataclass(frozen=True)
class Model:
    tokenizer: str = "bundled:base"
    width: int = 128
    layers: int = 3
    heads: int = 4


@dataclass(frozen=True)
class Mask:
    ratio: float = 0.15
    geometric: float = 0.5
    most: int = 10
    batches: str = "bm25"
    neighbours: int = 20


class Span(NamedTuple):
    """Tokens [start, stop) of a sequence, and where the same stand in others: first and last tokens, counted through the batch."""

    start: int
    stop: int
    first: tuple[int, ...]
    last: tuple[int, ...]


class Part(NamedTuple):
    """One rank's sequences [B, T] and the spans masked in each; share: of the batch's spans, times the ranks."""

    rows_BT: np.ndarray
    spans: list[list[Span]]
    first: int  # number of the first sequence in the batch
    share: float


class Npm(Task):
    kind = "npm"

    def __init__(self, recipe: Mapping[str, Any], root: Path, folder: Path):
        self.settings = Settings.of(recipe["train"])
        self.data, model, self.how = (section(recipe, n, c) for n, c in (("data", Data), ("model", Model), ("mask", Mask)))
        if not (0 < self.how.ratio < 1 and 0 < self.how.geometric <= 1 and self.how.most >= 1):
            raise UsageError(f"[mask] ratio = {self.how.ratio} and geometric = {self.how.geometric} lie between 0 and 1, most = "
                             f"{self.how.most} is at least 1")
        if self.how.batches not in ("bm25", "scattered"):
            raise UsageError(f"[mask] batches = '{self.how.batches}' is bm25 or scattered")
        if self.settings.batch < 2 or self.settings.batch % ranks.world().size:
            raise UsageError(f"[train] batch = {self.settings.batch}: at least 2 sequences, a multiple of the ranks")
        begun = load(model.tokenizer)
        self.bpe, self.end = begun.tokenizer, begun.bos
        self.npm = Phrases.made(self.bpe, self.data.segment, model.width, model.layers, model.heads)
        self.npm.model.to(ranks.device(self.settings.device)).train()
        text = Text.read([root / n for n in self.data.files], self.bpe, self.end, folder, self.data.documents, self.data.form)
        self.segments = Segments(text, self.data.segment, self.end, self.data.copies)
        self.begins = pieces(self.bpe, len(self.bpe))
        self.near, self.held = None, []
        if self.how.batches == "bm25":
            self.near = batching.neighbours(self.segments, self.bpe, self.how.neighbours, folder)
        if self.data.held_out:
            self.held = self._held(root / self.data.held_out, folder)
        self.epochs: dict[int, np.ndarray] = {}

    def _held(self, path: Path, folder: Path) -> list[Part]:
        """Held-out batches, chained by BM25, masked alike in every evaluation."""
        ids = np.array([*self.bpe.encode(read_text(path)[:self.data.sample]), self.end], np.int32)
        held = Segments(Text(ids, np.array([0, len(ids)])), self.data.segment, self.end)
        size = min(self.settings.batch, len(held))
        groups = batching.related(batching.neighbours(held, self.bpe, self.how.neighbours, folder), size, 0, 0)
        return [self._parts(held.tokens_NL[g], np.random.default_rng([9, i]), 1)[0] for i, g in enumerate(groups)]

    # ---- the task

    def groups(self) -> list[Group]:
        named = dict(self.npm.model.named_parameters())
        wide = {n: p for n, p in named.items() if p.ndim > 1}
        rest = {n: p for n, p in named.items() if n not in wide}
        return [Group("encoder", wide, self.settings.lr, weight_decay=0.01), Group("encoder norms", rest, self.settings.lr)]

    def batch(self, step: int) -> list[Part]:
        """One part a rank: its sequences, and their spans, which depend on the whole batch, seed and step."""
        size = self.settings.batch
        epoch, at = divmod(step, max(1, len(self.segments) // size))
        if epoch not in self.epochs:
            args = size, self.settings.seed, epoch
            self.epochs = {epoch: batching.scattered(len(self.segments), *args) if self.near is None
                           else batching.related(self.near, *args)}
        if not len(self.epochs[epoch]):
            raise UsageError(f"[train] batch = {size}, but the text makes {len(self.segments)} segments; use fewer")
        tokens_BT = self.segments.tokens_NL[self.epochs[epoch][at]]
        return self._parts(tokens_BT, np.random.default_rng([self.settings.seed, step, 3]), ranks.world().size)

    def _parts(self, tokens_BT: np.ndarray, rng: np.random.Generator, size: int) -> list[Part]:
        spans = masked(tokens_BT, self.begins, self.end, self.how, rng)
        each, total = len(tokens_BT) // size, sum(map(len, spans))
        out = []
        for r in range(size):
            mine = slice(r * each, (r + 1) * each)
            share = size * sum(map(len, spans[mine])) / max(1, total)
            out.append(Part(tokens_BT[mine], spans[mine], r * each, share))
        return out

    def loss(self, part: Part) -> tuple[Tensor, dict[str, float]]:
        """Mean over the batch's spans of L, and: right (the best start or end is right), chance (share of right tokens)."""
        keys_MD = ranks.world().gather(self.npm.states(part.rows_BT.tolist()).flatten(0, 1))
        count = sum(map(len, part.spans))
        told = {"right": 0.0, "chance": 0.0, "spans": count}
        if not count:
            return 0.0 * keys_MD.sum(), told
        scores_2QM, right_2QM, seen_QM = self.compared(part, keys_MD)
        losses = [memory_nll(s, r, seen_QM).mean() for s, r in zip(scores_2QM, right_2QM)]
        with torch.no_grad():
            best = [r.gather(1, s.masked_fill(~seen_QM, -math.inf).argmax(1, keepdim=True))
                    for s, r in zip(scores_2QM, right_2QM)]
            told |= {"right": float(torch.cat(best).float().mean()) * part.share,
                     "chance": float((right_2QM.sum(2) / seen_QM.sum(1)).mean()) * part.share}
        return (losses[0] + losses[1]) * part.share, told

    def compared(self, part: Part, keys_MD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of every masked span (Q in all): scores [2, Q, M] of the batch's tokens as its start and its end, which of them are right
        [2, Q, M], and which belong to other sequences [Q, M]."""
        rows, at = [], []  # at: (row, place of the first mask)
        for b, (tokens, spans) in enumerate(zip(part.rows_BT.tolist(), part.spans)):
            row, done = [], 0
            for s in spans:
                row += tokens[done:s.start]
                at.append((b, len(row)))
                row += [self.npm.mask_start, self.npm.mask_end]
                done = s.stop
            rows.append(row + tokens[done:])
        state_BTD = self.npm.states(rows)
        b, t = (torch.tensor(x, device=state_BTD.device) for x in zip(*at))
        q_2QD = torch.stack([state_BTD[b, t], state_BTD[b, t + 1]])
        scores_2QM = q_2QD @ keys_MD.T / math.sqrt(keys_MD.shape[1])
        right_2QM = torch.zeros(scores_2QM.shape, dtype=torch.bool)
        for n, s in enumerate(s for spans in part.spans for s in spans):
            right_2QM[0, n, list(s.first)] = True
            right_2QM[1, n, list(s.last)] = True
        sequence_M = torch.arange(len(keys_MD), device=b.device) // part.rows_BT.shape[1]
        return scores_2QM, right_2QM.to(b.device), sequence_M != (b + part.first)[:, None]

    def evaluate(self) -> dict[str, float]:
        """On held-out batches: L, percent of starts and ends whose best token is right, and what a token at random would be."""
        if not self.held:
            return {}
        self.npm.model.eval()
        loss = right = chance = spans = 0.0
        for part in self.held:
            one, told = self.loss(part)
            n = told["spans"]
            loss, spans = loss + float(one) * n, spans + n
            right, chance = right + told["right"] * n, chance + told["chance"] * n
        self.npm.model.train()
        return {"loss": loss / spans, "right": 100 * right / spans, "chance": 100 * chance / spans, "spans": int(spans)}

    def export(self, folder: Path, trained: Mapping[str, Any]) -> None:
        self.npm.save(folder)
        (folder / "trained.json").write_text(json.dumps(trained, indent=1) + "\n")
        (folder / "README.md").write_text(card(trained))


def masked(tokens_BT: np.ndarray, begins_V: np.ndarray, end: int, how: Mask, rng: np.random.Generator) -> list[list[Span]]:
    """Spans of whole words that stand in another sequence too, `ratio` of each sequence's tokens, none beside another."""
    B, T = tokens_BT.shape
    begins_BT = np.concatenate([begins_V[tokens_BT], np.ones((B, 1), bool)], 1)
    at: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for b, row in enumerate(tokens_BT.tolist()):
        for i in range(T):
            for n in range(1, min(how.most, T - i) + 1):
                if row[i + n - 1] == end:
                    break
                if begins_BT[b, i] and begins_BT[b, i + n]:
                    at.setdefault(tuple(row[i:i + n]), []).append((b, i))
    shared: list[dict[int, list[int]]] = [{} for _ in range(B)]  # of a sequence, by length: where spans begin that others have too
    for words, places in at.items():
        if len({b for b, _ in places}) > 1:
            for b, i in places:
                shared[b].setdefault(len(words), []).append(i)
    return [_spans(b, row, at, shared[b], how, rng) for b, row in enumerate(tokens_BT.tolist())]


def _spans(b: int, row: Sequence[int], at: Mapping[tuple[int, ...], list[tuple[int, int]]], shared: Mapping[int, list[int]],
           how: Mask, rng: np.random.Generator) -> list[Span]:
    T = len(row)
    free, out, left = np.ones(T + 1, bool), [], max(1, round(how.ratio * T))
    while left > 0 and shared:
        n = min(int(rng.geometric(how.geometric)), how.most, left)
        while n and not (good := [i for i in shared.get(n, ()) if free[max(0, i - 1):i + n + 1].all()]):
            n -= 1
        if not n:
            break
        i = int(rng.choice(good))
        free[i:i + n] = False
        left -= n
        places = [(c, j) for c, j in at[tuple(row[i:i + n])] if c != b]
        out.append(Span(i, i + n, tuple(c * T + j for c, j in places), tuple(c * T + j + n - 1 for c, j in places)))
    return sorted(out)


def card(trained: Mapping[str, Any]) -> str:
    """README.md of an exported model."""
    last = trained["evaluations"][-1] if trained["evaluations"] else {}
    rows = [f"| {k} | {v:g} |" for k, v in last.items() if k not in ("step", "seconds")]
    return "\n".join([
        f"# {trained['recipe'].get('title') or 'A nonparametric masked language model'}", "",
        f"Trained by `ralm train` from random weights: {trained['steps']:,} steps of {trained['recipe']['train'].get('batch', 1)} "
        f"sequences, {trained['seconds'] / 60:.1f} minutes, {trained['parameters'] / 1e6:.1f} M parameters"
        f"{'' if trained['finished'] else '; the run goes on'}.", "",
        "Use: `from ralm.lm.phrases import Phrases`; it fills `[MASK]` with phrases of texts that it is given.", "",
        "| held-out figure | |", "|---|---|", *rows, ""])
