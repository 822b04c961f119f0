"""How the datastore and its sparse index grow on one machine: 1M, 3M, 10M passages of 100 words.

    python benchmarks/scale.py --passages 1000000 [--text FILE] [--folder FOLDER] [--keep] [PATH ...]

FILE has a real passage a line; without it the text is made as benchmarks/sparse.py does (PATH as there). Every 100th line is held
back for the queries. Where the text is shorter than what is asked for it is repeated, and no copy is like another: in copy 2 and
later each passage loses 5 of 100 words, has 5 pairs of neighbours swapped and 5 words replaced by words of some other passage, and
gets new words besides, made of syllables, so many that the vocabulary goes on growing as n^0.7 (Heaps), and as many that were
made before, the early ones more often (number j with probability ~ 1/j). All of it follows from the passage's number: the same run
gives the same text. Ten passages are a document. Text is made while it is stored and never held; making it is timed, not counted.

Each step runs in a process of its own, on one thread where the libraries have such a setting; seconds are of the processor (of all
threads) and of the clock, MB are the process's peak: all of it, and without pages that only mirror files (sampled, 20 a second).
One JSON object a step on standard output. Killed, the same command with the same FOLDER goes on."""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

ONE = {f"{n}_NUM_THREADS": "1" for n in ("NUMBA", "OMP", "OPENBLAS", "MKL")} | {"LANCE_CPU_THREADS": "1"}
PER_DOCUMENT, HEAPS, EVERY = 10, 0.7, 100
SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "or")]
STEPS = ("documents", "index", "search", "append", "remove", "compact")


# ---- text ----------------------------------------------------------------------------------------------------------------------


class Passages:
    """Passage i of an endless text, made from a file of real passages that stays on disk."""

    def __init__(self, file: Path):
        self.file = file.open("rb")
        self.data = mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_READ)
        ends, at = [], 0
        while (at := self.data.find(b"\n", at) + 1) > 0:
            ends.append(at)
        starts = np.array([0, *ends[:-1]], np.int64)
        held = np.arange(len(ends)) % EVERY == 0
        self.starts, self.ends, self.held = starts[~held], np.array(ends, np.int64)[~held], np.flatnonzero(held)
        self.all = starts, np.array(ends, np.int64)
        self.n, self.seconds = len(self.starts), 0.0
        self.types = 0  # distinct terms of the text itself, and how many words it has; counted when first needed
        self.tokens = 0

    def real(self, i: int) -> str:
        return self.data[self.starts[i]:self.ends[i] - 1].decode()

    def queries(self, count: int) -> list[str]:
        """2 to 12 consecutive words of held-back passages."""
        rng, out = random.Random(0), []
        while len(out) < count:
            line = rng.choice(self.held)
            words, size = self.data[self.all[0][line]:self.all[1][line] - 1].decode().split(), rng.randint(2, 12)
            at = rng.randrange(max(1, len(words) - size))
            if any(w.isalpha() and w.isascii() and len(w) > 4 for w in words[at:at + size]):
                out.append(" ".join(words[at:at + size]))
        return out

    def _count(self) -> None:
        from ralm.index.analyse import Analyser, Settings

        analyser = Analyser(Settings())
        for i in range(0, self.n, 1000):
            found = [self.real(j) for j in range(i, min(i + 1000, self.n))]
            analyser(found)
            self.tokens += sum(len(t.split()) for t in found)
        self.types = len(analyser.terms)

    def passage(self, i: int) -> list[str]:
        """The words of passage i: a real one, or one changed by the rule above."""
        words = self.real(i % self.n).split()
        if i < self.n:
            return words
        if not self.types:
            self._count()
        rng, size = random.Random(i), len(words)
        few = max(1, size // 20)
        for at in rng.sample(range(size), few):
            words[at] = ""
        for at in rng.sample(range(size - 1), min(few, size - 1)):
            words[at], words[at + 1] = words[at + 1], words[at]
        other = self.real(rng.randrange(self.n)).split()
        for at in rng.sample(range(size), few):
            words[at] = other[rng.randrange(len(other))]
        grown = i / self.n  # in units of the text itself
        made = int(self.types * (grown**HEAPS - 1)) + 1
        expected = self.types * HEAPS * grown**(HEAPS - 1) / self.n
        for _ in range(int(expected + rng.random())):
            words.insert(rng.randrange(len(words)), coined(made + rng.randrange(1 + int(expected) * 2)))
            words.insert(rng.randrange(len(words)), coined(int(made**rng.random())))
        return [w for w in words if w]

    def documents(self, chunks: int, first: int = 0, name: str = "d") -> Iterator:
        """Documents of ten passages, from passage `first` on, until they hold so many chunks of 100 words."""
        from ralm.types import Document

        have = 0
        while have < chunks:
            begun = time.process_time()
            parts = [self.passage(j) for j in range(first, first + PER_DOCUMENT)]
            have += -(-sum(map(len, parts)) // 100)
            document = Document(f"{name}{first // PER_DOCUMENT}", "\n".join(map(" ".join, parts)), metadata={"number": first // 10})
            first += PER_DOCUMENT
            self.seconds += time.process_time() - begun
            yield document


def coined(number: int) -> str:
    word = "q"
    while number:
        number, digit = divmod(number, len(SYLLABLES))
        word += SYLLABLES[digit]
    return word


# ---- measuring -----------------------------------------------------------------------------------------------------------------


class Anonymous(threading.Thread):
    """The most memory of its own (RssAnon, MB) that this process had."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak, self.done = 0.0, threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.05):
            found = re.search(r"RssAnon:\s*(\d+)", Path("/proc/self/status").read_text())
            self.peak = max(self.peak, int(found[1]) / 1024)


@contextmanager
def clock(out: dict, name: str, less=lambda: 0.0):
    begun, wall, before = time.process_time(), time.perf_counter(), less()
    yield
    made = less() - before
    out[f"{name}, s"], out[f"{name}, wall s"] = time.process_time() - begun - made, time.perf_counter() - wall - made


def disk(folder: Path) -> float:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 1e6


def sizes(path: Path) -> dict[str, float]:
    parts = ("documents.lance", "texts.lance", "chunks.lance", "index")
    return {f"{p}, MB": disk(path / p) for p in parts}


def files(path: Path) -> dict[str, float]:
    """MB of every kind of array of the sparse index, and how many segments it has."""
    folder = path / "index" / "bm25"
    out: dict[str, float] = {}
    for f in folder.glob("*/*.npy"):
        out[f"  {f.stem}, MB"] = out.get(f"  {f.stem}, MB", 0) + f.stat().st_size / 1e6
    return out | {"segments": len(list(folder.glob("*/ids.npy")))}


# ---- steps ---------------------------------------------------------------------------------------------------------------------


def documents(path: Path, text: Passages, n: int, out: dict) -> None:
    from ralm.what.datastore import Datastore

    with clock(out, "documents", lambda: text.seconds):
        store = Datastore.build(path, text.documents(n))
    out |= {"making the text, s": text.seconds, "chunks": store.n_chunks, "documents": len(store)} | sizes(path)


def index(path: Path, text: Passages, n: int, out: dict) -> None:
    from ralm.index.sparse import BM25
    from ralm.what.datastore import Datastore

    store = Datastore.open(path)
    with clock(out, "index"):
        BM25(store)
    out |= sizes(path) | files(path)


def search(path: Path, text: Passages, n: int, out: dict) -> None:
    from ralm.index.sparse import BM25
    from ralm.what.datastore import Datastore

    asked = text.queries(2000)
    with clock(out, "open datastore"):
        store = Datastore.open(path)
        store.allow()
    with clock(out, "open index"):
        searcher = BM25(store)
    with clock(out, "first query"):
        searcher.search(["warm up"], 1)
    for k in (10, 100):
        times = []
        for _ in range(4):
            begun = time.process_time()
            searcher.search(asked, k)
            times.append(time.process_time() - begun)
        out |= {f"queries/s, k={k}": len(asked) / min(times), f"queries/s, k={k}, at first": len(asked) / times[0]}
    with clock(out, "texts of 2,000 hits"):
        best = searcher.search(asked, 1).ids[:, 0]
        store.chunks(best[best >= 0])


def append(path: Path, text: Passages, n: int, out: dict) -> None:
    from ralm.index.sparse import BM25
    from ralm.what.datastore import Datastore

    searcher = BM25(store := Datastore.open(path))
    searcher.search(["more"], 1)
    text.passage(n * 2)
    with clock(out, "append of 1 %: documents", lambda: text.seconds):
        store.add(text.documents(n // 100, n * 2, "more"))
    with clock(out, "append of 1 %: index and next search"):
        searcher.search(["more"], 1)


def remove(path: Path, text: Passages, n: int, out: dict) -> None:
    from ralm.index.sparse import BM25
    from ralm.what.datastore import Datastore

    searcher = BM25(store := Datastore.open(path))
    searcher.search(["more"], 1)
    step = len(store) // 1100
    names = [name for i in range(0, 1100 * step, step) if store.has(name := f"d{i}")][:1000]  # a resumed run removes them once
    with clock(out, f"remove {len(names)} documents"):
        store.remove(names)
    with clock(out, "remove: next search"):
        searcher.search(["more"], 1)


def compact(path: Path, text: Passages, n: int, out: dict) -> None:
    from ralm.index import grow
    from ralm.what.datastore import Datastore

    store = Datastore.open(path)
    with clock(out, "compact with purge: datastore"):
        store.compact(purge=True)
    with clock(out, "compact with purge: index"):
        grow.compact(store)
    out |= sizes(path)


def child(step: str, path: Path, file: Path, n: int) -> None:
    watch, out = Anonymous(), {"step": step, "passages": n}
    watch.start()
    globals()[step](path, Passages(file), n, out)
    watch.done.set()
    out |= {"peak, MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "peak without files, MB": watch.peak}
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in out.items()}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path)
    parser.add_argument("--passages", type=int, default=1_000_000)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--keep", action="store_true", help="leave the datastore in FOLDER")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp())
    path, text = folder / "scale.ralm", args.text or folder / "text"
    if args.child:
        return child(args.child, path, text, args.passages)
    folder.mkdir(parents=True, exist_ok=True)
    if not text.is_file():
        from sparse import passages

        text.write_text("".join(f"{p}\n" for p in passages(args.paths, args.passages)[0]), encoding="utf-8")
    done = folder / "done"
    for step in STEPS[len(done.read_text().split()) if done.is_file() else 0:]:
        command = [sys.executable, __file__, "--child", step, "--folder", str(folder), "--text", str(text), "--passages"]
        if subprocess.run([*command, str(args.passages)], env=os.environ | ONE).returncode:
            sys.exit(f"the step {step} failed; the same command goes on from it")
        with done.open("a") as f:
            f.write(f"{step}\n")
    if not args.keep:
        shutil.rmtree(path)
        done.unlink()
        if not args.folder:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
