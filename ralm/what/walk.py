"""From arguments to files: what is read, in which order, under which id.

A file's id is its path relative to the argument it was found under (for a file given by itself: its name), so reading the same
folder again from another working directory gives the same ids. Where several arguments would give one id twice, those arguments
all get as many of their last path components in front as it takes to tell them apart, whatever their order."""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ralm.errors import UsageError

KINDS = {
    "txt text md markdown rst adoc asciidoc org tex log srt vtt": "text",
    "py pyi js mjs ts jsx tsx java c h cc cpp cxx hh hpp cs go rs rb php swift kt scala r jl lua pl pm sh bash zsh fish ps1 bat "
    "sql hs ml mli clj ex exs erl el lisp scm f f90 pas d nim zig dart vim cmake proto graphql tf css scss less": "text",
    "yaml yml toml ini cfg conf properties xml": "text",
    "html htm xhtml": "html", "pdf": "pdf", "docx": "docx",
    "jsonl ndjson": "jsonl", "json": "json", "csv": "csv", "tsv": "tsv", "parquet": "parquet", "zip": "zip",
}
SUFFIXES = {f".{suffix}": kind for names, kind in KINDS.items() for suffix in names.split()}
PACKINGS = (".gz", ".zst")
PLAIN = {"readme", "license", "licence", "copying", "changelog", "changes", "notice", "authors", "news", "todo", "install",
         "history", "contributing", "makefile", "dockerfile"}  # names without a suffix that are text wherever they are found
LEFT_OUT = {"__pycache__", "node_modules", "__MACOSX", "CVS", "lost+found"}  # and everything that begins with a dot


@dataclass(frozen=True, slots=True)
class File:
    path: str  # where it is
    source: str  # the same as the user would write it
    id: str
    kind: str  # a value of KINDS
    packing: str = ""  # "", ".gz" or ".zst"
    size: int = 0  # bytes on disk
    named: bool = False  # given by itself, not found in a folder
    changed: int = 0  # when it last was, in ns


def kind_of(name: str, named: bool = False) -> tuple[str, str] | None:
    """(kind, packing) of a file by its name, None where the suffix is not known. A named file without a suffix is text."""
    stem, suffix = os.path.splitext(name)
    packing = suffix.lower() if suffix.lower() in PACKINGS else ""
    if packing:
        stem, suffix = os.path.splitext(stem)
    kind = SUFFIXES.get(suffix.lower())
    if kind is None and not suffix and (named or stem.lower() in PLAIN):
        kind = "text"
    return None if kind is None or (kind == "zip" and packing) else (kind, packing)


def ending(name: str) -> str:
    """What to call the kind of a file that is not read: its suffix, with that of its packing."""
    stem, suffix = os.path.splitext(os.path.basename(name).lower())
    return printable((os.path.splitext(stem)[1] if suffix in PACKINGS else "") + suffix) or "without a suffix"


def known() -> str:
    """The suffixes that are read, as a phrase for error messages."""
    return f"{' '.join(sorted(s for s in SUFFIXES))}, each also with {' or '.join(PACKINGS)}"


def printable(path: str) -> str:
    """A file name as text of one line: undecodable bytes and control characters are written out, so two names never become one."""
    return re.sub("[\ud800-\udfff\0-\x1f\x7f]", _written_out, path)


def _written_out(match: re.Match) -> str:
    code = ord(match[0])
    return f"\\x{code - 0xdc00:02x}" if 0xdc80 <= code <= 0xdcff else match[0].encode("unicode_escape").decode("ascii")


def beir(names: Sequence[str]) -> set[str]:
    """Of the names in one folder: those that are BEIR's queries and judgements, empty where the folder is no BEIR set."""
    if not any(n.partition(".")[0] == "corpus" and (kind_of(n) or "")[0:1] == ("jsonl",) for n in names):
        return set()
    return {n for n in names if n == "qrels" or (n.partition(".")[0] == "queries" and (kind_of(n) or "")[0:1] == ("jsonl",))}


def find(paths: Sequence[str | os.PathLike], bad: Callable[[str, str], None]) -> tuple[list[File], list[str]]:
    """The files of all arguments in a fixed order, each file once, and notes on what was left out.

    Raises UsageError for a path that is not there or a named file of unknown suffix. `bad` hears of unreadable folders."""
    if not paths:
        raise UsageError("nothing to read: give at least one file or folder")
    found: list[list[File]] = []
    notes: list[str] = []
    seen: set[str] = set()
    arguments = [os.fspath(p) for p in paths]
    for argument in arguments:
        if isinstance(argument, bytes) or "\0" in argument:
            raise UsageError(f"{argument!r} is not a path: give paths as text")
        if not os.path.exists(argument):
            raise UsageError(f"{printable(argument)} does not exist (looked in {printable(os.getcwd())})")
    for argument in arguments:
        if os.path.isdir(argument):
            found.append(_folder(argument, seen, bad, notes))
        else:
            found.append(_single(argument, seen))
    return [file for files in _apart(arguments, found) for file in files], notes


def _single(path: str, seen: set[str]) -> list[File]:
    name = os.path.basename(path)
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise UsageError(f"{printable(path)} is neither a file nor a folder: only these are read")
    kind = kind_of(name, named=True)
    if kind is None:
        raise UsageError(f"{printable(path)} is of a kind that is not read; known suffixes are {known()}")
    real = os.path.realpath(path)
    if real in seen:
        return []
    seen.add(real)
    facts = os.stat(path)
    return [File(path, printable(path), printable(name), *kind, facts.st_size, named=True, changed=facts.st_mtime_ns)]


def _folder(root: str, seen: set[str], bad: Callable[[str, str], None], notes: list[str]) -> list[File]:
    files: list[File] = []
    unknown: Counter[str] = Counter()
    for relative, path, real, left_out in _walk(root, bad):
        if left_out:
            notes.append(f"{printable(path)}: left out ({left_out})")
            continue
        kind = kind_of(os.path.basename(path))
        if kind is None:
            unknown[ending(path)] += 1
            continue
        if real in seen:
            continue
        try:
            facts = os.stat(path)
        except OSError as e:  # gone meanwhile
            bad(printable(path), f"cannot be read ({e.strerror or e})")
            continue
        seen.add(real)
        files.append(File(path, printable(path), printable(relative), *kind, facts.st_size, changed=facts.st_mtime_ns))
    if unknown:
        listed = ", ".join(f"{n} {suffix}" for suffix, n in unknown.most_common(8))
        rest = unknown.total() - sum(n for _, n in unknown.most_common(8))
        notes.append(f"{printable(root)}: left out {unknown.total()} files of kinds that are not read ({listed}"
                     + (f", {rest} others)" if rest else ")"))
    if not files:
        notes.append(f"{printable(root)}: no file in it can be read; known suffixes are {known()}")
    return files


def _walk(folder: str, bad: Callable[[str, str], None]) -> Iterator[tuple[str, str, str, str]]:
    """(path relative to the argument, path, real path, why it is left out) of every regular file, sorted, links followed once.

    Links come last: a file keeps the name it has itself, whatever else points to it. A stack of our own, not recursion: folders may
    be nested deeper than Python's stack. What the listing of a folder says of its entries is not asked of each again."""
    visited: set[str] = set()
    stack, links = [("", folder, os.path.realpath(folder), True)], []
    while stack or links:
        relative, path, real, is_folder = stack.pop() if stack else _followed(*links.pop())
        if not is_folder:
            if is_folder is False:
                yield relative, path, real, ""
            continue
        if real in visited:  # a second link to it, or a loop
            continue
        visited.add(real)
        try:
            with os.scandir(path) as entries:
                there = {e.name: e for e in entries}
        except OSError as e:
            bad(printable(path), f"cannot be listed ({e.strerror or e})")
            continue
        aside = beir(list(there))
        for name in sorted(aside):
            yield os.path.join(relative, name), os.path.join(path, name), "", "of a BEIR set only the corpus becomes documents"
        for name in sorted(set(there) - aside, reverse=True):
            if name.startswith(".") or name in LEFT_OUT:
                continue
            place = f"{relative}/{name}" if relative else name, os.path.join(path, name)
            if there[name].is_symlink():
                links.append(place)
            else:
                stack.append((*place, os.path.join(real, name), _kind(there[name])))


def _followed(relative: str, path: str) -> tuple[str, str, str, bool | None]:
    """A link, as what it leads to."""
    return relative, path, os.path.realpath(path), True if os.path.isdir(path) else False if os.path.isfile(path) else None


def _kind(entry: os.DirEntry) -> bool | None:
    """True for a folder, False for a regular file, None for what would block for ever: a pipe or a device."""
    if entry.is_dir(follow_symlinks=False):
        return True
    return False if entry.is_file(follow_symlinks=False) else None


def _apart(arguments: Sequence[str], found: list[list[File]]) -> list[list[File]]:
    """The same files with ids that are unique over all arguments."""
    roots = [Path(os.path.realpath(a if os.path.isdir(a) else os.path.dirname(a) or ".")) for a in arguments]
    depth = [0] * len(found)
    ids = [[f.id for f in files] for files in found]
    while True:
        counts = Counter(i for some in ids for i in some)
        clash = [n for n, some in enumerate(ids) if any(counts[i] > 1 for i in some) and depth[n] < len(roots[n].parts)]
        if not clash:
            break
        for n in clash:
            depth[n] += 1
            front = "/".join(printable(p).strip("/") for p in roots[n].parts[-depth[n]:])
            ids[n] = [f"{front}/{f.id}" for f in found[n]]
    return [[replace(f, id=i) for f, i in zip(files, some)] for files, some in zip(found, ids)]
