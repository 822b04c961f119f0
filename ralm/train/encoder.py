"""An encoder that learns: a sentence-transformers model of one's own, encoded with gradients in memory that does not grow.

    encoder = Trainable(Encoder("minilm"), torch.device("cpu"))
    encoder.encode(texts, "query", size=16, cached=True)      # float [N, D] of length one, with gradients
    encoder.many(texts, "passage")                            # numpy, without
    encoder.save(folder, trained, card)                       # loads in sentence-transformers, and here as dense:FOLDER

Encoders that are shared in the process (index/encode.py) are not trained: this one is read anew."""

from __future__ import annotations

import copy
import importlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ralm import progress
from ralm.errors import UsageError, need
from ralm.index.encode import Sentences, encoder
from ralm.train.task import Group

ROLES = {"query": "query", "passage": "document"}  # ours, sentence-transformers'
AT_ONCE = 16  # texts encoded at a time without gradients
DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "dropout")


@dataclass(frozen=True)
class Encoder:
    model: str = "minilm"
    random: bool = False  # the same shape, untrained
    layers: int = 0  # of the transformer: its first so many; 0: as many as the model has
    tokens: int = 256
    separate: bool = False  # one encoder for queries and one for passages, as DPR
    dropout: float = -1.0  # below 0: as the model has it


class Trainable:
    """Queries and passages as vectors of length one, as index/dense compares them."""

    def __init__(self, wish: Encoder, device: torch.device):
        self.model = network(wish).to(device).train()

    @property
    def dim(self) -> int:
        return int(self.model.get_embedding_dimension())

    def groups(self, lr: float, name: str = "encoder") -> list[Group]:
        """Matrices decay, norms and biases do not."""
        named = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        wide = {n: p for n, p in named.items() if p.ndim > 1}
        rest = {n: p for n, p in named.items() if p.ndim <= 1}
        return [Group(name, wide, lr, weight_decay=0.01), Group(f"{name} norms", rest, lr)]

    def freeze(self, role: str) -> None:
        """One side of two separate encoders stays as it is. Raises UsageError where both sides are one."""
        routes = getattr(self.model[0], "sub_modules", None)
        if routes is None or ROLES[role] not in routes:
            raise UsageError(f"the encoder of {role} texts cannot be frozen: queries and passages share it; use separate = true")
        routes[ROLES[role]].requires_grad_(False)

    def encode(self, texts: Sequence[str], role: str, size: int = 0, cached: bool = True) -> Tensor:
        """float [N, D] with gradients, `size` texts at a time (0: all) in order of length.

        cached: what the backward pass of a group of texts needs is computed again when it is due, under the same dropout. Memory is
        that of one group, and the gradient that of all texts at once (Gao et al. 2021, GradCache)."""
        size = size or len(texts)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        again = cached and len(texts) > size and torch.is_grad_enabled()
        out = []
        for at in range(0, len(order), size):
            features = self._features([texts[i] for i in order[at:at + size]], role)
            out.append(checkpoint(self._vectors, features, role, use_reentrant=False) if again else self._vectors(features, role))
        back = torch.tensor(np.argsort(order, kind="stable"), device=out[0].device)
        return torch.cat(out)[back]

    def many(self, texts: Sequence[str], role: str, advance: Callable[[int], None] = lambda n: None) -> np.ndarray:
        """float32 [N, D] without gradients or dropout."""
        out = np.empty((len(texts), self.dim), np.float32)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        self.model.eval()
        try:
            with torch.no_grad():
                for at in range(0, len(order), AT_ONCE):
                    rows = order[at:at + AT_ONCE]
                    out[rows] = self._vectors(self._features([texts[i] for i in rows], role), role).cpu().numpy()
                    advance(len(rows))
        finally:
            self.model.train()
        return out

    def _features(self, texts: list[str], role: str) -> dict[str, Any]:
        prompt = self.model.prompts.get(ROLES[role]) or None
        features = self.model.preprocess(texts, prompt=prompt, task=ROLES[role])
        return {k: v.to(self.model.device) if isinstance(v, Tensor) else v for k, v in features.items()}

    def _vectors(self, features: Mapping[str, Any], role: str) -> Tensor:
        return F.normalize(self.model(dict(features), task=ROLES[role])["sentence_embedding"].float(), dim=-1)

    def save(self, folder: Path, trained: Mapping[str, Any], card: str) -> None:
        """Write a sentence-transformers model; the folder is replaced as a whole."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        part, old = folder.with_name(f".{folder.name}.part"), folder.with_name(f".{folder.name}.old")
        for leftover in (part, old):
            shutil.rmtree(leftover, ignore_errors=True)
        with progress.quiet():
            self.model.save_pretrained(str(part), create_model_card=False)
        (part / "train_results.json").write_text(json.dumps(trained, indent=1) + "\n")  # a name that fingerprints leave out
        (part / "README.md").write_text(card)
        if folder.exists():
            folder.rename(old)
        part.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


def network(wish: Encoder) -> Any:
    """The sentence-transformers model that is wished for, ending in vectors of length one. Raises UsageError for what is none."""
    package = need("sentence_transformers", "training an encoder", "lm")
    found = encoder(wish.model)
    if not isinstance(found, Sentences):
        raise UsageError(f"'{wish.model}' is no transformer that can be trained; use minilm, st:NAME or a folder")
    with progress.quiet():
        model = package.SentenceTransformer(str(found.folder), local_files_only=True, trust_remote_code=False, device="cpu",
                                            model_kwargs={"use_safetensors": True})
    modules, parts = list(model), _parts()
    for inner in model.modules():
        if hasattr(inner, "auto_model"):
            _changed(inner, wish)
            inner.max_seq_length = min(wish.tokens, inner.max_seq_length or wish.tokens)
    if isinstance(modules[0], parts.Router):  # two encoders already
        return model
    if not isinstance(modules[-1], parts.Normalize):
        modules.append(parts.Normalize())
    if wish.separate:
        modules = [parts.Router.for_query_document(modules, copy.deepcopy(modules))]
    if modules == list(model):
        return model
    return package.SentenceTransformer(modules=modules, prompts=model.prompts, device="cpu")


def _parts() -> Any:
    """Where sentence-transformers keeps its modules: elsewhere since version 6."""
    try:
        return importlib.import_module("sentence_transformers.sentence_transformer.modules")
    except ImportError:
        return importlib.import_module("sentence_transformers.models")


def _changed(inner: Any, wish: Encoder) -> None:
    """Other dropout, fewer layers, or the same shape with random weights."""
    from transformers import AutoModel

    if not (wish.random or wish.layers) and wish.dropout < 0:
        return
    config, trained = copy.deepcopy(inner.auto_model.config), inner.auto_model.state_dict()
    if not wish.random and wish.layers > config.num_hidden_layers:
        raise UsageError(f"[encoder] layers = {wish.layers}, but the trained model has {config.num_hidden_layers}; random = true "
                         "makes as many as are asked for")
    for key in DROPOUTS if wish.dropout >= 0 else ():
        if hasattr(config, key):
            setattr(config, key, wish.dropout)
    config.num_hidden_layers = wish.layers or config.num_hidden_layers
    inner.model = AutoModel.from_config(config)
    if not wish.random:
        wanted = inner.model.state_dict()
        inner.model.load_state_dict({n: t for n, t in trained.items() if n in wanted})
