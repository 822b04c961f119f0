"""`ralm neighbours`: the neighbour database of a datastore, made or brought up to date, with what it takes said before the work."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from ralm import progress
from ralm.app.options import StoreArg
from ralm.app.terminal import Output, bold, count, duration, facts, size
from ralm.errors import CapabilityError

if TYPE_CHECKING:
    from ralm.what.datastore import Datastore


def neighbours(store: StoreArg, /, *,
               lm: Annotated[str, Parameter(help="The model whose tokenizer cuts the documents: bundled:retro, bundled:base, "
                                                 "hf:NAME or hf:FOLDER; the one to score and generate with.")],
               retriever: Annotated[str | None, Parameter(help="What searches the chunks: bm25 (default), dense, dense:ENCODER or "
                                                               "dense+bm25. One that is named stays.")] = None,
               m: Annotated[int | None, Parameter(name="--m", help="Tokens of a chunk; default: what the model reads, 64.")] = None,
               name: Annotated[str, Parameter(help="Of these neighbours; several can stand side by side.")] = "default",
               rebuild: Annotated[bool, Parameter(show_default=False, help="Delete these neighbours and make them anew; needed "
                                                                           "where settings change.")] = False,
               out: Output = Output()) -> None:  # noqa: B008
    """Cut the datastore into chunks of m tokens and index them, for --how retro. What is there is kept: only new documents are
    read, and a run that was stopped goes on. Tokenizer and m of the first time hold for all later ones.

    JSON: name, m, chunks, tokens, bytes, retriever, recall (@10, against exact search), added (chunks made now), documents,
    estimate {chunks, tokens, bytes, seconds} (of what was to be made), settings, lm, version, seconds."""
    from ralm.app.indexes import check
    from ralm.index import manifest
    from ralm.lm import load
    from ralm.what.datastore import Datastore
    from ralm.what.neighbour_build import folder_of
    from ralm.what.neighbour_cost import estimate
    from ralm.what.neighbours import NeighbourStore, spec_of

    began = time.perf_counter()
    if retriever is not None:
        check(spec_of(retriever))
    kb = Datastore.open(store)
    folder = folder_of(kb, name)
    model = load(lm)
    if getattr(model, "tokenizer", None) is None:
        raise CapabilityError(f"neighbours are cut by the model's tokenizer, '{lm}' gives none; use a local model (bundled:base, "
                              "hf:NAME)")
    if rebuild and folder.is_dir():
        with kb.lock():
            manifest.discard(folder)
    plan = estimate(kb, model, name, m, retriever)
    _announce(kb, plan)
    before = _chunks(folder)
    made = NeighbourStore.build(kb, model, m=m, name=name, retriever=retriever)
    settings = {k: v for k, v in made.settings.items() if k not in ("fingerprint", "vocab", "lm")}
    data = {"name": made.name, "m": made.m, "chunks": len(made), "tokens": made.tokens, "bytes": _disk(folder),
            "retriever": made.retriever, "recall": made.recall, "added": len(made) - before, "documents": len(kb), "estimate": plan,
            "settings": settings, "lm": lm, "version": kb.version, "seconds": round(time.perf_counter() - began, 3)}
    out.show(data, lambda: _lines(data))


def _chunks(folder) -> int:
    from ralm.index import manifest

    found = manifest.load(folder / "chunks")
    return sum(p.rows for p in found.parts) if found else 0


def _disk(folder) -> int:
    from ralm.app.stores import disk

    return disk(folder)


def _announce(kb: Datastore, plan: dict[str, float]) -> None:
    """What is about to be done, before it is."""
    if not plan["chunks"] and not plan["seconds"]:
        progress.note("every document has its chunks already, and they are indexed")
        return
    progress.note(f"about {plan['chunks']:,} chunks of {plan['tokens']:,} tokens to make and index: {size(plan['bytes'])} on disk, "
                  f"{duration(plan['seconds'])}")


def _lines(data: dict[str, Any]) -> Iterator[str]:
    yield (f"{count(data['added'], 'chunk')} added; {bold(data['name'])} holds {count(data['chunks'], 'chunk')} of "
           f"{data['m']} tokens, of {count(data['documents'], 'document')} ({duration(data['seconds'])})")
    yield from facts({"tokens": f"{data['tokens']:,}", "search": data["retriever"] + (
        "" if data["recall"] == 1 else f", recall@10 {data['recall']:.3f}"), "size": size(data["bytes"])})
