"""One writer at a time: an advisory lock on a file, which the kernel releases when its holder dies."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ralm.errors import StoreError


class WriteLock:
    """`with lock.hold():` nests within one thread; StoreError at once where another process, store object or thread holds it."""

    def __init__(self, path: Path):
        self.path = path
        self._thread = threading.RLock()
        self._depth = 0

    @contextmanager
    def hold(self) -> Iterator[None]:
        if not self._thread.acquire(blocking=False):
            raise StoreError(f"another thread of process {os.getpid()} is writing to {self.path.parent}; wait for it")
        try:
            if self._depth == 0:
                self._file = self._take()
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                if self._depth == 0:
                    os.close(self._file)
        finally:
            self._thread.release()

    def _take(self) -> int:
        import fcntl

        try:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as e:
            raise StoreError(f"cannot write to {self.path.parent} ({e.strerror}); it can be read, not changed") from e
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            holder = os.pread(file, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(file)
            raise StoreError(f"process {holder} is writing to {self.path.parent}, and there can be one writer at a time; "
                             "wait until it ends") from e
        os.ftruncate(file, 0)
        os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
        return file
