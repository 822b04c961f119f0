"""read(): which files, under which ids, packed how; bad ones among good ones; nothing touches the disk, hangs or leaks."""

import gzip
import io
import json
import os
import zipfile
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ralm import progress
from ralm.errors import MissingDependency, RalmError, ReadError, UsageError
from ralm.what import stream
from ralm.what.read import NOTES, read
from ralm.what.walk import KINDS

DATA = Path(os.environ.get("RALM_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))


class Heard(progress.Silent):
    def __init__(self):
        self.total, self.done, self.open, self.notes = [], 0.0, 0, []

    def start(self, stage, total, unit):
        self.total.append((stage, total, unit))
        self.open += 1
        return 0

    def advance(self, task, amount):
        assert amount >= 0
        self.done += amount

    def stop(self, task):
        self.open -= 1

    def note(self, text):
        self.notes.append(text)


@pytest.fixture
def heard():
    sink = Heard()
    progress.use(sink)
    yield sink
    progress.use(progress.Silent())


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8"))
    return path


def rows(n, start=0):
    return "".join(json.dumps({"id": str(i), "text": f"row number {i}"}) + "\n" for i in range(start, start + n)).encode()


def tree(root):
    for name in ("b.txt", "a.md", "sub/c.py", "sub/deep/README", ".hidden.txt", ".git/config.txt", "node_modules/x.js",
                 "__pycache__/y.txt"):
        put(root / name, f"text of {name}")
    for name in ("p.png", "q.png", "r.so", "weights.bin.gz", "LOCK"):
        put(root / name, b"\0\1")
    return root


# ---- which files, which ids ---------------------------------------------------------------------------------------------


def test_folder_is_sorted_and_counts_what_it_leaves_out(tmp_path, heard):
    documents = list(read(tree(tmp_path / "docs"), strict=True))
    assert [d.id for d in documents] == ["a.md", "b.txt", "sub/c.py", "sub/deep/README"]
    assert [d.text for d in documents] == [f"text of {d.id}" for d in documents]
    assert documents[2].source == str(tmp_path / "docs" / "sub" / "c.py")
    [note] = heard.notes
    assert "5 files" in note and "2 .png" in note and "1 .bin.gz" in note and "1 without a suffix" in note


def test_ids_are_the_same_from_another_working_directory(tmp_path, monkeypatch):
    docs = tree(tmp_path / "docs")
    put(docs / "rows.jsonl", '{"text": "no id"}\n')
    before = list(read(docs))
    for folder, argument in ((tmp_path, "docs"), (docs, "."), (docs / "sub", ".."), (tmp_path, "docs/../docs/")):
        monkeypatch.chdir(folder)
        again = list(read(argument))
        assert [(d.id, d.text) for d in again] == [(d.id, d.text) for d in before]
        assert all(os.path.exists(d.source) for d in again)


def test_colliding_arguments_get_names_in_front_in_any_order(tmp_path):
    for name in ("x/docs/a.txt", "y/docs/a.txt", "z/notes/a.txt", "z/other/b.txt"):
        put(tmp_path / name, name)
    arguments = [tmp_path / "x" / "docs", tmp_path / "y" / "docs", tmp_path / "z" / "notes", tmp_path / "z" / "other"]
    ids = {d.id: d.text for d in read(*arguments)}
    assert ids == {"x/docs/a.txt": "x/docs/a.txt", "y/docs/a.txt": "y/docs/a.txt", "notes/a.txt": "z/notes/a.txt",
                   "b.txt": "z/other/b.txt"}
    assert {d.id: d.text for d in read(*reversed(arguments))} == ids
    assert [d.id for d in read(arguments[0])] == ["a.txt"]
    assert {d.id for d in read(tmp_path / "x/docs/a.txt", tmp_path / "z/notes/a.txt")} == {"docs/a.txt", "notes/a.txt"}


def test_a_file_named_twice_is_read_once(tmp_path):
    docs = tree(tmp_path / "docs")
    assert [d.id for d in read(docs, docs / "a.md", docs / "sub")] == ["a.md", "b.txt", "sub/c.py", "sub/deep/README"]


def test_symlink_loops_and_links_to_files(tmp_path):
    docs = tree(tmp_path / "docs")
    (docs / "loop").symlink_to(docs)
    (docs / "sub" / "up").symlink_to(docs / "sub")
    (docs / "zz.txt").symlink_to(put(tmp_path / "blob", "linked"))
    (docs / "broken.txt").symlink_to(tmp_path / "nowhere")
    assert [d.id for d in read(docs)] == ["a.md", "b.txt", "sub/c.py", "sub/deep/README", "zz.txt"]


def test_pipes_are_not_opened(tmp_path):
    docs = tree(tmp_path / "docs")
    os.mkfifo(docs / "pipe.txt")
    assert len(list(read(docs))) == 4
    with pytest.raises(UsageError, match="neither a file nor a folder"):
        read(docs / "pipe.txt")


def test_file_names_that_are_not_utf8(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("latin name")
    [d] = read(tmp_path)
    assert d.id == "caf\\xe9.txt" and d.source.encode("utf-8")


def test_errors_come_before_anything_is_read(tmp_path):
    good = put(tmp_path / "a.txt", "good")
    with pytest.raises(UsageError, match="nope does not exist"):
        read(good, tmp_path / "nope")
    with pytest.raises(UsageError, match=r"known suffixes are .*\.parquet"):
        read(good, put(tmp_path / "a.xyz", "x"))
    with pytest.raises(UsageError, match="nothing to read"):
        read()
    assert [d.text for d in read(put(tmp_path / "LOCK", "a named file without a suffix"))] == ["a named file without a suffix"]


def test_empty_folder_says_so(tmp_path, heard):
    assert list(read(tmp_path)) == [] and "no file in it can be read" in heard.notes[0]


# ---- packed -------------------------------------------------------------------------------------------------------------


def zst(data, frames=1):
    cut = max(1, len(data) // frames)
    return b"".join(zstandard.ZstdCompressor().compress(data[i:i + cut]) for i in range(0, len(data), cut))


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
    for name, bomb, reason in (("b.jsonl.gz", gzip.compress(b"x" * (16 << 20)), "decompression bomb"),
                               ("b.jsonl.zst", zst(b"x" * (64 << 20)), "decompression bomb"),
                               ("b.txt.zst", zst(b"x" * (64 << 20)), "decompression bomb"),
                               ("b.csv.zst", zst(b"text\n" + b"\n" * (2 << 20)), "all but empty")):
        skipped.clear()
        assert list(read(put(tmp_path / name, bomb), skipped=skipped)) == []
        assert reason in skipped[0][1]
    skipped.clear()
    assert list(read(put(tmp_path / "big.txt", b"x" * (2 << 20)), skipped=skipped)) == [] and "more than 1 MB" in skipped[0][1]


# ---- zip and BEIR -------------------------------------------------------------------------------------------------------


def zipped(path, members, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


BEIR = {"corpus.jsonl": b'{"_id": "d1", "title": "T", "text": "body", "metadata": {"year": 3}}\n'
                        b'{"_id": "d2", "title": "", "text": "two"}\n',
        "queries.jsonl": b'{"_id": "q1", "text": "a query"}\n', "qrels/test.tsv": b"query-id\tcorpus-id\tscore\nq1\td1\t1\n"}


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


# ---- bad among good -----------------------------------------------------------------------------------------------------


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
    path = put(tmp_path / "a.jsonl", b"".join(rows(8, i).replace(b"row", b"row " * 500) for i in range(0, 8000, 8)))
    documents = read(path)
    import tracemalloc
    tracemalloc.start()
    assert sum(1 for _ in documents) == 8000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 << 20 < path.stat().st_size


BYTES = st.binary(max_size=200) | st.text(max_size=80).map(lambda t: t.encode("utf-8", "surrogatepass")) | st.sampled_from([
    b"%PDF-1.7\n1 0 obj<</Type/Catalog/Pages 1 0 R>>\ntrailer<</Root 1 0 R>>", b"PK\x03\x04" + b"\0" * 30, b"PAR1\0\0\0\0PAR1",
    b"text\n\"open", b"\xff\xfe", b"\xff\xfea", b"id\ttext\n1\t\"", b"<html><p>", b"[" * 5000, b'{"data": [{"paragraphs": 3}]}'])


@settings(max_examples=150, deadline=5000, suppress_health_check=[HealthCheck.too_slow])
@given(suffix=st.sampled_from(sorted(s for names in KINDS for s in names.split() if KINDS[names] != "text") + ["txt", "md", "py"]),
       packing=st.sampled_from(["", "", ".gz", ".zst"]), packed=st.booleans(),
       data=BYTES)
def test_any_bytes_under_any_suffix(tmp_path_factory, suffix, packing, packed, data):
    if packed and packing:
        data = gzip.compress(data) if packing == ".gz" else zst(data or b" ")
    path = tmp_path_factory.mktemp("any") / f"a.{suffix}{packing if suffix != 'zip' else ''}"
    path.write_bytes(data)
    skipped = []
    documents = list(read(path, skipped=skipped))
    assert documents or skipped
    for d in documents:
        (d.id + d.text + d.title + d.source).encode("utf-8")
        assert d.text and not d.text.isspace()
    try:
        assert list(read(path, strict=True)) == documents
    except RalmError as e:
        assert skipped and "\n" not in str(e)


# ---- real data ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "count"), [("passages/psgs_w100_sample.jsonl.zst", 19_411), ("retrieval/arguana.zip", 8_674),
                                             ("lm/wikipedia_articles.jsonl.zst", 378), ("lm/books.train.jsonl.zst", 149),
                                             ("qa/squad-v1.1.train.json.zst", 1_367)])
def test_counts_of_real_sets(name, count):
    if not (DATA / name).exists():
        pytest.skip(f"{DATA / name} is not there: set RALM_DATA to the folder with the project's data")
    assert len({d.id for d in read(DATA / name, strict=True)}) == count


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
