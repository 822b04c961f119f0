"""Perplexity and bits per byte of many documents under one system, with the convention that makes the figure comparable.

Every document is scored on its own: context never crosses from one to the next. Figures are micro averages, sums of nats over
sums of tokens, words or bytes; the sums are kept, so shards scored apart add up to the whole."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ralm import progress
from ralm.errors import RalmError, UsageError
from ralm.eval.files import Ledger
from ralm.eval.interval import interval
from ralm.eval.leakage import chunk_sums
from ralm.eval.qa import describe
from ralm.how.output import asking, innermost
from ralm.types import Document

if TYPE_CHECKING:
    from ralm.model import RALM
    from ralm.what.datastore import Datastore


@dataclass(frozen=True)
class Counts:
    """Sums over scored texts. `a + b` are the counts of both; every figure derives from them."""

    nats: float = 0.0
    tokens: int = 0
    words: int = 0  # separated by white space
    bytes: int = 0  # of UTF-8
    documents: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.nats + other.nats, self.tokens + other.tokens, self.words + other.words, self.bytes + other.bytes,
                      self.documents + other.documents)

    def nats_per_token(self) -> float:
        return self.nats / self.tokens if self.tokens else math.nan

    def ppl(self) -> float:
        """Perplexity per token: exp(nats per token). Comparable between systems with the same tokenizer only."""
        return _exp(self.nats_per_token())

    def word_ppl(self) -> float:
        """Perplexity per white-space separated word: exp(nats / words), whatever the tokenizer."""
        return _exp(self.nats / self.words) if self.words else math.nan

    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan

    def figures(self) -> dict[str, float]:
        return {"ppl": self.ppl(), "word_ppl": self.word_ppl(), "bits_per_byte": self.bits_per_byte(),
                "nats_per_token": self.nats_per_token()}


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def evaluate_perplexity(ralm: RALM, texts: Iterable[Document | str | tuple[str, str]], window: int | None = None,
                        stride: int | None = None, exclude_self: bool = True, ledger: str | Path | None = None,
                        m: int | None = None, own: Mapping[str, Sequence[str]] | None = None) -> dict[str, Any]:
    """Score documents (or texts, or pairs of id and text) one by one.

    window, stride: see `RALM.score`. exclude_self: what is scored must not be retrieved: documents of the datastore with the same
    id or the same text are excluded from every search of that document (own: which these are, where `own_documents` told it
    before). ledger: JSON lines, one per document; a file begun earlier is continued. m: rows hold the nats of every m tokens
    too, `chunk_nats`.

    Returns {"ppl", "word_ppl", "bits_per_byte", "nats_per_token", "tokens", "words", "bytes", "documents", "intervals",
    "excluded_documents", "retrievals", "passages_read", "passages_cut", "tokens_searched", "chunks_searched", "rows",
    "convention", "seconds"}; retrievals count those of passages, of neighbours of tokens, and of chunks. Raises UsageError without
    any text or for an id given twice; the error of a document that cannot be scored names it."""
    began = time.perf_counter()
    documents = _documents(texts)
    if own is None or not exclude_self:
        own = own_documents(ralm.store, documents) if exclude_self and ralm.store is not None and ralm.how.how != "none" else {}
    store = ralm.store
    attends = innermost(ralm.how).how == "intermediate"
    finder = ralm.retriever if ralm.how.how != "none" and not attends else None
    of = {"lm": describe(ralm.lm), "retriever": ralm.neighbours.retriever if attends else finder and describe(finder),
          "how": describe(ralm.how), "when": repr(ralm.when), "where": ralm.where, "window": window, "stride": stride,
          "exclude_self": exclude_self, "datastore": None if store is None else f"{store.id} version {store.version}"}
    if m is not None:
        of["chunk_nats"] = m
    if attends:
        of["neighbours"] = repr(ralm.neighbours)
    convention: dict[str, Any] = {}
    if ralm.tokens is not None and asking(ralm.how, "tokens") is not None:
        made = ("fingerprint", "key", "window", "stride", "project", "dtype", "metric")
        of["token_store"] = f"{ralm.tokens!r}, " + ", ".join(f"{name} {ralm.tokens.settings[name]}" for name in made)
    size = sum(len(d.text.encode("utf-8", "surrogatepass")) for d in documents)
    with Ledger(ledger, of) as book, progress.task("score", total=size, unit="B") as advance:
        for d in documents:
            digest = _digest(d.text)
            if (row := book.rows.get(d.id)) is None:
                book.add(row := _row(ralm, d, digest, window, stride, own.get(d.id, ()), m))
            elif row["sha256"] != digest:
                raise UsageError(f"{ledger} holds another text under the id '{d.id}'; write to another file, or delete it")
            convention = row["convention"]
            advance(row["bytes"])
        rows = [book.rows[d.id] for d in documents]
    total = sum((counts(row) for row in rows), Counts())
    low, high = interval([r["nats"] for r in rows], [r["tokens"] for r in rows])
    return total.figures() | asdict(total) | {
        "intervals": {"nats_per_token": (low, high), "ppl": (_exp(low), _exp(high))},
        "excluded_documents": sum(len(r["excluded"]) for r in rows), "retrievals": sum(r["retrievals"] for r in rows),
        **{key: sum(r.get(key, 0) for r in rows) for key in COUNTED},
        "rows": rows, "seconds": time.perf_counter() - began,
        "convention": convention | of | {
            "window": convention.get("window"), "stride": convention.get("stride"),
            "documents": "each on its own, no context across", "average": "micro: sum of nats over sum of tokens, words, bytes",
            "words": "separated by white space", "own_document": OWN if exclude_self else "may be retrieved",
            "interval": "95 % percentile bootstrap over documents, 1000 resamples"}}


# passages (or neighbours of chunks): distinct per document; cut: not all of their tokens fitted into their share. Tokens and chunks
# whose neighbours were looked for.
COUNTED = ("passages_read", "passages_cut", "tokens_searched", "chunks_searched")
OWN = "excluded from retrieval, as is every document with the same text"


def counts(row: Mapping[str, Any]) -> Counts:
    """The counts of one row of a ledger."""
    return Counts(row["nats"], row["tokens"], row["words"], row["bytes"], 1)


def _documents(texts: Iterable[Document | str | tuple[str, str]]) -> list[Document]:
    out, seen = [], set()
    for n, text in enumerate(texts, 1):
        if isinstance(text, str):
            text = Document(f"text {n}", text)
        elif not isinstance(text, Document):
            text = Document(*text)
        if text.id in seen:
            raise UsageError(f"the id '{text.id}' is given twice; ids must be unique")
        seen.add(text.id)
        out.append(text)
    if not out:
        raise UsageError("there is no text to score")
    return out


def own_documents(store: Datastore, documents: Sequence[Document]) -> dict[str, list[str]]:
    """Per document, the ids in the datastore that are itself: its own, and those of equal texts (surrounding space aside).

    One pass over the stored texts, since a copy may be there under any name."""
    by_text: dict[str, list[str]] = {}
    for d in documents:
        by_text.setdefault(_digest(d.text.strip()), []).append(d.id)
    own: dict[str, list[str]] = {d.id: [] for d in documents}
    with progress.task("look for the scored texts in the datastore", total=len(store), unit="documents") as advance:
        for stored in store.documents():
            same = by_text.get(_digest(stored.text.strip()), [])
            for name in same if stored.id in same or stored.id not in own else [*same, stored.id]:
                own[name].append(stored.id)
            advance(1)
    return own


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _row(ralm: RALM, d: Document, digest: str, window: int | None, stride: int | None, exclude: Sequence[str],
         m: int | None) -> dict[str, Any]:
    try:
        scored = ralm.score(d.text, window=window, stride=stride, exclude=exclude)
    except RalmError as e:
        e.args = (f"'{d.id}' cannot be scored: {e}",)
        raise
    except Exception as e:
        e.add_note(f"while scoring the document '{d.id}'")
        raise
    own = ("excluded", "token_seconds", *COUNTED)  # of this document, not of the evaluation
    convention = {key: value for key, value in scored.convention.items() if key not in own}
    return {"id": d.id, "sha256": digest, "nats": scored.nats, "tokens": len(scored.logp), "words": scored.words,
            "bytes": scored.bytes, "excluded": list(exclude),
            "retrievals": len(scored.evidence) + scored.convention.get("tokens_searched", 0),
            "convention": convention, "seconds": scored.seconds} | {key: scored.convention.get(key, 0) for key in COUNTED} | (
                {} if m is None else {"chunk_nats": chunk_sums(-scored.logp, m)})
