"""A Document as it is stored: text that can be encoded, metadata as JSON, a hash of its content."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ralm.errors import UsageError
from ralm.types import Document

FIELDS = ("title", "source", "licence", "date")


@dataclass(frozen=True, slots=True)
class Row:
    id: str
    text: str
    fields: tuple[str, ...]  # FIELDS
    metadata: Mapping[str, Any]
    json: str
    sha256: str


def clean(text: str) -> str:
    """Text as it can be stored: lone surrogates, which are no characters, become U+FFFD one for one, so offsets stay.

    Everything else stays as it is, NUL included."""
    if text.isascii():
        return text
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return re.sub("[\ud800-\udfff]", "\ufffd", text)


def id_of(id: str) -> str:
    """A document id as it is stored: lone surrogates (undecodable bytes of a file name) are written out, so ids stay distinct."""
    return id.encode("utf-8", "backslashreplace").decode("utf-8")


def key_of(id: str) -> int:
    """64 bits of a hash of the id: the look-up key of the documents table."""
    return int.from_bytes(hashlib.sha256(id_of(id).encode()).digest()[:8], "little")


def row(document: Document) -> Row:
    """Check and normalise one document. Raises UsageError naming the document and the field that is wrong."""
    if not isinstance(document, Document):
        raise UsageError(f"{str(document)[:60]!r} ({type(document).__name__}) is no Document; give Document(id, text, ...)")
    for name in ("id", "text", *FIELDS):
        value = getattr(document, name)
        if not isinstance(value, str):
            raise UsageError(f"document {document.id!r} has {name} = {value!r} ({type(value).__name__}), not text; convert it")
    if not document.id:
        raise UsageError(f"a document has an empty id (text begins {document.text[:40]!r}); give every document an id of its own")
    metadata = "{}" if document.metadata == {} else _json(document)
    fields = tuple(clean(getattr(document, name)) for name in FIELDS)
    text = clean(document.text)
    digest = hashlib.sha256()  # without the source: the same file reached by another path is the same document
    hashed = (value for name, value in zip(FIELDS, fields) if name != "source")
    kept = json.loads(metadata)
    for part in (text, *hashed, json.dumps(kept, sort_keys=True) if kept else metadata):
        raw = part.encode()
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
    return Row(id_of(document.id), text, fields, kept, metadata, digest.hexdigest())


def _json(document: Document) -> str:
    wrong = next((k for k in document.metadata if not isinstance(k, str)), None)
    if wrong is not None:
        raise UsageError(f"document '{document.id}' has the metadata key {wrong!r}, keys must be text; use '{wrong}'")
    try:
        return clean(json.dumps(dict(document.metadata), ensure_ascii=False))
    except (TypeError, ValueError) as e:
        raise UsageError(f"the metadata of document '{document.id}' cannot be stored ({e}); "
                         "use text, numbers, true/false or none") from e


def batches(documents: Iterable[Document], count: int, characters: int,
            repeated: Callable[[Row, Row], None] = lambda old, new: None) -> Iterator[list[Row]]:
    """Rows in groups of at most `count` documents or about `characters` of text. Of an id repeated in a group the last stays;
    `repeated` hears of every row that gives way to one with other content."""
    group: dict[str, Row] = {}
    size = 0
    for document in documents:
        r = row(document)
        old = group.pop(r.id, None)
        if old is not None and old.sha256 != r.sha256:
            repeated(old, r)
        group[r.id] = r
        size += len(r.text)
        if len(group) >= count or size >= characters:
            yield list(group.values())
            group, size = {}, 0
    if group:
        yield list(group.values())
