"""What a REALM run wrote, in use: fill in masks from passages that its own retriever finds.

    realm = Realm("runs/realm_squad/model", store)
    realm.fill("The Normans came to England in [MASK].")      # Filled(words=["1066"], logp=-0.4, passages=[...], weights=[...])
    realm.score("The Normans came to England in 1066.", [(31, 35)])      # ln p(1066 | x), what training minimises the negative of

p(y|x) = sum over the k best passages and the null document of p(z|x) p(y|x, z) (Guu et al. 2020, eq. 1)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ralm.errors import StoreError, UsageError
from ralm.how.mixing import log_mix_sequences, log_mix_tokens, log_weights
from ralm.index.dense import Dense
from ralm.index.encode import encoder
from ralm.lm.masked import Lengths, Masked, MaskedReader
from ralm.types import Chunk

SPARE = 8  # passages retrieved beyond k: some may hold the text itself


@dataclass(frozen=True, slots=True)
class Filled:
    """The likeliest piece at each mask, their joint ln p, and what was read: None is the null document; weights are p(z|x)."""

    words: list[str]
    logp: float
    passages: list[Chunk | None]
    weights: list[float]


class Realm:
    """A retriever and a masked language model that were trained together, over a datastore.

    Its vectors of the store are made at the first use (index/dense-NAME). Raises StoreError for a folder without such a model."""

    def __init__(self, folder: str | Path, store, name: str = "realm"):
        folder = Path(folder)
        for file in ("realm.json", "retriever/modules.json", "reader/config.json"):
            if not (folder / file).is_file():
                raise StoreError(f"{folder} holds no model of a REALM run: {file} is missing; train one (recipes/realm_toy.toml)")
        told = json.loads((folder / "realm.json").read_text())
        self.k, self.null, self.per, self.temperature = told["k"], told["null"], told["per"], told["temperature"]
        lengths = Lengths(**json.loads((folder / "reader" / "lengths.json").read_text()))
        self.reader = MaskedReader.load(str(folder / "reader"), lengths).eval()
        self.encoder = encoder(f"st:{folder / 'retriever'}")
        self.store, self.dense = store, Dense(store, encoder=self.encoder.name, name=name)

    def score(self, text: str, spans: Sequence[tuple[int, int]]) -> float:
        """ln p of what stands at the character spans, given the rest; passages that hold the text are not read.

        Raises UsageError for spans that hold no or too many word pieces."""
        row, passages, log_w_1K = self._given(text, spans)
        with torch.no_grad():
            logp_1KM, _ = self.reader.logp([row], [[c.text if c else "" for c in passages]])
        mixed = log_mix_sequences(logp_1KM, log_w_1K) if self.per == "sequence" else log_mix_tokens(logp_1KM, log_w_1K).sum(-1)
        return float(mixed)

    def fill(self, text: str) -> Filled:
        """The likeliest word piece at each mask of a text. Raises UsageError where it has none."""
        mask = self.reader.tokenizer.mask_token
        at = [n for n in range(len(text)) if text.startswith(mask, n)]
        row, passages, log_w_1K = self._given(text, [(n, n + len(mask)) for n in at])
        with torch.no_grad():
            logp_KMV = self.reader.distribution(row, [c.text if c else "" for c in passages])
        best_M = log_mix_tokens(logp_KMV[None], log_w_1K)[0].argmax(-1)
        logp_1KM = logp_KMV.gather(-1, best_M[None, :, None].expand(len(passages), -1, 1))[None, ..., 0]
        words = self.reader.tokenizer.convert_ids_to_tokens(best_M.tolist())
        return Filled(words, float(log_mix_sequences(logp_1KM, log_w_1K)), passages, log_w_1K[0].exp().tolist())

    def _given(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[Masked, list[Chunk | None], torch.Tensor]:
        """The masked text, what is read beside it, and ln p(z|x) [1, K]."""
        row = self.reader.cut(text, spans)
        if row is None:
            raise UsageError(f"the spans {list(spans)} hold no word piece of the text, or more than {self.reader.lengths.masks}; "
                             f"mask less, or write {self.reader.tokenizer.mask_token} where something is to be filled in")
        q_1D = self.encoder.encode([row.query], role="query")
        found = [i for i in self.dense.nearest(q_1D, self.k + SPARE).ids[0].tolist() if i >= 0]
        own = " ".join(text.split())
        some = [c for c in (self.store.chunks(found) if found else []) if own not in " ".join(c.text.split())][:self.k]
        passages = [*([None] if self.null else []), *some]
        if not passages:
            raise StoreError(f"{self.store.path} has no passage to read")
        d_KD = self.encoder.encode([(f"{c.title}\n{c.text}" if c.title else c.text) if c else "" for c in passages])
        return row, passages, log_weights(torch.from_numpy(np.asarray(q_1D @ d_KD.T)), self.temperature)
