"""Bytes of a file, whatever they are packed in: counted as they are read, lines with a bound, encodings.

Nothing here holds more than one line or one text (CAP bytes). What cannot be read raises Reason, which says only why;
read.py knows the file's name and turns it into a skipped file or, under strict, a ReadError."""

from __future__ import annotations

import codecs
import gzip
import io
import re
from collections.abc import Callable, Iterator
from typing import BinaryIO

import zstandard

BLOCK = 1 << 20
FIRST = 64 << 10
CAP = 256 << 20  # most bytes of one line, one row or one text
RATIO = 500  # beyond CAP bytes, a file that expands more than this is refused: text expands 2 to 20 times, deflate at most 1032
EMPTY = 1_000_000  # lines of nothing but their end, in a row: only a decompression bomb has as many
PIECE = 8 << 10  # a zstd block of 4 bytes can stand for 128 KiB, so this much input gives at most CAP at once

BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
        (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))  # UTF-32 first: its mark begins with that of UTF-16
DECLARED = r"iso8859|cp12|cp8|cp9|koi8|shift_jis|euc_|gb|big5|mac|tis|hz|iso2022|johab"  # Python has codecs that are no encodings
CONTROLS = bytes(set(range(32)) - set(b"\t\n\r\f\b\x1b")) + b"\x7f"


class Reason(Exception):
    """Why a file, the rest of a file, or a row of it cannot be read."""


class Metered(io.RawIOBase):
    """A stream whose bytes are reported as they are read; with `limit`, one that may not give more than that."""

    def __init__(self, inner: BinaryIO, count: Callable[[int], None] | None = None, limit: int | None = None):
        self.inner, self.count, self.limit, self.given = inner, count, limit, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        n = self.inner.readinto(buffer) or 0
        self.given += n
        if self.limit is not None and self.given > self.limit:
            raise Reason(f"expands more than {RATIO}-fold, to over {self.given >> 20} MB: it looks like a decompression bomb; "
                         "unpack it yourself if you trust it")
        if self.count is not None and n:
            self.count(n)
        return n

    def close(self) -> None:
        if not self.closed:
            self.inner.close()
        super().close()


class Zstd(io.RawIOBase):
    """Decompresses zstd, any number of frames. zstandard's own stream_reader takes a truncated file for a complete one."""

    def __init__(self, inner: BinaryIO):
        self.inner, self.frame, self.left, self.ready, self.at = inner, None, b"", b"", 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while self.at == len(self.ready):
            piece = self.left or self.inner.read(PIECE)
            if not piece:
                if self.frame is not None:
                    raise Reason("ends in the middle of a zstd frame: it is truncated")
                return 0
            if self.frame is None:
                self.frame = zstandard.ZstdDecompressor().decompressobj()
            self.ready, self.at, self.left = self.frame.decompress(piece), 0, b""
            if self.frame.eof:
                self.left, self.frame = self.frame.unused_data, None
        n = min(len(buffer), len(self.ready) - self.at)
        buffer[:n] = memoryview(self.ready)[self.at:self.at + n]
        self.at += n
        return n

    def close(self) -> None:
        if not self.closed:
            self.inner.close()
        super().close()


def unpacked(raw: io.RawIOBase, packing: str, size: int) -> io.BufferedReader:
    """The bytes inside `raw`, which the caller closes: a file of `size` bytes packed as "", ".gz" or ".zst"."""
    if packing:
        raw = io.BufferedReader(raw, BLOCK)
        raw = Metered(gzip.GzipFile(fileobj=raw) if packing == ".gz" else Zstd(raw), limit=max(CAP, RATIO * size))
    return io.BufferedReader(raw, BLOCK)


def whole(stream: BinaryIO) -> bytes:
    """All bytes of a stream of at most CAP bytes."""
    data = stream.read(FIRST)  # most are small: room for CAP bytes takes longer to get than they to read
    if len(data) == FIRST:
        data += stream.read(CAP + 1 - FIRST)
    if len(data) > CAP:
        raise Reason(f"is one text of more than {CAP >> 20} MB: cut it into several files or into rows of a .jsonl")
    return data


class Transcoded(io.RawIOBase):
    """UTF-16 or UTF-32 bytes as UTF-8 bytes."""

    def __init__(self, inner: BinaryIO, encoding: str):
        self.inner, self.name, self.ready = inner, encoding, b""
        self.decoder = codecs.getincrementaldecoder(encoding)()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self.ready:
            block = self.inner.read(BLOCK)
            try:
                self.ready = self.decoder.decode(block, final=not block).encode("utf-8")
            except UnicodeError as e:
                raise Reason(f"begins with a byte order mark of {self.name} but is not valid {self.name}") from e
            if not block:
                break
        n = min(len(buffer), len(self.ready))
        buffer[:n], self.ready = self.ready[:n], self.ready[n:]
        return n


def lines(stream: io.BufferedReader, remark: Callable[[str], None]) -> Iterator[tuple[int, str | Reason]]:
    """(line number from 1, the line with its end) of a text file; a Reason in place of a line over CAP or one with NUL bytes.

    A line that is not UTF-8 is read as cp1252, and `remark` hears of the first one."""
    head = stream.peek(4)
    encoding = next((name for bom, name in BOMS if head.startswith(bom)), "")
    if encoding == "utf-8-sig":
        stream.read(len(codecs.BOM_UTF8))
    elif encoding:
        stream = io.BufferedReader(Transcoded(stream, encoding), BLOCK)
    if b"\0" in stream.peek(PIECE)[:PIECE]:
        raise Reason("looks binary (it holds NUL bytes)")
    number, empty, odd = 0, 0, False
    while line := stream.readline(CAP + 1):
        number += 1
        empty = empty + 1 if len(line) == 1 else 0
        if empty > EMPTY:
            raise Reason(f"has more than {EMPTY:,} lines in a row that are all but empty, up to line {number:,}")
        if len(line) > CAP:
            while line and not line.endswith(b"\n"):
                line = stream.readline(BLOCK)
            yield number, Reason(f"is longer than {CAP >> 20} MB")
        elif b"\0" in line:
            yield number, Reason("holds NUL bytes")
        else:
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError:
                if not odd:
                    remark(f"line {number} is not UTF-8: it, and any like it, is read as cp1252")
                text, odd = western(line), True
            yield number, text


def western(data: bytes) -> str:
    """Bytes that are not UTF-8, as the most common other encoding; latin-1, which takes anything, where that has no such byte."""
    try:
        return data.decode("cp1252")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def decode(data: bytes, declared: str = "") -> tuple[str, str]:
    """(text, remark) of a whole file, line ends as they are. `declared`: an encoding that it names itself, tried after UTF-8.

    Raises Reason where the bytes are no text."""
    for bom, name in BOMS:
        if data.startswith(bom):
            try:
                return data.decode(name), ""
            except UnicodeError as e:
                if name != "utf-8-sig":
                    raise Reason(f"begins with a byte order mark of {name} but is not valid {name}") from e
                data = data[len(bom):]
    head = data[:BLOCK]
    if b"\0" in data:
        raise Reason("looks binary (it holds NUL bytes)")
    if len(head) - len(head.translate(None, CONTROLS)) > len(head) // 20:
        raise Reason("looks binary (more than one byte in twenty is a control character)")
    try:
        return data.decode("utf-8"), ""
    except UnicodeDecodeError as e:
        at = e.start
    try:
        if declared and re.match(DECLARED, codecs.lookup(declared).name) and codecs.lookup(declared).name != "iso8859-1":
            return data.decode(declared), ""
    except (LookupError, UnicodeError):
        pass
    return western(data), f"is not UTF-8 (byte {at}): read as cp1252"


def clean(text: str) -> str:
    """Text without lone surrogates, which cannot be stored as UTF-8; everything else stays as it is."""
    if text.isascii():
        return text
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
