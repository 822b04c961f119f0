"""Which members of a zip file are read: the same kinds as in a folder, no name that leads out of it, of BEIR only the corpus."""

from __future__ import annotations

import posixpath
import zipfile
from collections import Counter
from collections.abc import Callable

from ralm.what.walk import LEFT_OUT, beir, ending, kind_of, printable


def members(archive: zipfile.ZipFile, source: str, skip: Callable[[str, str], None],
            remark: Callable[[str, str], None]) -> list[tuple[str, zipfile.ZipInfo]]:
    """(name, member) of what is read, sorted; of several members of one name the last, as unzip would leave it."""
    inside = {m.filename: m for m in archive.infolist() if m.filename and not m.filename.endswith("/")}
    folders: dict[str, set[str]] = {}  # folder -> names of the files and folders directly in it
    for name in inside:
        while name:
            parent, _, last = name.rpartition("/")
            folders.setdefault(parent, set()).add(last)
            name = parent
    aside = {posixpath.join(folder, name) for folder, names in folders.items() for name in beir(sorted(names))}
    unknown: Counter[str] = Counter()
    kept = []
    for name in sorted(inside):
        parts = name.replace("\\", "/").split("/")
        if name.startswith(("/", "\\")) or ".." in parts or ":" in parts[0]:
            skip(f"{source}/{printable(name)}", "has a name that leads out of the archive")
        elif any(p.startswith(".") or p in LEFT_OUT for p in parts) or _under(name, aside):
            continue
        elif (kind_of(parts[-1]) or ("zip", ""))[0] == "zip":
            unknown[ending(parts[-1])] += 1
        else:
            kept.append((name, inside[name]))
    if aside:
        remark(source, f"left out {', '.join(sorted(map(printable, aside)))} (of a BEIR set only the corpus becomes documents)")
    if unknown:
        listed = ", ".join(f"{n} {suffix}" for suffix, n in unknown.most_common(8))
        remark(source, f"left out {unknown.total()} files of kinds that are not read ({listed})")
    return kept


def _under(name: str, folders: set[str]) -> bool:
    """Whether a member is one of `folders` or inside one."""
    while name:
        if name in folders:
            return True
        name = name.rpartition("/")[0]
    return False
