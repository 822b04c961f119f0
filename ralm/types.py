"""The nouns everything else speaks in. Read this first, then model.py.

Shapes: B batch, T tokens, S tokens in a segment, V vocabulary, D width, Q queries, K hits, N rows.
Scores are "higher is better" everywhere; log-probabilities are natural logs and are called `logp`.

Reading order: types -> model -> when -> what/datastore -> index/sparse -> how/mixing -> how/input -> lm/gpt -> testing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from ralm.what.datastore import Datastore

Gives = Literal["text", "logits", "hidden", "neighbours", "spans"]


# ---- what is stored -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Document:
    """One source text, as the user knows it. `id` is unique in a datastore; `metadata` values are str, int, float, bool or None."""

    id: str
    text: str
    title: str = ""
    source: str = ""  # path or address the text was read from
    licence: str = ""
    date: str = ""  # ISO 8601; compares as text
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A retrievable span of a document. Invariant, tested: `text == document.text[start:end]` (character offsets)."""

    id: int  # stable for the datastore's whole life, never reused
    document: str
    start: int
    end: int
    text: str
    title: str = ""
    source: str = ""


@dataclass(frozen=True, slots=True)
class Hits:
    """Result of a search: chunk ids and scores, both [Q, K], scores descending, ties by ascending id, padded with (-1, -inf)."""

    ids: np.ndarray  # int64 [Q, K]
    scores: np.ndarray  # float32 [Q, K]

    @staticmethod
    def empty(queries: int, k: int) -> Hits:
        return Hits(np.full((queries, k), -1, np.int64), np.full((queries, k), -np.inf, np.float32))

    def row(self, q: int) -> Hits:
        """The hits of query q without padding, as Hits [1, K']."""
        keep = self.ids[q] >= 0
        return Hits(self.ids[q][keep][None], self.scores[q][keep][None])


# ---- what happens at run time -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Segment:
    """Predict tokens [start, stop) of a window, with evidence fetched at token `at` <= start (it saw only tokens before `at`).

    `at` is None where nothing has been retrieved yet: the plain language model speaks. All three count tokens from the
    beginning of the ids a fusion is given."""

    start: int
    stop: int
    at: int | None


@dataclass(frozen=True, slots=True)
class Evidence:
    """One retrieval: the unit of attribution. `at` counts the tokens (of prompt and text) that stood before it.

    kind says whose `ids` these are: "passages" are chunks of the datastore, "neighbours" those of a neighbour database (RETRO),
    found with the chunk of m tokens that ends at `at`; the query is its text."""

    at: int
    query: str
    ids: np.ndarray  # int64 [K], chunk ids, padding removed
    scores: np.ndarray  # float32 [K], the retriever's
    seconds: float
    weights: np.ndarray | None = None  # float32 [K], the fusion's normalised weights where it has some
    kind: Literal["passages", "neighbours"] = "passages"


@dataclass(frozen=True)
class Scored:
    """logp[t] = ln p(x_t | x_<t, D) in nats for every scored token, with the convention that makes the number comparable."""

    logp: np.ndarray  # float64 [T]
    tokens: np.ndarray  # int64 [T]
    bytes: int  # UTF-8 bytes of the scored text
    words: int  # whitespace-separated words of the scored text
    evidence: Sequence[Evidence]
    convention: Mapping[str, Any]
    seconds: float
    at: np.ndarray | None = None  # int64 [T]: Evidence.at of the evidence in force at each token, -1 where none
    under: np.ndarray | None = None  # int64 [T]: which of `evidence` that is, -1 where none

    @property
    def nats(self) -> float:
        return float(-self.logp.sum())

    def nats_per_token(self) -> float:
        return self.nats / max(1, len(self.logp))

    def ppl(self) -> float:
        """Perplexity per token: exp(mean nats)."""
        return math.exp(self.nats_per_token()) if len(self.logp) else math.nan

    def word_ppl(self) -> float:
        """Perplexity per whitespace-separated word, as In-Context RALM prints it."""
        return math.exp(self.nats / self.words) if self.words else math.nan

    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan


@dataclass(frozen=True, slots=True)
class Citation:
    """Characters [start, end) of a stored document that support an answer; `quote` is exactly that text."""

    document: str
    start: int
    end: int
    quote: str
    score: float
    title: str = ""
    source: str = ""
    chunk: int = -1


@dataclass(frozen=True, slots=True)
class Answer:
    answer: str  # "" when abstained
    abstained: bool
    citations: Sequence[Citation]
    evidence: Sequence[Citation]  # every passage that was read, in retrieval order
    seconds: float
    score: float = math.nan  # ln p of the answer where the model has one


@dataclass(frozen=True, slots=True)
class Retrieved:
    """Event: a retrieval was made (always before the tokens it influences). what: "passages" or "neighbours" (Evidence.kind)."""

    at: int
    query: str
    passages: Sequence[Citation]
    seconds: float
    what: str = "passages"
    kind: ClassVar[str] = "retrieved"


@dataclass(frozen=True, slots=True)
class Token:
    """Event: a piece of text. `logp` is ln p of the token under the whole system, nan where a server does not tell."""

    text: str
    id: int = -1
    logp: float = math.nan
    kind: ClassVar[str] = "token"


@dataclass(frozen=True, slots=True)
class Cited:
    """Event: the text just streamed cites `citation` (marker [number])."""

    number: int
    citation: Citation
    kind: ClassVar[str] = "cited"


@dataclass(frozen=True, slots=True)
class Done:
    """Event: the end, with everything once more."""

    text: str
    tokens: int
    reason: str  # "eos" | "length" | "stop"
    evidence: Sequence[Evidence]
    seconds: float
    kind: ClassVar[str] = "done"


Event = Retrieved | Token | Cited | Done


# ---- the contracts ------------------------------------------------------------------------------------------------------


class LMOut(NamedTuple):
    logits: torch.Tensor  # float [B, T', V]; T' = T, or the kept positions
    hidden: torch.Tensor | None  # final normed hidden state [B, T', D], None where the model does not give it
    past: Any  # opaque; pass to the next forward. Has .length (places), .crop(n) and .reorder(index_B)
    key: torch.Tensor | None = None  # the state asked for by `key` [B, T', D]


@runtime_checkable
class Tokenizer(Protocol):
    def encode(self, text: str) -> list[int]: ...  # no special tokens added
    def decode(self, ids: Sequence[int]) -> str: ...


@runtime_checkable
class LanguageModel(Protocol):
    """Anything that gives p(x_t | x_<t). What it cannot give is not in `gives`, and is refused before any work."""

    name: str
    tokenizer: Tokenizer
    window: int  # most tokens one forward may see, BOS included
    vocab: int
    bos: int  # the token that stands before the first one (models without a BOS use their end-of-text token)
    eos: int | None
    gives: frozenset[str]

    def forward(self, ids_BT: torch.Tensor, *, past: Any = None, mask: torch.Tensor | None = None,
                keep: int | torch.Tensor | None = None, neighbours: Any = None, key: str | None = None) -> LMOut:
        """Logits after each of ids_BT [B, T], given the `past` of earlier forwards.

        mask [B, past+T]: 1 real, 0 padding (either side); positions count real tokens only. keep: logits only for the
        last `keep` positions, or for the given positions (LongTensor). key: also the state that token stores keep (`ffn_in` or
        `hidden`, lm/keys.py), by models that give "hidden"; those have `keys(ids_BT, key)` too, which stops at that state."""
        ...


@runtime_checkable
class Retriever(Protocol):
    """Text in, chunks out. `where` is a filter on document metadata, `exclude` document ids that must not be found."""

    store: Datastore

    def search(self, queries: Sequence[str], k: int = 10, where: str | None = None,
               exclude: Sequence[str] = ()) -> Hits: ...


Fetch = "Callable[[Sequence[str], int, Segment], Hits]"


class Fusion(Protocol):
    """HOW evidence enters the model. One deep method, the rest are facts the engine plans with."""

    what: ClassVar[str]  # "chunks" | "tokens"
    how: ClassVar[str]  # "none" | "input" | "intermediate" | "output"
    needs: ClassVar[frozenset[str]]
    query_tokens: int  # how many tokens before `at` make the query

    def reserve(self, lm: LanguageModel) -> int:
        """How many tokens of the window evidence may take (the text's own window shrinks by it, so nothing ever overflows)."""
        ...

    def logprobs(self, lm: LanguageModel, ids_BT: torch.Tensor, segments: Sequence[Segment], fetch: Callable[..., Hits],
                 store: Datastore) -> Iterator[tuple[Segment, torch.Tensor]]:
        """Yield (segment, logp_BSV) in order: natural logs over the vocabulary for each position of each segment."""
        ...


class Schedule(Protocol):
    """WHEN to retrieve. `due` may look only at x_<t: t and last count tokens of context, confidence is the largest
    next-token probability under the evidence held now (None for schedules that are not adaptive)."""

    adaptive: ClassVar[bool]

    def due(self, t: int, last: int | None, confidence: float | None) -> bool: ...
