"""Re-ranking: score the best candidates of a retriever again, with the query and the text of the chunk at hand.

    minilm, static, st:NAME, m2v:NAME     cosine of query and "title\\ntext" under that encoder, encoded on the fly
    cross:NAME                            a cross-encoder (sentence-transformers), by folder or hub name: its score for the pair

Vectors of chunks are remembered by chunk id (a chunk's text never changes), scores of pairs are not."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from ralm.errors import UsageError, need
from ralm.index.encode import Encoder, encoder, model_folder
from ralm.index.vectors import passages

REMEMBER = 100_000  # vectors of chunks


class Reranker(Protocol):
    """Scores of (query, chunk) pairs: float32 [n] for n candidates, higher is better."""

    name: str

    def scores(self, query: str, ids: np.ndarray, store) -> np.ndarray: ...


def reranker(spec: str) -> Reranker:
    """The re-ranker a spec names. Raises UsageError for what is not there."""
    kind, _, name = spec.partition(":")
    if kind == "cross":
        if not name:
            raise UsageError("rerank=cross names no model: write cross:NAME, the folder or hub name of a CrossEncoder")
        return Cross(spec, name)
    return Bi(encoder(spec))


class Bi:
    """Cosine under an encoder: a stronger one than found the candidates, without encoding the whole store."""

    def __init__(self, model: Encoder):
        self.model, self.name = model, model.name
        self._known: OrderedDict[tuple[str, int], np.ndarray] = OrderedDict()
        self._guard = threading.Lock()

    def scores(self, query: str, ids: np.ndarray, store) -> np.ndarray:
        x_KD = self._vectors(ids, store)
        q_D = self.model.encode([query], role="query")[0]
        return (x_KD.astype(np.float64) * q_D).sum(1).astype(np.float32)

    def _vectors(self, ids: np.ndarray, store) -> np.ndarray:
        keys = [(store.id, int(i)) for i in ids]
        with self._guard:
            known = {key: self._known[key] for key in keys if key in self._known}
        missing = [key for key in keys if key not in known]
        if missing:
            chunks = store.chunks([i for _, i in missing])
            made = self.model.encode(passages([c.title for c in chunks], [c.text for c in chunks], True))
            known |= zip(missing, made)
        with self._guard:
            for key in keys:
                self._known[key] = known[key]
                self._known.move_to_end(key)
            while len(self._known) > REMEMBER:
                self._known.popitem(last=False)
        return np.stack([known[key] for key in keys])


class Cross:
    """A cross-encoder reads query and chunk together: the most exact and the slowest (a forward pass for every pair)."""

    def __init__(self, spec: str, name: str):
        self.name, self._guard = spec, threading.Lock()
        package = need("sentence_transformers", "re-ranking with a cross-encoder", "lm")
        folder = model_folder(name)
        try:
            self.model = package.CrossEncoder(str(folder), local_files_only=True, trust_remote_code=False,
                                              model_kwargs={"use_safetensors": True})
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as e:
            said = (str(e).strip().splitlines() or [type(e).__name__])[0][:160]
            raise UsageError(f"'{folder}' cannot be read as a cross-encoder ({said}); give a folder made by its save method") from e
        if self.model.num_labels != 1:
            raise UsageError(f"'{name}' gives {self.model.num_labels} scores for a pair, a re-ranker gives one; use another model")

    def scores(self, query: str, ids: np.ndarray, store) -> np.ndarray:
        chunks = store.chunks(ids.tolist())
        texts: Sequence[str] = passages([c.title for c in chunks], [c.text for c in chunks], True)
        with self._guard:
            found = self.model.predict([(query, t) for t in texts], show_progress_bar=False, convert_to_numpy=True)
        return np.asarray(found, np.float32).reshape(-1)
