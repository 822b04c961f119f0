"""Provenance: which rows of the datastore moved which token, for every architecture.

Passages and the neighbours of chunks (RETRO) move the tokens while they are in force: what they moved (ln p of the system less ln p
of the model alone, L_OFF - L_ON) is shared among them by their weights, equally where they have none. What RETRO reads also acts on
later tokens, through the model's own attention: that is counted for what is in force there. Beside it stands what is certain, the
runs of tokens that a neighbour in force holds too (how/copied.py).

Neighbours of tokens (kNN-LM) move one token each: those whose value is the token supply lam x weight of its probability, the others
take some away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from ralm.how.output import asking, innermost
from ralm.lm.pieces import spans
from ralm.types import Evidence, Scored

if TYPE_CHECKING:
    from ralm.model import RALM
    from ralm.run import Run

LEFT = 12  # tokens shown before a neighbour's


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A token of the datastore whose context was like this one's. Its document has it at [start, start + len(target))."""

    document: str
    start: int  # character of the stored document's text
    left: str  # what stands before it there
    target: str  # the token; of one that is a part of a character, the character
    distance: float
    weight: float  # of all neighbours' softmax
    matches: bool  # whether the token is the one that was scored


@dataclass(frozen=True, slots=True)
class Copy:
    """The longest run of `tokens` tokens that ends with this one and stands in a neighbour in force: characters [start, end) of its
    document. A run may begin before the chunk whose neighbours these are, and in the prompt."""

    tokens: int
    document: str
    start: int
    end: int
    chunk: int  # the neighbour; the run may stand in what follows it


@dataclass(frozen=True)
class Provenance:
    """What retrieval changed. documents[id]: by passages, the nats they moved; by neighbours, the share of the text's tokens (each
    counts as one) whose probability they supplied."""

    tokens: list[str]
    logp_lm: np.ndarray  # float64 [T]
    logp: np.ndarray  # float64 [T]
    at: np.ndarray  # int64 [T]: position of the retrieval in force (as Evidence.at), -1 where none
    evidence: Sequence[Evidence]
    documents: dict[str, float]
    p_knn: np.ndarray | None = None  # float64 [T]: the neighbours' probability of the token, nan where none were looked for
    neighbours: list[list[Neighbour]] = field(default_factory=list)  # per token, the heaviest ones
    convention: Mapping[str, Any] = field(default_factory=dict)  # of the system's scoring (as Scored.convention)
    under: np.ndarray | None = None  # int64 [T]: which of `evidence` is in force (as Scored.under)
    copied: list[Copy | None] | None = None  # per token, where the system reads neighbours of chunks
    places: np.ndarray | None = None  # int64 [T]: of the stored token that each run ends with; the next one's is one more

    @staticmethod
    def of(ralm: RALM, text: str, most: int = 8, **settings: Any) -> Provenance:
        """Score with the system and with the model alone, and say what the difference is made of."""
        from ralm.model import _names

        run = ralm._run(text, settings.get("prompt", ""), settings.get("window"), settings.get("stride"),
                        _names(settings.get("exclude", ())), settings.get("query"))
        run.near = []
        system = ralm._score(run, text)
        room = system.convention["window"] - system.convention["evidence_tokens"]
        alone = replace(ralm, how="none", when="once").score(text, prompt=settings.get("prompt", ""), window=room,
                                                            stride=system.convention["stride"])
        pieces = _pieces(ralm.lm.tokenizer, text, system.tokens.tolist())
        made = Provenance(pieces, alone.logp, system.logp, system.at, system.evidence, _moved(ralm, system, alone),
                          convention=system.convention, under=system.under)
        if innermost(ralm.how).how == "intermediate":
            copied, places = _copies(ralm, run, system)
            made = replace(made, copied=copied, places=places)
        return made if asking(ralm.how, "tokens") is None else _with_neighbours(made, ralm, run, system, most)

    @property
    def gain(self) -> np.ndarray:
        """float64 [T]: nats that retrieval saved at each token."""
        return self.logp - self.logp_lm

    def copies(self, least: int = 2) -> list[tuple[int, Copy]]:
        """(last token, run) of the whole runs of at least so many tokens, in the order of the text; neighbours of several chunks
        may hold a part each. They overlap where different places hold the same tokens."""
        from ralm.how.copied import joined

        found, out = self.copied or [], []
        for first, stop, begin in joined(np.array([0 if c is None else c.tokens for c in found], np.int64), self.places, least):
            out.append((stop - 1, replace(found[stop - 1], tokens=stop - first, start=found[begin].start)))
        return out


def _moved(ralm: RALM, system: Scored, alone: Scored) -> dict[str, float]:
    """Nats moved per document by passages and by neighbours of chunks."""
    moved: dict[str, float] = {}
    for i, e in enumerate(system.evidence):
        gain = float((system.logp - alone.logp)[system.under == i].sum())
        weights = e.weights if e.weights is not None else np.full(len(e.ids), 1 / max(1, len(e.ids)))
        for chunk, w in zip(ralm.source(e).chunks(e.ids.tolist()) if len(e.ids) else (), weights):
            moved[chunk.document] = moved.get(chunk.document, 0.0) + gain * float(w)
    return dict(sorted(moved.items(), key=lambda pair: -pair[1]))


def _copies(ralm: RALM, run: Run, system: Scored) -> tuple[list[Copy | None], np.ndarray]:
    """Per token the longest run that ends with it and stands in a neighbour in force, and the place of its last token."""
    from ralm.how.copied import runs
    from ralm.when import window_of

    out: list[Copy | None] = [None] * len(system.tokens)
    places = np.full(len(system.tokens), -1, np.int64)
    ids, stored = np.array(run.ids), _Stored(ralm)
    for i in np.unique(system.under[system.under >= 0]).tolist():
        e, under = system.evidence[i], np.flatnonzero(system.under == i) + run.prompt
        if not len(e.ids):
            continue
        context = window_of(int(under[0]), run.size, run.stride)[0]
        found = runs(ids, int(under[0]), int(under[-1]) + 1, *ralm.neighbours.gather(e.ids), begin=context)
        for t, (n, neighbour, last) in zip(under.tolist(), zip(*(a.tolist() for a in found))):
            if n:
                out[t - run.prompt], places[t - run.prompt] = stored.copy(int(e.ids[neighbour]), last, n)
    return out, places


class _Stored:
    """Tokens of chunks as characters of their documents; a document is cut into tokens once, a chunk looked up once."""

    def __init__(self, ralm: RALM):
        self.neighbours, self.tokenizer = ralm.neighbours, ralm.lm.tokenizer
        self.seen: dict[tuple[int, str], tuple[np.ndarray, np.ndarray]] = {}
        self.chunks: dict[int, tuple[str, int, int, np.ndarray, np.ndarray]] = {}

    def copy(self, chunk: int, last: int, n: int) -> tuple[Copy, int]:
        """The n tokens up to the one at `last` of a chunk and what follows it, and the place of that one."""
        if chunk not in self.chunks:
            self.chunks[chunk] = self._of(chunk)
        name, number, first, starts, ends = self.chunks[chunk]
        token = first + last
        return Copy(n, name, int(starts[token - n + 1]), int(ends[token]), chunk), (number << 32) + token

    def _of(self, chunk: int) -> tuple[str, int, int, np.ndarray, np.ndarray]:
        """Document, its number, which of its tokens the chunk begins with, and where all its tokens start and end."""
        at = max(i for i, (_, offset) in enumerate(self.neighbours.leaves) if offset <= chunk)
        number, first = (int(x[0]) for x in self.neighbours.places(np.array([chunk])))
        (name,) = self.neighbours.documents([chunk])
        if (at, name) not in self.seen:
            leaf, _ = self.neighbours.leaves[at]
            self.seen[at, name] = spans(self.tokenizer, leaf.store.document(name).text)[1:]
        return name, number, first, *self.seen[at, name]


def _pieces(tokenizer: Any, text: str, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text; a character of several tokens is the first one's."""
    if not isinstance(text, str):
        return [tokenizer.decode([t]) for t in ids]
    _, _, ends = spans(tokenizer, text)
    return [text[a:b] for a, b in pairwise([0, *ends.tolist()])]


def _with_neighbours(made: Provenance, ralm: RALM, run: Any, system: Scored, most: int) -> Provenance:
    """The same with each token's neighbours, and documents by the probability they supplied."""
    how, T = asking(ralm.how, "tokens"), len(system.tokens)
    p_knn, shown = np.full(T, np.nan), [[] for _ in range(T)]
    supplied: list[tuple[np.ndarray, np.ndarray]] = []  # rows, and how much of a token each supplied
    for position, found, i in run.near or ():
        t = position - run.prompt
        one = found.take(slice(i, i + 1))
        rows, there = one.rows[0], one.rows[0] >= 0
        if not there.any():
            continue
        weights, lam = how.weights(one)[0].double().numpy(), float(how.lams(one)[0, 0])
        right = there & (one.values[0] == system.tokens[t])
        p_knn[t] = weights[right].sum()
        supplied.append((rows[right], lam * weights[right] / float(np.exp(system.logp[t]))))
        order = np.lexsort((rows, -weights))[:min(most, int(there.sum()))]
        shown[t] = [(int(rows[j]), float(one.distances[0, j]), float(weights[j]), bool(right[j])) for j in order.tolist()]
    resolve = _Places(ralm, [rows for rows, _ in supplied] + [np.array([s[0] for s in x], np.int64) for x in shown])
    documents = dict(made.documents) if innermost(how).how != "none" else {}
    for rows, shares in supplied:
        for row, share in zip(rows.tolist(), shares.tolist()):
            name = resolve.place[row].document
            documents[name] = documents.get(name, 0.0) + share
    return replace(made, p_knn=p_knn, neighbours=[[resolve.neighbour(*s) for s in x] for x in shown],
                   documents=dict(sorted(documents.items(), key=lambda pair: -pair[1])))


class _Places:
    """Rows of a token store as documents and characters: all rows are looked up at once, a document is cut into tokens once."""

    def __init__(self, ralm: RALM, rows: Sequence[np.ndarray]):
        self.tokens, self.tokenizer = ralm.tokens, ralm.lm.tokenizer
        each = np.unique(np.concatenate([np.zeros(0, np.int64), *rows]))
        self.place = dict(zip(each.tolist(), self.tokens.places(each)))
        self.seen: dict[tuple[str, int], tuple[str, np.ndarray, np.ndarray]] = {}  # text, where its tokens start and end

    def neighbour(self, row: int, distance: float, weight: float, matches: bool) -> Neighbour:
        place = self.place[row]
        key = str(place.store.path), place.revision
        if key not in self.seen:
            (source,) = place.store.state([place.revision]).values()
            self.seen[key] = source.text, *spans(self.tokenizer, source.text)[1:]
        text, starts, ends = self.seen[key]
        start, end = int(starts[place.position]), int(ends[place.position])
        return Neighbour(place.document, start, text[int(starts[max(0, place.position - LEFT)]):start], text[start:end], distance,
                         weight, matches)
