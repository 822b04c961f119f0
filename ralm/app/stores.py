"""`ralm build add remove compact history show`: what changes a datastore, and what tells about one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from ralm import progress
from ralm.app.options import At, Index, Paths, StoreArg, Strict, Where, documents, skip, specs
from ralm.app.terminal import Output, bold, count, dim, duration, facts, size, table
from ralm.errors import UsageError

if TYPE_CHECKING:
    from ralm.what.datastore import Datastore

def build(store: StoreArg, /, *paths: Paths,
          split: Annotated[str, Parameter(help="How documents are cut: words:100, tokens:64, markdown, none.")] = "words:100",
          index: Index = None, strict: Strict = False, out: Output = Output()) -> None:  # noqa: B008
    """Make a datastore from files and folders; on one that is there already, go on where a stopped build ended.

    JSON: documents, chunks, version, seconds (totals of the datastore); added, updated, unchanged, added_chunks, replaced (gave
    way to another document of the same id); skipped [{file, reason}]; indexes, split, store. Without --index, bm25."""
    from ralm.index import build as make
    from ralm.what.datastore import Datastore
    from ralm.what.split import split as splitter

    began = time.perf_counter()
    wanted = _known(specs(index, "bm25"))
    splitter(split)  # a wrong split is told before anything is read
    skipped: list[Any] = []
    found = documents("build", paths, strict, skipped)
    if _is_store(store):
        kb = Datastore.open(store)
        if kb.split != split:
            raise UsageError(f"{store} was built with --split {kb.split}, this asks for {split}; "
                             f"give --split {kb.split}, or build into another folder")
    else:
        kb = Datastore.create(store, split)
    added = kb.add(found)
    for spec in wanted:
        make(spec, kb)
    _report(kb, added, skipped, began, out)


def add(store: StoreArg, /, *paths: Paths, strict: Strict = False, out: Output = Output()) -> None:  # noqa: B008
    """Add documents, or update those whose text or fields have changed; every index there is follows.

    JSON: as of build."""
    from ralm.index import update
    from ralm.what.datastore import Datastore

    began = time.perf_counter()
    kb = Datastore.open(store)
    skipped: list[Any] = []
    added = kb.add(documents("add", paths, strict, skipped))
    update(kb)
    _report(kb, added, skipped, began, out)


def remove(store: StoreArg, /, *,
           id: Annotated[list[str] | None, Parameter(name="--id", help="Id of a document; may be given several times.")] = None,
           where: Where = None, out: Output = Output()) -> None:  # noqa: B008
    """Remove documents. No search finds them any more, from now on and in every index; `ralm compact --purge` deletes the text.
    --id and --where together remove what either names; `ralm show --ids --where` shows what that is.

    JSON: documents, chunks, version, seconds (what is left); removed, removed_chunks."""
    from ralm.what.datastore import Datastore

    began = time.perf_counter()
    if not id and where is None:
        raise UsageError("remove needs to know what: give --id ID (several times for several) or --where FILTER")
    kb = Datastore.open(store)
    gone = kb.remove(ids=id or (), where=where)
    data = _totals(kb, began) | {"removed": gone.documents, "removed_chunks": gone.chunks}
    out.show(data, lambda: [f"removed {count(gone.documents, 'document')} ({count(gone.chunks, 'chunk')}); {_line(data)}"])


def compact(store: StoreArg, /, *,
            purge: Annotated[bool, Parameter(show_default=False, help="Also delete older versions: removed text is then nowhere on "
                                                           "disk.")] = False,
            out: Output = Output()) -> None:  # noqa: B008
    """Rewrite the datastore, its indexes and token stores without rows that are gone. Older versions stay readable unless --purge.

    JSON: documents, chunks, version, seconds; bytes_before, bytes, dropped_documents, dropped_chunks."""
    from ralm.index import compact as squeeze
    from ralm.what.datastore import Datastore

    began = time.perf_counter()
    kb = Datastore.open(store)
    before = disk(store)
    dropped = kb.compact(purge=purge)
    squeeze(kb)
    data = _totals(kb, began) | {"bytes_before": before, "bytes": disk(store), "dropped_documents": dropped.documents,
                                 "dropped_chunks": dropped.chunks}
    out.show(data, lambda: [f"{size(before)} before, {size(data['bytes'])} now, {count(dropped.documents, 'old document')} gone "
                            f"for good; {_line(data)}"])


def history(store: StoreArg, /, *, out: Output = Output()) -> None:  # noqa: B008
    """The versions that `--at` can open.

    JSON: versions [{version, ...}], store, version."""
    from ralm.what.datastore import Datastore

    kb = Datastore.open(store)
    versions = [_public(v) for v in kb.history()]
    for v in versions:
        v["time"] = v["time"].isoformat(" ", "seconds") + "Z"
    data = {"store": str(store), "version": kb.version, "versions": versions}
    names = list(versions[0]) if versions else []
    out.show(data, lambda: table([["" if v[n] is None else v[n] for n in names] for v in versions], names, right=[0]))


def show(store: StoreArg, /, *, at: At = None,
         id: Annotated[str | None, Parameter(name="--id", help="Show this document instead: its fields and its text.")] = None,
         ids: Annotated[bool, Parameter(name="--ids", show_default=False, help="List the ids of the documents instead; with "
                                        "--where, of those that match.")] = False,
         where: Where = None, out: Output = Output()) -> None:  # noqa: B008
    """What a datastore holds and how it was made; with --id, one document, to check a citation against; with --ids, what
    `ralm remove` would take.

    JSON: documents, chunks, version, seconds; store, id, split, bytes, fields {name: type} for --where, indexes
    and token_stores [{name, kind, rows, bytes, settings, facts}], neighbours [{the same, indexes}].
    With --id: id, text, title, source, licence, date, metadata. With --ids: ids, documents (how many), version, seconds."""
    from ralm.what.datastore import Datastore

    began = time.perf_counter()
    if id is not None and (ids or where is not None):
        raise UsageError("--id shows one document, --ids and --where list several; give one or the other")
    if where is not None and not ids:
        raise UsageError("--where is for --ids; give both to list the documents that match")
    kb = Datastore.open(store, version=at)
    if id is not None:
        document = _public(kb.document(id))
        out.show(document | {"version": kb.version}, lambda: _document_lines(document))
        return
    if ids:
        found = [d.id for d in kb.documents(where)]
        listed = {"ids": found, "documents": len(found), "version": kb.version, "seconds": round(time.perf_counter() - began, 3)}
        out.show(listed, lambda: found)
        return
    indexes, token_stores, neighbours = list(artifacts(store)), list(artifacts(store, "tokens")), list(databases(store))
    data = _totals(kb, began) | {"store": str(store), "id": kb.id, "split": kb.split, "bytes": disk(store),
                                 "fields": kb.columns(), "indexes": indexes, "token_stores": token_stores, "neighbours": neighbours}
    out.show(data, lambda: _store_lines(data))


def _known(wanted: list[str]) -> list[str]:
    """The specs, their names checked before any work. Raises UsageError for an unknown one."""
    from ralm.app.indexes import check

    for spec in wanted:
        check(spec)
    return wanted


def _is_store(store: Path) -> bool:
    return (store / "documents.lance").is_dir()


# ---- telling --------------------------------------------------------------------------------------------------------


def _totals(kb: Datastore, began: float) -> dict[str, Any]:
    return {"documents": len(kb), "chunks": kb.n_chunks, "version": kb.version, "seconds": round(time.perf_counter() - began, 3)}


def _report(kb: Datastore, added: Any, skipped: list[Any], began: float, out: Output) -> None:
    from ralm.index import built
    from ralm.index.manifest import command, tokens_command

    files = [skip(s) for s in skipped]
    data = _totals(kb, began) | {
        "added": added.documents, "updated": added.updated, "unchanged": added.unchanged, "added_chunks": added.chunks,
        "replaced": added.replaced,
        "skipped": files, "indexes": built(kb), "split": kb.split, "store": str(kb.path)}
    for t in artifacts(kb.path, "tokens") if added.documents or added.updated else ():
        progress.note(f"token store '{t['name']}' has yet to read what is new: {tokens_command(kb.path / t['folder'])} (or "
                      "the next --how knn does)")
    for n in databases(kb.path) if added.documents or added.updated else ():
        progress.note(f"neighbours '{n['name']}' have yet to take in what is new: {command(kb.path / n['folder'])} (or the next "
                      "--how retro does)")
    out.show(data, lambda: _report_lines(data))


def _report_lines(data: dict[str, Any]) -> Iterator[str]:
    what = [f"{data[k]:,} {k}" for k in ("added", "updated", "unchanged") if data[k] or k == "added"]
    yield f"{', '.join(what)}; {_line(data)}"
    if data["skipped"]:  # named on stderr as they came
        yield f"skipped {len(data['skipped']):,} (--json lists them)"
    if data["indexes"]:
        yield f"indexes: {', '.join(data['indexes'])}"


def _line(data: dict[str, Any]) -> str:
    return (f"{count(data['documents'], 'document')}, {count(data['chunks'], 'chunk')} at version {data['version']} "
            f"({duration(data['seconds'])})")


def _public(record: Any) -> dict[str, Any]:
    from dataclasses import asdict, is_dataclass

    return asdict(record) if is_dataclass(record) else dict(record._asdict())


def _document_lines(document: dict[str, Any]) -> Iterator[str]:
    text = document["text"]
    fields = {k: v for k, v in document.items() if k not in ("text", "metadata") and v} | dict(document["metadata"])
    yield from facts(fields | {"characters": f"{len(text):,}"})
    yield ""
    yield text


def _store_lines(data: dict[str, Any]) -> Iterator[str]:
    yield bold(data["store"])
    yield from facts({"documents": f"{data['documents']:,}", "chunks": f"{data['chunks']:,}", "version": data["version"],
                      "split": data["split"], "id": data["id"], "size": size(data["bytes"]), "fields": ", ".join(data["fields"])})
    yield ""
    if data["indexes"]:
        yield from table([[i["name"], i["kind"], f"{i['rows']:,}", size(i["bytes"])] for i in data["indexes"]],
                         ["index", "kind", "rows", "size"], right=[2, 3])
    else:
        yield dim(f"no index yet: ralm index {data['store']} --index bm25")
    if data["token_stores"]:
        yield ""
        yield from table([[t["name"], t["settings"]["lm"], t["settings"]["key"], f"{t['rows']:,}", size(t["bytes"])]
                          for t in data["token_stores"]], ["token store", "model", "key", "tokens", "size"], right=[3, 4])
    if data["neighbours"]:
        yield ""
        yield from table([[n["name"], (s := n["settings"])["lm"], n["facts"].get("retriever", ""), f"{n['rows']:,} of {s['m']}",
                           size(n["bytes"])] for n in data["neighbours"]],
                         ["neighbours", "model", "search", "chunks", "size"], right=[3, 4])


def artifacts(store: Path, family: str = "index") -> Iterator[dict[str, Any]]:
    """Every derived artifact of a datastore in this folder (index, tokens), from its manifest."""
    from ralm.index import manifest

    for folder in sorted(p.parent for p in Path(store).glob(f"{family}/*/manifest.json")):
        made = manifest.load(folder)
        if made is not None:
            yield {"name": folder.name, "folder": str(folder.relative_to(store)), "kind": made.kind,
                   "rows": sum(p.rows for p in made.parts), "segments": len(made.parts), "bytes": disk(folder),
                   "settings": dict(made.settings), "facts": dict(made.facts)}


def databases(store: Path) -> Iterator[dict[str, Any]]:
    """Every neighbour database of a datastore, as `artifacts` tells of the others; rows are chunks."""
    for made in artifacts(store, "neighbours/*"):
        folder = Path(store) / made["folder"]
        indexes = sorted(p.parent.name for p in folder.parent.glob("index/*/manifest.json"))
        yield made | {"name": folder.parent.name, "bytes": disk(folder.parent), "indexes": indexes}


def disk(folder: Path) -> int:
    """Bytes of all files below a folder."""
    total = 0
    for path in Path(folder).rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # a writer in another process tidied up meanwhile
            pass
    return total
