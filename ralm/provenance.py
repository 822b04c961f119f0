"""Provenance: which rows of the datastore moved which token, for every architecture.

Passages move the tokens while they are in force: what they moved (ln p of the system less ln p of the model alone) is shared among
them by their weights. Neighbours (kNN-LM) move one token each: those whose value is the token supply lam x weight of its
probability, the others take some away."""

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
                          convention=system.convention)
        return made if asking(ralm.how, "tokens") is None else _with_neighbours(made, ralm, run, system, most)


def _moved(ralm: RALM, system: Scored, alone: Scored) -> dict[str, float]:
    """Nats moved per document by passages."""
    moved: dict[str, float] = {}
    for e in system.evidence:
        gain = float((system.logp - alone.logp)[system.at == e.at].sum())
        weights = e.weights if e.weights is not None else np.full(len(e.ids), 1 / max(1, len(e.ids)))
        for chunk, w in zip(ralm.store.chunks(e.ids.tolist()) if len(e.ids) else (), weights):
            moved[chunk.document] = moved.get(chunk.document, 0.0) + gain * float(w)
    return moved


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
