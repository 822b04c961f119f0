"""One progress sink for the whole library: silent by default, a bar in the terminal, an event stream in a server.

    with progress.task("encode", total=n_bytes, unit="B") as advance:
        for batch in batches: ...; advance(batch_bytes)

Work is counted in what costs time (bytes, chunks), never in files, so the ETA is honest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol


class Sink(Protocol):
    def start(self, stage: str, total: float | None, unit: str) -> int: ...
    def advance(self, task: int, amount: float) -> None: ...
    def stop(self, task: int) -> None: ...
    def note(self, text: str) -> None: ...


class Silent:
    """The default: a library does not talk."""

    def start(self, stage: str, total: float | None, unit: str) -> int:
        return 0

    def advance(self, task: int, amount: float) -> None: ...
    def stop(self, task: int) -> None: ...
    def note(self, text: str) -> None: ...


_sink: Sink = Silent()


def use(sink: Sink) -> None:
    """Install the sink that all library code reports to (the command line does it once)."""
    global _sink
    _sink = sink


@contextmanager
def task(stage: str, total: float | None = None, unit: str = "") -> Iterator[Callable[[float], None]]:
    """Report a stage of work; yields `advance(amount)`."""
    sink = _sink
    number = sink.start(stage, total, unit)
    try:
        yield lambda amount=1: sink.advance(number, amount)
    finally:
        sink.stop(number)


def note(text: str) -> None:
    """One line of talk (a skipped file, a chosen default)."""
    _sink.note(text)


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' own bars: a library does not talk."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            logging.enable_progress_bar()
