"""How fast files become documents: MB/s of reading text, Markdown rows, HTML, PDF and DOCX made on the spot from real text.

    python benchmarks/ingest.py [--megabytes 4] [--kinds txt,jsonl,jsonl.gz,jsonl.zst,csv,tsv,parquet,html,pdf,docx]

The text is Python's own help topics and the docstrings of its standard library, about 3,000 characters a document. MB are those of
the text that comes out (UTF-8), the same for every kind, so the rows compare; "file MB" is what was read from disk. Seconds are of
this process's CPU, best of --repeat runs, imports done beforehand; JSON lines with --json. Figures move with the machine: compare
within one run, and against json.loads over the same lines, which is the floor for jsonl."""

from __future__ import annotations

import argparse
import ast
import csv
import gzip
import html
import io
import json
import sysconfig
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import zstandard

from ralm.what.read import read


def texts(megabytes: float, size: int = 3000) -> list[str]:
    """Real prose, cut at paragraphs into pieces of about `size` characters, as many as make `megabytes`; repeated if too few."""
    from pydoc_data.topics import topics

    parts = list(topics.values())
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        named = (n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef))
        parts += [d for n in named if (d := ast.get_docstring(n))]
    pieces, piece, total = [], "", 0
    while total < megabytes * 1e6:
        for paragraph in (p for part in parts for p in part.split("\n\n") if p.strip()):
            piece += paragraph + "\n\n"
            if len(piece) >= size:
                pieces.append(piece)
                total += len(piece.encode())
                piece = ""
                if total >= megabytes * 1e6:
                    break
    return pieces


# ---- writers: one per kind, into an empty folder ------------------------------------------------------------------------


def write_txt(folder: Path, pieces: list[str]) -> None:
    for i, text in enumerate(pieces):
        (folder / f"{i:05}.txt").write_text(text, encoding="utf-8")


def rows(pieces: list[str]) -> bytes:
    made = ({"id": str(i), "title": text[:30].strip(), "text": text} for i, text in enumerate(pieces))
    return "".join(json.dumps(row) + "\n" for row in made).encode()


def write_jsonl(folder: Path, pieces: list[str]) -> None:
    (folder / "a.jsonl").write_bytes(rows(pieces))


def write_gz(folder: Path, pieces: list[str]) -> None:
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(rows(pieces)))


def write_zst(folder: Path, pieces: list[str]) -> None:
    (folder / "a.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(rows(pieces)))


def write_csv(folder: Path, pieces: list[str]) -> None:
    out = io.StringIO()
    csv.writer(out).writerows([("id", "text"), *enumerate(pieces)])
    (folder / "a.csv").write_text(out.getvalue(), encoding="utf-8", newline="")


def write_tsv(folder: Path, pieces: list[str]) -> None:
    lines = ["id\ttext\ttitle", *(f"{i}\t{' '.join(text.split())}\tTitle {i}" for i, text in enumerate(pieces))]
    (folder / "psgs.tsv").write_text("\n".join(lines), encoding="utf-8")


def write_parquet(folder: Path, pieces: list[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"id": [str(i) for i in range(len(pieces))], "text": pieces}), folder / "a.parquet")


def write_html(folder: Path, pieces: list[str]) -> None:
    menu = "<nav><ul>" + "<li><a href='#'>menu</a></li>" * 20 + "</ul></nav>"
    for i, text in enumerate(pieces):
        body = "".join(f"<p>{html.escape(p)}</p>" for p in text.split("\n\n"))
        page = f"<!DOCTYPE html><html><head><title>Page {i}</title></head><body>{menu}<article>{body}</article></body></html>"
        (folder / f"{i:05}.html").write_text(page, encoding="utf-8")


def write_docx(folder: Path, pieces: list[str]) -> None:
    import docx

    for i, text in enumerate(pieces):
        document = docx.Document()
        for paragraph in text.split("\n\n"):
            document.add_paragraph("".join(c for c in paragraph if c.isprintable() or c in "\n\t"))
        document.save(folder / f"{i:05}.docx")


def write_pdf(folder: Path, pieces: list[str]) -> None:
    """Ten pieces a file, a page a piece, compressed, Helvetica: what a word processor would write, in the smallest form."""
    for first in range(0, len(pieces), 10):
        pages = pieces[first:first + 10]
        kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(len(pages)))
        objects = [b"<</Type/Catalog/Pages 2 0 R>>", f"<</Type/Pages/Kids[{kids}]/Count {len(pages)}>>".encode(),
                   b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica/Encoding/WinAnsiEncoding>>"]
        for i, text in enumerate(pages):
            escaped = text.encode("cp1252", "replace").replace(b"\\", b"\\\\").replace(b"(", b"\\(").replace(b")", b"\\)")
            lines = escaped.split(b"\n")
            packed = zlib.compress(b"BT /F1 6 Tf 7 TL 30 800 Td " + b"".join(b"(" + line + b") Tj T*\n" for line in lines) + b"ET")
            objects.append(b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 842]/Resources<</Font<</F1 3 0 R>>>>"
                           + f"/Contents {5 + 2 * i} 0 R>>".encode())
            objects.append(f"<</Length {len(packed)}/Filter/FlateDecode>>stream\n".encode() + packed + b"\nendstream")
        out, places = bytearray(b"%PDF-1.4\n"), []
        for number, body in enumerate(objects, 1):
            places.append(len(out))
            out += f"{number} 0 obj".encode() + body + b"\nendobj\n"
        table = "".join(f"{p:010} 00000 n \n" for p in places)
        tail = f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}trailer<</Size {len(objects) + 1}/Root 1 0 R>>\n"
        (folder / f"{first:05}.pdf").write_bytes(out + f"{tail}startxref\n{len(out)}\n%%EOF".encode())


WRITERS: dict[str, Callable[[Path, list[str]], None]] = {
    "txt": write_txt, "jsonl": write_jsonl, "jsonl.gz": write_gz, "jsonl.zst": write_zst, "csv": write_csv, "tsv": write_tsv,
    "parquet": write_parquet, "html": write_html, "pdf": write_pdf, "docx": write_docx}


def measure(work: Callable[[], int], repeat: int) -> tuple[int, float]:
    """(what work returns, least CPU seconds)."""
    best = float("inf")
    for _ in range(repeat):
        start = time.process_time()
        result = work()
        best = min(best, time.process_time() - start)
    return result, best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=4)
    parser.add_argument("--kinds", default=",".join(WRITERS))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    pieces = texts(options.megabytes)
    megabytes = sum(len(p.encode()) for p in pieces) / 1e6
    if not options.json:
        print(f"{len(pieces):,} pieces, {megabytes:.1f} MB of text")
        print(f"{'kind':10} {'file MB':>8} {'docs':>7} {'MB/s':>8} {'docs/s':>9}")
    for kind in options.kinds.split(","):
        with tempfile.TemporaryDirectory() as folder:
            WRITERS[kind](Path(folder), pieces)
            size = sum(f.stat().st_size for f in Path(folder).iterdir()) / 1e6
            next(read(folder))  # imports
            count, seconds = measure(lambda at=folder: sum(1 for _ in read(at, strict=True)), options.repeat)
            show(options.json, kind, size, count, megabytes, seconds)
            if kind == "jsonl":
                lines = (Path(folder) / "a.jsonl").read_bytes().splitlines()
                count, seconds = measure(lambda lines=lines: sum(1 for line in lines if json.loads(line)), options.repeat)
                show(options.json, "json.loads", size, count, megabytes, seconds)


def show(as_json: bool, kind: str, size: float, count: int, megabytes: float, seconds: float) -> None:
    if as_json:
        print(json.dumps({"kind": kind, "file_mb": size, "documents": count, "mb_per_s": megabytes / seconds}))
    else:
        print(f"{kind:10} {size:8.2f} {count:7,} {megabytes / seconds:8.1f} {count / seconds:9,.0f}", flush=True)


if __name__ == "__main__":
    main()
