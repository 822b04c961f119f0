"""`ralm index`: build an index of a datastore, or bring one up to date."""

from __future__ import annotations

import time
from typing import Annotated

from cyclopts import Parameter

from ralm.app.options import Index, StoreArg, specs
from ralm.app.terminal import Output, duration, size, table
from ralm.errors import UsageError, unknown
from ralm.registry import parse


def index(store: StoreArg, /, *, index: Index = None,
          rebuild: Annotated[bool, Parameter(show_default=False, help="Delete the index and build it anew; needed where settings "
                                                             "change.")] = False,
          out: Output = Output()) -> None:  # noqa: B008
    """Build an index, or extend it to documents it lacks. Without --index: bring every index there is up to date.

    JSON: indexes [{name, kind, rows, segments, bytes, settings, facts}], documents, chunks, version, seconds."""
    from ralm.app.stores import artifacts
    from ralm.index import build, update
    from ralm.what.datastore import Datastore

    began = time.perf_counter()
    wanted = specs(index)
    if rebuild and not wanted:
        raise UsageError("--rebuild needs to know which index: give --index too, like --index bm25")
    kb = Datastore.open(store)
    for spec in wanted:
        check(spec)
    for spec in wanted:
        build(spec, kb, rebuild=rebuild)
    if not wanted:
        update(kb)
    made = list(artifacts(store))
    data = {"indexes": made, "documents": len(kb), "chunks": kb.n_chunks, "version": kb.version,
            "seconds": round(time.perf_counter() - began, 3)}
    out.show(data, lambda: [*table([[i["name"], i["kind"], f"{i['rows']:,}", size(i["bytes"])] for i in made],
                                   ["index", "kind", "rows", "size"], right=[2, 3]), duration(data["seconds"])])


def check(spec: str) -> None:
    """Raise UsageError for a spec that names no index or has wrong options: they are tried on an empty datastore, so that nobody
    learns of a misspelling after an hour of reading."""
    from tempfile import TemporaryDirectory

    from ralm.index import SPECS, build
    from ralm.what.datastore import Datastore

    known = [name for name in SPECS if name != "auto"]
    found = parse(spec)
    if found.name not in known:
        raise unknown("index", found.name, known)
    if found.args or found.options:
        with TemporaryDirectory(prefix="ralm-") as folder:
            build(spec, Datastore.create(f"{folder}/kb"))
