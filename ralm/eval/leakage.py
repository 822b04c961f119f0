"""How much of an evaluation text is in the datastore already, and what remains of a result without that part.

The text is cut into chunks C of at most m tokens. s is the longest contiguous run of tokens that C shares with one of its nearest
stored chunks [N, F]; r(C) = s / m. Then, as in section 2.6 of Borgeaud et al. 2022,

    bpb(alpha) = sum over r(C) <= alpha of nats(C)  /  (ln 2 . sum over r(C) <= alpha of bytes(C))

from alpha = 12.5 % (runs of at most 8 of 64 tokens) to 100 % (everything). A gain that is only there at 100 % is copying.

Arrays and sums; no model, no torch. Shapes: C chunks, M tokens of a chunk, K neighbours of each, R tokens of one, P pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ralm import progress
from ralm.errors import UsageError
from ralm.lm.pieces import spans
from ralm.types import Document

ALPHAS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
NEAREST = 10  # stored chunks each chunk is compared with
HALF = 0.5  # more than that in one run is called copied
BLOCK = 512  # pairs compared at once: the table's row stays in the cache
ASKED = 1024  # chunks searched for at once


# ---- tokens in common -----------------------------------------------------------------------------------------------


def longest_common(a_PM: np.ndarray, b_PR: np.ndarray, there_PR: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Of pairs of token rows: the length of the longest contiguous run both have, int64 [P], and which tokens of the first occur
    anywhere in the second, bool [P, M].

    -1 is no token, nor is what there_PR calls False. The table is filled for all pairs at once, a row a step, M steps in all:
    run[i, j] = run[i-1, j-1] + 1 where a_i = b_j, else 0."""
    a_PM = np.ascontiguousarray(a_PM, np.int32)
    b_PR = np.where((b_PR >= 0) & (True if there_PR is None else there_PR), b_PR, -2).astype(np.int32)
    (P, M), R = a_PM.shape, b_PR.shape[1]
    best_P, found_PM = np.zeros(P, np.int64), np.zeros((P, M), bool)
    for p in range(0, P, BLOCK):
        a, b = a_PM[p:p + BLOCK], b_PR[p:p + BLOCK]
        run = np.zeros((len(a), R + 1), np.int16)  # column 0: nothing stands before the first token
        most = np.zeros((len(a), R), np.int16)
        for i in range(M):
            same = b == a[:, i:i + 1]
            run[:, 1:] = (run[:, :-1] + 1) * same
            np.maximum(most, run[:, 1:], out=most)
            found_PM[p:p + BLOCK, i] = same.any(1)
        best_P[p:p + BLOCK] = most.max(1, initial=0)
    return best_P, found_PM


@dataclass(frozen=True)
class Overlap:
    """Of every chunk: s, the longest run it shares with a neighbour, int64 [C]; how many of its tokens occur in any neighbour [C];
    how many it has [C]. Their sums and shares are over chunks of m tokens."""

    run: np.ndarray
    common: np.ndarray
    tokens: np.ndarray
    m: int

    @property
    def ratio(self) -> np.ndarray:
        """r(C) = s / m, float64 [C]. A shorter last chunk cannot reach 1, as in the paper."""
        return self.run / self.m

    def statistics(self) -> dict[str, float]:
        """{"mean_run": r on average, "copied": the share of chunks with r above a half, "common_tokens": the share of all tokens
        that occur in a neighbour of their chunk, "chunks"}; nan of no chunks."""
        total = int(self.tokens.sum())
        return {"mean_run": float(self.ratio.mean()) if len(self.run) else math.nan,
                "copied": float((self.ratio > HALF).mean()) if len(self.run) else math.nan,
                "common_tokens": float(self.common.sum() / total) if total else math.nan, "chunks": len(self.run)}


def overlap(chunks: Sequence[Sequence[int]], near_CKR: np.ndarray, there_CKR: np.ndarray, m: int) -> Overlap:
    """Chunks of at most m tokens with their nearest stored ones, [N, F] each; there_CKR: which of their tokens are there."""
    C, K, R = near_CKR.shape
    if len(chunks) != C:
        raise UsageError(f"{len(chunks)} chunks have neighbours of {C}; each needs its own")
    rows_CM = np.full((C, m), -1, np.int32)
    for c, chunk in enumerate(chunks):
        if len(chunk) > m:
            raise UsageError(f"chunk {c} has {len(chunk)} tokens, more than m={m}; cut the text into chunks of {m}")
        rows_CM[c, :len(chunk)] = chunk
    run_P, found_PM = longest_common(np.repeat(rows_CM, K, 0), near_CKR.reshape(C * K, R), there_CKR.reshape(C * K, R))
    return Overlap(run_P.reshape(C, K).max(1, initial=0), found_PM.reshape(C, K, m).any(1).sum(1),
                   np.array([len(c) for c in chunks], np.int64), m)


# ---- what is left of a result -----------------------------------------------------------------------------------------


def filtered(nats_C: np.ndarray, bytes_C: np.ndarray, ratio_C: np.ndarray,
             alphas: Sequence[float] = ALPHAS) -> list[dict[str, float]]:
    """bpb(alpha): [{"alpha", "bits_per_byte", "bytes": their share of all, "chunks"}]; nan where no chunk is left."""
    nats_C, bytes_C, ratio_C = (np.asarray(x, np.float64) for x in (nats_C, bytes_C, ratio_C))
    if not len(nats_C) == len(bytes_C) == len(ratio_C):
        raise UsageError(f"nats of {len(nats_C)} chunks, bytes of {len(bytes_C)} and overlap of {len(ratio_C)} do not belong "
                         "together; cut the same text at the same m")
    out = []
    for alpha in alphas:
        kept = ratio_C <= alpha
        size = bytes_C[kept].sum()
        out.append({"alpha": alpha, "bits_per_byte": float(nats_C[kept].sum() / math.log(2) / size) if size else math.nan,
                    "bytes": float(size / bytes_C.sum()) if bytes_C.sum() else math.nan, "chunks": int(kept.sum())})
    return out


def chunk_sums(values_T: Sequence[float] | np.ndarray, m: int) -> list[float]:
    """Sums over each m of the values; the last over what is left."""
    values_T = np.asarray(values_T)
    return np.add.reduceat(values_T, np.arange(0, len(values_T), m)).tolist() if len(values_T) else []


def token_bytes(tokenizer: Any, text: str) -> tuple[list[int], np.ndarray]:
    """The tokens of a text and how many of its UTF-8 bytes each is, int64 [T]; they add up to the text's.

    Exact where pieces spell bytes (byte-level BPE), a character that is split over tokens too; that they do is checked on the text
    itself. Of other tokenizers, a character of several tokens counts as the first one's."""
    ids, raw = tokenizer.encode(text), text.encode("utf-8", "surrogatepass")
    pieces = _pieces(tokenizer, ids)
    if pieces is not None:
        alphabet = _alphabet()
        try:
            spelt = [bytes(alphabet[c] for c in piece) for piece in pieces]
        except KeyError:
            spelt = []
        if b"".join(spelt) == raw:
            return ids, np.array([len(s) for s in spelt], np.int64)
    _, _, ends = spans(tokenizer, text)
    before = np.cumsum([0] + [len(c.encode("utf-8", "surrogatepass")) for c in text])[np.concatenate([[0], ends])]
    return ids, np.diff(before).astype(np.int64)


def _pieces(tokenizer: Any, ids: Sequence[int]) -> list[str] | None:
    """How the vocabulary writes tokens; None of a tokenizer that does not tell."""
    inner = getattr(tokenizer, "inner", None)
    name = getattr(inner, "id_to_token", None) or getattr(inner, "convert_ids_to_tokens", None)
    if name is None:
        return None
    seen = {i: name(i) for i in set(ids)}
    return None if any(piece is None for piece in seen.values()) else [seen[i] for i in ids]


def _alphabet() -> dict[str, int]:
    """The character that byte-level BPE writes for each byte (Radford et al. 2019): itself where visible, else from 256 on."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in seen]
    return {chr(b): b for b in seen} | {chr(256 + n): b for n, b in enumerate(rest)}


# ---- with a datastore -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Leaks:
    """Evaluation texts beside what is stored, chunk by chunk, the chunks of all texts one behind the other."""

    overlap: Overlap
    bytes: np.ndarray  # int64 [C]

    def curve(self, nats_C: Sequence[float]) -> list[dict[str, float]]:
        """bpb(alpha) of what a system said of these chunks."""
        return filtered(np.asarray(nats_C), self.bytes, self.overlap.ratio)


def leaks(neighbours: Any, tokenizer: Any, documents: Sequence[Document], own: Mapping[str, Sequence[str]],
          where: str | None = None, k: int = NEAREST) -> Leaks:
    """Compare the chunks of documents with the k nearest stored under `where`. A chunk itself is searched for, not the one before.

    neighbours: a NeighbourStore; its m is that of the chunks, its tokenizer the one given. own: the documents of the datastore that
    are an evaluated one (perplexity.own_documents), which do not count."""
    m = neighbours.m
    chunks: list[list[int]] = []
    sizes: list[int] = []
    groups: dict[tuple[str, ...], list[int]] = {}  # what is excluded: which chunks
    for d in documents:
        ids, size_T = token_bytes(tokenizer, d.text)
        groups.setdefault(tuple(own.get(d.id, ())), []).extend(range(len(chunks), len(chunks) + -(-len(ids) // m)))
        chunks += [ids[i:i + m] for i in range(0, len(ids), m)]
        sizes += chunk_sums(size_T, m)
    run, common = np.zeros((2, len(chunks)), np.int64)
    with progress.task("compare with what is stored", len(chunks), "chunks") as advance:
        for exclude, at in groups.items():
            for part in (at[i:i + ASKED] for i in range(0, len(at), ASKED)):
                asked = [chunks[c] for c in part]
                hits = neighbours.search(asked, k, where=where, exclude=exclude)
                found = overlap(asked, *neighbours.gather(hits.ids), m)
                run[part], common[part] = found.run, found.common
                advance(len(part))
    return Leaks(Overlap(run, common, np.array([len(c) for c in chunks], np.int64), m), np.array(sizes, np.int64))
