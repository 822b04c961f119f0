"""How the chunks of a neighbour database are made: every document as packed tokens, cut into pieces of m (Borgeaud et al. 2022,
section 2.3), committed part by part. token_chunks.py reads them.

    neighbours/NAME/chunks/
      manifest.json          settings: lm (whose tokenizer), fingerprint, vocab, m; parts cover document revisions [first, stop)
      PART/tokens.npy        uint16 or uint32 [T]: the tokens of all documents, one after the other
      PART/ends.npy          uint32 [C]: the character of its document at which each chunk ends (and the next begins)
      PART/documents.npy     int64 [D, 3]: revision, number of its first chunk, its first token (counted in the part)
    neighbours/NAME/index/   the indexes over the chunks, as those of a datastore (ralm.index)

No chunk crosses a document: the last one of a document has what is left, 1 to m tokens. A chunk keeps its number for good; those of
dropped documents are not given again. A chunk costs 2 m (or 4 m) + 4 bytes, a document 24."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ralm import progress
from ralm.errors import FingerprintError, StoreError, UsageError
from ralm.index import manifest
from ralm.index.suffix_parts import tokenizer_fingerprint, vocabulary
from ralm.lm.pieces import spans
from ralm.registry import whole

KIND = "neighbours"
M = 64  # tokens of a chunk where nothing else is said
SECONDS, TOKENS = 30.0, 8_000_000  # a part is committed after so long or so many tokens: what a kill can cost
LARGEST = 2_000_000  # chunks; parts above it are not merged any further


def folder_of(store, name: str = "") -> Path:
    """neighbours/NAME of a datastore. Raises UsageError for a name that is no folder name."""
    name = str(name or "default")
    if not name.replace("-", "").replace("_", "").isalnum():
        raise UsageError(f"name = '{name}': letters, digits, - and _ only")
    return Path(store.path) / "neighbours" / name


def chunks_of(store, name: str = "") -> Path:
    """The folder of the packed tokens; the indexes over them stand beside it."""
    return folder_of(store, name) / "chunks"


def tokenizer_of(lm: Any) -> Any:
    """The tokenizer of a model, or the one that is given itself."""
    return getattr(lm, "tokenizer", lm)


def token_type(vocab: int) -> type:
    """The smallest unsigned integers that hold every token id."""
    return np.uint16 if vocab <= 1 << 16 else np.uint32


# ---- what it was made from --------------------------------------------------------------------------------------------


def ready(store, name: str, lm: Any = None, m: int | None = None, as_it_is: bool = False) -> manifest.Manifest:
    """The manifest of chunks that cover every document this version of the store may see; what is missing is made, unless it is to
    be taken as it is.

    Raises StoreError where there is none and no tokenizer to make one, FingerprintError where it was made otherwise."""
    folder = chunks_of(store, name)
    if m is not None:
        whole(1, m=m)
    found = manifest.load(folder)
    if found is not None:
        check(store, folder, found, lm, m)
        if as_it_is or found.stop >= store.revision_rows:
            return found
    elif lm is None:
        raise lacking(store, folder)
    if lm is None:
        raise StoreError(f"{folder} covers {found.stop} of {store.revision_rows} document revisions, and no model is given to "
                         f"go on with: {manifest.command(folder)}")
    try:
        with store.lock():
            return _extend(store, folder, lm, m)
    except OSError as e:
        raise StoreError(f"{folder} covers {found.stop if found else 0} of {store.revision_rows} document revisions and cannot be "
                         f"extended ({e}); make it where the datastore can be written: {manifest.command(folder)}") from e


def lacking(store, folder: Path) -> StoreError:
    return StoreError(f"{store.path} has no neighbour database '{folder.parent.name}': make it with {manifest.command(folder)}")


def settled(lm: Any, m: int | None) -> dict[str, Any]:
    """The settings of new chunks; m: by default that of the model, where it has one."""
    tokenizer = tokenizer_of(lm)
    return {"m": m or getattr(lm, "m", None) or M, "lm": getattr(lm, "name", type(tokenizer).__name__),
            "fingerprint": tokenizer_fingerprint(tokenizer), "vocab": vocabulary(tokenizer)}


def check(store, folder: Path, now: manifest.Manifest, lm: Any, m: int | None) -> None:
    """Raise FingerprintError unless these chunks are of that datastore, tokenizer and m."""
    if (now.kind, now.store) != (KIND, store.id):
        raise FingerprintError(f"{folder} was made from datastore {now.store}, this one is {store.id}; {manifest.remedy(folder)}")
    theirs, other = now.settings, f"make another beside it ({manifest.command(folder, name='OTHER')})"
    asked = m or getattr(lm, "m", None)
    if asked is not None and asked != theirs["m"]:
        who = "chunks" if m is not None else f"chunks for '{lm.name}'"
        raise FingerprintError(f"{folder} holds chunks of m = {theirs['m']} tokens, {who} of m = {asked} are asked for: use m = "
                               f"{theirs['m']}, or {other} with --m {asked}")
    if lm is not None:
        ours = settled(lm, m)
        for key in ("fingerprint", "vocab"):
            if ours[key] != theirs[key]:
                raise FingerprintError(f"{folder} was made with the tokenizer of {theirs['lm']} ({key} {theirs[key]}), that of "
                                       f"{ours['lm']} has {ours[key]}: use a model with the first, or {other}")


# ---- growing ----------------------------------------------------------------------------------------------------------


def _extend(store, folder: Path, lm: Any, m: int | None) -> manifest.Manifest:
    """Under the lock: tokenise the documents that are not covered yet."""
    now = manifest.load(folder)
    if now is None:
        now = manifest.Manifest(KIND, settled(lm, m), store.id, store.split, facts={"next": 0})
        manifest.commit(folder, now)
    else:
        check(store, folder, now, lm, m)
    writer, since, tokenizer = None, time.monotonic(), tokenizer_of(lm)
    with progress.task(f"chunks ({now.settings['lm']})", total=store.characters(now.stop), unit="characters") as advance:
        for rev, source in store.states(now.stop):
            writer = writer or Writer(now)
            writer.add(rev, source, tokenizer)
            advance(len(source.text))
            if writer.tokens >= TOKENS or time.monotonic() - since > SECONDS:
                now, writer, since = _append(folder, now, writer, rev + 1), None, time.monotonic()
    if writer is not None:
        now = _append(folder, now, writer, store.revision_rows)
    if now.stop < store.revision_rows:  # the last revisions are gone
        now = _commit(folder, now, now.parts + (_none(now.stop, store.revision_rows),))
    return now


class Writer:
    """Collects the chunks of some documents."""

    def __init__(self, now: manifest.Manifest):
        self.settings, self.next, self.tokens = now.settings, now.facts["next"], 0
        self.held: list[np.ndarray] = []
        self.ends: list[np.ndarray] = []
        self.documents: list[tuple[int, int, int]] = []

    def add(self, rev: int, source: Any, tokenizer: Any) -> None:
        """Cut one document. Raises UsageError for a tokenizer that gives what its vocabulary does not hold."""
        m, vocab = self.settings["m"], self.settings["vocab"]
        ids, _, ends = spans(tokenizer, source.text)
        ids = np.asarray(ids, np.int64)
        if len(ids) and not 0 <= ids.min() <= ids.max() < vocab:
            raise UsageError(f"the tokenizer of {self.settings['lm']} gave token {ids.max()} for document '{source.id}', its "
                             f"vocabulary ends at {vocab - 1}; use another tokenizer")
        last = np.minimum(np.arange(m, len(ids) + m, m), len(ids)) - 1  # of each chunk
        self.documents.append((rev, self.next, self.tokens))
        self.held.append(ids.astype(token_type(vocab)))
        self.ends.append(np.asarray(ends, np.int64)[last].astype(np.uint32))
        self.next += len(last)
        self.tokens += len(ids)


def _append(folder: Path, now: manifest.Manifest, writer: Writer, stop: int) -> manifest.Manifest:
    """Commit one more part, merged with its left neighbours while they are not twice as large: a chunk is copied log2(N) times."""
    part = _write(folder, now.stop, stop, writer.held, writer.ends, np.array(writer.documents, np.int64).reshape(-1, 3))
    old, tail = list(now.parts), [part]
    while old and old[-1].rows < 2 * sum(p.rows for p in tail) and old[-1].rows < LARGEST:
        tail.insert(0, old.pop())
    if len(tail) > 1:
        tail = [merge(folder, tail, now.settings["m"])]
    return _commit(folder, now, (*old, *tail), writer.next)


def _commit(folder: Path, now: manifest.Manifest, parts: Sequence[manifest.Part], chunks: int | None = None) -> manifest.Manifest:
    """With these parts; chunks: how many numbers have been given, where it has changed."""
    facts = now.facts if chunks is None else dict(now.facts) | {"next": chunks}
    now = replace(now, parts=tuple(parts), facts=facts)
    manifest.commit(folder, now)
    return now


def _none(first: int, stop: int) -> manifest.Part:
    return manifest.Part(f"none-{first}-{stop}", first, stop, 0, {})


def _write(folder: Path, first: int, stop: int, tokens: Sequence[np.ndarray], ends: Sequence[np.ndarray],
           documents: np.ndarray) -> manifest.Part:
    """One sealed part. Documents without a token are kept: they are covered, and have no chunks."""
    if not len(documents):
        return _none(first, stop)
    path = manifest.new_part(folder)
    out = manifest.room(path / "tokens.npy", tokens[0].dtype, (sum(map(len, tokens)),))
    np.concatenate(tokens, out=out)
    out.flush()
    del out
    np.save(path / "ends.npy", np.concatenate(ends), allow_pickle=False)
    np.save(path / "documents.npy", documents, allow_pickle=False)
    return manifest.seal(path, first, stop, sum(map(len, ends)))


class Mapped(NamedTuple):
    """One part, memory-mapped."""

    tokens: np.ndarray  # uint16 or uint32 [T]
    ends: np.ndarray  # uint32 [C]
    documents: np.ndarray  # int64 [D, 3]


def mapped(folder: Path, part: manifest.Part) -> Mapped:
    """The arrays of a part that has files. Raises StoreError where they are not what was written."""
    out = []
    for name in Mapped._fields:
        try:
            out.append(np.lib.format.open_memmap(folder / part.name / f"{name}.npy", mode="r"))
        except ValueError as e:
            raise damaged(folder, f"{part.name}/{name}.npy is not what was written ({e})") from e
    found = Mapped(*out)
    if len(found.ends) != part.rows or found.documents.ndim != 2 or found.documents.shape[1] != 3:
        raise damaged(folder, f"{part.name}/ends.npy has {len(found.ends)} chunks, its manifest says {part.rows}")
    return found


def damaged(folder: Path, what: str) -> StoreError:
    return StoreError(f"{folder} is damaged: {what}; {manifest.remedy(folder)}")


def merge(folder: Path, parts: Sequence[manifest.Part], m: int, keep: Callable[[int], bool] | None = None) -> manifest.Part:
    """Consecutive parts as one; `keep(revision)` False leaves a document out."""
    tokens, ends, documents, at = [], [], [], 0
    for part in (p for p in parts if p.files):
        found = mapped(folder, part)
        token_at = np.append(found.documents[:, 2], len(found.tokens))
        chunk_at = np.concatenate([[0], np.cumsum(-(-np.diff(token_at) // m))])
        for i, (rev, first, _) in enumerate(found.documents.tolist()):
            if keep is None or keep(rev):
                tokens.append(found.tokens[token_at[i]:token_at[i + 1]])
                ends.append(found.ends[chunk_at[i]:chunk_at[i + 1]])
                documents.append((rev, first, at))
                at += len(tokens[-1])
    return _write(folder, parts[0].first, parts[-1].stop, tokens, ends, np.array(documents, np.int64).reshape(-1, 3))


def prefer(store, name: str, retriever: str) -> None:
    """What searches a neighbour database from now on, where nothing else is asked for."""
    folder = chunks_of(store, name)
    now = manifest.load(folder)
    if now.facts.get("retriever") != retriever:
        with store.lock():
            now = manifest.load(folder)
            manifest.commit(folder, replace(now, facts=dict(now.facts) | {"retriever": retriever}))


def compact(store, name: str) -> None:
    """Rewrite the parts that hold tokens of documents which are gone from the store. Chunks keep their numbers."""
    folder = chunks_of(store, name)
    with store.lock():
        now = manifest.load(folder)
        if now is None:
            return
        stored, parts = set(store.stored_revisions().tolist()), []
        for part in now.parts:
            if part.files and not set(mapped(folder, part).documents[:, 0].tolist()) <= stored:
                part = merge(folder, [part], now.settings["m"], stored.__contains__)
            parts.append(part)
        if tuple(parts) != now.parts:
            _commit(folder, now, parts)
