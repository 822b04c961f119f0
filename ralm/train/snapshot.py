"""A retriever's index during training: the vectors of all passages by the encoder as it was at some step.

The index only proposes candidates; their scores are computed again with the weights as they are. Its age, and how much of what
it proposes a fresh one would propose, are logged. On disk it says which passages and which weights it is of; another is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ralm import progress
from ralm.errors import FingerprintError
from ralm.train.encoder import Trainable
from ralm.what.datastore import Datastore


class Passages:
    """The passages of a datastore in memory: chunk ids, documents, texts as they are encoded."""

    def __init__(self, store: Datastore):
        self.store = store
        ids, self.texts = [], []
        for ids_N, titles, texts in store.texts():
            alive = store.allow()[ids_N]
            ids += ids_N[alive].tolist()
            self.texts += [f"{a}\n{b}" if a else b for a, b, there in zip(titles, texts, alive) if there]
        self.ids, self.documents = np.array(ids), np.array(store.document_ids(ids))
        self.rows: dict[str, np.ndarray] = {}  # of a document

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.texts).encode()).hexdigest()[:32]

    def of(self, document: str) -> np.ndarray:
        if document not in self.rows:
            self.rows[document] = np.flatnonzero(self.documents == document)
        return self.rows[document]


class Snapshot:
    """Vectors [N, D] of passages, made at `step` by the encoder whose weights have this hash."""

    def __init__(self, passages: Passages, vectors_ND: Tensor, step: int, weights: str):
        self.passages, self.vectors_ND, self.step, self.weights = passages, vectors_ND, step, weights

    @staticmethod
    def of(encoder: Trainable, passages: Passages, step: int) -> Snapshot:
        with progress.task(f"index of step {step}", total=len(passages), unit="passages") as advance:
            vectors = encoder.many(passages.texts, "passage", advance)
        return Snapshot(passages, torch.from_numpy(vectors).to(encoder.model.device), step, weights_of(encoder))

    def top(self, q_BD: Tensor, k: int, exclude: Sequence[Sequence[str]] = ()) -> np.ndarray:
        """Rows of the k passages of largest inner product, int64 [B, k], best first, without those of the documents excluded; -1
        where there are fewer."""
        with torch.no_grad():
            s_BN = (q_BD.detach().to(self.vectors_ND.device) @ self.vectors_ND.T).float().cpu().numpy()
        for s_N, documents in zip(s_BN, exclude):
            for d in documents:
                s_N[self.passages.of(d)] = -np.inf
        top = best(s_BN, k)
        there = np.isfinite(np.take_along_axis(s_BN, top, 1))
        out = np.full((len(q_BD), k), -1)
        out[:, :top.shape[1]] = np.where(there, top, -1)
        return out

    def overlap(self, other: Snapshot, q_BD: Tensor, k: int) -> float:
        """Share of its k candidates that the other one proposes too, mean over queries."""
        pairs = zip(self.top(q_BD, k).tolist(), other.top(q_BD, k).tolist())
        return float(np.mean([len(set(a) & set(b)) / k for a, b in pairs]))

    # ---- on disk

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file

        said = {"step": self.step, "weights": self.weights, "passages": self.passages.fingerprint}
        part = folder / "index.part"
        save_file({"vectors": self.vectors_ND.contiguous()}, part, metadata={k: str(v) for k, v in said.items()})
        part.replace(_file(folder, self.step))

    @staticmethod
    def load(folder: Path, passages: Passages, step: int, weights: str, device: torch.device) -> Snapshot:
        """The index of this step. Raises FingerprintError where it is not there, or of other passages or weights."""
        from safetensors import SafetensorError, safe_open

        path = _file(folder, step)
        try:
            with safe_open(path, "pt") as f:
                said, vectors = f.metadata() or {}, f.get_tensor("vectors")
        except (OSError, SafetensorError) as e:
            raise FingerprintError(f"{path}, the index this run goes on with, cannot be read ({e}); begin anew") from e
        wanted = {"step": str(step), "weights": weights, "passages": passages.fingerprint}
        for key, value in wanted.items():
            if said.get(key) != value:
                raise FingerprintError(f"{path} is the index of other {key} ({said.get(key)}, this run's is {value}); begin anew")
        return Snapshot(passages, vectors.to(device), step, weights)


def best(s_BN: np.ndarray, k: int) -> np.ndarray:
    """Columns of the k largest of each row, best first, equal ones by number; int64 [B, min(k, N)]."""
    k = min(k, s_BN.shape[1])
    some = np.sort(np.argpartition(-s_BN, k - 1, axis=1)[:, :k], axis=1)
    order = np.argsort(-np.take_along_axis(s_BN, some, 1), axis=1, kind="stable")
    return np.take_along_axis(some, order, 1)


def prune(folder: Path, before: int) -> None:
    """Delete indexes of steps before this one."""
    for path in folder.glob("index-*.safetensors"):
        if int(path.stem.partition("-")[2]) < before:
            path.unlink()


def _file(folder: Path, step: int) -> Path:
    return folder / f"index-{step}.safetensors"


def weights_of(encoder: Any) -> str:
    """A hash of an encoder's weights."""
    digest = hashlib.sha256()
    for name, p in encoder.model.state_dict().items():
        digest.update(name.encode())
        digest.update(p.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
