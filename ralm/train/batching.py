"""Text as one stream of tokens, cut into segments, and which segments stand in a batch together.

    text = Text.read(paths, tokenizer, end, folder)       # encoded once, kept in the run's folder
    segments = Segments(text, length=256)                 # rows [END, tokens] of one grid
    order = consecutive(len(segments), 8, seed, epoch)    # groups of neighbours in the text: long memory
    order = related(near, 8, seed, epoch)                 # groups of neighbours by BM25: external memory

A memory of the batch is worth what stands in it: segments drawn at random share little but function words. `related` chains each
segment to the best hit of BM25 that has not been taken (Zhong et al. 2022, section 4.3)."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ralm import progress
from ralm.errors import UsageError
from ralm.lm.keys import tokenizer_bytes
from ralm.train.gpt_data import documents, spaced

QUERY = 64  # rare terms of a segment that it is searched with: the others cost time and say little
BATCH = 256  # queries of one search
RUN = 8  # tokens: so many in a row twice are a copy


@dataclass(frozen=True)
class Text:
    """Documents as one row of ids, each followed by END. starts: where each begins, and the end."""

    ids: np.ndarray  # int32 [N]
    starts: np.ndarray  # int64 [documents + 1]

    @staticmethod
    def read(paths: Sequence[Path], tokenizer: Any, end: int, folder: Path, most: int = 0, form: str = "plain") -> Text:
        """Documents of .jsonl.zst files ({"text"}), at most `most` of each file (0: all), evenly spread. form: plain, or wikitext
        (spaces around punctuation, as WikiText is written). Kept in `folder` under a hash of all that decides it."""
        if form not in ("plain", "wikitext"):
            raise UsageError(f"form = '{form}' is plain or wikitext")
        decides = hashlib.sha256(json.dumps([[str(p), p.stat().st_size] for p in paths] + [end, most, form]).encode())
        decides.update(tokenizer_bytes(tokenizer))
        kept = folder / f"text-{decides.hexdigest()[:16]}.npz"
        if not kept.is_file():
            progress.note(f"encoding {', '.join(p.name for p in paths)}")
            parts = [np.array([*tokenizer.encode(text), end], np.int32) for text in _texts(paths, most, form)]
            part = kept.with_suffix(".part.npz")
            np.savez(part, ids=np.concatenate(parts), starts=np.cumsum([0, *map(len, parts)]), allow_pickle=False)
            part.replace(kept)
        with np.load(kept, allow_pickle=False) as z:
            return Text(z["ids"], z["starts"])


def _texts(paths: Sequence[Path], most: int, form: str) -> Iterable[str]:
    for path in paths:
        found = list(documents(path))
        if most and most < len(found):
            found = [found[i] for i in np.linspace(0, len(found) - 1, most).round().astype(int).tolist()]
        for title, text in found:
            yield spaced(title, text) if form == "wikitext" else text


class Segments:
    """The stream in pieces of `length` tokens, one after the other; what is left at the end is not used.

    copies: pieces of which a larger share of the runs of RUN tokens stood in the stream before are left out (1: none). A text that
    holds its own passages twice teaches a memory to copy, which pays on no other text."""

    def __init__(self, text: Text, length: int, end: int, copies: float = 1.0):
        self.length = length
        count = len(text.ids) // length
        self.tokens_NL = text.ids[:count * length].reshape(count, length)
        if copies < 1 and count:
            self.tokens_NL = self.tokens_NL[copied(text.ids)[:count * length].reshape(count, length).mean(1) <= copies]
        if len(self.tokens_NL) < 2:
            raise UsageError(f"{len(text.ids)} tokens make {len(self.tokens_NL)} segments of {length}; give more text, or shorter "
                             "segments")
        self.end = end

    def __len__(self) -> int:
        return len(self.tokens_NL)

    def rows(self, numbers: Sequence[int]) -> np.ndarray:
        """int64 [n, L + 1]: END, as a model reads it before a window, and the tokens."""
        some = self.tokens_NL[np.asarray(numbers)]
        return np.concatenate([np.full((len(some), 1), self.end), some], 1).astype(np.int64)


def copied(ids: np.ndarray) -> np.ndarray:
    """bool [N]: whether the run of RUN tokens that begins at each token stood before."""
    if len(ids) < RUN:
        return np.zeros(len(ids), bool)
    runs = np.lib.stride_tricks.sliding_window_view(ids.astype(np.int64), RUN)
    hashed = np.zeros(len(runs), np.uint64)
    for column in runs.T:
        hashed = hashed * np.uint64(0x9E3779B97F4A7C15) + column.astype(np.uint64) + np.uint64(1)
    out = np.ones(len(ids), bool)
    out[np.unique(hashed, return_index=True)[1]] = False
    out[len(runs):] = False
    return out


# ---- who stands with whom -----------------------------------------------------------------------------------------------


def scattered(count: int, size: int, seed: int, epoch: int) -> np.ndarray:
    """Segments in any order, in groups of `size` [groups, size]; what is left over waits for the next epoch."""
    order = np.random.default_rng([seed, epoch]).permutation(count)
    return order[:count // size * size].reshape(-1, size)


def consecutive(count: int, size: int, seed: int, epoch: int) -> np.ndarray:
    """Groups of segments that follow each other in the text; where they begin moves from epoch to epoch."""
    rng = np.random.default_rng([seed, epoch])
    first = int(rng.integers(0, count - count // size * size + 1)) if count % size else 0
    groups = np.arange(first, first + count // size * size).reshape(-1, size)
    return groups[rng.permutation(len(groups))]


def related(near_NK: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Groups of segments that are each other's neighbours: a chain through all segments, from each to its best neighbour that is
    not in the chain yet, or else to any that is not; cut into groups, which are then shuffled."""
    count = len(near_NK)
    rng = np.random.default_rng([seed, epoch])
    waiting = rng.permutation(count).tolist()
    free = np.ones(count, bool)
    chain: list[int] = []
    at = -1
    while len(chain) < count:
        good = [int(j) for j in near_NK[at] if j >= 0 and free[j]] if at >= 0 else []
        if good:
            at = good[0]
        else:
            while not free[waiting[-1]]:
                waiting.pop()
            at = waiting.pop()
        free[at] = False
        chain.append(at)
    groups = np.array(chain[:count // size * size]).reshape(-1, size)
    return groups[rng.permutation(len(groups))]


def neighbours(segments: Segments, tokenizer: Any, k: int, folder: Path) -> np.ndarray:
    """int32 [N, k]: for each segment the best others by our own BM25 over the segments' texts, -1 where there are fewer. A segment
    asks with its rarest words. Kept in `folder` under a hash of the segments."""
    decides = hashlib.sha256(segments.tokens_NL.tobytes() + f"{segments.length} {k} {QUERY}".encode())
    kept = folder / f"neighbours-{decides.hexdigest()[:16]}.npy"
    if kept.is_file():
        return np.load(kept, allow_pickle=False)
    progress.note(f"BM25 over {len(segments):,} segments")
    texts = [tokenizer.decode(row) for row in segments.tokens_NL.tolist()]
    near = _found(texts, rare_words(texts, QUERY), k)
    part = kept.with_name(kept.name + ".part")
    with part.open("wb") as f:
        np.save(f, near)
    part.replace(kept)
    return near


def rare_words(texts: Sequence[str], most: int) -> list[list[str]]:
    """Per text its `most` rarest words, rarest first, of those that stand in another text too."""
    words = [sorted(set(w for w in "".join(c if c.isalnum() else " " for c in t.lower()).split())) for t in texts]
    count: dict[str, int] = {}
    for some in words:
        for w in some:
            count[w] = count.get(w, 0) + 1
    return [sorted((w for w in some if count[w] > 1), key=lambda w: count[w])[:most] for some in words]


def _found(texts: Sequence[str], words: Sequence[Sequence[str]], k: int) -> np.ndarray:
    from ralm.index.sparse import BM25
    from ralm.types import Document
    from ralm.what.datastore import Datastore

    out = np.full((len(texts), k), -1, np.int32)
    with tempfile.TemporaryDirectory() as folder:
        store = Datastore.build(Path(folder) / "kb", (Document(str(i), t) for i, t in enumerate(texts) if t.strip()), split="none")
        index = BM25(store)
        with progress.task("search", total=len(texts), unit="segments") as advance:
            for at in range(0, len(texts), BATCH):
                ids = index.search([" ".join(w) for w in words[at:at + BATCH]], k=k + 1).ids
                names = np.full(ids.shape, -1, np.int64)
                names[ids >= 0] = [int(d) for d in store.document_ids(ids[ids >= 0].tolist())]
                for i, row in enumerate(names.tolist(), at):
                    others = [j for j in row if j not in (-1, i)][:k]
                    out[i, :len(others)] = others
                advance(len(ids))
    return out
