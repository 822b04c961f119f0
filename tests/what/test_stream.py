"""Packed files: whole, cut off, damaged, hostile."""

import gzip
import importlib.util
import io
import json
import os
from pathlib import Path

import pytest

from ralm.errors import ReadError
from ralm.what import stream
from ralm.what.read import read

_spec = importlib.util.spec_from_file_location("files", Path(__file__).parent / "files.py")
files = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(files)
put, rows, zst, heard = files.put, files.rows, files.zst, files.heard


def test_gz_and_zst_of_rows_and_texts(tmp_path, heard):
    data = rows(5000)
    skippable = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"12345"
    packed = {"a.jsonl.gz": gzip.compress(data[:99]) + gzip.compress(data[99:]), "b.jsonl.zst": zst(data, 7),
              "c.jsonl.zst": skippable + zst(data) + skippable}
    for name, content in packed.items():
        heard.done = 0
        assert [d.id for d in read(put(tmp_path / name, content), strict=True)] == [str(i) for i in range(5000)]
        assert heard.done == len(content) == heard.total[-1][1]
    [d] = read(put(tmp_path / "t.txt.gz", gzip.compress(b"packed text")))
    assert (d.id, d.text) == ("t.txt.gz", "packed text")
    assert heard.open == 0


@pytest.mark.parametrize("pack", [gzip.compress, zst])
def test_damage_in_the_middle_keeps_what_came_before(tmp_path, pack):
    noise = "".join(json.dumps({"id": str(i), "text": os.urandom(400).hex()}) + "\n" for i in range(5000)).encode()
    whole, name = pack(noise), "a.jsonl.gz" if pack is gzip.compress else "a.jsonl.zst"
    for content in (whole[:len(whole) // 2], whole + b"trailing rubbish"):
        skipped = []
        documents = list(read(put(tmp_path / name, content), skipped=skipped))
        assert len(documents) >= 1000 and [d.id for d in documents] == [str(i) for i in range(len(documents))]
        assert len(skipped) == 1 and f"the {len(documents):,} documents before that are kept" in skipped[0][1]
    with pytest.raises(ReadError, match="before that are kept"):
        list(read(tmp_path / name, strict=True))
    flipped = bytearray(whole)
    flipped[len(whole) // 2:len(whole) // 2 + 64] = b"\xff" * 64  # deflate may go on with rubbish up to its checksum
    skipped = []
    documents = list(read(put(tmp_path / name, bytes(flipped)), skipped=skipped))
    assert [d.id for d in documents[:1000]] == [str(i) for i in range(1000)]
    assert "damaged compressed data" in skipped[-1][1] and "before that are kept" in skipped[-1][1]


def test_bombs_are_refused_and_long_lines_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "CAP", 1 << 20)
    line = b'{"text": "' + b"x" * (3 << 20) + b'"}\n'
    skipped = []
    assert [d.id for d in read(put(tmp_path / "a.jsonl", rows(1) + line + rows(1, 1)), skipped=skipped)] == ["0", "1"]
    assert skipped[0][1] == "line 2 is longer than 1 MB"
    for name, bomb, reason in (("b.jsonl.gz", gzip.compress(b"x" * (8 << 20)), "decompression bomb"),
                               ("b.jsonl.zst", zst(b"x" * (16 << 20)), "decompression bomb"),
                               ("b.txt.zst", zst(b"x" * (16 << 20)), "decompression bomb"),
                               ("b.csv.zst", zst(b"text\n" + b"\n" * 1_000_010), "all but empty")):
        skipped.clear()
        assert list(read(put(tmp_path / name, bomb), skipped=skipped)) == []
        assert reason in skipped[0][1]
    skipped.clear()
    assert list(read(put(tmp_path / "big.txt", b"x" * (2 << 20)), skipped=skipped)) == [] and "more than 1 MB" in skipped[0][1]


def test_a_file_of_nothing_but_bad_rows_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr("ralm.what.read.HOPELESS", 1000)
    skipped = []
    bad, good = b"a\n" * 999, rows(1)
    assert len(list(read(put(tmp_path / "a.jsonl", bad + good + bad + good), skipped=skipped))) == 2
    assert "1,998 rows" in skipped[0][1]
    skipped.clear()
    assert len(list(read(put(tmp_path / "b.jsonl.zst", zst(good + b"a\n" * 5000)), skipped=skipped))) == 1
    assert "1,000 rows in a row that cannot be read, up to 1,001" in skipped[-1][1]


def test_unpacking_does_not_read_the_whole_file_at_once():
    class Slow(io.RawIOBase):
        def __init__(self, data):
            self.data, self.asked = data, []

        def readable(self):
            return True

        def readinto(self, buffer):
            self.asked.append(len(buffer))
            part, self.data = self.data[:1000], self.data[1000:]
            buffer[:len(part)] = part
            return len(part)

    raw = Slow(zst(os.urandom(300_000), 3))
    assert len(stream.unpacked(raw, ".zst", 300_000).read()) == 300_000 and max(raw.asked) <= stream.BLOCK

