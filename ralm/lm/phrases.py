"""A nonparametric masked language model: a gap is filled with a phrase of stored texts, found by its ends. NPM (Min et al. 2023).

    npm = Phrases.load("runs/npm/model")
    memory = npm.remember({"doc1": "the reef of Brennick ...", ...})        # a vector for every token
    for found in npm.fill("The lighthouse stands on [MASK].", memory): ...  # phrase, score, document, start, end

There is no output vocabulary. The gap is read as two masks, and their states q_s and q_e are compared with the states of all stored
tokens, which were read without a gap:

    p_s(i) = softmax over i of q_s . y_i / sqrt(D),  p_e(j) likewise,  score(phrase) = sum over its places (i, j) of p_s + p_e

(section 3.3). Every answer is therefore a quotation, with the characters it was taken from. train/npm.py trains it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ralm.errors import StoreError, UsageError, need
from ralm.lm.gpt import BPE
from ralm.lm.pieces import spans

GAP = "[MASK]"
SPECIALS = 3  # behind the tokenizer's ids: the mask of a start, of an end, padding
BATCH = 16  # sequences read at a time


@dataclass(frozen=True)
class Found:
    """A phrase, and the place of it that fits best: text == documents[document][start:end]."""

    phrase: str
    score: float
    document: str
    start: int
    end: int
    places: int  # how many there are


@dataclass(frozen=True)
class Remembered:
    """Stored texts as vectors of their tokens. N tokens in all, pieces of at most a window; a phrase does not cross pieces."""

    texts: Mapping[str, str]
    vectors_ND: Tensor
    piece_N: np.ndarray  # which piece a token is of
    document: list[str]  # of each piece
    start_N: np.ndarray  # characters
    end_N: np.ndarray


class Phrases:
    """A bidirectional encoder (BERT's) over the tokens of a byte-level BPE and two masks. Texts are read `window` tokens at a time;
    with masks for single tokens a row may be longer."""

    def __init__(self, model: nn.Module, tokenizer: BPE, window: int):
        self.model, self.tokenizer, self.window = model, tokenizer, window
        self.mask_start, self.mask_end, self.pad = (len(tokenizer) + i for i in range(SPECIALS))

    @staticmethod
    def made(tokenizer: BPE, window: int, width: int = 128, layers: int = 3, heads: int = 4) -> Phrases:
        """With random weights."""
        need("transformers", "a masked language model", "lm")
        from transformers import BertConfig, BertModel

        config = BertConfig(vocab_size=len(tokenizer) + SPECIALS, hidden_size=width, num_hidden_layers=layers,
                            num_attention_heads=heads, intermediate_size=4 * width, max_position_embeddings=2 * window,
                            type_vocab_size=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
                            pad_token_id=len(tokenizer) + 2)
        return Phrases(BertModel(config, add_pooling_layer=False), tokenizer, window)

    @staticmethod
    def load(folder: str | Path) -> Phrases:
        """What `save` wrote. Raises StoreError where there is nothing of it."""
        from tokenizers import Tokenizer
        from transformers import BertModel

        folder = Path(folder)
        try:
            window = json.loads((folder / "phrases.json").read_text())["window"]
            tokenizer = BPE(Tokenizer.from_file(str(folder / "tokenizer.json")))
        except (OSError, ValueError, KeyError) as e:
            raise StoreError(f"'{folder}' holds no model that fills gaps ({e}); give the folder that ralm train wrote") from e
        model = BertModel.from_pretrained(folder, add_pooling_layer=False, local_files_only=True, use_safetensors=True)
        return Phrases(model.eval().requires_grad_(False), tokenizer, window)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.model.save_pretrained(folder)
        self.tokenizer.inner.save(str(folder / "tokenizer.json"))
        (folder / "phrases.json").write_text(json.dumps({"window": self.window}))

    # ---- reading ----------------------------------------------------------------------------------------------------

    def states(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """The state of every token [B, T, D]; rows are padded on the right."""
        T = max(map(len, rows))
        ids_BT = torch.tensor([list(r) + [self.pad] * (T - len(r)) for r in rows], device=self.model.device)
        return self.model(input_ids=ids_BT, attention_mask=(ids_BT != self.pad).long()).last_hidden_state

    def remember(self, texts: Mapping[str, str]) -> Remembered:
        """Read texts (by document id) in pieces of `window` tokens."""
        rows, vectors, starts, ends, document = [], [], [], [], []
        for name, text in texts.items():
            ids, start, end = spans(self.tokenizer, text)
            for at in range(0, len(ids), self.window):
                rows.append(list(ids[at:at + self.window]))
                starts.append(start[at:at + self.window])
                ends.append(end[at:at + self.window])
                document.append(name)
        if not rows:
            raise UsageError("there is no text to remember")
        with torch.no_grad():
            for at in range(0, len(rows), BATCH):
                some = rows[at:at + BATCH]
                vectors += [v[:len(r)] for v, r in zip(self.states(some), some)]
        piece_N = np.repeat(np.arange(len(rows)), [len(r) for r in rows])
        return Remembered(texts, torch.cat(vectors).float(), piece_N, document, np.concatenate(starts), np.concatenate(ends))

    def fill(self, text: str, memory: Remembered, k: int = 10, most: int = 10, tried: int = 64) -> list[Found]:
        """The k best phrases of at most `most` tokens for the gap `[MASK]` of a text, best first; starts and ends are tried among
        the `tried` most probable ones. Raises UsageError for a text without exactly one gap, or longer than the window."""
        before, *after = text.split(GAP)
        if len(after) != 1:
            raise UsageError(f"the text has {len(after)} gaps; write exactly one {GAP}")
        encode = self.tokenizer.encode
        left, right = encode(before.rstrip(" ")), encode(after[0])
        row = [*left, self.mask_start, self.mask_end, *right]
        if len(row) > self.window:
            raise UsageError(f"{len(row)} tokens with the gap, the model reads {self.window}; shorten the text")
        with torch.no_grad():
            state_TD = self.states([row])[0]
        return self.found(state_TD[len(left)], state_TD[len(left) + 1], memory, k, most, tried)

    def found(self, start_D: Tensor, end_D: Tensor, memory: Remembered, k: int = 10, most: int = 10,
              tried: int = 64) -> list[Found]:
        """As `fill`, from the states of the two masks."""
        p_sN, p_eN = (torch.softmax(memory.vectors_ND @ q / math.sqrt(len(q)), 0).double().numpy() for q in (start_D, end_D))
        top_s, top_e = (np.argpartition(-p, min(tried, len(p)) - 1)[:tried] for p in (p_sN, p_eN))
        at: dict[str, list[tuple[float, int, int]]] = {}
        for i in np.union1d(top_s, np.concatenate([np.maximum(top_e - d, 0) for d in range(most)])).tolist():
            for j in range(i, min(i + most, len(p_eN))):
                if memory.piece_N[i] != memory.piece_N[j]:
                    break
                if i in top_s or j in top_e:
                    phrase = self._text(memory, i, j).strip()
                    if phrase:
                        at.setdefault(phrase, []).append((float(p_sN[i] + p_eN[j]), i, j))
        ranked = sorted(at.items(), key=lambda pair: (-sum(s for s, _, _ in pair[1]), pair[0]))[:k]
        return [self._found(memory, phrase, places) for phrase, places in ranked]

    @staticmethod
    def _text(memory: Remembered, i: int, j: int) -> str:
        return memory.texts[memory.document[memory.piece_N[i]]][memory.start_N[i]:memory.end_N[j]]

    def _found(self, memory: Remembered, phrase: str, places: list[tuple[float, int, int]]) -> Found:
        _, i, j = max(places)
        raw, start = self._text(memory, i, j), int(memory.start_N[i])
        start += len(raw) - len(raw.lstrip())
        document = memory.document[memory.piece_N[i]]
        return Found(phrase, sum(s for s, _, _ in places), document, start, start + len(phrase), len(places))


def pieces(tokenizer: Any, size: int) -> np.ndarray:
    """bool [V]: tokens with which a word begins (or that are no part of one)."""
    texts = [tokenizer.decode([i]) for i in range(size)]
    return np.array([not t[:1].isalnum() and t[:1] not in ("'", "\ufffd") for t in texts])
