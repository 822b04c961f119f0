"""Texts drawn from the system's distribution: one as events (`stream`), several at once (`stream_many`).

A run (model.py) gives the distribution of the next token; here it is drawn, told, and appended. Where several texts are drawn at
once, every step of all of them is one forward of the model and one search among the tokens (`Lockstep`), whatever the fusion: each
text takes the very step that it would take alone, and stops where it lacks an answer until all have said what they lack."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from ralm.errors import CapabilityError, UsageError
from ralm.types import Done, Event, Evidence, Retrieved

if TYPE_CHECKING:
    import torch

    from ralm.asked import Wanted
    from ralm.model import RALM

MOST = 64  # tokens, where nothing is said


class Draw:
    """From a distribution to a token, with the randomness of one text."""

    def __init__(self, seed: int, **settings: Any):
        import torch

        from ralm.lm.sample import check

        check(**settings)
        self.settings, self.generator = settings, torch.Generator().manual_seed(seed)

    def __call__(self, logp_V: torch.Tensor) -> int:
        from ralm.lm.sample import sample

        return int(sample(logp_V[None], generator=self.generator, **self.settings)[0])

    def ahead(self) -> Draw:
        """One that draws what this one is going to draw."""
        other = Draw(0, **self.settings)
        other.generator.set_state(self.generator.get_state())
        return other


def stream(ralm: RALM, prompt: str, *, max_tokens: int, seed: int, stop: Sequence[str], window: int | None, stride: int | None,
           exclude: tuple[str, ...], query: str | None, speculate: int | str, **settings: Any) -> Iterator[Event]:
    """As `RALM.stream`."""
    from ralm.how.rows import PrefixCache
    from ralm.speculate import Ahead, speculated

    check_length(max_tokens)
    stops, draw, ahead = _stops(stop), Draw(seed, **settings), Ahead.of(speculate)
    if "logits" not in ralm.lm.gives:
        if ahead is not None:
            raise CapabilityError(f"speculate={speculate} needs logits from the model, '{ralm.lm.name}' gives "
                                  f"{', '.join(sorted(ralm.lm.gives))} only; leave it out")
        return _remote(ralm, prompt, max_tokens, stops, window, stride, exclude, query, settings)
    run = ralm._run("", prompt, window, stride, exclude, query or prompt, lm=PrefixCache(ralm.lm))
    tokens = (drawn(run, draw, max_tokens) if ahead is None or not (run.finds or run.retrieves)
              else speculated(run, draw, max_tokens, ahead))
    return events(ralm, run, tokens, stops)


def _remote(ralm: RALM, prompt: str, max_tokens: int, stops, window, stride, exclude, query, settings) -> Iterator[Event]:
    """The same from a server, which draws for itself."""
    if "text" not in ralm.lm.gives:
        ralm._refuse("streaming", frozenset({"text"}))
    from ralm.how.cite import stream_remote

    if (settings["top_k"], settings["top_p"], window, stride) != (None, None, None, None):
        raise CapabilityError(f"'{ralm.lm.name}' is a server: top_k, top_p, window and stride are its own; leave them out")
    return stream_remote(ralm, prompt, max_tokens=max_tokens, temperature=settings["temperature"], stop=stops, exclude=exclude,
                         query=query)


def check_length(max_tokens: int) -> None:
    if max_tokens < 1:
        raise UsageError(f"max_tokens={max_tokens} asks for no token; use at least 1")


def _stops(stop: str | Sequence[str]) -> list[str]:
    return [s for s in ((stop,) if isinstance(stop, str) else stop) if s]


def drawn(run: Any, draw: Draw, most: int) -> Iterator[tuple[int, float]]:
    """(token, its ln p), one step after the other; a token belongs to the run once the next one is asked for."""
    import torch

    for _ in range(most):
        with torch.inference_mode():
            logp_V = run.step(len(run.ids))
        token = draw(logp_V)
        yield token, float(logp_V[token])
        run.ids.append(token)


def events(ralm: RALM, run: Any, tokens: Iterator[tuple[int, float]], stops: Sequence[str]) -> Iterator[Event]:
    """What drawn tokens are to a reader: evidence before the tokens it influences, whole characters, no stop text, Done."""
    began, telling = time.perf_counter(), Telling(ralm, run, stops)
    for token, logp in tokens:
        yield from telling.of(token, logp)
        if telling.reason:
            break
    yield from telling.end(time.perf_counter() - began)


class Telling:
    """The events of one text, token by token. reason: why it ended, "" while it goes on."""

    def __init__(self, ralm: RALM, run: Any, stops: Sequence[str]):
        from ralm.lm.pieces import Pieces

        self.ralm, self.run, self.told, self.reason = ralm, run, 0, ""
        self.pieces = Pieces(ralm.lm.tokenizer, stops)

    def of(self, token: int, logp: float) -> Iterator[Event]:
        for evidence in self.run.evidence[self.told:]:
            yield retrieved(self.ralm, evidence)
        self.told = len(self.run.evidence)
        if token == self.ralm.lm.eos:
            self.reason = "eos"
            return
        yield from self.pieces.add(token, logp)
        if self.pieces.stopped:
            self.reason = "stop"

    def end(self, seconds: float) -> Iterator[Event]:
        yield from self.pieces.rest()
        yield Done(self.pieces.shown, len(self.pieces.ids), self.reason or "length", self.run.evidence, seconds)


def retrieved(ralm: RALM, e: Evidence) -> Retrieved:
    from ralm.how.cite import passages

    return Retrieved(e.at, e.query, passages(ralm.source(e), e.ids, e.scores), e.seconds, e.kind)


# ---- several texts at once --------------------------------------------------------------------------------------------


class Lockstep:
    """Runs that take their steps together. Rows are padded on the left; a run that ends leaves the batch.

    All runs search with the same filter and exclusions. Rows that do not go on from what is remembered (a window that moved on,
    other evidence) are read again together with the others: one forward a step, always."""

    ORDER = ("passages", "neighbours", "rows", "tokens")  # what is asked first is answered first, so that the others can catch up

    def __init__(self, ralm: RALM):
        from ralm.how.rows import PrefixCache

        self.cache = PrefixCache(ralm.lm, moving=True)
        self.truth: dict[str, Callable] = {}

    def enter(self, run: Any) -> Any:
        """The desk of a new run."""
        from ralm.asked import open_desk

        desk, self.truth = open_desk(run, self.cache)
        return desk

    def step(self, desks: Sequence[Any]) -> list[torch.Tensor]:
        """ln p(. | x_<t, D) [V] of each run's next token."""
        from ralm.asked import Wanted

        told, out = [{} for _ in desks], [None] * len(desks)
        lacking: dict[int, Wanted | None] = dict.fromkeys(range(len(desks)))
        while lacking:
            for i in [i for i, wanted in lacking.items() if wanted is None]:
                try:
                    out[i] = desks[i].step(told[i], {})
                    del lacking[i]
                except Wanted as wanted:
                    lacking[i] = wanted
            kind = min((self.ORDER.index(w.kind) for w in lacking.values()), default=None)
            some = [i for i, w in lacking.items() if self.ORDER.index(w.kind) == kind]
            for i, answer in zip(some, self._answers([lacking[i] for i in some])):
                told[i][lacking[i].name] = answer
                lacking[i] = None
        return out

    def _answers(self, wanted: Sequence[Wanted]) -> list[Any]:
        """The answers to questions of one kind; those that can be asked together are."""
        if not wanted:
            return []
        parts: dict[Any, list[int]] = {}
        for i, w in enumerate(wanted):
            parts.setdefault(w.group, []).append(i)
        out: list[Any] = [None] * len(wanted)
        for index in parts.values():
            for i, answer in zip(index, answered(self.truth, [wanted[i] for i in index])):
                out[i] = answer
        return out


def answered(truth: dict[str, Callable], wanted: Sequence[Wanted]) -> list[Any]:
    """Answers to questions of one kind that can be asked together (`Wanted.group`), by one call."""
    from ralm.how.rows import Beside

    kind, many = wanted[0].kind, [w.request for w in wanted]
    sizes = [len(r[0]) for r in many]
    cuts = np.cumsum([0, *sizes]).tolist()
    if kind == "rows":
        rows, starts, keys, beside = zip(*many)
        got = truth[kind]([x for some in rows for x in some], [s for some in starts for s in some], keys[0], Beside.joined(beside))
    elif kind == "tokens":
        got = truth[kind](np.concatenate([q for q, _ in many]), many[0][1])
        return [got.take(slice(a, b)) for a, b in pairwise(cuts)]
    else:
        got, seconds = truth[kind]([q for queries, _ in many for q in queries], many[0][1])
        return [(got[a:b], seconds * (b - a) / cuts[-1]) for a, b in pairwise(cuts)]
    return [got[a:b] for a, b in pairwise(cuts)]


def stream_many(ralm: RALM, prompts: Sequence[str], *, max_tokens: int, seed: int, stop: Sequence[str], window: int | None,
                stride: int | None, exclude: tuple[str, ...], **settings: Any) -> Iterator[tuple[int, Event]]:
    """As `RALM.stream_many`."""
    check_length(max_tokens)
    if isinstance(prompts, str):
        raise UsageError("prompts is one text; give a list of them, or use stream")
    if "logits" not in ralm.lm.gives:
        ralm._refuse("drawing several texts at once", frozenset({"logits"}))
    runs = [ralm._run("", p, window, stride, exclude, p) for p in prompts]
    draws = [Draw(seed + i, **settings) for i in range(len(runs))]
    return _stream_many(ralm, runs, draws, max_tokens, _stops(stop))


def _stream_many(ralm: RALM, runs: list[Any], draws: list[Draw], most: int, stops: list[str]) -> Iterator[tuple[int, Event]]:
    began, together = time.perf_counter(), Lockstep(ralm)
    desks, telling = [together.enter(r) for r in runs], [Telling(ralm, r, stops) for r in runs]
    going = list(range(len(runs)))
    for n in range(most):
        for i, logp_V in zip(going, together.step([desks[i] for i in going])):
            token = draws[i](logp_V)
            for event in telling[i].of(token, float(logp_V[token])):
                yield i, event
            if telling[i].reason or n == most - 1:
                for event in telling[i].end(time.perf_counter() - began):
                    yield i, event
            runs[i].ids.append(token)
        going = [i for i in going if not telling[i].reason]
        if not going:
            return
