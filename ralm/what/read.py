"""Files and folders -> Documents, one at a time.

    for document in read("handbook/", "papers.zip", "psgs_w100.tsv.gz"): ...

Kinds: plain text, Markdown, source code, PDF, DOCX (formats.py); HTML (webpage.py); jsonl, json, csv, tsv, parquet (records.py);
zip files of these and BEIR sets, of which only the corpus becomes documents (archive.py). Each may be packed as .gz or .zst. Which
files, and under which ids: walk.py. Row files are never held in memory; a file that is one document is, up to 256 MB."""

from __future__ import annotations

import gzip
import lzma
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import zstandard

from ralm import progress
from ralm.errors import MissingDependency, ReadError
from ralm.types import Document
from ralm.what import formats, records, webpage
from ralm.what.archive import members
from ralm.what.stream import CAP, RATIO, Metered, Reason, clean, unpacked, whole
from ralm.what.walk import File, find, kind_of

HOPELESS = 1_000_000  # rows in a row that cannot be read, after which the rest of a file is left: 100 bytes may unpack to as many
NOTES = 20  # files that are named one by one; of the rest only the number
FAULTS = (Reason, OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError, zipfile.BadZipFile, UnicodeError, MemoryError)


def read(*paths: str | os.PathLike, strict: bool = False, skipped: list | None = None) -> Iterator[Document]:
    """The documents of files and folders (searched deep, in sorted order; hidden files left out).

    A file or row that cannot be read is named with the reason through progress.note, appended to `skipped` as (path, reason), and
    passed over; strict=True raises ReadError with the same words instead. Documents from before the damage stay valid.
    Raises UsageError, before anything is read, for a path that does not exist and for a named file of unknown suffix;
    MissingDependency for a named file whose package is not installed."""
    faults = Faults(strict, skipped if skipped is not None else [])
    files, notes = find(paths, faults.skip)
    return _documents(files, notes, faults)


@dataclass
class Faults:
    """What could not be read: told, remembered, or raised."""

    strict: bool
    skipped: list
    rows: dict[str, list[int]] = field(default_factory=dict)  # of the file at hand: reason -> [how often, first line]
    told: int = 0
    remarked: int = 0

    def skip(self, path: str, reason: str) -> None:
        reason = " ".join(reason.split())  # messages of other libraries may have several lines
        if self.strict:
            raise ReadError(f"{path}: {reason}")
        self.skipped.append((path, reason))
        self.told += 1
        if self.told <= NOTES:
            progress.note(f"skipped {path}: {reason}")

    def row(self, path: str, number: int, reason: str) -> None:
        if self.strict:
            raise ReadError(f"{path}:{number}: {reason}")
        if reason not in self.rows and len(self.rows) >= NOTES:
            reason = "other reasons"
        self.rows.setdefault(reason, [0, number])[0] += 1

    def end_file(self, path: str, unit: str) -> None:
        """One line for each reason why rows of this file were left out."""
        rows, self.rows = self.rows, {}
        for reason, (times, first) in rows.items():
            self.skip(path, f"{unit} {first} {reason}" if times == 1 else f"{times:,} rows: {reason} (first: {unit} {first})")

    def remark(self, path: str, text: str) -> None:
        """Something to know about a file that was read."""
        self.remarked += 1
        if self.remarked <= NOTES:
            progress.note(f"{path}: {text}")

    def end(self) -> None:
        if self.told > NOTES:
            progress.note(f"skipped {self.told - NOTES:,} more")
        if self.remarked > NOTES:
            progress.note(f"{self.remarked - NOTES:,} more remarks like these")


class Meter:
    """A file's share of the progress: what is counted never exceeds its size, and ends there."""

    def __init__(self, size: int, advance: Callable[[float], None]):
        self.left, self.advance = size, advance

    def count(self, amount: float) -> None:
        amount = min(amount, self.left)
        self.left -= amount
        self.advance(amount)

    def end(self) -> None:
        self.count(self.left)


def _documents(files: list[File], notes: list[str], faults: Faults) -> Iterator[Document]:
    for text in notes:
        progress.note(text)
    with progress.task("read", total=sum(f.size for f in files), unit="B") as advance:
        for file in files:
            meter = Meter(file.size, advance)
            yield from _file(file, partial(_opened, file.path, meter), meter, faults)
            meter.end()
            if _changed(file):
                faults.remark(file.source, "changed while it was read: what came of it is kept; read it again once it is at rest")
    faults.end()


def _changed(file: File) -> bool:
    """Whether a file is no longer what it was when it was found; one that is gone was read to its end, or is skipped by name."""
    try:
        facts = os.stat(file.path)
    except OSError:
        return False
    return (facts.st_size, facts.st_mtime_ns) != (file.size, file.changed)


def _opened(path: str, meter: Meter) -> Metered:
    return Metered(open(path, "rb", buffering=0), meter.count)  # closed by the one who reads it


def _file(file: File, opened: Callable[[], Metered], meter: Meter, faults: Faults) -> Iterator[Document]:
    """The documents of one file; what is wrong with it goes to `faults`."""
    given, why, told = 0, "", faults.told
    try:
        for document in _parts(file, opened, meter, faults):
            given += 1
            yield document
        if not given and not faults.rows and faults.told == told:
            why = "holds no file of a kind that is read" if file.kind == "zip" else "is empty"
    except MissingDependency as e:
        if file.named:
            raise
        why = str(e)
    except FAULTS as e:
        why = _why(e) + (f"; the {given:,} documents before that are kept" if given else "")
    faults.end_file(file.source, "line" if file.kind in ("jsonl", "csv", "tsv") else "row")
    if why:
        faults.skip(file.source, why)


def _why(error: BaseException) -> str:
    if isinstance(error, Reason):
        return str(error)
    if isinstance(error, EOFError):
        return "is truncated: its compressed data ends too early"
    if isinstance(error, gzip.BadGzipFile | zlib.error | lzma.LZMAError | zstandard.ZstdError):
        return f"holds damaged compressed data ({error})"
    if isinstance(error, zipfile.BadZipFile):
        return f"is not a zip file that can be read ({error})"
    if isinstance(error, MemoryError):
        return "does not fit in memory"
    return f"cannot be read ({getattr(error, 'strerror', None) or error})"


def _parts(file: File, opened: Callable[[], Metered], meter: Meter, faults: Faults) -> Iterator[Document]:
    if file.kind == "zip":
        yield from _zip(file, meter, faults)
        return
    if file.path and not file.packing and file.kind in ("pdf", "parquet"):
        if file.kind == "pdf":
            yield _document(file, formats.pdf(file.path), faults)
        else:
            yield from _rows(file, records.parquet(file.path, lambda share: meter.count(share * file.size)), faults)
        return
    with opened() as raw, unpacked(raw, file.packing, file.size) as stream:
        if file.kind in records.FORMATS:
            yield from _rows(file, records.FORMATS[file.kind](stream, partial(faults.remark, file.source)), faults)
        elif file.kind == "parquet":
            yield from _rows(file, records.parquet(whole(stream), lambda share: None), faults)
        else:
            yield _document(file, _page(file, whole(stream)), faults)


def _rows(file: File, rows: Iterator[records.Row], faults: Faults) -> Iterator[Document]:
    bad = 0
    for number, row in rows:
        try:
            document = records.document(row, f"{file.id}:{number}", file.source)
        except Reason as e:
            faults.row(file.source, number, str(e))
            bad += 1
            if bad >= HOPELESS:
                raise Reason(f"has {bad:,} rows in a row that cannot be read, up to {number:,}: the rest of it is left") from e
        else:
            bad = 0
            yield document


def _page(file: File, data: bytes) -> formats.Page:
    if file.kind == "text":
        name = file.id.lower().removesuffix(file.packing)
        return formats.markdown(data) if name.endswith((".md", ".markdown")) else formats.plain(data)
    return {"html": webpage.html, "pdf": formats.pdf, "docx": formats.docx}[file.kind](data)


def _document(file: File, page: formats.Page, faults: Faults) -> Document:
    if records.blank(page.text):
        raise Reason("is empty")
    if page.remark:
        faults.remark(file.source, page.remark)
    text, title, date, licence = (clean(v) for v in (page.text, page.title, page.date, page.licence))
    return Document(file.id, text, title, file.source, licence, date)


def _zip(file: File, meter: Meter, faults: Faults) -> Iterator[Document]:
    """The documents of an archive's members, unpacked in memory: no name in it ever becomes a path on the disk."""
    try:
        archive = zipfile.ZipFile(file.path)
    except Exception as e:  # a damaged directory makes zipfile raise struct.error, ValueError, NotImplementedError and more
        raise Reason(f"is not a zip file that can be read ({e})") from e
    with archive:
        left = max(CAP, RATIO * file.size)  # bytes that all members together may give
        for name, member in members(archive, file.source, faults.skip, faults.remark):
            kind, packing = kind_of(name)
            inner = File("", f"{file.source}/{name}", f"{file.id}/{name}", kind, packing, member.file_size)
            share = member.compress_size / max(1, member.file_size)
            streams: list[Metered] = []
            yield from _file(inner, partial(_member, archive, member, lambda n, share=share: meter.count(n * share), left, streams),
                             meter, faults)
            left -= sum(s.given for s in streams)


def _member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, count: Callable[[float], None], left: int,
            streams: list[Metered]) -> Metered:
    try:
        streams.append(Metered(archive.open(member), count, left))
    except (RuntimeError, NotImplementedError, ValueError, struct.error) as e:  # encrypted, or an unknown packing
        raise Reason(f"cannot be unpacked ({e})") from e
    return streams[-1]
