"""read(): bad files among good ones, nothing that hangs, leaks or raises anything but a RalmError."""

import gzip
import importlib.util
import os
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ralm.errors import MissingDependency, RalmError, ReadError
from ralm.what.read import NOTES, read
from ralm.what.walk import KINDS

_spec = importlib.util.spec_from_file_location("files", Path(__file__).parent / "files.py")
files = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(files)
put, rows, zst, heard = files.put, files.rows, files.zst, files.heard


def test_bad_files_are_named_counted_and_strict_raises_the_same(tmp_path, heard):
    docs = tmp_path / "docs"
    put(docs / "a.txt", "good")
    put(docs / "b.txt", b"\0\1\2")
    put(docs / "c.txt", "  \n")
    put(docs / "d.pdf", b"not a pdf")
    put(docs / "e.jsonl", b"")
    put(docs / "z.txt", "also good")
    skipped = []
    assert [d.id for d in read(docs, skipped=skipped)] == ["a.txt", "z.txt"]
    assert [Path(p).name for p, _ in skipped] == ["b.txt", "c.txt", "d.pdf", "e.jsonl"]
    assert heard.notes == [f"skipped {p}: {r}" for p, r in skipped]
    assert heard.done == sum(f.stat().st_size for f in docs.iterdir())
    with pytest.raises(ReadError) as e:
        list(read(docs, strict=True))
    assert str(e.value) == f"{skipped[0][0]}: {skipped[0][1]}"


def test_notes_are_limited_and_the_rest_counted(tmp_path, heard):
    for i in range(NOTES + 7):
        put(tmp_path / f"{i:03}.txt", b"\0")
    skipped = []
    assert list(read(tmp_path, skipped=skipped)) == [] and len(skipped) == NOTES + 7
    assert len(heard.notes) == NOTES + 1 and heard.notes[-1] == "skipped 7 more"


def test_a_missing_package_stops_for_a_named_file_only(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pypdfium2", None)
    put(tmp_path / "a.pdf", b"%PDF-1.4")
    put(tmp_path / "b.txt", "good")
    skipped = []
    assert [d.id for d in read(tmp_path, skipped=skipped)] == ["b.txt"] and "ralm[pdf]" in skipped[0][1]
    with pytest.raises(MissingDependency, match=r"ralm\[pdf\]"):
        list(read(tmp_path / "a.pdf"))


def test_a_file_that_vanishes_is_skipped(tmp_path):
    put(tmp_path / "a.txt", "a")
    put(tmp_path / "b.txt", "b")
    skipped = []
    documents = read(tmp_path, skipped=skipped)
    (tmp_path / "b.txt").unlink()
    assert [d.id for d in documents] == ["a.txt"] and "No such file" in skipped[0][1]


def test_reading_streams(tmp_path):
    path = put(tmp_path / "a.jsonl", b"".join(rows(8, i).replace(b"row", b"row " * 500) for i in range(0, 5000, 8)))
    documents = read(path)
    import tracemalloc
    tracemalloc.start()
    assert sum(1 for _ in documents) == 5000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 << 20 < path.stat().st_size


BYTES = st.binary(max_size=200) | st.text(max_size=80).map(lambda t: t.encode("utf-8", "surrogatepass")) | st.sampled_from([
    b"%PDF-1.7\n1 0 obj<</Type/Catalog/Pages 1 0 R>>\ntrailer<</Root 1 0 R>>", b"PK\x03\x04" + b"\0" * 30, b"PAR1\0\0\0\0PAR1",
    b"text\n\"open", b"\xff\xfe", b"\xff\xfea", b"id\ttext\n1\t\"", b"<html><p>", b"[" * 5000, b'{"data": [{"paragraphs": 3}]}'])


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(suffix=st.sampled_from(sorted(s for names in KINDS for s in names.split() if KINDS[names] != "text") + ["txt", "md", "py"]),
       packing=st.sampled_from(["", "", ".gz", ".zst"]), packed=st.booleans(),
       data=BYTES)
def test_any_bytes_under_any_suffix(tmp_path_factory, suffix, packing, packed, data):
    if packed and packing:
        data = gzip.compress(data) if packing == ".gz" else zst(data or b" ")
    path = tmp_path_factory.mktemp("any") / f"a.{suffix}{packing if suffix != 'zip' else ''}"
    path.write_bytes(data)
    skipped, start = [], time.perf_counter()
    documents = list(read(path, skipped=skipped))
    assert documents or skipped
    assert time.perf_counter() - start < 60
    for d in documents:
        (d.id + d.text + d.title + d.source).encode("utf-8")
        assert d.text and not d.text.isspace()
    try:
        assert list(read(path, strict=True)) == documents
    except RalmError as e:
        assert skipped and "\n" not in str(e)


# ---- real data ----------------------------------------------------------------------------------------------------------


DATA = Path(os.environ.get("RALM_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))


@pytest.mark.parametrize(("name", "count"), [("passages/psgs_w100_sample.jsonl.zst", 19_411), ("retrieval/arguana.zip", 8_674),
                                             ("lm/wikipedia_articles.jsonl.zst", 378), ("lm/books.train.jsonl.zst", 149),
                                             ("qa/squad-v1.1.train.json.zst", 1_367)])
def test_counts_of_real_sets(name, count):
    if not (DATA / name).exists():
        pytest.skip(f"{DATA / name} is not there: set RALM_DATA to the folder with the project's data")
    assert len({d.id for d in read(DATA / name, strict=True)}) == count


