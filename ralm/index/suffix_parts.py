"""The tokens of a store's documents with their suffix arrays, as append-only parts on disk. suffix.py searches them.

    index/suffix/
      manifest.json          settings: tokenizer (its name), fingerprint, vocab, width; parts cover document revisions [first, stop)
      PART/tokens.npy        uint8 [N, width]: all documents in a row, each followed by a separator; the high byte first
      PART/documents.npy     uint32 [D, 2]: revision - first, and where the document begins in tokens
      PART/sa.npy            uint32 [N - D]: positions of all tokens but separators, in the order of what follows
      PART/heads.npy         uint32 [vocab + 1]: where in sa the suffixes begin that start with each token

A token of a vocabulary below 65,536 takes 2 + 4 bytes, of a larger one 3 + 4, and a document 10 or 11 bytes more. Tokens are
committed first, in parts without sa, so that a killed build does not tokenise again; they are then sorted together
(libdivsufsort, linearithmic). A part takes in its left neighbours while they are not twice as large, as in vectors.py."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ralm import progress
from ralm.errors import FingerprintError, StoreError, UsageError, need
from ralm.index import manifest
from ralm.index import suffix_kernels as kernels

KIND = "suffix"
SECONDS, TOKENS = 30.0, 8_000_000  # tokens are committed after so long or so many: what a kill can cost
LARGEST = 2**27  # tokens; sorting takes up to 16 bytes a token while it runs, and parts are not merged beyond this
BYTES = 2**31 - 1  # what libdivsufsort sorts with 4-byte positions


# ---- which tokenizer ------------------------------------------------------------------------------------------------


def tokenizer_fingerprint(tokenizer) -> str:
    """sha256 (hex) of how a tokenizer cuts text: for those of the `tokenizers` library (ralm's and transformers' fast ones) its
    model, added tokens, normalizer and pre-tokenizer; padding, truncation and special tokens around a text change nothing here.
    For others the class and its vocabulary. Raises UsageError for one that shows neither."""
    inner = getattr(tokenizer, "inner", tokenizer)
    backend = getattr(inner, "backend_tokenizer", inner)
    if hasattr(backend, "to_str"):
        whole = json.loads(backend.to_str())
        facts = {key: whole.get(key) for key in ("model", "added_tokens", "normalizer", "pre_tokenizer")}
    elif hasattr(inner, "get_vocab"):
        facts = {"class": type(inner).__name__, "vocab": inner.get_vocab()}
    else:
        raise UsageError(f"{type(tokenizer).__name__} shows no vocabulary, so an index made with it could not be told from one of "
                         "another; use a tokenizer of transformers or tokenizers")
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def vocabulary(tokenizer) -> int:
    """1 + the largest id a tokenizer gives."""
    inner = getattr(tokenizer, "inner", tokenizer)
    return 1 + max(inner.get_vocab().values(), default=-1)


@dataclass(frozen=True)
class Wish:
    """The tokenizer to be used, what its model is called, and the name of a second index beside the first: index/suffix-NAME."""

    tokenizer: object
    called: str = ""
    name: str = ""

    def folder(self, store) -> Path:
        return Path(store.path) / "index" / (f"suffix-{self.name}" if self.name else "suffix")

    def settings(self) -> dict:
        vocab = vocabulary(self.tokenizer)  # the separator is number `vocab`
        return {"tokenizer": self.called or type(self.tokenizer).__name__, "fingerprint": tokenizer_fingerprint(self.tokenizer),
                "vocab": vocab, "width": max(1, (vocab.bit_length() + 7) // 8)}


def check(folder: Path, now: manifest.Manifest, store, settings: dict) -> None:
    """Raise FingerprintError unless the index is of this store and of a tokenizer that cuts text the same way."""
    manifest.check(folder, now, store, KIND, {})
    for key in ("fingerprint", "vocab", "width"):
        if now.settings[key] != settings[key]:
            raise FingerprintError(
                f"{folder} was made with the tokenizer of {now.settings['tokenizer']} ({key} {now.settings[key]}), that of "
                f"{settings['tokenizer']} has {settings[key]}: use the first, keep both with a name for the second (name=…), or "
                f"delete {folder} and build it again")


def damaged(folder: Path, what: str) -> StoreError:
    return StoreError(f"{folder} is damaged: {what}; {manifest.remedy(folder)}")


# ---- growing --------------------------------------------------------------------------------------------------------


def ready(store, wish: Wish) -> manifest.Manifest:
    """The manifest of an index that covers every revision this version of the store may see, building what is missing.

    Raises FingerprintError where it was made otherwise, StoreError where documents are missing and it cannot be written."""
    folder, settings = wish.folder(store), wish.settings()
    found = manifest.load(folder)
    if found is not None:
        check(folder, found, store, settings)
        if found.stop >= store.revision_rows and not _unsorted(found):
            return found
    try:
        with store.lock():
            return _extend(store, folder, wish, settings)
    except (OSError, StoreError) as e:
        if isinstance(e, StoreError):
            raise
        raise StoreError(f"{folder} covers {found.stop if found else 0} of {store.revision_rows} document revisions and cannot be "
                         f"extended ({e}); build it where the datastore can be written") from e


def _unsorted(now: manifest.Manifest) -> list[manifest.Part]:
    return [p for p in now.parts if p.rows and "sa.npy" not in p.files]


def _extend(store, folder: Path, wish: Wish, settings: dict) -> manifest.Manifest:
    """Under the lock: tokenise the revisions that are not covered yet, then sort what is not sorted."""
    now = manifest.load(folder)
    if now is None:
        now = manifest.Manifest(KIND, settings, store.id, store.split)
        manifest.commit(folder, now)
    else:
        check(folder, now, store, settings)
    if now.stop < store.revision_rows:
        now = _tokenise(store, folder, now, wish.tokenizer)
    while _unsorted(now):
        now = _sort(folder, now)
    return now


def _tokenise(store, folder: Path, now: manifest.Manifest, tokenizer) -> manifest.Manifest:
    rows = store.revision_rows
    held, size, since = [], 0, time.monotonic()
    with progress.task(f"tokenise ({now.settings['tokenizer']})", total=rows - now.stop, unit="documents") as advance:
        for rev, source in store.states(first=now.stop):
            ids = np.asarray(tokenizer.encode(source.text), np.int64)
            if len(ids) and not 0 <= ids.min() <= ids.max() < now.settings["vocab"]:
                raise UsageError(f"the tokenizer of {now.settings['tokenizer']} gave token {ids.max()} for document '{source.id}', "
                                 f"its vocabulary ends at {now.settings['vocab'] - 1}; use another tokenizer")
            held.append((rev, pack(np.append(ids, now.settings["vocab"]), now.settings["width"])))
            size += len(ids) + 1
            advance(1)
            if size >= TOKENS or time.monotonic() - since > SECONDS:
                now = _add(folder, now, held, rev + 1)
                held, size, since = [], 0, time.monotonic()
    if held or now.stop < rows:  # the last revisions may be gone
        now = _add(folder, now, held, rows)
    return now


def pack(ids: np.ndarray, width: int) -> np.ndarray:
    """uint8 [n, width]: tokens as they are stored, the high byte first."""
    return np.ascontiguousarray(ids.astype(">u4").view(np.uint8).reshape(-1, 4)[:, 4 - width:])


def unpack(data_NW: np.ndarray) -> np.ndarray:
    """int64 [n]: the tokens that `pack` was given."""
    out = np.zeros(len(data_NW), np.int64)
    for column in data_NW.T:
        out = out << 8 | column
    return out


def _add(folder: Path, now: manifest.Manifest, held: Sequence[tuple[int, np.ndarray]], stop: int) -> manifest.Manifest:
    """Commit the tokens of these revisions, not sorted yet. Documents without tokens leave no trace."""
    held = [(rev, data) for rev, data in held if len(data) > 1]
    part = _none(now.stop, stop)
    if held:
        path = manifest.new_part(folder)
        data = [data for _, data in held]
        _write(path, data, np.array([rev for rev, _ in held]), np.array([len(d) for d in data]), now.stop)
        part = manifest.seal(path, now.stop, stop, sum(map(len, data)))
    now = replace(now, parts=(*now.parts, part))
    manifest.commit(folder, now)
    return now


def _none(first: int, stop: int) -> manifest.Part:
    return manifest.Part(f"none-{first}-{stop}", first, stop, 0, {})


def _write(path: Path, data: Sequence[np.ndarray], revs: np.ndarray, sizes: np.ndarray, first: int) -> np.ndarray:
    """tokens.npy and documents.npy of one part, whose documents have these revisions and sizes (separator included)."""
    width, total = data[0].shape[1], int(sizes.sum())
    if revs[-1] - first >= 2**32 or total * width > BYTES:
        raise UsageError(f"document revision {revs[-1]} makes a part of {total} tokens, {BYTES // width} are the most that can be "
                         "sorted together; cut such a document into several")
    starts = np.cumsum(sizes) - sizes
    np.save(path / "documents.npy", np.stack([revs - first, starts], 1).astype(np.uint32), allow_pickle=False)
    out = manifest.room(path / "tokens.npy", np.uint8, (total, width))
    np.concatenate(data, out=out)
    out.flush()
    return out


def load(folder: Path, part: manifest.Part, name: str) -> np.ndarray:
    """A file of a part, mapped."""
    try:
        return np.load(folder / part.name / name, mmap_mode="r", allow_pickle=False)
    except ValueError as e:
        raise damaged(folder, f"{part.name}/{name} is not what was written ({e})") from e


# ---- sorting --------------------------------------------------------------------------------------------------------


def _sort(folder: Path, now: manifest.Manifest) -> manifest.Manifest:
    """Sort the first run of unsorted parts, up to LARGEST tokens, with the left neighbours that are not twice as large."""
    parts = list(now.parts)
    a = next(i for i, p in enumerate(parts) if p in _unsorted(now))
    b, size = a + 1, parts[a].rows
    while b < len(parts) and "sa.npy" not in parts[b].files and size + parts[b].rows <= LARGEST:
        size += parts[b].rows
        b += 1
    while a and parts[a - 1].rows < 2 * size and size + parts[a - 1].rows <= LARGEST:
        a -= 1
        size += parts[a].rows
    with progress.task("sort suffixes", total=size, unit="tokens") as advance:
        made = _sorted(folder, now, parts[a:b])
        advance(size)
    now = replace(now, parts=(*parts[:a], made, *parts[b:]))
    manifest.commit(folder, now)
    return now


def _sorted(folder: Path, now: manifest.Manifest, parts: Sequence[manifest.Part],
            stored: np.ndarray | None = None) -> manifest.Part:
    """One sealed part of the documents of several, or of those among them whose revisions are `stored`."""
    first, stop = parts[0].first, parts[-1].stop
    data, revs, sizes = [], [], []
    for part in parts:
        if part.rows:
            tokens, documents = load(folder, part, "tokens.npy"), load(folder, part, "documents.npy").astype(np.int64)
            rev, size = documents[:, 0] + part.first, np.diff(np.append(documents[:, 1], len(tokens)))
            keep = np.ones(len(rev), bool) if stored is None else np.isin(rev, stored)
            data.append(tokens if keep.all() else tokens[np.repeat(keep, size)])
            revs.append(rev[keep])
            sizes.append(size[keep])
    revs, sizes = np.concatenate(revs), np.concatenate(sizes)
    if not len(revs):
        return _none(first, stop)
    path = manifest.new_part(folder)
    tokens = _write(path, data, revs, sizes, first)
    _write_suffixes(path, tokens.reshape(-1), now.settings["width"], now.settings["vocab"], len(revs))
    return manifest.seal(path, first, stop, len(tokens))


def _write_suffixes(path: Path, data: np.ndarray, width: int, vocab: int, documents: int) -> None:
    """sa.npy and heads.npy: the bytes are sorted by libdivsufsort, and every width-th suffix is one of tokens. Separators are the
    largest token, so their suffixes come last and are left out."""
    found = need("pydivsufsort", "a suffix array", "suffix").divsufsort(np.ascontiguousarray(data))
    sa = manifest.room(path / "sa.npy", np.uint32, (len(data) // width - documents,))
    kernels.keep_whole(found, width, np.asarray(sa))
    sa.flush()
    counts = np.zeros(vocab + 1, np.int64)
    kernels.count_tokens(np.asarray(data), width, counts)
    np.save(path / "heads.npy", (np.cumsum(counts) - counts).astype(np.uint32), allow_pickle=False)


def compact(store, folder: Path) -> None:
    """Rewrite the parts that hold documents which are gone from the store."""
    with store.lock():
        now = manifest.load(folder)
        if now is None:
            return
        stored, parts = store.stored_revisions(), []
        for part in now.parts:
            if part.rows and not np.isin(load(folder, part, "documents.npy")[:, 0].astype(np.int64) + part.first, stored).all():
                part = _sorted(folder, now, [part], stored)
            parts.append(part)
        if tuple(parts) != now.parts:
            manifest.commit(folder, replace(now, parts=tuple(parts)))
