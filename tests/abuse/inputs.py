"""Files that someone might hand to `read`: broken, hostile, or merely odd; the same for the same seed, on every machine.

`make(folder, seed)` writes one file, or a small tree, and says what it is. The kinds are valid files of each format that are
then cut, flipped, spliced and made to lie, bombs, and text in every encoding; `hypothesis_rows` draws more from hypothesis
strategies."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import os
import random
import socket
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

WORDS = ("the of and lighthouse granite Köln naïve 日本 \u202e \ufeff \u0000 \ud800 😀 "
         "<b> &amp; ]]> %s {} \\ \" ' \r \x85 \u2028 0 -1").split(" ")
ENCODINGS = ("utf-8 utf-8-sig utf-16 utf-16-le utf-16-be utf-32 utf-7 latin-1 cp1252 cp437 koi8-r shift_jis euc_jp gb18030 big5 "
             "iso2022_jp mac_roman cp037").split()
TEXTS = "txt md rst py xml yaml html xhtml".split()


def words(r: random.Random, most: int = 60) -> str:
    return " ".join(r.choice(WORDS) for _ in range(r.randrange(most)))


def plain(r: random.Random, most: int = 60) -> bytes:
    return words(r, most).encode("utf-8", "surrogatepass")


# ---- damage ----------------------------------------------------------------------------------------------------------


def damaged(r: random.Random, data: bytes) -> bytes:
    """The same with something wrong: as a disk, a network, a bug or an enemy would have it."""
    raw = bytearray(data)
    for _ in range(r.choice([0, 1, 1, 2, 5])):
        if not raw:
            break
        at, how = r.randrange(len(raw)), r.randrange(8)
        if how == 0:
            del raw[at:]
        elif how == 1:
            raw[at] ^= 1 << r.randrange(8)
        elif how == 2:
            raw[at:at + 8] = r.randbytes(8)
        elif how == 3:
            raw[at:at] = r.randbytes(r.randrange(40))
        elif how == 4:
            del raw[at:at + r.randrange(64)]
        elif how == 5:
            raw[at:at + 4] = r.choice([b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff", b"\0\0\0\0", b"9999"])
        elif how == 6:
            raw[at:at + 8] = b"\0" * 8
        else:
            piece = raw[at:at + r.randrange(200)]
            raw[at:at] = piece * r.randrange(1, 5)
    return bytes(raw)


# ---- one builder a kind: bytes, and the suffix they go under ------------------------------------------------------------


def pdf(r: random.Random) -> tuple[bytes, str]:
    trick = r.randrange(9)
    shown = "".join(f"1 0 0 1 72 {740 - 16 * y} Tm (line {y} {r.randrange(10**6)}) Tj\n" for y in range(r.randrange(1, 6)))
    content = f"BT /F1 12 Tf {shown}ET".encode()
    kids, count, more = "4 0 R", "1", b""
    if trick == 1:
        kids, count = "2 0 R", "1"  # the tree is its own child
    elif trick == 2:
        count = str(r.choice([2**31 - 1, -1, 10**9, 200_000]))
    elif trick == 3:
        content = b"[" * 50_000 + content
    elif trick == 4:
        content = b"q " * 100_000 + content + b" Q" * 100_000
    elif trick == 5:
        more = b"/Filter[" + b"/FlateDecode" * r.randrange(1, 20) + b"]"
    elif trick == 6:
        more, content = b"/Filter/FlateDecode", zlib.compress(b"BT /F1 1 Tf (" + b"A" * r.choice([10**5, 3 * 10**7]) + b") Tj ET")
    elif trick == 7:
        kids = "4 0 R " * 3000
        count = "3000"
    elif trick == 8:
        more, content = b"/Filter/FlateDecode", zlib.compress(content)
    box = r.choice(["0 0 612 792", "0 0 1e30 1e30", "-1 -1 -1 -1", "0 0 0 0", "(x)"])
    objects = [b"<</Type/Catalog/Pages 2 0 R>>", f"<</Type/Pages/Kids[{kids}]/Count {count}>>".encode(),
               b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica/Encoding/WinAnsiEncoding>>",
               f"<</Type/Page/Parent 2 0 R/MediaBox[{box}]/Resources<</Font<</F1 3 0 R>>>>/Contents 5 0 R>>".encode(),
               b"<</Length %d%s>>stream\n" % (len(content), more) + content + b"\nendstream",
               b"<</Title(" + plain(r, 9).replace(b")", b"") + b")/ModDate(D:"
               + r.choice([b"20240131", b"99999999", b"x"]) + b")>>"]
    out, places = bytearray(b"%PDF-1.4\n"), []
    for number, body in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj" % number + body + b"\nendobj\n"
    start = len(out)
    out += f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n".encode() + b"".join(b"%010d 00000 n \n" % p for p in places)
    loop = b"/Prev %d" % start if r.random() < 0.1 else b""
    out += b"trailer<</Size %d/Root 1 0 R/Info 6 0 R%s>>\nstartxref\n%d\n%%%%EOF" % (len(objects) + 1, loop, start)
    return damaged(r, bytes(out)) if r.random() < 0.7 else bytes(out), "pdf"


TAGS = ("p div b i a table tr td ul li h1 span script style title head body html svg math template select frameset "
        "plaintext br").split()


def html(r: random.Random) -> tuple[bytes, str]:
    trick = r.randrange(8)
    out = [r.choice(["", "<!DOCTYPE html>", "<?xml version='1.0' encoding='utf-16'?>", f"<meta charset={r.choice(ENCODINGS)}>"])]
    if trick == 0:
        tag = r.choice(TAGS)
        out.append(f"<{tag}>" * r.choice([300, 5000, 60_000]) + "deep")
    elif trick == 1:
        out.append("<p " + " ".join(f"a{i}={i}" for i in range(r.choice([10, 20_000]))) + ">x</p>")
    elif trick == 2:
        out.append("<!--" * 2000 + "<![CDATA[" * 50 + words(r))
    elif trick == 3:
        out.append("&" * 5000 + "&#x110000;&#0;&#xd800;&notin;&" + "a" * 10_000 + ";")
    elif trick == 4:
        out.append("<table>" * 800 + "<tr><td colspan=1000000000 rowspan=99999>x" * 800)
    for _ in range(r.randrange(80)):
        tag = r.choice(TAGS)
        out.append(r.choice([f"<{tag}>", f"</{tag}>", f"<{tag} ", words(r, 12),
                             f"<{tag} x='{words(r, 3)}'>", "<", ">", "<!DOCTYPE ["]))
    data = "".join(out).encode("utf-8", "surrogatepass")
    return damaged(r, data) if r.random() < 0.3 else data, r.choice(["html", "htm", "xhtml"])


TYPES = ('<?xml version="1.0"?><Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types"><Default '
         'Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
         '<Override PartName="/word/document.xml" ContentType='
         '"application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"/></Types>')
RELS = ('<?xml version="1.0"?><Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">'
        '<Relationship Id="r1" Type='
        '"http://schemas.openxmlformats.org/officeDocument/2006/relationships/officeDocument" Target="{}"/></Relationships>')
BODY = '{}<w:document xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"><w:body>{}</w:body></w:document>'
LAUGH = "<!DOCTYPE d [" + "<!ENTITY l0 'ha ha'>" + "".join(f"<!ENTITY l{i} '{f'&l{i - 1};' * 10}'>" for i in range(1, 10)) + "]>"


def docx(r: random.Random) -> tuple[bytes, str]:
    front, said, target, extra = "", f"<w:p><w:r><w:t>said {r.randrange(99)}</w:t></w:r></w:p>", "word/document.xml", {}
    trick = r.randrange(10)
    if trick == 0:
        front, said = LAUGH, "<w:p><w:r><w:t>&l9;</w:t></w:r></w:p>"
    elif trick == 1:
        front = "<!DOCTYPE d [<!ENTITY x SYSTEM 'file:///etc/passwd'>]>"
        said = "<w:p><w:r><w:t>before &x; after</w:t></w:r></w:p>"
    elif trick == 2:
        said = "<w:p>" * 3000 + said + "</w:p>" * 3000
    elif trick == 3:
        extra = {"word/media/z.bin": b"\0" * (r.choice([1, 70]) << 20)}
    elif trick == 4:
        target = r.choice(["../../../etc/passwd", "/etc/passwd", "file:///etc/passwd", "http://127.0.0.1:9/x", ""])
    elif trick == 5:
        front = "<!DOCTYPE d [<!ENTITY q '" + "q" * 50_000 + "'>]>"
        said = "<w:p><w:r><w:t>" + "&q;" * 20_000 + "</w:t></w:r></w:p>"
    elif trick == 6:
        said = "<w:tbl>" + "<w:tr>" + "<w:tc><w:tcPr><w:gridSpan w:val='999999999'/></w:tcPr>" + said + "</w:tc></w:tr></w:tbl>"
        said = said * r.choice([1, 300])
    elif trick == 7:
        said = "<w:tbl><w:tr><w:tc>" * 60 + said + "</w:tc></w:tr></w:tbl>" * 60
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("[Content_Types].xml", TYPES)
        z.writestr("_rels/.rels", RELS.format(target))
        z.writestr("word/document.xml", BODY.format(front, said))
        for name, data in extra.items():
            z.writestr(name, data)
    return damaged(r, out.getvalue()) if r.random() < 0.6 else out.getvalue(), "docx"


def value(r: random.Random, depth: int = 3):
    kind = r.randrange(9 if depth else 6)
    if kind < 3:
        return words(r, 8)
    if kind < 6:
        return r.choice([None, True, 0, -1.5, 1e308, 2**70, float("nan"), float("inf"), "", "\0"])
    if kind == 6:
        return [value(r, depth - 1) for _ in range(r.randrange(4))]
    names = ["id", "text", "title", "metadata", "date", words(r, 2), "a.b", ""]
    return {r.choice(names): value(r, depth - 1) for _ in range(r.randrange(5))}


def row(r: random.Random) -> dict:
    out = {"id": r.choice([r.randrange(10**9), words(r, 3), None, 1.5, [1]]), "text": words(r, 40)}
    names = ["title", "year", "Text", "meta", "x y", "_id", "license", "URL"]
    return out | {r.choice(names): value(r) for _ in range(r.randrange(4))}


def jsonl(r: random.Random) -> tuple[bytes, str]:
    lines = [json.dumps(row(r), ensure_ascii=r.random() < 0.5) for _ in range(r.randrange(1, 30))]
    odd = ["[" * 100_000, '{"a":' * 30_000, "1" * 10_000, '{"text": "a", "text": "b"}', "\ufeff{}", '{"text": 1e999}',
           "null", "[]", '"text"',
           '{"text": "' + "x" * r.choice([10, 3_000_000]) + '"}', '{"text": "\\ud800\\udc00 \\udfff"}',
           '{"text": "\x00"}', "{'text': 1}"]
    for _ in range(r.randrange(4)):
        lines.insert(r.randrange(len(lines) + 1), r.choice(odd))
    data = r.choice(["\n", "\r\n", "\r", "\n\n\n"]).join(lines).encode("utf-8", "surrogatepass")
    if r.random() < 0.2:
        data = f"[{','.join(lines)}]".encode("utf-8", "surrogatepass")
    return damaged(r, data) if r.random() < 0.4 else data, r.choice(["jsonl", "ndjson", "json"])


def table(r: random.Random) -> tuple[bytes, str]:
    suffix, out = r.choice(["csv", "tsv"]), io.StringIO()
    names = r.choice([["id", "text", "title"], ["text"], ["a", "text", "a"], ["TEXT", "n", ""], ["id", "passage"], ["x", "y"]])
    w = csv.writer(out, delimiter="\t" if suffix == "tsv" else r.choice(",;\t|"), quoting=r.choice([0, 1]), escapechar="\\")
    w.writerow(names)
    for _ in range(r.randrange(40)):
        cells = len(names) + r.choice([0, 0, 0, 0, 1, -1])
        w.writerow([words(r, 9).replace("\0", r.choice(["", "\0"])) or r.randrange(99) for _ in range(cells)])
    data = out.getvalue().encode("utf-8", "surrogatepass")
    data += r.choice([b"", b'"' * 3, b'1\t"open', b'a,"' + b"x,\n" * 5000, b"\n" * 1000])
    return damaged(r, data) if r.random() < 0.4 else data, suffix


def parquet(r: random.Random) -> tuple[bytes, str]:
    n = r.randrange(1, 50)
    columns = {"text": [r.choice([None, words(r, 20).replace("\ud800", "")]) for _ in range(n)], "id": list(range(n)),
               "n": [[1, 2], None] * (n // 2) + [[]] * (n % 2), "s": [{"a": i} for i in range(n)],
               "b": [os.urandom(0) if i % 3 else bytes([i]) for i in range(n)]}
    kept = {k: columns[k] for k in r.sample(sorted(columns), r.randrange(1, 6))}
    out = io.BytesIO()
    pq.write_table(pa.table(kept), out, compression=r.choice(["none", "snappy", "gzip", "zstd", "brotli"]),
                   row_group_size=r.choice([1, 7, 100]))
    data = out.getvalue()
    if r.random() < 0.3:  # the footer is where sizes are declared
        at = len(data) - 8 - r.randrange(1, max(2, min(200, len(data) - 12)))
        data = data[:at] + r.choice([b"\xff\xff\xff\xff\x0f", r.randbytes(3)]) + data[at + 3:]
    return damaged(r, data) if r.random() < 0.7 else data, "parquet"


def text(r: random.Random) -> tuple[bytes, str]:
    said, encoding = " ".join(words(r) for _ in range(r.randrange(9))), r.choice(ENCODINGS)
    data = said.encode(encoding, "replace" if encoding[:3] != "utf" else "surrogatepass" if encoding != "utf-7" else "ignore")
    data = r.choice([b"", b"", codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_LE,
                     codecs.BOM_UTF32_BE]) + data
    trick = r.randrange(9)
    if trick == 0:
        data = r.randbytes(r.randrange(3000))
    elif trick == 1:
        data = b"a" * r.choice([1 << 16, 5 << 20])  # one word, one line
    elif trick == 2:
        data = b"# " * r.choice([10, 200_000]) + b"\n" + data
    elif trick == 3:
        data = b"\r" * 100_000 + data
    return data, r.choice([*TEXTS, *"jsonl csv tsv json pdf docx parquet zip".split()])


def archive(r: random.Random) -> tuple[bytes, str]:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", r.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])) as z:
        for i in range(r.randrange(1, 8)):
            data, suffix = r.choice([pdf, html, docx, jsonl, table, text])(r)
            name = r.choice([f"{i}.{suffix}", f"../up{i}.txt", f"/abs{i}.txt", f"a/../../up{i}.txt", f"C:\\w{i}.txt",
                             "..\\..\\win.txt", f"a/{i}.{suffix}", "same.txt", "con.txt",
                             f"{'d/' * 200}{i}.txt", f"{i}\n.txt", "./x.txt", "~/x.txt"])
            info = zipfile.ZipInfo(name)
            if r.random() < 0.15:
                info.external_attr, data = (stat.S_IFLNK | 0o777) << 16, b"/etc/passwd"
            z.writestr(info, data, compress_type=z.compression)
        if r.random() < 0.1:
            bomb = b"\0" * (100 << 20) if r.random() < 0.3 else b"x" * (40 << 20)
            z.writestr("bomb.txt", bomb, compress_type=zipfile.ZIP_DEFLATED)
    raw = bytearray(out.getvalue())
    if r.random() < 0.3:  # sizes and flags in the directory that lie
        at = raw.rfind(b"PK\1\2")
        if at >= 0:
            field, size = r.choice([(8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (42, 4), (28, 2), (30, 2)])
            raw[at + field:at + field + size] = r.choice([b"\xff" * size, b"\0" * size, r.randbytes(size)])
    return damaged(r, bytes(raw)) if r.random() < 0.4 else bytes(raw), "zip"


def packed(r: random.Random) -> tuple[bytes, str]:
    data, suffix = r.choice([html, jsonl, table, text, pdf, docx, parquet])(r)
    if r.random() < 0.1:
        data = r.choice([b"\0", b"x", b"\n", b"a\n", b"<p>", b'{"text": "a"}\n' * 8]) * (r.choice([1, 20]) << 20)
        data, suffix = data[:30 << 20], r.choice(["txt", "jsonl", "csv", "html"])
    if r.random() < 0.5:
        data, packing = gzip.compress(data, 1) + r.choice([b"", b"rest", gzip.compress(b"more\n")]), "gz"
    else:
        data, packing = zstandard.ZstdCompressor(level=1, write_checksum=r.random() < 0.5).compress(data), "zst"
        if r.random() < 0.1:
            data = struct.pack("<IBB", 0xFD2FB528, 0x00, 0xff) + data  # a frame that asks for an enormous window
    return damaged(r, data) if r.random() < 0.5 else data, f"{suffix}.{packing}"


# ---- trees -----------------------------------------------------------------------------------------------------------


def tree(folder: Path, r: random.Random) -> Path:
    """A folder with what should not be followed, opened or waited for, among a few good files."""
    root = folder
    root.mkdir()
    (root / "good.txt").write_text("a good text")
    (root / "deep").mkdir()
    place: Callable = r.choice([_loop, _fifo, _device, _socket, _names, _depth, _denied, _vanishing])
    place(root, r)
    return root


def _loop(root: Path, r: random.Random) -> None:
    (root / "a").symlink_to("b")
    (root / "b").symlink_to("a")
    (root / "deep" / "up").symlink_to("..")
    (root / "self.txt").symlink_to("self.txt")
    (root / "root").symlink_to("/proc/self/root/proc/self/fd" if r.random() < 0.2 else "/nowhere")


def _fifo(root: Path, r: random.Random) -> None:
    os.mkfifo(root / f"pipe.{r.choice(['txt', 'pdf', 'zip', 'jsonl.gz'])}")


def _device(root: Path, r: random.Random) -> None:
    for name in ("zero", "null", "random", "full", "tty"):
        (root / f"{name}.txt").symlink_to(f"/dev/{name}")


def _socket(root: Path, r: random.Random) -> None:
    s = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    os.chdir(root)  # a socket's path has little room
    try:
        s.bind("s.txt")
    finally:
        os.chdir(here)
        s.close()


def _names(root: Path, r: random.Random) -> None:
    for name in (b"new\nline.txt", b"caf\xe9.txt", b"-rf.txt", b"a\x1b[31mred.txt", b"%s{}.txt", b"'quote\".txt", b" .txt",
                 b"..txt", b"x" * 250 + b".txt"):
        with open(os.path.join(os.fsencode(root), name), "wb") as f:
            f.write(b"text under an odd name")


def _depth(root: Path, r: random.Random) -> None:
    here = os.getcwd()
    os.chdir(root)
    try:
        for _ in range(r.choice([50, 700])):  # beyond PATH_MAX for the longer one
            os.mkdir("folder")
            os.chdir("folder")
        Path("end.txt").write_text("the end")
    finally:
        os.chdir(here)


def _denied(root: Path, r: random.Random) -> None:
    (root / "closed.txt").write_text("closed")
    (root / "closed.txt").chmod(0)
    (root / "deep").chmod(0)


def _vanishing(root: Path, r: random.Random) -> None:
    (root / "empty.txt").write_bytes(b"")
    (root / "sparse.txt").write_bytes(b"")
    os.truncate(root / "sparse.txt", 20 << 20)  # 20 MB of NUL bytes on no blocks


KINDS = [pdf, pdf, html, docx, docx, jsonl, jsonl, table, parquet, parquet, text, text, archive, archive, packed, packed, tree]


def make(folder: Path, seed: int) -> Path:
    """Write input number `seed` into the folder; its path."""
    r = random.Random(seed)
    kind = r.choice(KINDS)
    if kind is tree:
        return tree(folder / f"{seed}", r)
    data, suffix = kind(r)
    path = folder / f"{seed}.{suffix}"
    path.write_bytes(data)
    return path
