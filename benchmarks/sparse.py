"""The sparse index against the packages bm25s and tantivy, on the same text in one run.

    python benchmarks/sparse.py [PATH ...] [--passages 200000] [--queries 2000] [--peers PYTHON]

Text: passages of 100 words of the docstrings of all installed packages and Python's help topics, and of the files under the paths
given (txt, md, rst, pod, html, py, jsonl, jsonl.zst; gz of the first five). Queries: 2 to 12 consecutive words of passages held
back, every fourth a title where there are any. All three stem (Snowball English) and drop stop words; ralm and bm25s (its numba
backend) use the Lucene form with k1 = 1.5, b = 0.75 and are exact, tantivy has its own k1 = 1.2 and rounded lengths. Each runs in a
process of its own (PYTHON: the interpreter that has the peers), on one thread where nothing else is said, compiled beforehand.
Seconds are of processor time unless they are called wall, memory is the peak above that of the texts. Ratios above 1 say that ralm
is better. "at first": the first time the words of the queries are asked for; ralm works out their scores then."""

from __future__ import annotations

import argparse
import ast
import gzip
import html
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

ONE = {f"{n}_NUM_THREADS": "1" for n in ("NUMBA", "OMP", "OPENBLAS", "MKL")}
DEPTHS = (10, 100, 1000)
PLAIN = (".txt", ".md", ".rst", ".pod", ".html")
MARKUP = re.compile(r"(?is)<(script|style|head)\b.*?</\1>|<[^>]*>")


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


def plain(file: Path, titles: list[str]) -> Iterator[str]:
    try:
        text = (gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()).decode("utf-8")
    except (ValueError, OSError):
        return
    if ".html" in file.name:
        titles += [html.unescape(t) for t in re.findall(r"(?is)<title>(.*?)</title>", text)[:1]]
        text = html.unescape(MARKUP.sub(" ", text))
    yield text


def texts(paths: Iterable[Path], titles: list[str]) -> Iterator[str]:
    from pydoc_data.topics import topics

    yield from topics.values()
    for root in [*paths, *(Path(p) for p in sys.path if p and Path(p).is_dir())]:
        for file in sorted(root.rglob("*")) if root.is_dir() else [root]:
            if file.suffix == ".py":
                yield from docstrings(file)
            elif ".jsonl" in file.suffixes:
                yield from records(file)
            elif root in paths and file.with_suffix("" if file.suffix == ".gz" else file.suffix).suffix in PLAIN:
                yield from plain(file, titles)


def passages(paths: Iterable[Path], most: int) -> tuple[list[str], list[str], list[str]]:
    """(passages, others that were held back, titles)."""
    seen, out, titles = set(), [], []
    for text in texts(paths, titles):
        words = text.split()
        for i in range(0, len(words), 100):
            if len(words) - i >= 20 and (passage := " ".join(words[i:i + 100])) not in seen:
                seen.add(passage)
                out.append(passage)
        if len(out) >= most * 1.01:
            break
    rng = random.Random(1)
    held = set(rng.sample(range(len(out)), len(out) // 101))
    return [p for i, p in enumerate(out) if i not in held][:most], [out[i] for i in sorted(held)], titles


def queries(held: list[str], titles: list[str], n: int) -> list[str]:
    rng = random.Random(0)
    out = []
    while len(out) < n:
        if titles and len(out) % 4 == 3:
            query = rng.choice(titles).split()[:12]
        else:
            words, size = rng.choice(held).split(), rng.randint(2, 12)
            at = rng.randrange(max(1, len(words) - size))
            query = words[at:at + size]
        if len(query) > 1 and any(w.isalpha() and w.isascii() and len(w) > 4 for w in query):  # bm25s refuses one without words
            out.append(" ".join(query))
    return out


# ---- the engines, each in its own process --------------------------------------------------------------------------------------


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Clock:
    """Processor seconds of this process, and wall-clock seconds, as a context."""

    def __enter__(self):
        self.start, self.begun = time.process_time(), time.perf_counter()
        return self

    def __exit__(self, *_):
        self.seconds, self.wall = time.process_time() - self.start, time.perf_counter() - self.begun


def fastest(call, times: int = 3, wall: bool = False) -> float:
    """Seconds of the best of several calls."""
    best = float("inf")
    for _ in range(times):
        with Clock() as clock:
            call()
        best = min(best, clock.wall if wall else clock.seconds)
    return best


def speeds(search, asked: list[str]) -> dict[str, float]:
    """Queries per processor second, the best of three, asked all at once and (k = 10) one by one."""
    out = {"queries/s, k=10, at first": len(asked) / fastest(lambda: search(asked, 10), 1)}
    for k in DEPTHS:
        out[f"queries/s, k={k}"] = len(asked) / fastest(lambda: search(asked, k))  # noqa: B023 (called at once)
    some = asked[:300]
    return out | {"queries/s, k=10, one by one": len(some) / fastest(lambda: [search([query], 10) for query in some])}


def ralm(found: list[str], asked: list[str], folder: Path) -> dict[str, float]:
    from ralm.index import postings
    from ralm.index.analyse import Settings
    from ralm.index.sparse import BM25
    from ralm.types import Document
    from ralm.what.datastore import Datastore

    BM25(Datastore.build(folder / "warm.ralm", [Document("a", "warm up")])).search(["warm"], 1)
    before, out = peak(), {}
    with Clock() as clock:  # what bm25s does: texts in memory -> index (here on disk, flushed and with checksums)
        writer, bytes_, first = postings.Writer(Settings(), title=False), 0, 0
        for i in range(0, len(found), 4096):
            writer.add(range(i, min(i + 4096, len(found))), [""] * 4096, found[i:i + 4096])
            if writer.full() or i + 4096 >= len(found):
                bytes_ += sum(f["bytes"] for f in writer.write(folder / "index", first).files.values())
                writer, first = postings.Writer(Settings(), title=False), i + 4096
    out["build, s"], out["peak, MB"], out["index, MB"] = clock.seconds, peak() - before, bytes_ / 1e6
    del writer
    with Clock() as clock:
        store = Datastore.build(folder / "kb.ralm", (Document(f"d{i}", t, metadata={"tenth": i * 10 // len(found), "mod": i % 10})
                                                     for i, t in enumerate(found)), split="none")
    out["(documents into the datastore, s)"] = clock.seconds
    with Clock() as clock:
        BM25(store)
    out["(index of the datastore, s)"] = built = clock.seconds
    store.allow()
    with Clock() as clock:
        searcher = BM25(store)
    out["(opening it, ms: processor, wall)"] = 1e3 * clock.seconds, 1e3 * clock.wall
    out |= speeds(searcher.search, asked)
    plain = fastest(lambda: searcher.search(asked, 10))
    for where in ("mod >= 5", "mod = 3", "tenth = 3"):
        store.allow(where)
        out[f"(k=10 where {where}, speed of unfiltered)"] = plain / fastest(lambda: searcher.search(asked, 10, where=where))  # noqa: B023
    both = BM25(store, threads=2)
    both.search(asked, 10)
    for k in DEPTHS:  # in turn: what else runs on the machine comes to both
        pairs = [(fastest(lambda: searcher.search(asked, k), 1, True), fastest(lambda: both.search(asked, k), 1, True))  # noqa: B023
                 for _ in range(7)]
        out[f"(2 threads, wall, speed of one, k={k})"] = max(a / b for a, b in pairs)
    with Clock() as clock:
        store.remove([f"d{i}" for i in range(0, len(found), max(1, len(found) // 1000))][:1000])
    with Clock() as again:
        searcher.search(asked[:1], 10)
    out["(removal of 1000: store, next search, s)"] = clock.seconds, again.seconds
    with Clock() as clock:
        store.add(Document(f"new{i}", f"{t} once more") for i, t in enumerate(found[:len(found) // 100]))
    with Clock() as again:
        searcher.search(["more"], 1)
    out["(append of 1%: datastore, index, s)"] = clock.seconds, again.seconds
    out["(append of 1%: index, % of its build)"] = 100 * again.seconds / built
    return out


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


def tantivy(found: list[str], asked: list[str], folder: Path) -> dict[str, float]:
    import tantivy

    schema = tantivy.SchemaBuilder().add_text_field("text", tokenizer_name="en_stem").build()
    before, out = peak(), {}
    (folder / "tantivy").mkdir()
    with Clock() as clock:
        index = tantivy.Index(schema, path=str(folder / "tantivy"))
        writer = index.writer(heap_size=256_000_000, num_threads=1)
        for text in found:
            writer.add_document(tantivy.Document(text=text))
        writer.commit()
        writer.wait_merging_threads()
    out["build, s"], out["peak, MB"] = clock.seconds, peak() - before
    out["index, MB"] = sum(f.stat().st_size for f in (folder / "tantivy").iterdir()) / 1e6
    index.reload()
    searcher, stop = index.searcher(), frozenset(STOP)
    words = {q: " ".join(w for w in re.findall(r"\w+", q.lower()) if w not in stop) for q in asked}

    def search(asked, k):
        for query in asked:
            searcher.search(index.parse_query(words[query], ["text"]), limit=k, count=False)

    return out | speeds(search, asked)


STOP = ("a an and are as at be but by for if in into is it no not of on or such that the their then there these they this to was "
        "will with").split()  # bm25s' and ralm's


def child(name: str, file: Path) -> None:
    with file.open(encoding="utf-8") as f:
        found, asked = [json.loads(next(f)) for _ in range(int(next(f)))], json.loads(next(f))
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps({"ralm": ralm, "bm25s": bm25s, "tantivy": tantivy}[name](found, asked, Path(folder))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path)
    parser.add_argument("--passages", type=int, default=200_000)
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--peers", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child, args.paths[0])
    found, held, titles = passages(args.paths, args.passages)
    asked = queries(held, titles, args.queries)
    print(f"{len(found)} passages, {sum(map(len, found)) / 1e6:.0f} MB, {len(asked)} queries")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "text"
        with file.open("w", encoding="utf-8") as f:
            f.writelines(f"{line}\n" for line in (len(found), *map(json.dumps, found), json.dumps(asked)))
        del found
        results = {}
        for name in ("bm25s", "tantivy", "ralm"):
            python = sys.executable if name == "ralm" else args.peers
            done = subprocess.run([python, __file__, "--child", name, str(file)], env=os.environ | ONE, stdout=subprocess.PIPE,
                                  text=True)
            if done.returncode and name == "ralm":
                sys.exit("the run of ralm failed")
            results[name] = json.loads(done.stdout.splitlines()[-1]) if not done.returncode else {}
    ours = results.pop("ralm")
    print(f"{'':42}{'ralm':>14}" + "".join(f"{name:>12}{'ratio':>8}" for name in results))
    for key, value in ours.items():
        line = " + ".join(f"{v:,.2f}" for v in value) if isinstance(value, list) else f"{value:,.2f}"
        line = f"{key:42}{line:>14}"
        for theirs in results.values():
            if key in theirs:
                line += f"{theirs[key]:12,.2f}{value / theirs[key] if key.startswith('queries') else theirs[key] / value:7.1f}x"
        print(line)


if __name__ == "__main__":
    main()
