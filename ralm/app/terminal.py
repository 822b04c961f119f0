"""What the command line says and where: results on stdout, talk on stderr, bars only on a terminal.

Nothing heavy is imported here: rich comes with the first bar or the first coloured line."""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from cyclopts import Parameter

HEARTBEAT = 10.0  # seconds between progress lines where stderr is no terminal


# ---- results --------------------------------------------------------------------------------------------------------


@Parameter(name="*")
@dataclass(frozen=True)
class Output:
    """How a command prints its result."""

    json: Annotated[bool, Parameter(show_default=False, help="Print one JSON object on stdout; talk goes to stderr.")] = False
    quiet: Annotated[bool, Parameter(name=["--quiet", "-q"], show_default=False, help="No progress, no notes on stderr.")] = False

    def show(self, data: Mapping[str, Any], text: Callable[[], Iterable[str]]) -> None:
        """The result, once: `data` as JSON, or the lines `text()` gives."""
        if self.json:
            print(dumps(data))
        else:
            for line in text():
                print(line)


def plain(value: Any) -> Any:
    """A value as JSON knows it: numpy numbers become Python's, paths text; nan and inf become null, for JSON has neither."""
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):  # numpy arrays and scalars
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def dumps(data: Mapping[str, Any]) -> str:
    """One line of JSON in characters that stdout can take."""
    wide = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    return json.dumps(plain(data), ensure_ascii=not wide, allow_nan=False)


def table(rows: Sequence[Sequence[Any]], head: Sequence[str] = (), right: Iterable[int] = ()) -> list[str]:
    """Columns padded to their widest cell; `right` names the columns that hold numbers."""
    cells = [[str(c) for c in row] for row in ([head] if head else []) + list(rows)]
    if not cells:
        return []
    right = set(right)
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["  ".join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths))).rstrip()
             for row in cells]
    return [bold(lines[0]), *lines[1:]] if head else lines


def facts(pairs: Mapping[str, Any]) -> list[str]:
    """name  value, one a line."""
    width = max(map(len, pairs), default=0)
    return [f"{name.ljust(width)}  {value}" for name, value in pairs.items()]


def columns() -> int:
    """How wide text may be: the terminal's width, 100 at most; where stdout is no terminal, 100."""
    import shutil

    return min(100, shutil.get_terminal_size((100, 24)).columns) if sys.stdout.isatty() else 100


def wrapped(text: str, indent: str = "    ", most: int | None = None) -> list[str]:
    """A passage in lines, white space as one space; cut after `most` lines, and marked where it is cut."""
    import textwrap

    return textwrap.wrap(" ".join(text.split()), columns(), initial_indent=indent, subsequent_indent=indent,
                         max_lines=most, placeholder=" …", break_long_words=False, break_on_hyphens=False)


def bold(text: str) -> str:
    return _styled(text, "1")


def dim(text: str) -> str:
    return _styled(text, "2")


def _styled(text: str, code: str) -> str:
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    return f"\x1b[{code}m{text}\x1b[0m" if colour else text


def number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


def size(n: float) -> str:
    """Bytes for people: 1.4 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(n) < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def count(n: int, noun: str) -> str:
    """3 documents, 1 document."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


# ---- talk -----------------------------------------------------------------------------------------------------------


class Talk:
    """The progress sink of the command line: bars where stderr is a terminal, a line every few seconds where it is not."""

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self.terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self.lock = threading.RLock()
        self.progress = None  # rich's, while a task runs
        self.tasks: dict[int, _Task] = {}
        self.next = 0

    def start(self, stage: str, total: float | None, unit: str) -> int:
        with self.lock:
            self.next += 1
            task = self.tasks[self.next] = _Task(stage, total, unit, time.monotonic())
            if self.terminal and not self.quiet:
                if self.progress is None:
                    self.progress = _bars()
                    self.progress.start()
                task.bar = self.progress.add_task(stage, total=total, shown="")
            return self.next

    def advance(self, number: int, amount: float) -> None:
        with self.lock:
            task = self.tasks.get(number)
            if task is None:
                return
            task.done += amount
            if task.bar is not None and self.progress is not None:
                self.progress.update(task.bar, completed=task.done, shown=task.amount())
            elif not self.quiet and time.monotonic() - task.told > HEARTBEAT:
                task.told = time.monotonic()
                self._line(f"{task.stage}: {task.amount()}{task.left()}")

    def stop(self, number: int) -> None:
        with self.lock:
            task = self.tasks.pop(number, None)
            if task is None:
                return
            seconds = time.monotonic() - task.began
            if self.progress is not None and task.bar is not None:
                self.progress.remove_task(task.bar)
                if not self.tasks:
                    self.progress.stop()
                    self.progress = None
            if seconds > 5 and task.done and not self.quiet:
                self._line(f"{task.stage}: {task.amount(whole=False)} in {duration(seconds)}")

    def note(self, text: str) -> None:
        if not self.quiet:
            with self.lock:
                self._line(text)

    def close(self) -> None:
        """Take the bars off the screen, whatever happened."""
        with self.lock:
            if self.progress is not None:
                self.progress.stop()
                self.progress = None
            self.tasks.clear()

    def _line(self, text: str) -> None:
        if self.progress is not None:
            self.progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            _stderr(text)


@dataclass
class _Task:
    stage: str
    total: float | None
    unit: str
    began: float
    done: float = 0.0
    told: float = 0.0
    bar: Any = None

    def __post_init__(self):
        self.told = self.began

    def amount(self, whole: bool = True) -> str:
        if self.unit == "B":
            done, total = size(self.done), size(self.total or 0)
        else:
            done, total = f"{self.done:,.0f} {self.unit}".strip(), f"{self.total or 0:,.0f}"
        return f"{done} of {total}" if self.total and whole else done

    def left(self) -> str:
        """The rest at the rate so far; units are what costs time, so this is as honest as they are."""
        if not self.total or not self.done or self.done >= self.total:
            return ""
        return f", {duration((self.total - self.done) * (time.monotonic() - self.began) / self.done)} left"


def _bars():
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    return Progress(TextColumn("{task.description}", markup=False), BarColumn(bar_width=30), TextColumn("{task.fields[shown]}"),
                    TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=Console(stderr=True), transient=True)


def error(text: str) -> None:
    """The one line that ends a command that failed."""
    _stderr("ralm: " + " ".join(str(text).split()))


def _stderr(text: str) -> None:
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:  # nobody listens any more
        pass
