"""What commands make systems of: a datastore and what belongs to it, each opened once, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ralm.errors import StoreError

if TYPE_CHECKING:
    from ralm.model import RALM
    from ralm.types import Fusion, Retriever
    from ralm.what.datastore import Datastore


def opened(store: Path, at: int | None, retriever: str) -> tuple[Datastore, Retriever]:
    """The datastore at a version and a retriever over it, its index built or caught up where rows are missing."""
    from ralm.index import retriever as find
    from ralm.what.datastore import Datastore

    kb = Datastore.open(store, version=at)
    return kb, find(retriever, kb)


class Parts:
    """Systems by spec strings over one datastore. retriever: what searches passages, and (unless it is auto) what searches the
    neighbour database `database`; tokens: the name of the token store."""

    def __init__(self, store: Path, at: int | None = None, retriever: str = "auto", tokens: str = "default",
                 database: str = "default"):
        self.store, self.at, self.retriever, self.tokens, self.database = store, at, retriever, tokens, database
        self._models: dict[str, Any] = {}

    @cached_property
    def kb(self) -> Datastore:
        from ralm.what.datastore import Datastore

        return Datastore.open(self.store, version=self.at)

    @cached_property
    def finder(self) -> Retriever:
        from ralm.index import retriever as find

        return find(self.retriever, self.kb)

    def model(self, spec: str) -> Any:
        """A model by its spec, loaded once."""
        from ralm.lm import load

        if spec not in self._models:
            self._models[spec] = load(spec)
        return self._models[spec]

    def check(self, lm: str, how: str) -> Fusion:
        """The fusion that a spec names. Raises StoreError, with the command that makes it, where the datastore lacks what it
        asks; no model is loaded for that."""
        from ralm.how import fusion
        from ralm.how.output import asking, innermost

        way, kb = fusion(how), self.kb
        if asking(way, "tokens") is not None:
            _check_tokens(kb, self.tokens, lm)
        if innermost(way).how == "intermediate":
            _check_database(kb, self.database)
        return way

    def system(self, lm: str, how: str, when: str = "once", where: str | None = None, window: int | None = None) -> RALM:
        """The RALM of these specs, with the parts that `how` asks for. Where it does not say how many tokens evidence takes, it
        leaves half of `window` to the text. Wrong specs, and what is not there, are told before the model is loaded."""
        from ralm.how.output import asking, innermost
        from ralm.model import RALM
        from ralm.when import schedule

        way, times = self.check(lm, how), schedule(when)
        reads = innermost(way).how
        finder = self.finder if reads == "input" else None
        model, beside = self.model(lm), {}
        if reads == "intermediate":
            beside["neighbours"] = self.neighbours(model)
        if asking(way, "tokens") is not None:
            from ralm.what.token_store import TokenStore

            beside["tokens"] = TokenStore(self.kb, model, self.tokens)
        if asking(way, "suffix") is not None:  # made where it is not there
            from ralm.index.suffix import SuffixIndex

            beside["suffix"] = SuffixIndex(self.kb, model.tokenizer, model.name)
        system = RALM(model, finder, how=way, when=times, where=where, **beside)
        system.how = fitted(system, how, window)
        return system

    def neighbours(self, model: Any) -> Any:
        """The neighbour database, as this model reads it."""
        from ralm.what.neighbours import NeighbourStore

        return NeighbourStore(self.kb, model, self.database, None if self.retriever == "auto" else self.retriever)


def _check_tokens(kb: Datastore, name: str, lm: str) -> None:
    """Raise StoreError, with the command that makes it, where a datastore has no such token store."""
    from ralm.index import manifest
    from ralm.what.token_build import folder_of

    folder = folder_of(kb, name)
    if manifest.load(folder) is None:
        there = sorted(p.parent.name for p in Path(kb.path).glob("tokens/*/manifest.json"))
        others = f" (there is {', '.join(there)}: --tokens {there[0]})" if there else ""
        raise StoreError(f"{kb.path} has no token store '{name}'{others}; make it: {manifest.tokens_command(folder, lm)}")


def _check_database(kb: Datastore, name: str) -> None:
    """Raise StoreError, with the command that makes it, where a datastore has no such neighbour database."""
    from ralm.index import manifest
    from ralm.what.neighbour_build import chunks_of, lacking

    folder = chunks_of(kb, name)
    if manifest.load(folder) is None:
        raise lacking(kb, folder)


def fitted(system: RALM, spec: str, window: int | None = None) -> Fusion:
    """The system's fusion with at most half of the window for evidence, where the spec leaves that open."""
    return _roomy(system.how, spec.partition("+")[0], [w for w in (window, getattr(system.lm, "window", None)) if w])


def _roomy(way: Fusion, spec: str, sizes: list[int]) -> Fusion:
    """`way`, or what it is built on, with room for the text; `spec` is that of the innermost one."""
    from ralm.registry import parse

    if getattr(way, "inner", None) is not None:
        return replace(way, inner=_roomy(way.inner, spec, sizes))
    if way.how != "input" or "tokens" in parse(spec).options or not sizes or way.tokens <= min(sizes) // 2:
        return way
    return replace(way, tokens=max(min(sizes) // 2, way.k, 1))
