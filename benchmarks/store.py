"""How fast the datastore is: python benchmarks/store.py [--chunks 200000] [--path FOLDER]

Texts are real: the docstrings and help topics of this Python installation, repeated with a running number until there are
enough chunks. Every figure is one run on this machine, printed with its unit."""

from __future__ import annotations

import argparse
import ast
import shutil
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from itertools import count
from pathlib import Path

import numpy as np

from ralm.types import Document
from ralm.what.datastore import Datastore


@cache
def passages() -> list[tuple[str, str]]:
    """(name, text) of help topics and of every docstring of the standard library that has some length."""
    from pydoc_data.topics import topics

    out = list(topics.items())
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" in file.parts or "test" in file.parts:
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) > 200:
                    out.append((f"{file.stem}.{getattr(node, 'name', '')}", text))
    return out


def documents(limit: int) -> Iterator[Document]:
    real = passages()
    for i in count():
        name, text = real[i % len(real)]
        if i == limit:
            return
        yield Document(f"{i}/{name}", f"{text}\n\nNumber {i}.", title=name, metadata={"number": i, "round": i // len(real)})


def timed(what: str, amount: float, unit: str, call):
    began, used = time.perf_counter(), time.process_time()
    result = call()
    seconds, used = time.perf_counter() - began, time.process_time() - used
    print(f"{what:40} {seconds:9.4f} s  {used:9.4f} s CPU  {amount / seconds:12,.0f} {unit}/s", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunks", type=int, default=200_000)
    parser.add_argument("--path", type=Path, default=None)
    options = parser.parse_args()
    folder = options.path or Path(tempfile.mkdtemp())
    path = folder / "bench.ralm"
    try:
        run(path, options.chunks)
    finally:
        shutil.rmtree(path, ignore_errors=True)


def run(path: Path, chunks: int) -> None:
    from ralm.what.split import split

    real = passages()
    per_round = sum(len(split("words:40")(text)) for _, text in real)
    n = max(2000, len(real) * chunks // per_round)
    print(f"{sys.version.split()[0]}; {len(real)} real texts, {n} documents, words:40")
    store = timed("build", n, "documents", lambda: Datastore.build(path, documents(n), split="words:40"))
    size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    print(f"{store.n_chunks} chunks, {size / 1e6:.1f} MB on disk, version {store.version}")
    timed("build again (nothing new)", n, "documents", lambda: store.add(documents(n)))
    store = timed("open, alive bitmap", store.n_chunks, "chunks", lambda: (s := Datastore.open(path), s.alive)[0])
    timed("filter, first time", store.n_chunks, "chunks", lambda: store.allow("number % 7 = 3 and round < 5"))
    timed("filter, again", store.n_chunks, "chunks", lambda: store.allow("number % 7 = 3 and round < 5"))
    timed("filter with 5 documents excluded", store.n_chunks, "chunks",
          lambda: store.allow("number % 7 = 3", exclude=[f"{i}/{real[i][0]}" for i in range(5)]))
    draw = np.random.default_rng(0).choice(store.chunk_ids(), (200, 10))
    timed("random reads, 10 chunks each, cold", draw.size, "chunks", lambda: [store.chunks(d) for d in draw])
    timed("the same, warm", draw.size, "chunks", lambda: [store.chunks(d) for d in draw])
    big = np.random.default_rng(1).choice(store.chunk_ids(), 20_000)
    fresh = Datastore.open(path)
    timed("random reads, 20,000 chunks at once", big.size, "chunks", lambda: fresh.chunks(big))
    timed("all texts in order (index build)", store.n_chunks, "chunks", lambda: sum(len(t) for _, _, t in store.texts()))
    timed("add 1 document", 1, "documents", lambda: store.add([Document("one", "one more text")]))
    timed("update 1,000 documents", 1000, "documents", lambda: store.add(
        Document(d.id, d.text + " changed", d.title, metadata=d.metadata) for d in documents(1000)))
    timed("remove 1,000 documents by id", 1000, "documents", lambda: store.remove([d.id for d in documents(1000)]))
    timed("remove by filter", 1, "filters", lambda: store.remove(where="number % 100 = 7"))
    timed("open version 2", 1, "opens", lambda: Datastore.open(path, version=2).n_chunks)
    timed("history", 1, "calls", store.history)
    timed("compact", 1, "calls", store.compact)
    timed("compact, purge", 1, "calls", lambda: store.compact(purge=True))
    timed("open, alive bitmap", store.n_chunks, "chunks", lambda: Datastore.open(path).alive)


if __name__ == "__main__":
    main()
