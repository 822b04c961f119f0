"""Steps that may be interrupted and taken again: what a step asks of model, retriever and token store, and what it was told.

A step of a run (model.py) is a function of the run's state and of the answers it gets. So a step that lacks an answer may stop
(`Wanted`) and be taken again once it is there. Batches gather what all their rows lack and ask for it at once (generate.py);
speculation lets a step go on with a guess and takes it again with the truth, without another forward (speculate.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ralm.how.rows import Beside, PrefixCache


class Wanted(Exception):
    """A step lacks an answer. kind: "passages", "neighbours" of chunks, "rows" of tokens through the model, or "tokens" near
    states."""

    def __init__(self, kind: str, name: tuple, request: tuple):
        super().__init__(kind)
        self.kind, self.name, self.request = kind, name, request

    @property
    def group(self) -> Any:
        """What questions of this kind must share to be asked together: the key of rows, and whether they are read beside something;
        the k of searches."""
        return (self.request[2], self.request[3] is None) if self.kind == "rows" else self.request[-1]


class Desk:
    """Between a run and what it asks. told: the answers of the step at hand, by what was asked; anything else is got from
    `sources` (by kind), or is `Wanted`.

    A step asks for rows (rows, starts, key, beside), tokens (q_ND, k), passages and neighbours (queries, k); equal questions have
    equal answers."""

    def __init__(self, run: Any, cache: PrefixCache):
        self.run, self.cache = run, cache
        self.told: dict[tuple, Any] = {}
        self.sources: dict[str, Callable] = {}
        run.lm, run.find, run.ask, run.look = _Asking(self), self._find, self._ask, self._look

    def step(self, told: dict[tuple, Any], sources: dict[str, Callable]) -> Any:
        """ln p(. | x_<t, D) [V] of the run's next token. Where an answer is missing the run is left as it was."""
        import torch

        self.told, self.sources, before = told, sources, self.run.mark()
        try:
            with torch.inference_mode():
                return self.run.step(len(self.run.ids))
        except Wanted:
            self.run.restore(before)
            raise

    def _find(self, q_ND: np.ndarray, k: int) -> Any:
        return self._answer("tokens", (k, q_ND.shape, q_ND.tobytes()), (q_ND, k))

    def _ask(self, queries: Sequence[str], k: int) -> Any:
        return self._answer("passages", (k, tuple(queries)), (queries, k))

    def _look(self, queries: Sequence[str], k: int) -> Any:
        return self._answer("neighbours", (k, tuple(queries)), (queries, k))

    def rows(self, rows: Sequence[Sequence[int]], starts: Sequence[int], key: str | None, beside: Beside | None) -> Any:
        read = None if beside is None else beside.rows
        return self._answer("rows", (key, tuple(starts), tuple(map(tuple, rows)), read), (rows, starts, key, beside))

    def _answer(self, kind: str, asked: tuple, request: tuple) -> Any:
        name = (kind, *asked)
        if name not in self.told:
            if kind not in self.sources:
                raise Wanted(kind, name, request)
            self.told[name] = self.sources[kind](*request)
        return self.told[name]


class _Asking(PrefixCache):
    """A model whose rows go over a desk; what a PrefixCache remembers beside rows is that of the desk's."""

    def __init__(self, desk: Desk):
        self.__dict__.update(desk.cache.__dict__)
        self.desk = desk

    def state_rows(self, rows, starts, key, beside=None):
        return self.desk.rows(rows, starts, key, beside)


def open_desk(run: Any, cache: PrefixCache) -> tuple[Desk, dict[str, Callable]]:
    """A desk for a run, and the sources that answer with the truth: the model, the run's own searches."""
    truth = {"rows": cache.state_rows, "tokens": run.find, "passages": run.ask, "neighbours": run.look}
    return Desk(run, cache), truth
