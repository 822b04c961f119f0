"""Searching ahead of the truth, at no change of the output (RaLMSpec: Zhang et al. 2024, Accelerating retrieval-augmented language
model serving with speculation).

Where retrieval is due at every token, or every few, an exact search costs more than the model's step, and one pass over the keys
could serve many queries. So S steps are taken with what a small cache of recently found neighbours proposes (they, and the rows
that follow them in their documents), or with the passages found last; then all S queries are searched at once, and the same steps
are taken again with the truth, on the outputs of the model that are there already. The tokens are kept up to the first one that the
truth draws otherwise; what was read beyond it is forgotten (`PrefixCache.restore`). Both passes draw with the same random numbers.

    auto: the S that maximises (1 - gamma^S) / (1 - gamma) / (S a + b(S)), tokens kept per second     (OS^3, section 4.2)

with gamma the share of steps that turned out right, a the seconds of a step and b(S) those of a search for S queries, measured as
it goes. S = 1 is no speculation."""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ralm.asked import Wanted, open_desk
from ralm.errors import UsageError
from ralm.how.output import asking

MOST = 32  # steps ahead at most, where it is chosen
FIRST = 8  # steps ahead before anything is measured
NEAREST, OTHERS, RECENT = 128, 32, 16  # neighbours remembered of the last search, of each before it, and of how many searches
PROPOSED = 128  # neighbours proposed
MEMORY = 0.9  # of the share of the truth's weight that guesses had, per step
SURE = 0.98  # the largest share of right steps that is believed
MEASURED = 6  # rounds that are looked back on


@dataclass
class Ahead:
    """How many steps to take ahead: `steps`, or (None) as many as pay.

    checked, right: steps that were checked and that turned out right; searches: of the truth; for benchmarks and tests."""

    steps: int | None = None
    checked: int = 0
    right: int = 0
    searches: int = 0
    rounds: deque = field(default_factory=lambda: deque(maxlen=MEASURED))  # (steps, checked, right, seconds, of the search)
    alone: float | None = None  # seconds of a search for one query

    @staticmethod
    def of(value: int | str | Ahead | None) -> Ahead | None:
        """None, 0 and 1: no speculation. Raises UsageError for what is neither a number of steps nor auto."""
        if isinstance(value, Ahead) or value is None:
            return value
        if value == "auto":
            return Ahead()
        if isinstance(value, bool) or not str(value).isdigit():
            raise UsageError(f"speculate={value} is no number of steps; use 2 or more, auto, or 0 for none")
        return Ahead(int(value)) if int(value) > 1 else None

    def next(self) -> int:
        """Steps of the next round."""
        if self.steps is not None:
            return self.steps
        if not self.rounds:
            return FIRST
        checked, right = sum(r[1] for r in self.rounds), sum(r[2] for r in self.rounds)
        gamma = min(SURE, (right + 1) / (checked + 1.5))
        step = sum(r[3] for r in self.rounds) / sum(r[0] for r in self.rounds)
        base, each = self._search()
        steps = np.arange(1, MOST + 1)
        kept = (1 - gamma ** steps) / (1 - gamma)
        return int(steps[np.argmax(kept / (steps * (step + each) + base))])

    def _search(self) -> tuple[float, float]:
        """A search for S queries takes base + S each seconds: a line through what was measured, no slope below 0."""
        n, s = (np.array([r[i] for r in self.rounds], float) for i in (0, 4))
        if self.alone is not None:
            n, s = np.append(n, 1.0), np.append(s, self.alone)
        if np.ptp(n) == 0:
            return 0.0, float(s.mean() / n.mean())
        each = max(0.0, float(np.cov(n, s, bias=True)[0, 1] / n.var()))
        return max(0.0, float(s.mean() - each * n.mean())), each


class Guess:
    """What is proposed before it is searched for: of the tokens found lately, and of those behind them in their documents, the ones
    near a state; of passages those found last."""

    def __init__(self, tokens: Any):
        self.tokens = tokens
        self.latest: deque[np.ndarray] = deque(maxlen=RECENT)  # nearest rows of the last searches, newest first
        self.parts: list[_Known] = []
        self.share = 0.5  # of the true neighbours' weight, that of those proposed: what is not known is left to the model
        self.passages: dict[int, tuple[list, float]] = {}  # by k

    def learn(self, told: dict[tuple, Any]) -> None:
        """Remember what a step was told that is true."""
        for (kind, k, *_), answer in told.items():
            if kind == "tokens":
                self.latest.extendleft(row[:NEAREST] for row in answer.rows)
            elif kind == "passages":
                self.passages[k] = answer[0][-1:], 0.0

    def compare(self, guessed: dict[tuple, Any], told: dict[tuple, Any], temperature: float) -> None:
        """Learn from a checked step how much of the truth's weight its guess had."""
        for name, truth in told.items():
            if name[0] == "tokens" and len(truth.distances) and name in guessed:
                most = [np.logaddexp.reduce(-f.distances[0].astype(np.float64) / temperature) for f in (guessed[name], truth)]
                share = float(np.exp(min(0.0, most[0] - most[1]))) if np.isfinite(most[1]) else 1.0
                self.share = MEMORY * self.share + (1 - MEMORY) * share

    def cautious(self, how: Any) -> Any:
        """The fusion that goes with guesses: neighbours weigh in proportion to what is known of them."""
        inner = getattr(how, "inner", None)
        changed = {} if inner is None else {"inner": self.cautious(inner)}
        if getattr(how, "asks", how.what) == "tokens" and isinstance(getattr(how, "lam", None), float) and how.lam > 0:
            changed["lam"] = how.lam * max(0.01, self.share)
        return replace(how, **changed) if changed else how

    def look(self, steps: int) -> None:
        """Take out what may be near in the next steps."""
        if not self.latest:
            return
        newest, *others = self.latest
        near = [(newest, np.arange(steps + 2)), *((rows[:OTHERS], np.arange(2)) for rows in others)]
        self.parts = [_Known.of(leaf, near) for leaf in self.tokens.leaves]

    def near(self, q_ND: np.ndarray, k: int) -> Any:
        """Neighbours [N, k] among what was taken out; the PROPOSED nearest."""
        from ralm.index import nearest
        from ralm.what.token_store import Neighbours

        rows_C = np.concatenate([p.rows for p in self.parts])
        d_QC = np.concatenate([p.distances(q_ND) for p in self.parts], 1)
        some = np.argsort(d_QC, 1)[:, :min(k, PROPOSED)]
        rows, d = nearest.padded((rows_C[some], np.take_along_axis(d_QC, some, 1)), k)
        return Neighbours(rows, d, self.tokens.values(rows), self.tokens.counts(rows))


@dataclass
class _Known:
    """Some rows of a datastore with their keys."""

    leaf: Any
    rows: np.ndarray  # int64 [C], of the union
    keys: np.ndarray  # float32 [C, D]
    norms: np.ndarray  # float32 [C]

    @staticmethod
    def of(leaf: Any, near: list[tuple[np.ndarray, np.ndarray]]) -> _Known:
        """near: rows, and how far behind each to look."""
        found = [np.zeros(0, np.int64)]
        for rows, behind in near:
            local = rows[(rows >= leaf.offset) & (rows < leaf.offset + len(leaf.rows))] - leaf.offset
            end = leaf.rows.first[leaf.rows.document(local) + 1]  # a document's last row has none behind it
            after = local[:, None] + behind
            found.append(after[after < end[:, None]])
        local = np.unique(np.concatenate(found))
        keys = leaf.rows.keys.take(local)
        return _Known(leaf, local + leaf.offset, keys, (keys ** 2).sum(1))

    def distances(self, q_ND: np.ndarray) -> np.ndarray:
        """float32 [N, C], as they come out of a product."""
        q_ND = self.leaf.rows.projection(q_ND)
        s_QC = q_ND @ self.keys.T
        if self.leaf.rows.keys.metric == "ip":
            return -s_QC
        return np.maximum(0, (q_ND ** 2).sum(1)[:, None] - 2 * s_QC + self.norms)


class _Sources:
    """Where answers come from: the truth (from which guesses learn), and guesses."""

    def __init__(self, run: Any, truth: dict[str, Callable], guess: Guess):
        self.run, self.guess, self._truth = run, guess, truth
        self.seconds = 0.0  # spent on true searches
        certain = {kind: truth[kind] for kind in ("rows", "neighbours")}
        self.truth = certain | {"tokens": self._tokens, "passages": self._passages}
        self.guesses = certain | {"tokens": self._near, "passages": self._last}

    def _tokens(self, q_ND: np.ndarray, k: int) -> Any:
        """True neighbours; where an approximate index could choose others among many queries than for one, one by one."""
        began = time.perf_counter()
        leaves = self.run.ralm.tokens.leaves
        if len(q_ND) > 1 and any(leaf.near is not None or leaf.rows.projection.components is not None for leaf in leaves):
            parts = [self._truth["tokens"](q_ND[i:i + 1], k) for i in range(len(q_ND))]
            found = type(parts[0])(*(None if getattr(parts[0], name) is None else
                                     np.concatenate([getattr(p, name) for p in parts]) for name in _names(parts[0])))
        else:
            found = self._truth["tokens"](q_ND, k)
        self.seconds += time.perf_counter() - began
        return found

    def _passages(self, queries, k: int) -> tuple[list, float]:
        began = time.perf_counter()
        found = self._truth["passages"](queries, k)
        self.seconds += time.perf_counter() - began
        return found

    def _near(self, q_ND: np.ndarray, k: int) -> Any:
        return self.guess.near(q_ND, k) if self.guess.parts else self._tokens(q_ND, k)

    def _last(self, queries, k: int) -> tuple[list, float]:
        if k not in self.guess.passages:
            return self._passages(queries, k)
        (hits,), _ = self.guess.passages[k]
        return [hits] * len(queries), 0.0


def _names(found: Any) -> list[str]:
    from dataclasses import fields

    return [f.name for f in fields(found)]


@dataclass
class _Step:
    """One step taken ahead: the guesses it was told, and the truth; the token it drew; what the model remembered before it."""

    guessed: dict[tuple, Any]
    told: dict[tuple, Any]
    token: int
    before: list


def speculated(run: Any, draw: Any, most: int, ahead: Ahead) -> Iterator[tuple[int, float]]:
    """(token, its ln p) as `generate.drawn` gives them, bit for bit."""
    cache, eos = run.lm, run.ralm.lm.eos
    guess = Guess(run.ralm.tokens)
    temperature = getattr(asking(run.ralm.how, "tokens"), "temperature", 1.0)
    desk, truth = open_desk(run, cache)
    sources = _Sources(run, truth, guess)
    left = most
    while left:
        steps = min(left, ahead.next())
        if steps == 1 or ahead.alone is None:
            sources.seconds = 0.0
            logp_V = desk.step(told := {}, sources.truth)
            guess.learn(told)
            ahead.alone, ahead.searches = sources.seconds, ahead.searches + 1
            token = draw(logp_V)
            yield token, float(logp_V[token])
            run.ids.append(token)
            left -= 1
            continue
        began, sources.seconds = time.perf_counter(), 0.0
        guess.look(steps)
        taken = _take(run, desk, cache, sources, draw.ahead(), steps, eos)
        _check([s.told for s in taken], sources)
        ahead.searches += 1
        searching, right = sources.seconds, 0
        for i, step in enumerate(taken):
            before = run.mark()
            try:
                logp_V = desk.step(step.told, {})
                after = taken[i + 1].before if i + 1 < len(taken) else None
                guess.compare(step.guessed, step.told, temperature)
            except Wanted:  # with the truth it asks for something else
                run.restore(before)
                cache.restore(step.before)
                step.told, after, step.token = {}, None, -1
                logp_V = desk.step(step.told, sources.truth)
            guess.learn(step.told)
            token = draw(logp_V)
            ahead.checked += 1
            if token == step.token:
                right, ahead.right = right + 1, ahead.right + 1
            elif after is not None:
                cache.restore(after)
            if token != step.token or i + 1 == len(taken):
                ahead.rounds.append((len(taken), i + 1, right, time.perf_counter() - began - searching, searching))
            yield token, float(logp_V[token])
            run.ids.append(token)
            left -= 1
            if token != step.token:
                break


def _take(run: Any, desk: Any, cache: Any, sources: _Sources, draw: Any, steps: int, eos: int | None) -> list[_Step]:
    """Steps on guesses; the run is as before, the model's memory is ahead."""
    begin, taken, ralm = run.mark(), [], run.ralm
    run.ralm = copy.copy(ralm)
    run.ralm.how = sources.guess.cautious(ralm.how)
    for _ in range(steps):
        told, before = {}, cache.mark()
        token = draw(desk.step(told, sources.guesses))
        taken.append(_Step(told, dict(told), token, before))
        if token == eos:
            break
        run.ids.append(token)
    run.restore(begin)
    run.ralm = ralm
    return taken


def _check(told: list[dict[tuple, Any]], sources: _Sources) -> None:
    """Put the truth in the place of guesses, by one search for each kind of question."""
    from ralm.generate import answered

    groups: dict[tuple, list[tuple[dict, tuple]]] = {}
    for answers in told:
        for name in answers:
            if name[0] in ("tokens", "passages"):  # neighbours of chunks are searched for at once, they are no guesses
                groups.setdefault(name[:2], []).append((answers, name))
    for (kind, k), asked in groups.items():
        wanted = [Wanted(kind, name, (_query(name), k)) for _, name in asked]
        for (answers, name), truth in zip(asked, answered(sources.truth, wanted)):
            answers[name] = truth


def _query(name: tuple) -> Any:
    """What was asked, out of the name of the question."""
    if name[0] == "passages":
        return list(name[2])
    return np.frombuffer(name[3], np.float32).reshape(name[2])
