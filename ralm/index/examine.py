"""What is wrong with an index, every byte of it read and its rows held against the datastore: the part of `ralm doctor STORE` that
looks at derived artifacts. Every finding ends with the one command that puts it right."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ralm.errors import RalmError
from ralm.index import manifest


def artifact(store, folder: Path) -> tuple[list[str], list[str]]:
    """(what is broken, what is merely to be known) about the artifact in this folder."""
    try:
        now = manifest.load(folder)
    except RalmError as e:
        return [str(e)], []
    if now is None:
        from ralm.index import vectors

        if lost := vectors.orphaned(folder):
            return [lost], []
        return [], [f"{folder} has no manifest: a build that never ended; {manifest.command(folder)} goes on with it"]
    broken = [f"{w}; {manifest.remedy(folder)}" for w in manifest.verify(folder, now)]
    for what, theirs, ours in (("datastore", now.store, store.id), ("split", now.split, store.split)):
        if theirs != ours:
            broken.append(f"{folder} was made from {what} {theirs}, this one is {ours}; {manifest.remedy(folder)}")
    if broken:
        return broken, []
    try:
        if now.kind == "tokens":
            return _tokens(store, folder, now)
        if now.kind == "neighbours":
            return _chunks(store, folder, now)
        ids = _ids(store, folder, now)
    except RalmError as e:
        return [str(e)], []
    return _rows(store, folder, now, ids) if ids is not None else ([], [])


def _ids(store, folder: Path, now: manifest.Manifest) -> np.ndarray | None:
    """The chunk ids of the rows, by opening the artifact as a search does; None for kinds that have none."""
    if now.kind == "sparse":
        from ralm.index import postings

        found = [postings.open_segment(folder, p).ids for p in now.parts if p.rows]
        return np.concatenate([np.zeros(0, np.int64), *map(np.asarray, found)])
    if now.kind == "dense":
        from ralm.index import ann, vectors

        rows = vectors.Rows(folder, now)
        for first, x in rows.slices(0, len(rows), 65_536):
            length = np.linalg.norm(np.asarray(x, np.float32), axis=1)
            bad = ~((np.abs(length - 1) < 0.01) | (length == 0))
            if bad.any():
                at = int(np.argmax(bad))
                raise vectors.damaged(folder, f"vector {first + at} has length {length[at]:.3g}, not 1")
        ann.open_index(folder, now, rows)
        return rows.ids
    return None


def _tokens(store, folder: Path, now: manifest.Manifest) -> tuple[list[str], list[str]]:
    """A token store: one document a revision, its inverted index finding what it found when it was made, nothing lacking."""
    from ralm.index import inverted
    from ralm.what.token_store import Rows

    rows, again = Rows(folder, now), manifest.remedy(folder)
    inverted.open_index(folder, now, rows.keys)
    for first in range(0, len(rows), 1 << 20):
        values = rows.values(np.arange(first, min(first + (1 << 20), len(rows))))
        if len(values) and not 0 <= values.min() <= values.max() < now.settings["vocab"]:
            return [f"{folder} holds tokens that the model does not have ({values.max()}); {again}"], []
    return _documents(store, folder, now, rows.revs, "knn")


def _chunks(store, folder: Path, now: manifest.Manifest) -> tuple[list[str], list[str]]:
    """Chunks of a neighbour database: tokens of the vocabulary, ends that ascend within a document and end with it."""
    from ralm.what.token_chunks import TokenChunks

    held, again = TokenChunks(store, folder.parent.name, as_it_is=True), manifest.remedy(folder)
    if (top := held.largest()) >= now.settings["vocab"]:
        return [f"{folder} holds tokens that the model does not have ({top}); {again}"], []
    for rev, source in store.states():
        at = int(np.searchsorted(held.revs, rev))
        ends = held.ends[held.rows[at]:held.rows[at + 1]].astype(np.int64) if rev in held.revs[at:at + 1] else ()
        if len(ends) and ((np.diff(ends) < 0).any() or ends[-1] != len(source.text)):
            return [f"{folder} cuts document '{source.id}' otherwise than its text is long; {again}"], []
    return _documents(store, folder, now, held.revs, "retro")


def _documents(store, folder: Path, now: manifest.Manifest, revs: np.ndarray, how: str) -> tuple[list[str], list[str]]:
    """Whether every document that is said to be covered is among the revisions held; and what is behind, or gone."""
    alive, notes = np.flatnonzero(store.revisions()), []
    lacking = np.setdiff1d(alive[alive < now.stop], revs)
    if len(lacking):
        return [f"{folder} lacks {len(lacking):,} documents of the datastore (revision {lacking[0]} first); "
                f"{manifest.remedy(folder)}"], []
    if behind := int((alive >= now.stop).sum()):
        notes.append(f"{folder} does not hold the {behind:,} newest documents yet: {manifest.command(folder)} (or the next "
                     f"--how {how}) reads them")
    gone = np.setdiff1d(revs, store.stored_revisions())
    if len(gone):
        notes.append(f"{folder} holds the tokens of {len(gone):,} documents that are gone: ralm compact {store.path} drops "
                     "them")
    return [], notes


def _rows(store, folder: Path, now: manifest.Manifest, ids: np.ndarray) -> tuple[list[str], list[str]]:
    """Every chunk of the newest version that the artifact says it covers has one row; rows of chunks that are gone are no fault."""
    notes, again = [], manifest.remedy(folder)
    if (np.diff(ids) <= 0).any() or (len(ids) and (ids[0] < 0 or ids[-1] >= max(now.stop, 1))):
        return [f"{folder}: its chunk ids are not ascending from 0 to {now.stop}; {again}"], []
    alive = store.chunk_ids()
    lacking = np.setdiff1d(alive[alive < now.stop], ids, assume_unique=True)
    if len(lacking):
        return [f"{folder} lacks {len(lacking):,} chunks of the datastore (the first is {lacking[0]}); {again}"], []
    behind = int((alive >= now.stop).sum())
    if behind:
        notes.append(f"{folder} does not cover the {behind:,} newest chunks yet: the next search adds them, or "
                     f"{manifest.command(folder)}")
    gone = np.setdiff1d(ids, store.stored_ids(), assume_unique=True)
    if len(gone):
        notes.append(f"{folder} holds rows of {len(gone):,} chunks that are gone for good: ralm compact {manifest.home(folder)} "
                     "drops them")
    return [], notes
