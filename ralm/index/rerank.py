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
from ralm.index.sparse import leaves
from ralm.index.vectors import passages

REMEMBER = 100_000  # vectors of chunks


class Reranker(Protocol):
    """Scores of (query, chunk) pairs: for each query one float32 [n] for its n candidates, higher is better."""

    name: str

    def scores(self, queries: Sequence[str], ids: Sequence[np.ndarray], store) -> list[np.ndarray]: ...


def reranker(spec: str) -> Reranker:
    """The re-ranker a spec names. Raises UsageError for what is not there."""
    kind, _, name = spec.partition(":")
    if kind == "cross":
        if not name:
            raise UsageError("rerank=cross names no model: write cross:NAME, the folder or hub name of a CrossEncoder")
        return Cross(spec, name)
    model = encoder(spec)
    return _bi.setdefault(model.fingerprint, Bi(model))


class Bi:
    """Cosine under an encoder: a stronger one than found the candidates, without encoding the whole store."""

    def __init__(self, model: Encoder):
        self.model, self.name = model, model.name
        self._known: OrderedDict[tuple[str, int], np.ndarray] = OrderedDict()
        self._guard = threading.Lock()

    def scores(self, queries: Sequence[str], ids: Sequence[np.ndarray], store) -> list[np.ndarray]:
        q_QD = self.model.encode(list(queries), role="query").astype(np.float64)
        places = [(offset, part) for part, offset in leaves(store)]
        known = self._vectors(np.unique(np.concatenate(ids)), places, store)
        return [(np.stack([known[i] for i in row.tolist()]) * q).sum(1).astype(np.float32) for q, row in zip(q_QD, ids)]

    def _vectors(self, ids: np.ndarray, places: list, store) -> dict[int, np.ndarray]:
        """{chunk id: vector}, those not remembered encoded in one go. Remembered by the datastore's id and the id in it."""
        keys = {int(i): _key(int(i), places) for i in ids}
        with self._guard:
            out = {i: self._known[key] for i, key in keys.items() if key in self._known}
        missing = [i for i in keys if i not in out]
        if missing:
            chunks = store.chunks(missing)
            made = self.model.encode(passages([c.title for c in chunks], [c.text for c in chunks], True))
            out |= zip(missing, made)
        with self._guard:
            for i, key in keys.items():
                self._known[key] = out[i]
                self._known.move_to_end(key)
            while len(self._known) > REMEMBER:
                self._known.popitem(last=False)
        return out


_bi: dict[str, Bi] = {}  # one for each encoder and process: they remember


def _key(id: int, places: list) -> tuple[str, int]:
    offset, part = max((p for p in places if p[0] <= id), key=lambda p: p[0])
    return part.id, id - offset


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

    def scores(self, queries: Sequence[str], ids: Sequence[np.ndarray], store) -> list[np.ndarray]:
        wanted = np.unique(np.concatenate(ids))
        chunks = store.chunks(wanted.tolist())
        texts = dict(zip(wanted.tolist(), passages([c.title for c in chunks], [c.text for c in chunks], True)))
        pairs = [(query, texts[i]) for query, row in zip(queries, ids) for i in row.tolist()]
        with self._guard:
            found = np.asarray(self.model.predict(pairs, show_progress_bar=False, convert_to_numpy=True), np.float32).reshape(-1)
        return np.split(found, np.cumsum([len(row) for row in ids])[:-1])
