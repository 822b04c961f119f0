"""`ralm index`: build an index of a datastore, or bring one up to date."""

from __future__ import annotations

import time
from typing import Annotated

from cyclopts import Parameter

from ralm.app.options import Index, StoreArg, specs
from ralm.app.terminal import Output, duration, size, table
from ralm.errors import UsageError, unknown
from ralm.registry import parse

KINDS = ("bm25", "tfidf", "dense")


def index(store: StoreArg, /, *, index: Index = None,
          rebuild: Annotated[bool, Parameter(help="Delete the index and build it anew; needed where settings change.")] = False,
          out: Output = Output()) -> None:  # noqa: B008
    """Build an index, or extend it to documents it lacks. Without --index: bring every index there is up to date.

    JSON: indexes [{name, kind, rows, segments, bytes, settings, facts}], documents, chunks, version, seconds."""
    from ralm.app.stores import artifacts
    from ralm.index import build, update
    from ralm.what.datastore import Datastore

    began = time.perf_counter()
    wanted = specs(index)
    for spec in wanted:
        check(spec)
    kb = Datastore.open(store)
    if rebuild:
        if not wanted:
            raise UsageError("--rebuild needs to know which index: give --index too, like --index bm25")
        _drop(kb, wanted)
    for spec in wanted:
        build(spec, kb)
    if not wanted:
        update(kb)
    made = list(artifacts(store))
    data = {"indexes": made, "documents": len(kb), "chunks": kb.n_chunks, "version": kb.version,
            "seconds": round(time.perf_counter() - began, 3)}
    out.show(data, lambda: [*table([[i["name"], i["kind"], f"{i['rows']:,}", size(i["bytes"])] for i in made],
                                   ["index", "kind", "rows", "size"], right=[2, 3]), duration(data["seconds"])])


def check(spec: str) -> None:
    """Raise UsageError for a spec that names no index."""
    name = parse(spec).name
    if name not in KINDS:
        raise unknown("index", name, KINDS)


def _drop(kb, wanted: list[str]) -> None:
    """Delete the folders of the indexes that these specs name."""
    import shutil

    for spec in wanted:
        folder = kb.path / "index" / folder_of(spec)
        with kb.lock():
            shutil.rmtree(folder, ignore_errors=True)


def folder_of(spec: str) -> str:
    """The folder below index/ that a spec's index lives in."""
    found = parse(spec)
    return "bm25" if found.name in ("bm25", "tfidf") else "dense"
