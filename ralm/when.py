"""WHEN to retrieve. A schedule sees only the past: how many tokens of context there are, how many there were at the last
retrieval (None: none yet in this window), and how sure the model is of its next token.

The engine adds two rules: a prompt is a question, so retrieval is always due where it ends (for a query without a prompt,
at the beginning); and every new context window starts afresh (`last` is None), since evidence does not survive the context it
was fetched for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ralm.errors import UsageError
from ralm.registry import make, real, whole
from ralm.types import Schedule, Segment


@dataclass(frozen=True)
class Never:
    """No retrieval: the base language model."""

    adaptive: ClassVar[bool] = False

    def due(self, t: int, last: int | None, confidence: float | None) -> bool:
        return False


@dataclass(frozen=True)
class Once:
    """Once per context window, as soon as `after` tokens of context can form the query (RAG, REPLUG)."""

    after: int = 32
    adaptive: ClassVar[bool] = False

    def __post_init__(self):
        whole(1, after=self.after)

    def due(self, t: int, last: int | None, confidence: float | None) -> bool:
        return last is None and t >= self.after


@dataclass(frozen=True)
class EveryN:
    """Every n tokens (In-Context RALM's stride s; RETRO's m; n=1 is kNN-LM's every token), first after n tokens of context:
    before the first token there is nothing to ask yet."""

    n: int = 4
    adaptive: ClassVar[bool] = False

    def __post_init__(self):
        whole(1, n=self.n)

    def due(self, t: int, last: int | None, confidence: float | None) -> bool:
        return t - (last or 0) >= self.n


@dataclass(frozen=True)
class Adaptive:
    """When the model's largest next-token probability falls below `theta`, at most every `rest` tokens (FLARE's trigger,
    token by token)."""

    theta: float = 0.4
    rest: int = 1
    after: int = 1
    adaptive: ClassVar[bool] = True

    def __post_init__(self):
        if not real(self.theta) or not 0 <= self.theta <= 1:
            raise UsageError(f"theta={self.theta} is not a probability; use 0..1")
        whole(1, rest=self.rest, after=self.after)

    def due(self, t: int, last: int | None, confidence: float | None) -> bool:
        if t < self.after or confidence is None or (last is not None and t - last < self.rest):
            return False
        return confidence < self.theta


SCHEDULES = {"never": Never, "once": Once, "every": EveryN, "adaptive": Adaptive}


def schedule(spec: str) -> Schedule:
    """`once`, `once:16`, `every:4`, `adaptive:theta=0.3,rest=8`. Raises UsageError for anything else."""
    return make("schedule", spec, SCHEDULES)


def windows(n: int, size: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Context windows over n tokens: (context, start, stop), tokens [start, stop) are predicted having seen [context, ...).

    The first window predicts `size` tokens; each later one predicts `stride` tokens after size - stride of context:

        size 4, stride 2:   0 1 2 3 | 2 3 [4 5] | 4 5 [6 7] ...      every token is predicted exactly once

    Which window a token falls into depends on its position alone, so scoring a text and streaming it see the same context."""
    start = 0
    while start < n:
        context, stop = window_of(start, size, stride)[::2]
        yield context, start, min(stop, n)
        start = stop


def window_of(t: int, size: int, stride: int) -> tuple[int, int, int]:
    """The window (context, start, stop) that predicts token t; see `windows`."""
    if t < size:
        return 0, 0, size
    start = size + (t - size) // stride * stride
    return start + stride - size, start, start + stride


def plan(when: Schedule, start: int, stop: int, forced: int | None = None) -> list[Segment]:
    """Segments of [start, stop) for a schedule that is not adaptive; positions count from the beginning of the context.

    `forced`: a position where retrieval is due whatever the schedule says (the end of a prompt)."""
    segments: list[Segment] = []
    begin, at = start, None
    for t in range(start, stop):
        if t == forced or when.due(t, at, None):
            if t > begin:
                segments.append(Segment(begin, t, at))
            begin = at = t
    return segments + [Segment(begin, stop, at)]


def pieces(segments: Sequence[Segment], most: int) -> list[list[Segment]]:
    """Consecutive segments in groups of `most` tokens (the last group: what is left), segments cut where a group is full. A cut
    segment keeps its evidence: `at` stands before both parts."""
    out: list[list[Segment]] = []
    room = 0
    for s in segments:
        start = s.start
        while start < s.stop:
            if not room:
                out.append([])
                room = most
            stop = min(s.stop, start + room)
            out[-1].append(Segment(start, stop, s.at))
            room -= stop - start
            start = stop
    return out
