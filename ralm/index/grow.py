"""How a sparse index comes to cover a datastore: build, append, merge, compact. Readers need no lock, one writer at a time changes.

A build commits segment by segment, so a killed one goes on where it stopped; until it ends the manifest says how far it got and
whoever opens the index goes on with it. Merging is tiered (FAN segments of a size class become one of the next), so a row is
rewritten a few times in its life and the cost of an append does not depend on what is there already, but for logarithms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ralm import progress
from ralm.errors import StoreError
from ralm.index import manifest, postings
from ralm.index.analyse import Settings

KIND, NAME = "sparse", "bm25"
BATCH = 4096  # chunks read from the store at a time
AS_STORED = "auto"  # a setting that is not asked for: the index's own, the default where there is none yet


@dataclass(frozen=True)
class Wish:
    """The settings asked for; AS_STORED where the stored ones will do. `title`: index "title text" as one field."""

    stemmer: str | None = AS_STORED
    stop: str | Sequence[str] | None = AS_STORED
    title: bool | str = AS_STORED

    def settle(self, stored: manifest.Manifest | None) -> tuple[Settings, bool]:
        """Settings and title with every gap filled. Raises UsageError for unknown names."""
        known = stored.settings if stored is not None and stored.kind == KIND else {}
        stemmer = known.get("stemmer", "english") if self.stemmer == AS_STORED else self.stemmer
        stop = known.get("stop", "english") if self.stop is not None and self.stop == AS_STORED else self.stop
        title = known.get("title", True) if self.title == AS_STORED else bool(self.title)
        return Settings.of(stemmer, stop), title


def folder_of(store) -> Path:
    return Path(store.path) / "index" / NAME


def ready(store, wish: Wish) -> manifest.Manifest:
    """The manifest of an index that covers every chunk this version of the store may see, built or extended where need be.

    Raises FingerprintError where it was made from something else or with other settings than asked for, StoreError where rows
    are missing and it cannot be written."""
    folder = folder_of(store)
    found = manifest.load(folder)
    settings, title = wish.settle(found)
    facts = settings.facts() | {"title": title}
    if found is not None:
        manifest.check(folder, found, store, KIND, facts)
        if found.stop >= store.chunk_rows:
            return found
    try:
        with store.lock():
            return _extend(store, folder, settings, title, facts)
    except OSError as e:
        raise StoreError(f"{folder} covers {found.stop if found else 0} of {store.chunk_rows} chunks and cannot be extended "
                         f"({e}); build it where the datastore can be written: {manifest.command(folder)}") from e


def opened(store, wish: Wish) -> tuple[manifest.Manifest, list[tuple[manifest.Part, postings.Segment]]]:
    """The index, ready, with its segments mapped (parts without rows left out)."""
    folder = folder_of(store)
    return manifest.opened(lambda: ready(store, wish),
                           lambda now: [(p, postings.open_segment(folder, p)) for p in now.parts if p.rows])


def _extend(store, folder: Path, settings: Settings, title: bool, facts: dict[str, Any]) -> manifest.Manifest:
    """Under the lock: read the chunks that are not covered yet, in batches, and append them as segments."""
    now = manifest.load(folder) or manifest.Manifest(KIND, facts, store.id, store.split)
    manifest.check(folder, now, store, KIND, facts)
    rows = store.chunk_rows
    with progress.task(NAME, total=rows - now.stop, unit="chunks") as advance:
        writer = None
        for ids, titles, texts in store.texts(first=now.stop, batch=BATCH):
            if writer is None:
                writer = postings.Writer(settings, title)
            writer.add(ids, titles, texts)
            advance(len(ids))
            if writer.full():
                part, writer = writer.write(folder, now.stop), None  # its memory is free before segments are merged
                now = _append(folder, now, part)
        if writer is not None:
            now = _append(folder, now, writer.write(folder, now.stop))
    if now.stop < rows or not (folder / "manifest.json").is_file():
        now = _append(folder, now, postings.nothing(now.stop, rows)) if now.stop < rows else _commit(folder, now)
    return now


def _append(folder: Path, now: manifest.Manifest, part: manifest.Part) -> manifest.Manifest:
    """Commit one more part, after merging the last ones where there are too many."""
    parts = [*now.parts, part]
    while n := postings.crowded(parts):
        old = [p for p in parts[-n:] if p.rows]
        segments = [postings.open_segment(folder, p) for p in old]
        first, stop = parts[-n].first, parts[-1].stop
        keep = [np.ones(p.rows, bool) for p in old]
        parts[-n:] = [postings.merge(folder, segments, keep, first, stop) if old else postings.nothing(first, stop)]
    return _commit(folder, replace(now, parts=tuple(parts)))


def _commit(folder: Path, now: manifest.Manifest) -> manifest.Manifest:
    manifest.commit(folder, now)
    return now


def compact(store) -> None:
    """Rewrite the segments that hold rows which are gone from the store; terms that only those rows held go with them."""
    folder = folder_of(store)
    with store.lock():
        now = manifest.load(folder)
        if now is None:
            return
        stored, parts = store.stored_ids(), []
        for part in now.parts:
            if part.rows:
                segment = postings.open_segment(folder, part)
                near = slice(*np.searchsorted(stored, [part.first, part.stop]))
                keep = np.isin(segment.ids, stored[near], assume_unique=True)
                if not keep.any():
                    part = postings.nothing(part.first, part.stop)
                elif not keep.all():
                    part = postings.merge(folder, [segment], [keep], part.first, part.stop)
            parts.append(part)
        if tuple(parts) != now.parts:
            manifest.commit(folder, replace(now, parts=tuple(parts)))
