"""Static embeddings: one vector per token, a text is the mean of its tokens' vectors. About fifty times faster than the model
they come from on a CPU, and weaker: good for a first ranking, with the model itself to re-rank.

`distil` makes such a table from a sentence-transformers model on the spot, as Model2Vec does (Tulkens and van Dongen 2024): each
token alone goes through the model, the vectors are reduced by principal components and weighted by smooth inverse frequency
(Arora, Liang and Ma, ICLR 2017) with Zipf's law for the frequencies, since a vocabulary is ordered by frequency. Files are those
of the package model2vec (config.json, model.safetensors, tokenizer.json); no code, no pickle."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from ralm import progress
from ralm.errors import UsageError, need

DIM, SIF, TOKENS = 256, 1e-4, 1024  # width, Arora's a (Model2Vec's default), tokens a forward


class Static:
    """Encoder over a table of token vectors. Unknown tokens are left out: a text of nothing else has the zero vector."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder = name, Path(folder)

    @cached_property
    def _model(self):
        model2vec = need("model2vec", "a static encoder", "lm")
        from safetensors import SafetensorError

        try:
            model = model2vec.StaticModel.from_pretrained(self.folder, max_length=None, force_download=False)
        except (OSError, ValueError, KeyError, SafetensorError) as e:
            raise UsageError(f"'{self.folder}' is no readable model2vec folder ({e}); it needs config.json, model.safetensors and "
                             "tokenizer.json") from e
        except Exception as e:  # the package tokenizers raises bare Exceptions
            if type(e) is not Exception:
                raise
            raise UsageError(f"the tokenizer of '{self.folder}' cannot be read ({e}); give a model2vec folder") from e
        return model

    @cached_property
    def _stored(self) -> np.ndarray:
        """The table as stored; the model computes with float32 from here on."""
        model = self._model
        table = model.embedding
        model.embedding = table.astype(np.float32)
        return table

    @property
    def dim(self) -> int:
        return int(self._stored.shape[1])

    @cached_property
    def fingerprint(self) -> str:
        """Of the vectors, their weights and the tokenizer, wherever they lie."""
        digest, table = hashlib.sha256(), self._stored
        for array in (table, self._model.weights, self._model.token_mapping):
            if array is not None:
                digest.update(f"{array.dtype}{array.shape}".encode())
                digest.update(np.ascontiguousarray(array).tobytes())
        digest.update(self._model.tokenizer.to_str().encode())
        return digest.hexdigest()[:32]

    def encode(self, texts: Sequence[str], role: str = "passage", batch: int = 256) -> np.ndarray:
        """float32 [N, D], L2-normalised; zero rows for texts without a known token. Texts are not cut, `role` is ignored.

        A text's vector does not depend, to the last bit, on the texts beside it, so that an index that grew equals one built
        at once; the package's own mean adds in an order that depends on the batch."""
        self._stored  # noqa: B018  (float32 from here on)
        out_ND = np.zeros((len(texts), self.dim), np.float32)
        for first in range(0, len(texts), batch):
            out_ND[first:first + batch] = self._means(list(texts[first:first + batch]))
        return unit(out_ND)

    def _means(self, texts: list[str]) -> np.ndarray:
        """The mean of each text's (weighted) token vectors [N, D], zero where there is no token."""
        ids = self._model.tokenize(texts)
        counts = np.array([len(i) for i in ids])
        flat_T = np.fromiter((t for i in ids for t in i), np.int64, counts.sum())
        mapping, weights = self._model.token_mapping, self._model.weights
        rows_TD = self._model.embedding[flat_T if mapping is None else mapping[flat_T]]
        if weights is not None:
            rows_TD = rows_TD * weights[flat_T].astype(np.float32)[:, None]
        out_ND, known = np.zeros((len(texts), self.dim), np.float32), counts > 0
        if known.any():
            starts = np.concatenate([[0], counts[known].cumsum()[:-1]])
            out_ND[known] = np.add.reduceat(rows_TD, starts, axis=0) / counts[known, None].astype(np.float32)
        return out_ND

    def save(self, folder: Path) -> None:
        """The three files, from which `Static(name, folder)` is the same encoder."""
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        arrays = {"embeddings": self._stored, "weights": self._model.weights, "mapping": self._model.token_mapping}
        folder.mkdir(parents=True, exist_ok=True)
        try:
            save_file({k: np.ascontiguousarray(v) for k, v in arrays.items() if v is not None}, folder / "model.safetensors")
        except SafetensorError as e:  # a full disk
            raise OSError(f"cannot write {folder / 'model.safetensors'}: {' '.join(str(e).split())[:120]}") from e
        self._model.tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
        config = {"model_type": "model2vec", "normalize": False, "hidden_dim": self.dim, "ralm_name": self.name}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def unit(x_ND: np.ndarray) -> np.ndarray:
    """Rows of length one in float32; zero rows stay zero."""
    x_ND = np.ascontiguousarray(x_ND, np.float32)
    length = np.sqrt(np.einsum("nd,nd->n", x_ND, x_ND))[:, None]
    return np.divide(x_ND, length, out=np.zeros_like(x_ND), where=length > 0)


def distil(transformer, folder: Path, dim: int = DIM, sif: float = SIF) -> None:
    """Write a model2vec folder made from a loaded SentenceTransformer whose tokenizer is a transformers fast tokenizer."""
    from safetensors.numpy import save_file

    tokenizer = transformer.tokenizer
    vectors_VD = _token_vectors(transformer)
    centred = (vectors_VD - vectors_VD.mean(0)).astype(np.float64)
    _, axes = np.linalg.eigh(centred.T @ centred)
    dim = min(dim, centred.shape[1])
    table = centred @ axes[:, ::-1][:, :dim]
    share = 1 / np.arange(2, len(table) + 2)
    table *= (sif / (sif + share / share.sum()))[:, None]
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"embeddings": table.astype(np.float16)}, folder / "model.safetensors")
    backend = tokenizer.backend_tokenizer.from_str(tokenizer.backend_tokenizer.to_str())  # a copy: the model keeps its own
    backend.no_padding()
    backend.no_truncation()
    backend.save(str(folder / "tokenizer.json"), pretty=False)
    config = {"model_type": "model2vec", "normalize": False, "hidden_dim": dim, "sif": sif}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _token_vectors(transformer) -> np.ndarray:
    """float32 [V, D]: for every token of the vocabulary, the mean of the model's last states for that token alone."""
    import torch

    tokenizer, model = transformer.tokenizer, transformer[0].auto_model
    size = len(tokenizer)
    left, right = tokenizer.cls_token_id, tokenizer.sep_token_id
    rows = [[t for t in (left, i, right) if t is not None] for i in range(size)]
    out = []
    with torch.inference_mode(), progress.task("distil", total=size, unit="tokens") as advance:
        for first in range(0, size, TOKENS):
            ids_BT = torch.tensor(rows[first:first + TOKENS], device=model.device)
            out.append(model(input_ids=ids_BT).last_hidden_state.mean(1).float().cpu().numpy())
            advance(len(ids_BT))
    return np.concatenate(out)


def distilled(transformer, fingerprint: str) -> Path:
    """The folder of the table distilled from this model: made once, then kept in the user's cache ($XDG_CACHE_HOME or ~/.cache)."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ralm"
    folder = home / f"static-{fingerprint[:12]}-{DIM}"
    if (folder / "config.json").is_file():
        return folder
    try:
        home.mkdir(parents=True, exist_ok=True)
        making = Path(tempfile.mkdtemp(prefix="distil-", dir=home))
    except OSError:
        progress.note(f"{home} cannot be written, so the static table is made anew each time; set XDG_CACHE_HOME to keep it")
        folder = making = Path(tempfile.mkdtemp(prefix="ralm-static-"))
    distil(transformer(), making)
    if making != folder:
        try:
            making.rename(folder)
        except OSError:  # another process was faster, with the same table
            shutil.rmtree(making, ignore_errors=True)
    return folder
