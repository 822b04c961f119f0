"""Fewer rows: tokens of one document whose contexts are alike and whose value is the same become one row (He et al. 2021, section
4.2, greedy merging). It stands for as many tokens as it took in, and enters p_kNN with s + ln of their number (how/output.py).

Merging never crosses a document, and depends on nothing but the document's own rows: so a removed document takes away exactly what
it brought, and a store that never held it gives the same bits. A merged token store stands beside the one it was made from;
documents that are added later are not merged until it is made anew.

    tokens/NAME/PART/merged.npy  int32 [N, 2]    position in the document, tokens it stands for; of parts with merged rows"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ralm import progress
from ralm.errors import StoreError, UsageError
from ralm.index import manifest, nearest
from ralm.index.compiled import compiled
from ralm.registry import whole
from ralm.what import token_build

if TYPE_CHECKING:
    from ralm.what.token_store import TokenStore

FILE = "merged.npy"
RUN = 32_768  # rows of a document that are compared with each other; a longer one is merged run by run


def merged(tokens: TokenStore, name: str, absorb: int = 9, near: int = 30, radius: float = math.inf) -> TokenStore:
    """A smaller token store `name` made from this one: each row takes in at most `absorb` rows of its value among its `near`
    nearest in the document, none farther than `radius` (a distance as `search` gives them: a few times the temperature; among the
    few rows of a short document the nearest are not near). Raises UsageError where the name is taken or the store is a union."""
    from ralm.what.token_store import TokenStore

    whole(1, absorb=absorb, near=near)
    if math.isnan(radius):
        raise UsageError("radius=nan is no distance; use a number, or inf for none")
    if len(tokens.store.parts) != 1:
        raise UsageError("a union has no token store of its own; merge those of its datastores one by one, under one name")
    store = tokens.store.parts[0][0]
    old, new = (token_build.folder_of(store, n) for n in (tokens.name, name))
    if manifest.load(new) is not None:
        raise UsageError(f"{new} is there already; choose another name, or delete the folder")
    with store.lock():
        now = manifest.load(old)
        settings = dict(now.settings) | {"merged": f"{absorb} of {near} within {radius} in '{old.name}'"}
        parts = [_copied(old, p, new) for p in now.parts if "projection.safetensors" in p.files]
        with progress.task("merge", total=sum(p.rows for p in now.parts), unit="rows") as advance:
            for part in now.parts:
                if "documents.npy" in part.files:
                    parts.append(_part(old, part, new, now, (absorb, near, radius), advance))
                elif part.stop:
                    parts.append(part)  # revisions without documents: it has no files
        manifest.commit(new, manifest.Manifest(now.kind, settings, now.store, now.split, tuple(parts)))
    return TokenStore(tokens.store, tokens.lm, name)


def _copied(old: Path, part: manifest.Part, new: Path) -> manifest.Part:
    path = manifest.new_part(new)
    for file in part.files:
        shutil.copyfile(old / part.name / file, path / file)
    return manifest.seal(path, part.first, part.stop, part.rows)


def _part(old: Path, part: manifest.Part, new: Path, now: manifest.Manifest, limits: tuple[int, int, float],
          advance: Callable[[int], None]) -> manifest.Part:
    settings = dict(now.settings)
    step, writer, kept = token_build.Projection.load(old, now).step, token_build.Writer(new, part.first, settings["vocab"]), []
    keys, norms, values, documents = token_build.mapped(old, part, settings)
    where = columns(old, part, documents)
    for (rev, start), end in zip(documents.tolist(), np.append(documents[1:, 1], part.rows).tolist()):
        rows, counts = [np.zeros(0, np.int64)], [np.zeros(0, np.int32)]
        for a in range(start, end, RUN):
            b = min(a + RUN, end)
            own = nearest.Keys([keys[a:b]], [norms[a:b]], settings["dim"], step, settings["metric"])
            count = where[a:b, 1].copy()
            alive = _greedy(own, np.asarray(values[a:b], np.int64), count, *limits)
            rows.append(a + alive)
            counts.append(count[alive])
            advance(b - a)
        row = np.concatenate(rows)
        writer.document(rev, len(row))
        if len(row):
            writer.add(keys[row], norms[row], values[row])
        kept.append(np.stack([where[row, 0], np.concatenate(counts)], 1).astype(np.int32))
    np.save(writer.path / FILE, np.concatenate([np.zeros((0, 2), np.int32), *kept]), allow_pickle=False)
    return writer.seal(part.stop)


def _greedy(keys: nearest.Keys, values: np.ndarray, count: np.ndarray, absorb: int, near: int,
            radius: float) -> np.ndarray:
    """Rows that stay, ascending; `count` is brought up to date."""
    n = len(keys)
    found = [nearest.exact(keys, keys.take(np.arange(a, min(a + nearest.QUERIES, n))), min(near + 1, n))
             for a in range(0, n, nearest.QUERIES)]
    rows = np.concatenate([np.where(d <= radius, r, -1) for r, d in found])
    order = np.random.default_rng(0).permutation(n)  # the same for every document of this length
    gone, took = np.zeros(n, np.bool_), np.zeros(n, np.int32)
    _absorb(rows, values, order, count, gone, took, absorb)
    return np.flatnonzero(~gone)


@compiled
def _absorb(rows, values, order, count, gone, took, absorb):
    for i in order:
        if gone[i]:
            continue
        for c in range(rows.shape[1]):
            j = rows[i, c]
            if j < 0 or took[i] == absorb:
                break
            # one that has taken in others stays: what it stands for lies around it, not around i
            if j != i and not gone[j] and took[j] == 0 and values[j] == values[i]:
                gone[j] = True
                count[i] += count[j]
                took[i] += 1


# ---- reading, and copying with the rows -------------------------------------------------------------------------------


def columns(folder: Path, part: manifest.Part, documents: np.ndarray) -> np.ndarray:
    """int32 [N, 2]: position and count of every row of a part; of parts without merged rows: the next position, and 1."""
    if FILE in part.files:
        found = np.load(folder / part.name / FILE, allow_pickle=False)
        if found.shape != (part.rows, 2):
            raise StoreError(f"{folder / part.name / FILE} has shape {found.shape}, {(part.rows, 2)} is expected; "
                             f"{manifest.remedy(folder)}")
        return found
    sizes = np.diff(np.append(documents[:, 1], part.rows))
    position = np.arange(part.rows) - np.repeat(documents[:, 1], sizes)
    return np.stack([position, np.ones(part.rows, np.int64)], 1).astype(np.int32)


def carry(folder: Path, parts: Sequence[manifest.Part], settings: dict[str, Any], keep: Callable | None, path: Path) -> None:
    """Where rows of parts were copied into a new part at `path` (token_build.merge), their columns go with them."""
    if not any(FILE in p.files for p in parts):
        return
    out = [np.zeros((0, 2), np.int32)]
    for part in parts:
        if part.files:
            documents = token_build.mapped(folder, part, settings)[3]
            found = columns(folder, part, documents)
            ends = np.append(documents[1:, 1], part.rows)
            out += [found[a:b] for (rev, a), b in zip(documents.tolist(), ends.tolist()) if keep is None or keep(rev)]
    np.save(path / FILE, np.concatenate(out), allow_pickle=False)
