"""The sparse index against the package bm25s, on the same text in one run.

    python benchmarks/sparse.py [PATH ...] [--passages 200000] [--queries 2000]

Text: passages of 100 words of the docstrings of all installed packages and Python's help topics, and of the files under the paths
given (txt, md, rst, py, jsonl, jsonl.zst). Queries: 4 to 12 consecutive words of passages. Both stem (Snowball English) and drop
stop words, use the Lucene form with k1 = 1.5, b = 0.75, one thread, compiled beforehand. Each runs in a process of its own;
seconds are of processor time, memory is the peak above that of the texts. A ratio above 1 says that ralm is better."""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

ONE = {f"{n}_NUM_THREADS": "1" for n in ("NUMBA", "OMP", "OPENBLAS", "MKL")}
DEPTHS = (10, 100, 1000)


# ---- text --------------------------------------------------------------------------------------------------------------


def docstrings(file: Path) -> Iterator[str]:
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, OSError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
            yield text


def records(file: Path) -> Iterator[str]:
    import io

    import zstandard

    raw = file.open("rb")
    lines = io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(raw) if file.suffix == ".zst" else raw, "utf-8", "replace")
    for line in lines:
        yield max((v for v in json.loads(line).values() if isinstance(v, str)), key=len, default="")


def texts(paths: Iterable[Path]) -> Iterator[str]:
    from pydoc_data.topics import topics

    yield from topics.values()
    for root in [*paths, *(Path(p) for p in sys.path if p and Path(p).is_dir())]:
        for file in sorted(root.rglob("*")) if root.is_dir() else [root]:
            if file.suffix == ".py":
                yield from docstrings(file)
            elif ".jsonl" in file.suffixes:
                yield from records(file)
            elif root in paths and file.suffix in (".txt", ".md", ".rst"):
                yield file.read_text(encoding="utf-8", errors="replace")


def passages(paths: Iterable[Path], most: int) -> list[str]:
    seen, out = set(), []
    for text in texts(paths):
        words = text.split()
        for i in range(0, len(words), 100):
            if len(words) - i >= 20 and (passage := " ".join(words[i:i + 100])) not in seen:
                seen.add(passage)
                out.append(passage)
        if len(out) >= most:
            break
    return out[:most]


def queries(found: list[str], n: int) -> list[str]:
    rng = random.Random(0)
    out = []
    while len(out) < n:
        words = rng.choice(found).split()
        size = rng.randint(4, 12)
        at = rng.randrange(max(1, len(words) - size))
        query = words[at:at + size]
        if sum(w.isalpha() and w.isascii() and len(w) > 4 for w in query) > 1:  # bm25s refuses a query without words
            out.append(" ".join(query))
    return out


# ---- the two, each in its own process --------------------------------------------------------------------------------------


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Clock:
    """Processor seconds of this process, as a context."""

    def __enter__(self):
        self.start = time.process_time()
        return self

    def __exit__(self, *_):
        self.seconds = time.process_time() - self.start


def speeds(search, asked: list[str]) -> dict[str, float]:
    """Queries per processor second, the best of three, asked all at once and (k = 10) one by one."""
    out = {}
    for k in DEPTHS:
        best = 0.0
        for _ in range(3):
            with Clock() as clock:
                search(asked, k)
            best = max(best, len(asked) / clock.seconds)
        out[f"queries/s, k={k}"] = best
    with Clock() as clock:
        for query in asked[:300]:
            search([query], 10)
    out["queries/s, k=10, one by one"] = min(300, len(asked)) / clock.seconds
    return out


def ralm(found: list[str], asked: list[str], folder: Path) -> dict[str, float]:
    from ralm.index import postings
    from ralm.index.analyse import Settings
    from ralm.index.sparse import BM25
    from ralm.types import Document
    from ralm.what.datastore import Datastore

    BM25(Datastore.build(folder / "warm.ralm", [Document("a", "warm up")])).search(["warm"], 1)
    before, out = peak(), {}
    with Clock() as clock:  # what bm25s does: texts in memory -> index (here on disk, flushed and with checksums)
        writer = postings.Writer(Settings(), title=False)
        for i in range(0, len(found), 4096):
            writer.add(range(i, min(i + 4096, len(found))), [""] * 4096, found[i:i + 4096])
        part = writer.write(folder / "index", 0)
    out["build, s"], out["peak, MB"] = clock.seconds, peak() - before
    out["index, MB"] = sum(f["bytes"] for f in part.files.values()) / 1e6
    del writer
    with Clock() as clock:
        store = Datastore.build(folder / "kb.ralm", (Document(f"d{i}", t) for i, t in enumerate(found)), split="none")
    out["(documents into the datastore, s)"] = clock.seconds
    with Clock() as clock:
        searcher = BM25(store)
    out["(index of the datastore, s)"] = clock.seconds
    with Clock() as clock:
        store.add(Document(f"new{i}", f"{t} once more") for i, t in enumerate(found[:1000]))
    add = clock.seconds
    with Clock() as clock:
        searcher.search(["more"], 1)
    out["(append of 1000: datastore, index, s)"] = add, clock.seconds
    searcher.search(asked[:200], 10)
    return out | speeds(searcher.search, asked)


def bm25s(found: list[str], asked: list[str], folder: Path) -> dict[str, float]:
    import bm25s
    import Stemmer

    stemmer = Stemmer.Stemmer("english")

    def cut(texts):
        return bm25s.tokenize(texts, stopwords="en", stemmer=stemmer, show_progress=False)

    def made(texts):
        index = bm25s.BM25(k1=1.5, b=0.75, method="lucene", backend="numba")
        index.index(cut(texts), show_progress=False)
        return index

    def search(asked, k, index):
        return index.retrieve(cut(asked), k=min(k, index.scores["num_docs"]), n_threads=1, show_progress=False)

    search(["warm up"], 1, made(["warm up", "warm down"]))
    before, out = peak(), {}
    with Clock() as clock:
        index = made(found)
    out["build, s"], out["peak, MB"] = clock.seconds, peak() - before
    index.save(folder / "bm25s", show_progress=False)
    out["index, MB"] = sum(f.stat().st_size for f in (folder / "bm25s").iterdir()) / 1e6
    search(asked[:200], 10, index)
    return out | speeds(lambda asked, k: search(asked, k, index), asked)


def child(name: str, file: Path) -> None:
    with file.open(encoding="utf-8") as f:
        found, asked = [json.loads(next(f)) for _ in range(int(next(f)))], json.loads(next(f))
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps({"ralm": ralm, "bm25s": bm25s}[name](found, asked, Path(folder))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path)
    parser.add_argument("--passages", type=int, default=200_000)
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child, args.paths[0])
    found = passages(args.paths, args.passages)
    asked = queries(found, args.queries)
    print(f"{len(found)} passages, {sum(map(len, found)) / 1e6:.0f} MB, {len(asked)} queries")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "text"
        with file.open("w", encoding="utf-8") as f:
            f.writelines(f"{line}\n" for line in (len(found), *map(json.dumps, found), json.dumps(asked)))
        del found
        results = {}
        for name in ("bm25s", "ralm"):
            done = subprocess.run([sys.executable, __file__, "--child", name, str(file)], env=os.environ | ONE, check=True,
                                  stdout=subprocess.PIPE, text=True)
            results[name] = json.loads(done.stdout.splitlines()[-1])
    ours, theirs = results["ralm"], results["bm25s"]
    print(f"{'':42}{'ralm':>12}{'bm25s':>12}{'ratio':>9}")
    for key, value in ours.items():
        other = theirs.get(key)
        shown = " + ".join(f"{v:,.2f}" for v in value) if isinstance(value, list) else f"{value:,.2f}"
        if other is None:
            print(f"{key:42}{shown:>12}")
        else:
            ratio = value / other if key.startswith("queries") else other / value
            print(f"{key:42}{shown:>12}{other:12,.2f}{ratio:8.1f}x")


if __name__ == "__main__":
    main()
