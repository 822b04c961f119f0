"""Files of an evaluation: text lines in (gz and zst too), whole files out in one step, and a ledger that survives Ctrl-C."""

from __future__ import annotations

import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import zstandard

from ralm.errors import ReadError, UsageError
from ralm.what.stream import Reason, Zstd


@contextmanager
def opened(path: str | Path) -> Iterator[IO[str]]:
    """A text file for reading, UTF-8 (a byte order mark is dropped), unpacked where its name ends in .gz or .zst.

    Raises ReadError where it is missing, not UTF-8 or not what its name says it is packed with."""
    path = Path(path)
    try:
        with path.open("rb") as raw:
            stream: Any = raw
            if path.suffix == ".gz":
                stream = gzip.GzipFile(fileobj=raw)
            elif path.suffix == ".zst":
                stream = Zstd(raw)
            yield io.TextIOWrapper(stream, encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise ReadError(f"{path} is not UTF-8 text ({e.reason} at byte {e.start} of a block); convert it to UTF-8") from e
    except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError, EOFError, Reason) as e:
        raise ReadError(f"{path} cannot be unpacked as {path.suffix}: {e}; it is cut short or something else") from e
    except OSError as e:
        raise ReadError(f"{path} cannot be read: {e.strerror or e}") from e


def lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line without its end) of the lines that are not blank. Raises ReadError as `opened`."""
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line.rstrip("\r\n")


def bare_suffix(path: str | Path) -> str:
    """The suffix below .gz and .zst, lower case: '.jsonl' of 'a.JSONL.zst'."""
    path = Path(path)
    return Path(path.stem if path.suffix in (".gz", ".zst") else path.name).suffix.lower()


@contextmanager
def whole(path: str | Path) -> Iterator[IO[str]]:
    """A text file for writing that appears under its name complete or not at all; packed where its name ends in .gz or .zst.

    Devices and pipes (/dev/stdout) are written to as they are. Raises UsageError where nothing can be written there."""
    path = Path(path)
    straight = path.parts[:2] == ("/", "dev") or path.is_fifo()
    temporary = path if straight else path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        raw = temporary.open("wb")
    except OSError as e:
        raise UsageError(f"{path} cannot be written: {e.strerror or e}") from e
    try:
        with raw:
            stream: Any = raw
            if path.suffix == ".gz":
                stream = gzip.GzipFile("", "wb", fileobj=raw, mtime=0)
            elif path.suffix == ".zst":
                stream = zstandard.ZstdCompressor().stream_writer(raw, closefd=False)
            text = io.TextIOWrapper(stream, encoding="utf-8", newline="\n")
            yield text
            text.flush()
            if stream is not raw:
                stream.close()
            raw.flush()
            if not straight:
                os.fsync(raw.fileno())
        if not straight:
            temporary.replace(path)
    finally:
        if not straight:
            temporary.unlink(missing_ok=True)


class Ledger:
    """Rows of an evaluation, one JSON line each, written as they are made: an interrupted run goes on where it stopped.

    The first line says what the rows are rows of. Raises UsageError where the file at `path` holds rows of something else,
    ReadError where it is damaged (a last line cut short by a crash is dropped, that row is made again)."""

    def __init__(self, path: str | Path | None, of: Mapping[str, Any]):
        self.path, self.rows, self._file = None if path is None else Path(path), {}, None
        self.of = json.loads(json.dumps(of))
        if self.path is None:
            return
        kept = self._load() if self.path.is_file() and self.path.stat().st_size else 0
        try:
            self._file = self.path.open("ab")
        except OSError as e:
            raise UsageError(f"{self.path} cannot be written: {e.strerror or e}") from e
        self._file.truncate(kept)
        if not kept:
            self._write({"rows_of": self.of})

    def _load(self) -> int:
        """Read the rows that are there; how many bytes of the file are whole lines."""
        raw = self.path.read_bytes()
        kept = raw.rfind(b"\n") + 1
        if not kept and not raw.startswith(b'{"rows_of"'):  # one line of something else, not our first line cut short
            raise ReadError(f"{self.path}, line 1, is not a row of an evaluation; move the file away, or write to another one")
        for number, line in enumerate(raw[:kept].decode("utf-8", "replace").split("\n")[:-1], 1):
            try:
                row = json.loads(line)
                if number == 1:
                    self._same(row["rows_of"])
                else:
                    self.rows[row["id"]] = row
            except (ValueError, KeyError, TypeError) as e:
                raise ReadError(f"{self.path}, line {number}, is not a row of an evaluation ({e!r}); move the file away") from e
        return kept

    def _same(self, theirs: Mapping[str, Any]) -> None:
        for key in sorted(self.of.keys() | theirs.keys()):
            if self.of.get(key) != theirs.get(key):
                raise UsageError(f"{self.path} holds rows made with {key} = {theirs.get(key)!r}, this run has "
                                 f"{self.of.get(key)!r}; write to another file, or delete it to begin again")

    def add(self, row: Mapping[str, Any]) -> None:
        """Keep a row (it has an "id"); on disk before this returns."""
        self.rows[row["id"]] = dict(row)
        if self._file is not None:
            self._write(row)

    def _write(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
        self._file.flush()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
