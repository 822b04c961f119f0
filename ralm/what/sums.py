"""Checksums: what was written is what is read, or it is an error that names the file.

    kb.ralm/sums.txt      one line a file of the three tables, "SHA256  PATH" (sha256sum -c reads it); the writer adds to it

Lance's files never change once written, and carry no checksums of their own: a flipped bit would come back as another text, a
removed document, or a crash. Every file that a version is read from is compared before Lance sees it. A file is read for that
once: what it was found to be is remembered with its size, times and inode, in the process and, for a lot of bytes, in the
user's cache folder, so opening again costs a stat a file. A copied or changed file has other times and is read again.

A writer killed between a commit and its line leaves a file that is not listed: it is read unchecked, and the next write lists
it. A store without sums.txt (an older one) is read unchecked too, and the next write lists everything."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ralm import progress
from ralm.errors import StoreError

NAME = "sums.txt"
HINTS = {"latest_version_hint.json"}  # rewritten by Lance at every commit; it may say what it likes
LARGE = 32 << 20  # bytes to be read from which on it is worth a file in the cache
SETTLED = 100_000_000  # ns since a file last changed from which on its times would tell another change (they move in ticks)
BLOCK = 256 << 10

Known = tuple[int, int, int, int, str]  # bytes, mtime_ns, ctime_ns, inode, sha256
_seen: dict[str, Known] = {}  # by absolute path
_lists: dict[str, tuple[tuple, dict[str, str]]] = {}  # sums.txt as it was read last, by absolute path


# ---- files -----------------------------------------------------------------------------------------------------------


def sha256(file: Path, told=lambda n: None) -> str:
    """Of a file's bytes; `told` hears of every block."""
    digest = hashlib.sha256()
    block = memoryview(bytearray(BLOCK))
    with open(file, "rb", buffering=0) as f:
        while n := f.readinto(block):
            digest.update(block[:n])
            told(n)
    return digest.hexdigest()


def differing(root: Path, wanted: Mapping[str, str], afresh: bool = False) -> Iterator[tuple[str, str | None]]:
    """(path, its SHA-256 or None where it is not there) of the files below `root` that are not what they should be.

    `wanted`: path -> SHA-256. `afresh`: read every byte, whatever is remembered."""
    root = root.absolute()
    unread: list[tuple[str, str, tuple[int, int, int, int]]] = []
    for name in wanted:
        file = f"{root}/{name}"
        try:
            stat = _stat(file)
        except OSError:
            yield name, None
            continue
        if afresh or _seen.get(file, ())[:4] != stat:
            unread.append((name, file, stat))
        elif _seen[file][4] != wanted[name]:
            yield name, _seen[file][4]
    size = sum(stat[0] for _, _, stat in unread)
    kept = _recall(root) if size >= LARGE and not afresh else {}
    unread = [u for u in unread if kept.get(u[1], ())[:4] != u[2] or kept[u[1]][4] != wanted[u[0]]]
    if not unread:
        return
    large = sum(stat[0] for _, _, stat in unread) >= LARGE
    with progress.task("verify", total=size, unit="B") if large else nullcontext(lambda n: None) as advance:
        for name, file, stat in unread:
            try:
                found = sha256(Path(file), advance)
            except FileNotFoundError:  # compacted away meanwhile
                yield name, None
                continue
            _settle(file, stat, found)
            if found != wanted[name]:
                yield name, found
    if size >= LARGE:
        _remember(root)


def _stat(file: str) -> tuple[int, int, int, int]:
    s = os.stat(file)
    return s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino


def _settle(file: str, stat: tuple[int, int, int, int], digest: str) -> None:
    if stat[2] + SETTLED < time.time_ns():
        _seen[file] = (*stat, digest)


def _cache(root: Path) -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "ralm" / "verified" / f"{hashlib.sha256(os.fsencode(root)).hexdigest()[:24]}.json"


def _recall(root: Path) -> dict[str, Known]:
    """What an earlier process found the files below `root` to be."""
    try:
        kept = {str(file): tuple(known) for file, known in json.loads(_cache(root).read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError, TypeError, RuntimeError):
        return {}  # none, or not readable: the files are read again
    for file, known in kept.items():
        _seen.setdefault(file, known)
    return kept


def _remember(root: Path) -> None:
    """Keep what was found for the next process; where the cache folder cannot be written, the next one reads the files again."""
    inside = f"{root}/"
    known = {file: facts for file, facts in _seen.items() if file.startswith(inside) and os.path.exists(file)}
    try:
        file = _cache(root)
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(known), encoding="utf-8")
        temporary.replace(file)
    except (OSError, RuntimeError):
        pass


def sealed(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What goes into a JSON file, with the checksum of the rest of it as "sum"."""
    return {**facts, "sum": _sum(facts)}


def unsealed(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The same without. Raises ValueError where it is not that of the rest; files of older releases have none."""
    rest = dict(facts)
    told = rest.pop("sum", None)
    if told is not None and told != _sum(rest):
        raise ValueError("its checksum differs")
    return rest


def _sum(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


# ---- the tables of a store -------------------------------------------------------------------------------------------


def listed(path: Path, table: str = "") -> dict[str, str]:
    """sums.txt as {path: SHA-256}, of one table or of all. Raises StoreError where it is not what a writer writes."""
    file = str((path / NAME).absolute())
    try:
        stat = _stat(file)
        if _lists.get(file, ((),))[0] != stat:
            _lists[file] = stat, _parsed(path, Path(file).read_bytes())
            while len(_lists) > 64:
                del _lists[next(iter(_lists))]
    except FileNotFoundError:
        return {}
    return {name: digest for name, digest in _lists[file][1].items() if name.startswith(table)}


def _parsed(path: Path, raw: bytes) -> dict[str, str]:
    out = {}
    lines = raw[:raw.rfind(b"\n") + 1].decode("utf-8", "replace").splitlines()  # a killed writer may leave half a line at the end
    for number, line in enumerate(lines, 1):
        digest, gap, name = line[:64], line[64:66], line[66:]
        if gap != "  " or not digest.isalnum() or ".lance/" not in name or ".." in name:
            raise StoreError(f"{path / NAME} is damaged (line {number}): restore it from a copy, or where nothing else is wrong "
                             f"write it anew: rm {path / NAME} && ralm compact {path}")
        out[name] = digest
    return out


def files(path: Path, table: str) -> list[str]:
    """The files of a table that carry a checksum, as paths relative to the store."""
    out = []
    for folder in ("data", "_deletions", "_versions", "_transactions"):
        try:
            with os.scandir(path / f"{table}.lance" / folder) as entries:
                out += [f"{table}.lance/{folder}/{e.name}" for e in entries if e.name not in HINTS and e.is_file()]
        except FileNotFoundError:
            pass
    return sorted(out)


def extend(path: Path, table: str) -> None:
    """List the files of a table that are not listed yet, forget those that are gone. By the writer, after every commit."""
    known, there = listed(path), files(path, table)
    new = [name for name in there if name not in known]
    gone = {name for name in known if name.startswith(f"{table}.lance/")} - set(there)
    lines = []
    for name in new:
        file = f"{path.absolute()}/{name}"
        stat, digest = _stat(file), sha256(Path(file))
        _settle(file, stat, digest)
        lines.append(f"{digest}  {name}\n")
    if len(gone) > 64 + len(known) // 2 or (gone and not (path / NAME).exists()):
        kept = "".join(f"{digest}  {name}\n" for name, digest in known.items() if name not in gone)
        temporary = path / f"{NAME}.{os.getpid()}.tmp"
        temporary.write_text(kept + "".join(lines), encoding="utf-8")
        temporary.replace(path / NAME)
    elif lines:
        with open(path / NAME, "ab+") as f:
            if f.tell():
                f.seek(-1, os.SEEK_END)
                if f.read(1) != b"\n":  # half a line of a killed writer
                    f.seek(0)
                    f.truncate(f.read().rfind(b"\n") + 1)
            f.write("".join(lines).encode())


def version_of(name: str) -> int:
    """The version that a manifest file of Lance holds; -1 for other files."""
    folder, _, file = name.rpartition("/")
    stem = file.removesuffix(".manifest")
    if not folder.endswith("_versions") or not stem.isdigit():
        return -1
    return 2**64 - 1 - int(stem) if len(stem) == 20 else int(stem)


def check(path: Path, table: str, version: int | None = None) -> None:
    """Compare the files that a version of a table is read from. Raises StoreError naming the first that is not what was written."""
    wanted = listed(path, f"{table}.lance/")
    if not wanted:
        return
    versions = {version_of(name): name for name in wanted}
    newest = max(versions)
    there = max((version_of(name) for name in files(path, table)), default=-1)
    if there < newest:
        raise wrong(path, versions[newest], None)
    needed = {name: digest for name, digest in wanted.items()
              if "/data/" in name or "/_deletions/" in name or version_of(name) in (newest if version is None else version, there)}
    for name, found in differing(path, needed):
        if found is not None:  # one that is gone: compacted away, or Lance says so when it is read
            raise wrong(path, name, found)


def check_log(path: Path, table: str) -> None:
    """The same for the versions and transactions that the history is told from."""
    log = {n: d for n, d in listed(path, f"{table}.lance/").items() if "/_transactions/" in n or "/_versions/" in n}
    for name, found in differing(path, log):
        if found is not None:
            raise wrong(path, name, found)


def wrong(path: Path, name: str, found: str | None) -> StoreError:
    return StoreError(f"{path / name} {_how(found)} ({NAME} has its checksum): restore it from a copy, or build the datastore "
                      "again")


def _how(found: str | None) -> str:
    return "is missing" if found is None else "is not what was written"


def everything(path: Path, tables: Iterable[str]) -> tuple[list[str], list[str]]:
    """(what is wrong, files without a checksum) of all tables, every byte read."""
    bad, new = [], []
    for table in tables:
        wanted, there = listed(path, f"{table}.lance/"), files(path, table)
        new += [name for name in there if name not in wanted]
        newest = max(map(version_of, there), default=-1)
        for name, found in differing(path, wanted, afresh=True):
            if found is not None or version_of(name) > newest:
                bad.append(str(wrong(path, name, found)))
    return bad, new
