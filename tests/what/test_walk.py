"""Which files are found, in which order, under which ids."""

import importlib.util
import os
from pathlib import Path

import pytest

from ralm.errors import UsageError
from ralm.what.read import read

_spec = importlib.util.spec_from_file_location("files", Path(__file__).parent / "files.py")
files = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(files)
put, tree, heard = files.put, files.tree, files.heard


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
