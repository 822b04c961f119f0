"""Stored vectors of chunks: append-only segments of memory-mapped float16, and an optional FAISS index over the first rows of them.

    index/dense/
      manifest.json
      PART/ids.npy int64 [R], vectors.npy float16 [R, D]     one append, or several merged; chunk ids ascend over all parts
      PART/rows.faiss                                        covers the first `rows` rows of all parts together (ann.py)
      PART/model.safetensors, tokenizer.json, config.json    the encoder's table, where it is a static one

A row is the position of a vector counted over all parts. Parts are only ever merged with their neighbours, so rows stay what
they were until `compact`. Rows that the FAISS index does not cover yet are searched exactly."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from ralm import progress
from ralm.errors import FingerprintError, StoreError, UsageError
from ralm.index import half, manifest
from ralm.index.encode import Encoder, canonical, encoder
from ralm.index.static import Static

KIND = "dense"
UNIT = 512  # chunks encoded at a time, counted from the last commit: a resumed build cuts the same units
SECONDS, ROWS = 30.0, 65_536  # a segment is committed after so long or so many chunks: what a kill can cost
LARGEST = 4_000_000  # rows; parts above it are not merged any further


@dataclass(frozen=True)
class Wish:
    """The settings asked for; None where the stored ones will do (minilm, title in front, where there are none yet)."""

    encoder: str | None = None
    title: bool | None = None
    index: str | None = None
    name: str = ""  # of a second set of vectors beside the first: index/dense-NAME

    def folder(self, store) -> Path:
        return Path(store.path) / "index" / (f"dense-{self.name}" if self.name else "dense")


class Rows:
    """The vectors of a manifest's parts, mapped: ids int64 [R]; `take` and `blocks` read vectors."""

    def __init__(self, folder: Path, now: manifest.Manifest):
        self.parts = [p for p in now.parts if "vectors.npy" in p.files]
        self.maps = [_map(folder, p, "vectors.npy") for p in self.parts]
        self.starts = np.concatenate([np.zeros(1, np.int64), np.cumsum([len(m) for m in self.maps], dtype=np.int64)])
        each = [np.asarray(_map(folder, p, "ids.npy")) for p in self.parts]
        self.ids = np.concatenate(each) if each else np.zeros(0, np.int64)
        self.dim = int(now.settings["dim"])
        if any(m.shape != (len(i), self.dim) for m, i in zip(self.maps, each)) or (np.diff(self.ids) <= 0).any():
            raise damaged(folder, "ids and vectors do not belong together")

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """float16 [n, D]: the vectors of these rows, in the order asked."""
        out = np.empty((len(rows), self.dim), np.float16)
        part = np.searchsorted(self.starts, rows, side="right") - 1
        for i in np.unique(part):
            here = part == i
            out[here] = self.maps[i][rows[here] - self.starts[i]]
        return out

    @cached_property
    def bits(self) -> list[tuple[int, np.ndarray]]:
        """(first row, uint16 [n, D]) of every part, as compiled loops read float16; plain arrays: a memmap costs every call."""
        return [(start, half.bits(m)) for start, m in zip(self.starts.tolist(), self.maps) if len(m)]

    def slices(self, first: int, stop: int, size: int):
        """(first row, float16 [n, D]) over the rows [first, stop), at most `size` at a time, never across parts."""
        for start, vectors in zip(self.starts.tolist(), self.maps):
            for a in range(max(first, start), min(stop, start + len(vectors)), size):
                yield a, vectors[a - start:min(a + size, stop) - start]


def _map(folder: Path, part: manifest.Part, name: str) -> np.ndarray:
    file = folder / part.name / name
    try:
        return np.lib.format.open_memmap(file, mode="r")  # not np.load: that takes zip files too
    except ValueError as e:
        raise damaged(folder, f"{part.name}/{name} is not what was written ({e})") from e


def damaged(folder: Path, what: str) -> StoreError:
    return StoreError(f"{folder} is damaged: {what}; the documents are not touched: delete the folder, build it again (ralm index)")


# ---- which encoder --------------------------------------------------------------------------------------------------


def encoder_of(folder: Path, now: manifest.Manifest) -> Encoder:
    """The encoder an index was made with: its stored table, or the model of that name. FingerprintError where it has changed."""
    name = now.settings["encoder"]
    table = next((p for p in now.parts if "tokenizer.json" in p.files), None)
    found = Static(name, folder / table.name) if table else encoder(name)
    if found.fingerprint != now.settings["fingerprint"]:
        raise FingerprintError(
            f"{folder} was made with encoder {name} of fingerprint {now.settings['fingerprint']}, the {name} at hand has "
            f"{found.fingerprint}: its weights or tokenizer changed; bring the old one back, or delete {folder} and rebuild it")
    return found


def _check(folder: Path, now: manifest.Manifest, store, wish: Wish) -> None:
    asked = {}
    if wish.encoder is not None:
        asked["encoder"] = canonical(wish.encoder)
    if wish.title is not None:
        asked["title"] = bool(wish.title)
    try:
        manifest.check(folder, now, store, KIND, asked)
    except FingerprintError as e:
        if asked.get("encoder", now.settings.get("encoder")) == now.settings.get("encoder"):
            raise
        raise FingerprintError(f"{e}; or keep both, the second as dense:{wish.encoder},name=…") from e


# ---- growing --------------------------------------------------------------------------------------------------------


def ready(store, wish: Wish) -> manifest.Manifest:
    """The manifest of vectors that cover every chunk this version of the store may see, encoding what is missing.

    Raises FingerprintError where they were made otherwise, StoreError where rows are missing and cannot be written."""
    folder = wish.folder(store)
    found = manifest.load(folder)
    if found is not None:
        _check(folder, found, store, wish)
        if found.stop >= store.chunk_rows and not _due(found, wish):
            return found
    try:
        with store.lock():
            return _extend(store, folder, wish)
    except (OSError, StoreError) as e:
        if found is not None and found.stop >= store.chunk_rows and not isinstance(e, FingerprintError):
            progress.note(f"{folder}: searched without its FAISS index, which cannot be written now ({e})")
            return found  # every vector is there, and exact search needs no index
        if isinstance(e, StoreError):
            raise
        raise StoreError(f"{folder} covers {found.stop if found else 0} of {store.chunk_rows} chunks and cannot be extended "
                         f"({e}); build it where the datastore can be written: {manifest.command(folder)}") from e


def opened(store, wish: Wish) -> tuple[manifest.Manifest, Rows]:
    """The vectors, ready and mapped."""
    folder = wish.folder(store)

    def rows(now: manifest.Manifest) -> Rows:
        for part in now.parts:
            manifest.sizes(folder, part)
        return Rows(folder, now)

    return manifest.opened(lambda: ready(store, wish), rows)


def _due(now: manifest.Manifest, wish: Wish) -> bool:
    from ralm.index import ann

    kind = ann.kind_of(wish.index or now.settings["index"], sum(p.rows for p in now.parts if "vectors.npy" in p.files))
    return ann.due(kind, now.facts.get("ann"), sum(p.rows for p in now.parts if "vectors.npy" in p.files), wish.index)


def _extend(store, folder: Path, wish: Wish) -> manifest.Manifest:
    """Under the lock: encode the chunks that are not covered yet, then bring the FAISS index up to date."""
    now = manifest.load(folder)
    if now is None:
        now, model = _begin(store, folder, wish)
    else:
        _check(folder, now, store, wish)
        model = None
    rows = store.chunk_rows
    if now.stop < rows:
        model = model or encoder_of(folder, now)
        now = _encode(store, folder, now, model, rows)
    if _due(now, wish):
        from ralm.index import ann

        now = ann.refresh(store, folder, now, model or encoder_of(folder, now), wish.index)
    return now


def orphaned(folder: Path) -> str | None:
    """What is wrong where there are vectors and no manifest: it comes before the first vectors, and named the encoder."""
    if not next(folder.glob("*/vectors.npy"), None):
        return None
    return (f"{folder} holds vectors and its manifest.json is missing: restore that from a copy, or build it again "
            f"with the encoder it had; {manifest.remedy(folder)}")


def _begin(store, folder: Path, wish: Wish) -> tuple[manifest.Manifest, Encoder]:
    """The first manifest: settings, and the encoder's table where it is a static one."""
    if lost := orphaned(folder):
        raise StoreError(lost)
    model = encoder(wish.encoder or "minilm")
    settings = {"encoder": model.name, "fingerprint": model.fingerprint, "dim": model.dim,
                "title": wish.title is not False, "index": wish.index or "auto"}
    parts = ()
    if isinstance(model, Static):
        path = manifest.new_part(folder)
        model.save(path)
        parts = (manifest.seal(path, 0, 0, 0),)
    now = manifest.Manifest(KIND, settings, store.id, store.split, parts)
    manifest.commit(folder, now)
    return now, model


def passages(titles: Sequence[str], texts: Sequence[str], title: bool) -> list[str]:
    """What of a chunk is encoded: "title\\ntext", or the text alone."""
    return [f"{a}\n{b}" if title and a else b for a, b in zip(titles, texts)]


def _encode(store, folder: Path, now: manifest.Manifest, model: Encoder, rows: int) -> manifest.Manifest:
    ids, vectors, since = [], [], time.monotonic()
    with progress.task(f"encode ({model.name})", total=rows - now.stop, unit="chunks") as advance:
        for ids_N, titles, texts in store.texts(first=now.stop, batch=UNIT):
            vectors.append(model.encode(passages(titles, texts, now.settings["title"])).astype(np.float16))
            ids.append(np.asarray(ids_N, np.int64))
            advance(len(ids_N))
            if time.monotonic() - since > SECONDS or sum(map(len, ids)) >= ROWS:
                now = _append(folder, now, np.concatenate(ids), np.concatenate(vectors))
                ids, vectors, since = [], [], time.monotonic()
    if ids:
        now = _append(folder, now, np.concatenate(ids), np.concatenate(vectors))
    if now.stop < rows:  # the last ids belong to chunks that are gone
        now = replace(now, parts=(*now.parts, manifest.Part(f"none-{now.stop}-{rows}", now.stop, rows, 0, {})))
        manifest.commit(folder, now)
    return now


def _append(folder: Path, now: manifest.Manifest, ids: np.ndarray, vectors: np.ndarray) -> manifest.Manifest:
    """Commit one more part. It takes in its left neighbours while they are not twice as large: a row is copied log2(R) times."""
    if not np.isfinite(vectors).all():
        raise UsageError(f"the encoder {now.settings['encoder']} gave vectors that are not finite; use another encoder")
    merged, first, old = [(ids, vectors)], now.stop, [p for p in now.parts if p.stop]
    others = [p for p in now.parts if not p.stop]
    while old and old[-1].rows < 2 * sum(len(i) for i, _ in merged) and old[-1].rows < LARGEST:
        part = old.pop()
        first = part.first
        if part.rows:
            merged.insert(0, (_map(folder, part, "ids.npy"), _map(folder, part, "vectors.npy")))
    part = write(folder, [i for i, _ in merged], [v for _, v in merged], first, int(ids[-1]) + 1)
    now = replace(now, parts=(*others, *old, part))
    manifest.commit(folder, now)
    return now


def write(folder: Path, ids: Sequence[np.ndarray], vectors: Sequence[np.ndarray], first: int, stop: int) -> manifest.Part:
    """One sealed part that covers the chunk ids [first, stop)."""
    path = manifest.new_part(folder)
    rows = sum(map(len, ids))
    np.save(path / "ids.npy", np.concatenate(ids), allow_pickle=False)
    out = manifest.room(path / "vectors.npy", np.float16, (rows, vectors[0].shape[1]))
    at = 0
    for v in vectors:
        out[at:at + len(v)] = v
        at += len(v)
    out.flush()
    del out
    return manifest.seal(path, first, stop, rows)


def compact(store, folder: Path) -> None:
    """Rewrite the parts that hold rows which are gone from the store; the FAISS index over them is made anew."""
    from ralm.index import ann

    with store.lock():
        now = manifest.load(folder)
        if now is None:
            return
        stored, parts = store.stored_ids(), []
        for part in now.parts:
            if "vectors.npy" in part.files:
                ids = np.asarray(_map(folder, part, "ids.npy"))
                keep = np.isin(ids, stored, assume_unique=True)
                if not keep.any():
                    part = manifest.Part(f"none-{part.first}-{part.stop}", part.first, part.stop, 0, {})
                elif not keep.all():
                    part = write(folder, [ids[keep]], [_map(folder, part, "vectors.npy")[keep]], part.first, part.stop)
            parts.append(part)
        if tuple(parts) == now.parts:
            return
        parts = [p for p in parts if "rows.faiss" not in p.files]
        now = replace(now, parts=tuple(parts), facts={k: v for k, v in now.facts.items() if k != "ann"})
        manifest.commit(folder, now)
        if _due(now, Wish()):
            ann.refresh(store, folder, now, encoder_of(folder, now), None)
