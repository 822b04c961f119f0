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

from ralm.app.terminal import Output, bold, count, duration, facts, size, table
from ralm.errors import StoreError

EXTRAS = {"lm": "language models, the reader, dense search", "remote": "models behind an OpenAI-compatible server",
          "pdf": "PDF files", "files": "HTML and DOCX files, markdown-aware splitting", "eval": "retrieval measures",
          "suffix": "infini-grams", "plot": "plots"}

def doctor(store: Annotated[Path | None, Parameter(name="STORE", help="Also read and verify this datastore.")] = None, /, *,
           lm: Annotated[str | None, Parameter(help="Also load this model and say what it gives (a server is probed).")] = None,
           out: Output = Output()) -> int:  # noqa: B008
    """What is installed, what is missing and how to get it, what the machine has, which checkpoints ship; with STORE, verify it.

    JSON: ok, problems, notes (no fault, but to be known), versions,
    extras {name: {present, missing, install}}, machine {cores, memory, memory_free, disk_free,
    device}, checkpoints {name: {path, bytes} or null}, lm, store, seconds. Exit code 1 where something is damaged."""
    began = time.perf_counter()
    problems: list[str] = []
    notes: list[str] = []
    data: dict[str, Any] = {"versions": _versions(), "extras": _extras(), "machine": _machine(store), "checkpoints": _checkpoints(),
                            "lm": None if lm is None else _model(lm),
                            "store": None if store is None else examine(store, problems, notes)}
    data = {"ok": not problems, "problems": problems, "notes": notes, **data, "seconds": round(time.perf_counter() - began, 3)}
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


def examine(path: Path, problems: list[str], notes: list[str] | None = None) -> dict[str, Any]:
    """Read every byte of a datastore and hold its parts against each other. What is broken goes to `problems`, what is merely to be
    known to `notes`, a line each with what to do about it. Damage in one part does not keep the others from being looked at."""
    from ralm.what import examine as whole
    from ralm.what import sums, tables
    from ralm.what.datastore import Datastore

    notes = [] if notes is None else notes
    tables.load(path)  # no datastore, or one of a newer ralm: nothing can be said about it
    bad, unlisted = sums.everything(path, tables.SCHEMAS)
    problems += bad
    if unlisted and (path / sums.NAME).exists():
        notes.append(f"{path}: {count(len(unlisted), 'file')} of a stopped writer without a checksum yet (like {unlisted[0]}): the "
                     "next change of the datastore adds it")
    elif unlisted:
        notes.append(f"{path} has no checksums of its tables ({sums.NAME}): the next change of it, or ralm compact {path}, writes "
                     "them")
    try:
        kb = Datastore.open(path)
        if not bad:  # what Lance makes of damaged bytes says nothing, and it may end the process
            problems += whole.some(whole.documents(kb))
            problems += whole.some(whole.columns(kb))
            problems += whole.versions(kb)
        held = {"id": kb.id, "version": kb.version, "split": kb.split, "documents": len(kb), "chunks": len(kb.chunk_ids())}
    except StoreError as e:
        problems += [str(e)] if str(e) not in problems else []
        return {"path": str(path), "artifacts": []}
    return {"path": str(path), **held, "artifacts": list(_artifacts(path, kb, problems, notes))}


def _artifacts(path: Path, kb: Any, problems: list[str], notes: list[str]) -> Iterator[dict[str, Any]]:
    from ralm.app.stores import disk
    from ralm.index import examine as index
    from ralm.index import manifest
    from ralm.what.token_chunks import TokenChunks

    def told(folder: Path, name: str, owner: Any) -> dict[str, Any]:
        wrong, known = index.artifact(owner, folder)
        problems.extend(wrong)
        notes.extend(known)
        made = None if wrong else manifest.load(folder)
        return {"name": name, "kind": made.kind if made else None, "rows": sum(p.rows for p in made.parts) if made else None,
                "bytes": disk(folder), "wrong": wrong}

    for folder in sorted(p for family in ("index", "tokens") for p in (path / family).glob("[!.]*") if p.is_dir()):
        yield told(folder, folder.name if folder.parent.name == "index" else f"tokens/{folder.name}", kb)
    for base in sorted(p for p in (path / "neighbours").glob("[!.]*") if p.is_dir()):
        yield (chunks := told(base / "chunks", f"neighbours/{base.name}", kb))
        if chunks["kind"] is not None:  # whole, so that what was made of it can be held against it
            owner = TokenChunks(kb, base.name, as_it_is=True)
            for folder in sorted(p for p in (base / "index").glob("[!.]*") if p.is_dir()):
                yield told(folder, f"neighbours/{base.name}/{folder.name}", owner)


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
    yield from (f"note: {n}" for n in data["notes"])
    yield from (f"PROBLEM {p}" for p in data["problems"])


def _store_lines(s: dict[str, Any], seconds: float) -> Iterator[str]:
    yield bold(f"datastore {s['path']}")
    if "id" not in s:
        yield "  cannot be opened"
        return
    yield (f"  {count(s['documents'], 'document')} and {count(s['chunks'], 'chunk')} at version {s['version']} read, "
           f"{duration(seconds)}")
    rows = [[a["name"], "" if a["rows"] is None else f"{a['rows']:,} rows", size(a["bytes"]),
             "damaged" if a["wrong"] else "agrees in every byte and row"] for a in s["artifacts"]]
    yield from ("  " + line for line in table(rows, right=[1, 2]))
