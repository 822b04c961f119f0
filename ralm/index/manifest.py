"""How a derived artifact says what it is: one manifest.json, written last, so that a folder without it is a build that never ended.

    index/NAME/
      manifest.json     kind, settings, the datastore it was made from, its segments with the size and checksum of every file
      000001-xxxx/      one segment: files made by one append, never changed afterwards

Rules (docs/design.md, section 3): what an artifact was made from is compared before it is used, and a mismatch is an error that
names both sides and both ways out; a segment is complete before the manifest that names it; files hold no code."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ralm.errors import FingerprintError, StoreError
from ralm.what import sums
from ralm.what.sums import sha256

FORMAT = 1
GONE = ".gone"  # beside artifacts: those that are being deleted
Opened = TypeVar("Opened")


@dataclass(frozen=True)
class Part:
    """One segment: the chunk ids [first, stop) it was made from, how many rows it holds, its files with size and checksum."""

    name: str
    first: int
    stop: int
    rows: int
    files: Mapping[str, Mapping[str, Any]]  # {file name: {"bytes": n, "sha256": hex}}


@dataclass(frozen=True)
class Manifest:
    """What an artifact is and what it was made from."""

    kind: str  # "sparse", "dense", ...
    settings: Mapping[str, Any]  # all that decides its contents: analyser, encoder and its fingerprint, index parameters
    store: str  # the datastore's id
    split: str  # how its documents were cut
    parts: tuple[Part, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)  # measured: recall, seconds, ...
    format: int = FORMAT

    @property
    def stop(self) -> int:
        """Chunk ids below this one are covered."""
        return max((p.stop for p in self.parts), default=0)


def load(folder: Path) -> Manifest | None:
    """The manifest of an artifact, None where there is none. Raises StoreError where it is damaged or of a newer format."""
    file = folder / "manifest.json"
    if not file.is_file():
        return None
    try:
        raw = sums.unsealed(json.loads(file.read_text(encoding="utf-8")))
        parts = tuple(Part(**p) for p in raw.pop("parts"))
        manifest = Manifest(**raw, parts=parts)
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise StoreError(f"{file} is damaged ({e}); {remedy(folder)}") from e
    if manifest.format > FORMAT:
        raise StoreError(f"{folder} has format {manifest.format}, this ralm reads up to {FORMAT}; install a newer ralm")
    return manifest


def check(folder: Path, manifest: Manifest, store, kind: str, settings: Mapping[str, Any]) -> None:
    """Raise FingerprintError unless the artifact is one of `kind`, made from this datastore with these settings."""
    ours = {"kind": kind, "datastore": store.id, "split": store.split} | dict(settings)
    theirs = {"kind": manifest.kind, "datastore": manifest.store, "split": manifest.split} | dict(manifest.settings)
    for key in ours:
        if ours[key] != theirs.get(key):
            raise FingerprintError(
                f"{folder} was made with {key} = {theirs.get(key)!r}, {ours[key]!r} is asked for: "
                f"ask for {theirs.get(key)!r}, or rebuild it ({command(folder, '…')} --rebuild)")


def new_part(folder: Path) -> Path:
    """An empty folder for the next segment. Readers do not see it before `commit` names it."""
    path = folder / f"{uuid.uuid4().hex[:12]}"
    path.mkdir(parents=True)
    return path


def room(file: Path, kind: Any, shape: tuple[int, ...]) -> np.ndarray:
    """A new .npy array, mapped for writing. Its bytes are on the disk before the first of them is written: a disk that is full is
    an OSError here, and would kill the process there."""
    array = np.lib.format.open_memmap(file, mode="w+", dtype=kind, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with file.open("rb+") as f:
            os.posix_fallocate(f.fileno(), 0, os.fstat(f.fileno()).st_size)
    return array


def seal(path: Path, first: int, stop: int, rows: int) -> Part:
    """The finished segment in `path` as a Part: every file flushed to disk and checksummed."""
    files = {}
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        with file.open("rb+") as f:
            os.fsync(f.fileno())
        files[file.relative_to(path).as_posix()] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    return Part(path.name, first, stop, rows, files)


def commit(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest in one step, then delete segments that no manifest names any more (those of killed builds too)."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = asdict(manifest)
    temporary = folder / f"manifest.{os.getpid()}.tmp"
    with temporary.open("w", encoding="utf-8") as f:
        json.dump(sums.sealed(raw), f, indent=1, sort_keys=True)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(folder / "manifest.json")
    named = {p.name for p in manifest.parts} | {"manifest.json"}
    for path in folder.iterdir():
        if path.name not in named:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def discard(folder: Path) -> None:
    """Delete an artifact: in one step for whoever reads beside it or comes after a kill, then file by file."""
    gone = folder.parent / GONE
    gone.mkdir(exist_ok=True)
    folder.rename(gone / uuid.uuid4().hex)
    sweep(folder.parent)


def sweep(family: Path) -> None:
    """Finish what a killed `discard` left of artifacts of this family (index/, tokens/, neighbours/)."""
    shutil.rmtree(family / GONE, ignore_errors=True)


def sizes(folder: Path, part: Part) -> None:
    """Raise StoreError where a file of the segment is missing or is not what was written.

    Every byte is read the first time on a machine, and a stat is enough from then on (ralm.what.sums)."""
    for name, facts in part.files.items():
        file = folder / part.name / name
        found = file.stat().st_size if file.is_file() else None
        if found != facts["bytes"]:
            raise StoreError(f"{file} has {found} bytes, its manifest says {facts['bytes']}; {remedy(folder)}")
    wanted = {f"{part.name}/{name}": facts["sha256"] for name, facts in part.files.items()}
    for name, found in sums.differing(folder, wanted):
        if found is None:
            raise StoreError(f"{folder / name} is missing; {remedy(folder)}")
        raise StoreError(f"{folder / name} is not what was written (checksum differs); {remedy(folder)}")


def remedy(folder: Path) -> str:
    """What to do about a damaged artifact: the one command that makes it anew from the documents."""
    if folder.parent.name == "tokens":
        return f"the documents are not touched, make it again: {tokens_command(folder)}{_unusual(folder)} --rebuild"
    return f"the documents are not touched, build it again: {command(folder)} --rebuild"


def command(folder: Path, spec: str = "", name: str = "") -> str:
    """The command that makes or extends an artifact (an index by default as it is); name: of other neighbours beside these."""
    if folder.parent.name == "tokens":
        return tokens_command(folder)
    if (base := _neighbours(folder)) is None:
        return f"ralm index {folder.parent.parent} --index {spec or _spec(folder)}"
    made, name = _settings(base / "chunks"), name or base.name
    m = f" --m {made['m']}" if name == base.name and made.get("m", 64) != 64 else ""
    called = "" if name == "default" else f" --name {name}"
    return f"ralm neighbours {base.parents[1]} --lm {made.get('lm') or '…'}{m}{called}"


def home(folder: Path) -> Path:
    """The datastore an artifact belongs to."""
    return folder.parents[1] if (base := _neighbours(folder)) is None else base.parents[1]


def _neighbours(folder: Path) -> Path | None:
    """STORE/neighbours/NAME where an artifact (chunks, index/bm25) is one of those in it."""
    return next((p for p in folder.parents[:2] if p.parent.name == "neighbours" and (p.parents[1] / "store.json").is_file()), None)


def tokens_command(folder: Path, lm: str = "") -> str:
    """The command that makes or extends a token store; lm: where its manifest does not say."""
    name = "" if folder.name == "default" else f" --name {folder.name}"
    return f"ralm tokens {folder.parent.parent} --lm {_settings(folder).get('lm') or lm or '…'}{name}"


def _unusual(folder: Path) -> str:
    """The options of ralm tokens that make this token store as it was, where its manifest can still be read."""
    settings = _settings(folder)
    usual = {"key": "ffn_in", "project": "none", "dtype": "float16", "metric": "l2", "index": "auto"}
    size = settings.get("window")
    usual |= {"window": size, "stride": None if size is None else max(1, size // 2)}
    return "".join(f" --{k} {settings[k]}" for k, v in usual.items() if settings.get(k, v) != v)


def _settings(folder: Path) -> Mapping[str, Any]:
    """What a manifest says of its settings, damaged or not; nothing where it cannot be read."""
    try:
        found = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["settings"]
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _spec(folder: Path) -> str:
    """The spec that builds this artifact; with its encoder, where its manifest can still be read."""
    name, options = folder.name.partition("-")[::2]
    encoder = str(_settings(folder).get("encoder", "")) if name == "dense" else ""
    parts = [p for p in (encoder, f"name={options}" if options else "") if p]
    return f"{name}:{','.join(parts)}" if parts else name


def opened(ready: Callable[[], Manifest], read: Callable[[Manifest], Opened]) -> tuple[Manifest, Opened]:
    """The manifest that `ready` gives and what `read` makes of it. Where a writer merged parts while they were being opened, once
    more with what is there now; otherwise the StoreError or FileNotFoundError of `read`."""
    now = ready()
    while True:
        try:
            return now, read(now)
        except (StoreError, FileNotFoundError):
            before, now = now, ready()
            if now == before:
                raise


def verify(folder: Path, manifest: Manifest) -> list[str]:
    """What is wrong with the files of an artifact, every byte read; an empty list where nothing is."""
    wrong = []
    for part in manifest.parts:
        for name, facts in part.files.items():
            file = folder / part.name / name
            if not file.is_file():
                wrong.append(f"{file} is missing")
            elif sha256(file) != facts["sha256"]:
                wrong.append(f"{file} is not what was written (checksum differs)")
    return wrong
