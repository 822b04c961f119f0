"""Zip files and BEIR sets: only what should be read, in memory only."""

import gzip
import importlib.util
import zipfile
from pathlib import Path

import pytest

from ralm.what.read import read

_spec = importlib.util.spec_from_file_location("files", Path(__file__).parent / "files.py")
files = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(files)
BEIR, put, rows, zipped, heard = files.BEIR, files.put, files.rows, files.zipped, files.heard


@pytest.mark.parametrize("front", ["", "set/"])
def test_beir_folder_and_zip(tmp_path, front, heard):
    for name, data in BEIR.items():
        put(tmp_path / "folder" / front / name, data)
    archive = zipped(tmp_path / "set.zip", {front + n: d for n, d in BEIR.items()})
    for path in (tmp_path / "folder", archive):
        heard.notes.clear()
        documents = list(read(path, strict=True))
        assert [(d.id, d.title, d.text) for d in documents] == [("d1", "T", "body"), ("d2", "", "two")]
        assert dict(documents[0].metadata) == {"year": 3}
        assert any("only the corpus" in n and "queries" in n for n in heard.notes)
    assert heard.done == pytest.approx(sum(t for _, t, _ in heard.total))


def test_zip_members_stay_in_memory(tmp_path, monkeypatch, heard):
    monkeypatch.chdir(tmp_path)
    inside = {"../evil.txt": "evil", "/abs.txt": "evil", "..\\win.txt": "evil", "C:/x.txt": "evil", "ok/a.md": "# Title\nfine",
              "r.jsonl": '{"text": "row"}\n', "ok/.hidden.txt": "no", "__MACOSX/a.txt": "no", "inner.zip": b"PK", "p.png": b"\0",
              "t.txt.gz": gzip.compress(b"packed in a zip")}
    path, skipped = zipped(tmp_path / "z.zip", inside), []
    before = sorted(tmp_path.rglob("*"))
    documents = list(read(path, skipped=skipped))
    assert [(d.id, d.text) for d in documents] == [
        ("z.zip/ok/a.md", "# Title\nfine"), ("z.zip/r.jsonl:1", "row"), ("z.zip/t.txt.gz", "packed in a zip")]
    assert documents[0].source == f"{path}/ok/a.md"
    assert len(skipped) == 4 and all("leads out of the archive" in r for _, r in skipped)
    assert sorted(tmp_path.rglob("*")) == before and not (tmp_path.parent / "evil.txt").exists()
    assert any("1 .png" in n and "1 .zip" in n for n in heard.notes)


def test_zip_bombs_and_damaged_zips(tmp_path, monkeypatch):
    monkeypatch.setattr("ralm.what.read.CAP", 1 << 20)
    bomb, skipped = zipped(tmp_path / "b.zip", {"a.jsonl": rows(2) + b"x" * (8 << 20), "b.txt": "after"}), []
    assert len(list(read(bomb, skipped=skipped))) <= 2 and "decompression bomb" in skipped[0][1]
    good = zipped(tmp_path / "g.zip", {"a.txt": "text " * 999, "b.txt": "fine"}, zipfile.ZIP_STORED).read_bytes()
    broken, skipped = good.replace(b"text text", b"text_text", 1), []
    assert [d.id for d in read(put(tmp_path / "c.zip", broken), skipped=skipped)] == ["c.zip/b.txt"]
    assert "Bad CRC-32" in skipped[0][1]
    skipped.clear()
    assert list(read(put(tmp_path / "d.zip", good[:-40]), skipped=skipped)) == [] and "is not a zip file" in skipped[0][1]


def test_members_without_a_name(tmp_path):
    data = zipped(tmp_path / "a.zip", {"x": "text", "b.txt": "fine"}).read_bytes()
    path = tmp_path / "b.zip"
    at = data.index(b"PK\1\2")
    path.write_bytes(data[:at + 46] + b"\0" + data[at + 47:])  # in the directory, where names end at a NUL
    assert [d.id for d in read(path)] == ["b.zip/b.txt"]
