"""What is wrong with a datastore, every byte of it read: the part of `ralm doctor STORE` that looks at documents and chunks."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np

from ralm import progress
from ralm.errors import StoreError
from ralm.types import Document
from ralm.what import filters, tables
from ralm.what.rows import key_of, row

SHOWN = 10  # findings of one kind that are told one by one
BATCH = 8192


def documents(store) -> Iterator[str]:
    """One line for each document or chunk of the opened version that is not what was added, with what to do about it."""
    view = store._view
    revs, keys, counts = view._rows
    order = view._by_rev[1]
    stored = view._take(view.documents, order.tolist(), ["sha256"]).column(0).to_pylist()
    ids, of = view._chunk
    spans = np.stack(view._span, 1) if len(ids) else np.zeros((0, 2), np.int64)
    first, stop = np.searchsorted(of, revs[order]), np.searchsorted(of, revs[order], side="right")
    if not (of[1:] >= of[:-1]).all():
        yield f"{store.path}/chunks.lance: its chunks are not in the order of their documents; {_copy(store)}"
        return
    with progress.task("read documents", total=len(store), unit="documents") as advance:
        for n, document in enumerate(view.read()):
            at = order[n]
            if row(document).sha256 != stored[n]:
                yield f"document '{document.id}' is not what was added (its content hash differs); {_again(store)}"
            if key_of(document.id) != int(keys[at]):
                yield f"document '{document.id}' cannot be looked up (its key differs); {_again(store)}"
            if stop[n] - first[n] != counts[at]:
                yield (f"document '{document.id}' has {stop[n] - first[n]} chunks, {counts[at]} were cut from it; {_again(store)}")
            yield from _spans(store, document, ids[first[n]:stop[n]], spans[first[n]:stop[n]])
            advance(1)


def versions(store) -> list[str]:
    """One line where a version that should be there has gone, or the log of the versions cannot be read."""
    try:
        store.history()
    except StoreError as e:
        return [str(e)]
    return []


def _spans(store, document: Document, ids: np.ndarray, spans: np.ndarray) -> Iterator[str]:
    """A chunk is characters start to end of its document, at least one, neither the first nor the last of them white space."""
    text = document.text
    bad = (spans[:, 0] >= spans[:, 1]) | (spans[:, 1] > len(text))
    for id, (start, end), wrong in zip(ids.tolist(), spans.tolist(), bad.tolist()):
        if wrong or text[start].isspace() or text[end - 1].isspace():
            yield (f"chunk {id} says it is characters {start} to {end} of document '{document.id}', which has {len(text)}; "
                   f"{_again(store)}")


def columns(store) -> Iterator[str]:
    """One line for each filter column that does not say what the documents' metadata say."""
    dataset = store._view.documents
    fields = [f for f in dataset.schema if f.name not in tables.DOCUMENTS.names]
    wrong: dict[str, int] = {}
    for batch in dataset.to_batches(columns=[f.name for f in fields] + ["metadata"], batch_size=BATCH) if fields else ():
        metadata = [json.loads(m) for m in batch.column("metadata").to_pylist()]
        for field in fields:
            said, held = batch.column(field.name), filters.values(field, metadata)[0]
            differ = sum(a != b for a, b in zip(said.to_pylist(), held.to_pylist()) if not (a != a and b != b))
            odd = said.null_count > held.null_count and differ == said.null_count - held.null_count  # written before the column was
            if differ and not odd:
                wrong[field.name] = wrong.get(field.name, 0) + differ
    for name, number in wrong.items():
        yield (f"filters by '{name}' miss or wrongly take {number:,} documents: its column does not hold their metadata; "
               f"{_again(store)}")


def some(findings: Iterator[str]) -> Iterator[str]:
    """The first of them, and how many more there are."""
    left = 0
    for n, finding in enumerate(findings):
        if n < SHOWN:
            yield finding
        else:
            left += 1
    if left:
        yield f"… and {left:,} more like these"


def _copy(store) -> str:
    return f"restore {store.path} from a copy, or build it again"


def _again(store) -> str:
    return f"restore {store.path} from a copy, or add the document again: ralm add {store.path} FILE"
