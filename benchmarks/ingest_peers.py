"""Files to chunks on disk: ralm against the readers and splitters of LlamaIndex and Haystack, on the same files in one run.

    python benchmarks/ingest_peers.py [--megabytes 10] [--kinds txt,html,html?,jsonl,pdf] [--repeat 3] [--text FILE] --peers PYTHON
    python benchmarks/ingest_peers.py --memory 10,100,1000 [--text FILE]       # ralm alone: peak memory as the corpus grows

Text, and files made from it: as benchmarks/ingest.py (pieces of about 3,000 characters; PDF: ten a file), or from FILE, a passage a
line. "html?" are the same pages with <div> for <article>: they do not say what their article is, and ralm asks trafilatura.
Chunks of 100 words without overlap everywhere. What each does, in a process of its own, after its imports:

    ralm        Datastore.build(folder, read(files)): three Lance tables, every batch committed; "+ index": BM25 of it as well
    llamaindex  SimpleDirectoryReader (its PDF reader is pypdf; HTMLTagReader for html) -> SentenceSplitter, words counted by
                str.split -> SimpleDocumentStore, persisted as JSON
    haystack    TextFileToDocument, HTMLToDocument (trafilatura), PyPDFToDocument -> DocumentSplitter -> InMemoryDocumentStore,
                saved as JSON

JSON lines: both peers get json.loads of each line, which is faster than a reader of their own. MB are those of the text (UTF-8),
seconds are the processor's, of all threads (one where libraries have such a setting), the least of --repeat runs that take
turns. Ratios above 1 say that ralm is faster. peak: of the whole process (ru_maxrss)."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ONE = {f"{n}_NUM_THREADS": "1" for n in ("NUMBA", "OMP", "OPENBLAS", "MKL")} | {"LANCE_CPU_THREADS": "1"}
WHO = ("ralm", "ralm + index", "llamaindex", "haystack")


# ---- each returns the work to be timed, after its imports; the work returns the number of chunks ------------------------------


def ralm(kind: str, files: Path, out: Path, index: bool) -> Callable[[], int]:
    from ralm.index.sparse import BM25
    from ralm.types import Document
    from ralm.what.datastore import Datastore
    from ralm.what.read import read

    warm = Datastore.build(out / "warm.ralm", [Document("a", "warm up")])
    if index:
        BM25(warm).search(["warm"], 1)
    next(read(files))

    def work() -> int:
        store = Datastore.build(out / "kb.ralm", read(files, strict=True), split="words:100")
        if index:
            BM25(store)
        return store.n_chunks

    return work


def llamaindex(kind: str, files: Path, out: Path, index: bool) -> Callable[[], int]:
    from llama_index.core import Document, SimpleDirectoryReader
    from llama_index.core.node_parser import SentenceSplitter
    from llama_index.core.storage.docstore import SimpleDocumentStore
    from llama_index.readers.file import HTMLTagReader, PDFReader

    splitter = SentenceSplitter(chunk_size=100, chunk_overlap=0, tokenizer=str.split, include_metadata=False)
    splitter.get_nodes_from_documents([Document(text="Warm up. And again.")])

    def work() -> int:
        if kind == "jsonl":
            found = [Document(id_=row["id"], text=row["text"], metadata={"title": row["title"]}) for row in rows(files)]
        else:
            readers = {".html": HTMLTagReader("article" if kind == "html" else "body"), ".pdf": PDFReader()}
            found = SimpleDirectoryReader(str(files), file_extractor=readers, raise_on_error=True).load_data()
        nodes = splitter.get_nodes_from_documents(found)
        store = SimpleDocumentStore()
        store.add_documents(nodes)
        store.persist(str(out / "docstore.json"))
        return len(nodes)

    return work


def haystack(kind: str, files: Path, out: Path, index: bool) -> Callable[[], int]:
    from haystack import Document
    from haystack.components.converters import HTMLToDocument, PyPDFToDocument, TextFileToDocument
    from haystack.components.preprocessors import DocumentSplitter
    from haystack.document_stores.in_memory import InMemoryDocumentStore

    converter = {"html": HTMLToDocument, "pdf": PyPDFToDocument}.get(kind.rstrip("?"), TextFileToDocument)()
    splitter = DocumentSplitter(split_by="word", split_length=100, split_overlap=0)
    splitter.warm_up()
    store = InMemoryDocumentStore()
    if kind != "jsonl":
        converter.run(sources=sorted(files.iterdir())[:1])

    def work() -> int:
        if kind == "jsonl":
            found = [Document(id=row["id"], content=row["text"], meta={"title": row["title"]}) for row in rows(files)]
        else:
            found = converter.run(sources=sorted(files.iterdir()))["documents"]
        chunks = splitter.run(documents=found)["documents"]
        store.write_documents(chunks)
        store.save_to_disk(str(out / "store.json"))
        return len(chunks)

    return work


def rows(files: Path):
    for file in files.iterdir():
        with file.open(encoding="utf-8") as f:
            yield from map(json.loads, f)


def child(who: str, kind: str, files: Path) -> None:
    with tempfile.TemporaryDirectory(dir=files.parent) as out:
        work = {"ralm": ralm, "llamaindex": llamaindex, "haystack": haystack}[who.split()[0]](kind, files, Path(out), "+" in who)
        begun, wall = time.process_time(), time.perf_counter()
        chunks = work()
        seconds, wall = time.process_time() - begun, time.perf_counter() - wall
        size = sum(f.stat().st_size for f in Path(out).rglob("*") if f.is_file()) / 1e6
    print(json.dumps({"seconds": seconds, "wall": wall, "chunks": chunks, "disk": size,
                      "peak": peak()}))


def peak() -> float:
    """MB. Not ru_maxrss, which a child takes over from a parent that was larger."""
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


# ---- the run ------------------------------------------------------------------------------------------------------


def run(who: str, kind: str, files: Path, peers: str) -> dict:
    python = sys.executable if who.startswith("ralm") else peers
    command = [python, __file__, "--child", who, kind, str(files)]
    done = subprocess.run(command, env=os.environ | ONE, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"the run of {who} on {kind} failed")
    return json.loads(done.stdout.splitlines()[-1])


def write(kind: str, files: Path, pieces: list[str]) -> None:
    from ingest import WRITERS

    files.mkdir()
    WRITERS[kind.rstrip("?")](files, pieces)
    if kind == "html?":
        for file in files.iterdir():
            file.write_text(file.read_text(encoding="utf-8").replace("article>", "div>"), encoding="utf-8")


def compare(kinds: list[str], pieces: list[str], repeat: int, peers: str) -> None:
    megabytes = sum(len(p.encode()) for p in pieces) / 1e6
    print(f"{len(pieces):,} pieces, {megabytes:.1f} MB of text; best of {repeat}\n"
          f"{'kind':6} {'':12} {'CPU s':>8} {'MB/s':>7} {'ralm is':>8} {'wall s':>7} {'chunks':>7} {'disk MB':>8} {'peak MB':>8}")
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder:
            files = Path(folder) / "files"
            write(kind, files, pieces)
            found: dict[str, list[dict]] = {who: [] for who in WHO}
            for _ in range(repeat):  # in turn: what else runs on the machine comes to all
                for who in WHO:
                    found[who].append(run(who, kind, files, peers))
        ours = min(r["seconds"] for r in found["ralm"])
        for who, results in found.items():
            best = min(results, key=lambda r: r["seconds"])
            ratio = f"{best['seconds'] / ours:7.1f}x" if who not in WHO[:2] else ""
            print(f"{kind:6} {who:12} {best['seconds']:8.2f} {megabytes / best['seconds']:7.2f} {ratio:>8} {best['wall']:7.2f} "
                  f"{best['chunks']:7,} {best['disk']:8.1f} {max(r['peak'] for r in results):8.0f}", flush=True)


def memory(sizes: list[float], kinds: list[str], pieces: Callable[[float], list[str]]) -> None:
    print(f"{'kind':6} {'MB of text':>10} {'':12} {'CPU s':>8} {'MB/s':>7} {'disk MB':>8} {'peak MB':>8}")
    for kind in kinds:
        for megabytes in sizes:
            with tempfile.TemporaryDirectory() as folder:
                files = Path(folder) / "files"
                write(kind, files, pieces(megabytes))
                for who in WHO[:2]:
                    r = run(who, kind, files, sys.executable)
                    print(f"{kind:6} {megabytes:10,.0f} {who:12} {r['seconds']:8.2f} {megabytes / r['seconds']:7.2f} "
                          f"{r['disk']:8.1f} {r['peak']:8.0f}", flush=True)


def from_file(file: Path, megabytes: float) -> list[str]:
    """Pieces of about 3,000 characters of the file's lines, one after the other, from its start again where it is too short."""
    out, piece, total = [], "", 0
    while total < megabytes * 1e6:
        with file.open(encoding="utf-8") as f:
            for line in f:
                piece += line + "\n"
                if len(piece) >= 3000:
                    out.append(piece)
                    total, piece = total + len(piece.encode()), ""
                    if total >= megabytes * 1e6:
                        break
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=10)
    parser.add_argument("--kinds", default="txt,html,html?,jsonl,pdf")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--peers", default=sys.executable, metavar="PYTHON", help="the interpreter that has the peers")
    parser.add_argument("--memory", metavar="MB,MB,...", help="only ralm's peak memory, at these sizes")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child[0], args.child[1], Path(args.child[2]))
    from ingest import texts

    def pieces(megabytes: float) -> list[str]:
        return from_file(args.text, megabytes) if args.text else texts(megabytes)

    kinds = args.kinds.split(",")
    if args.memory:
        return memory([float(m) for m in args.memory.split(",")], kinds, pieces)
    compare(kinds, pieces(args.megabytes), args.repeat, args.peers)


if __name__ == "__main__":
    main()
