"""`ralm doctor`: what this machine has and lacks; with STORE, every byte of a datastore read and verified."""

from __future__ import annotations

import os
import platform
import re
import shutil
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from ralm import progress
from ralm.app.terminal import Output, bold, count, duration, facts, size, table

EXTRAS = {"lm": "language models, the reader, dense search", "remote": "models behind an OpenAI-compatible server",
          "pdf": "PDF files", "files": "HTML and DOCX files, markdown-aware splitting", "eval": "retrieval measures"}
BATCH = 1024


def doctor(store: Annotated[Path | None, Parameter(name="STORE", help="Also read and verify this datastore.")] = None, /, *,
           lm: Annotated[str | None, Parameter(help="Also load this model and say what it gives (a server is probed).")] = None,
           out: Output = Output()) -> int:  # noqa: B008
    """What is installed, what is missing and how to get it, what the machine has, which checkpoints ship; with STORE, verify it.

    JSON: ok, problems, versions, extras {name: {present, missing, install}}, machine {cores, memory, memory_free, disk_free,
    device}, checkpoints {name: {path, bytes} or null}, lm, store, seconds. Exit code 1 where something is damaged."""
    began = time.perf_counter()
    problems: list[str] = []
    data: dict[str, Any] = {"versions": _versions(), "extras": _extras(), "machine": _machine(store), "checkpoints": _checkpoints(),
                            "lm": None if lm is None else _model(lm), "store": None if store is None else _store(store, problems)}
    data = {"ok": not problems, "problems": problems, **data, "seconds": round(time.perf_counter() - began, 3)}
    out.show(data, lambda: _lines(data))
    return 1 if problems else 0


def _versions() -> dict[str, str]:
    names = ("ralm", "numpy", "pyarrow", "pylance", "numba", "torch", "transformers", "sentence-transformers", "faiss-cpu")
    return {"python": platform.python_version()} | {n: v for n in names if (v := _version(n)) is not None}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _extras() -> dict[str, Any]:
    """Per extra, which of the packages that this installation's own metadata asks for are there."""
    wanted: dict[str, list[str]] = {name: [] for name in EXTRAS}
    try:
        requirements = metadata.requires("ralm") or []
    except metadata.PackageNotFoundError:  # run from a checkout that was never installed
        return {}
    for requirement in requirements:
        name = re.match(r"[\w.-]+", requirement)
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", requirement)
        if name and extra and extra.group(1) in wanted and name.group() != "ralm":
            wanted[extra.group(1)].append(name.group())
    out = {}
    for extra, packages in wanted.items():
        missing = [p for p in packages if _version(p) is None]
        out[extra] = {"for": EXTRAS[extra], "present": [p for p in packages if p not in missing], "missing": missing,
                      "install": f"pip install 'ralm[{extra}]'" if missing else None}
    return out


def _machine(store: Path | None) -> dict[str, Any]:
    total, free = _memory()
    folder = next((p for p in (Path(store or "."), *Path(store or ".").absolute().parents) if p.is_dir()), Path("/"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"system": f"{platform.system()} {platform.machine()}", "cores": cores, "memory": total, "memory_free": free,
            "disk_free": shutil.disk_usage(folder).free, "device": _device()}


def _memory() -> tuple[int | None, int | None]:
    """Bytes there are and bytes that can be had, of the container where it sets a limit; None where the system does not tell."""
    try:
        rows = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        total, free = (int(rows[k].split()[0]) * 1024 for k in ("MemTotal", "MemAvailable"))
        limit, used = (Path("/sys/fs/cgroup") / n for n in ("memory.max", "memory.current"))
        if limit.is_file() and (most := limit.read_text().strip()).isdigit():
            total, free = min(total, int(most)), min(free, max(0, int(most) - int(used.read_text())))
        return total, free
    except (OSError, ValueError, KeyError):
        return None, None


def _device() -> str | None:
    """The accelerator that torch sees, "cpu" where none, None without torch."""
    try:
        import torch
    except ImportError:
        return None
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _checkpoints() -> dict[str, Any]:
    from ralm.app.stores import disk
    from ralm.errors import StoreError
    from ralm.lm import BUNDLED
    from ralm.lm.bundled import bundled

    out: dict[str, Any] = {}
    for name in BUNDLED:
        try:
            folder = bundled(name)
            out[name] = {"path": str(folder), "bytes": disk(folder)}
        except StoreError:
            out[name] = None
    return out


def _model(spec: str) -> dict[str, Any]:
    from ralm.lm import load

    lm = load(spec)
    return {"spec": spec, "name": lm.name, "gives": sorted(lm.gives), "window": getattr(lm, "window", None),
            "vocab": getattr(lm, "vocab", None)}


# ---- a datastore ----------------------------------------------------------------------------------------------------


def _store(path: Path, problems: list[str]) -> dict[str, Any]:
    """Read every row and every byte of a datastore; what is wrong goes to `problems`."""
    from ralm.app.stores import artifacts
    from ralm.what.datastore import Datastore

    kb = Datastore.open(path)
    documents, chunks = _rows(kb, problems)
    if (documents, chunks) != (len(kb), kb.n_chunks):
        problems.append(f"{path}: {documents} documents and {chunks} chunks can be read, {len(kb)} and {kb.n_chunks} are counted")
    made = list(artifacts(path))
    for artifact in made:
        artifact["wrong"] = _artifact(path / artifact["folder"], kb)
        problems += artifact["wrong"]
    return {"path": str(path), "id": kb.id, "version": kb.version, "split": kb.split, "documents": documents, "chunks": chunks,
            "artifacts": [{k: a[k] for k in ("name", "kind", "rows", "bytes", "wrong")} for a in made]}


def _rows(kb: Any, problems: list[str]) -> tuple[int, int]:
    """Documents and chunks that can be read; a chunk whose text is not its document's characters start to end is a problem."""
    documents = 0
    with progress.task("read documents", total=len(kb), unit="documents") as advance:
        for _ in kb.documents():
            documents += 1
            advance(1)
    ids, read, bad = kb.chunk_ids(), 0, []
    with progress.task("check chunks", total=len(ids), unit="chunks") as advance:
        texts: dict[str, str] = {}
        for first in range(0, len(ids), BATCH):
            batch = kb.chunks(ids[first:first + BATCH].tolist())
            texts = {d: texts[d] if d in texts else kb.document(d).text for d in {c.document for c in batch}}
            bad += [c for c in batch if c.text != texts[c.document][c.start:c.end]]
            read += len(batch)
            advance(len(batch))
    problems += [f"chunk {c.id} is not characters {c.start} to {c.end} of document '{c.document}'" for c in bad[:10]]
    if len(bad) > 10:
        problems.append(f"… and {len(bad) - 10} more chunks like that")
    return documents, read


def _artifact(folder: Path, kb: Any) -> list[str]:
    from ralm.index import manifest

    made = manifest.load(folder)
    wrong = [] if made is None else manifest.verify(folder, made)
    if made is not None and made.store != kb.id:
        wrong.append(f"{folder} was made from datastore {made.store}, this one is {kb.id}; delete it and build it again "
                     "with ralm index")
    return wrong


# ---- telling --------------------------------------------------------------------------------------------------------


def _lines(data: dict[str, Any]) -> Iterator[str]:
    yield bold("versions")
    yield "  " + ", ".join(f"{n} {v}" for n, v in data["versions"].items())
    yield bold("extras")
    for name, extra in data["extras"].items():
        state = "ok" if not extra["missing"] else f"missing {', '.join(extra['missing'])}: {extra['install']}"
        yield f"  {name.ljust(7)}{extra['for']}: {state}"
    m = data["machine"]
    yield bold("machine")
    memory = "" if m["memory"] is None else f", {size(m['memory'])} memory ({size(m['memory_free'])} free)"
    device = {"cpu": "no accelerator", None: "torch is not installed"}.get(m["device"], m["device"])
    yield f"  {m['system']}, {m['cores']} cores{memory}, {size(m['disk_free'])} disk free, {device}"
    yield bold("bundled checkpoints")
    for name, found in data["checkpoints"].items():
        yield f"  bundled:{name.ljust(8)}" + ("missing; reinstall ralm" if found is None else size(found["bytes"]))
    if data["lm"]:
        yield bold("model")
        yield from ("  " + line for line in facts(data["lm"] | {"gives": ", ".join(data["lm"]["gives"])}))
    if data["store"]:
        yield from _store_lines(data["store"], data["seconds"])
    yield from (f"PROBLEM {p}" for p in data["problems"])


def _store_lines(s: dict[str, Any], seconds: float) -> Iterator[str]:
    yield bold(f"datastore {s['path']}")
    yield (f"  {count(s['documents'], 'document')} and {count(s['chunks'], 'chunk')} at version {s['version']} read, "
           f"{duration(seconds)}")
    rows = [[a["name"], f"{a['rows']:,} rows", size(a["bytes"]), "; ".join(a["wrong"]) or "every checksum agrees"]
            for a in s["artifacts"]]
    yield from ("  " + line for line in table(rows, right=[1, 2]))
