import gzip
import json

import pytest
import zstandard

from ralm.errors import ReadError, UsageError
from ralm.eval.files import Ledger, bare_suffix, lines, opened, whole


def pack(path, raw):
    raw = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)(raw)
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("name", ["q.tsv", "q.tsv.gz", "q.tsv.zst"])
def test_lines_of_packed_files(tmp_path, name):
    path = pack(tmp_path / name, "\ufeffeins\r\n\n  \nzwei\u2028drei\n".encode())
    assert list(lines(path)) == [(1, "eins"), (4, "zwei\u2028drei")]
    assert bare_suffix(name) == ".tsv"


@pytest.mark.parametrize("name", ["x.txt.gz", "x.txt.zst"])
def test_what_is_cut_short_or_something_else_is_an_error(tmp_path, name):
    path = pack(tmp_path / name, b"a line that is long enough\n" * 5000)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ReadError, match="cannot be unpacked"):
        list(lines(path))
    path.write_bytes(b"plain text")
    with pytest.raises(ReadError, match="cannot be unpacked"):
        list(lines(path))


def test_missing_and_not_utf8(tmp_path):
    with pytest.raises(ReadError, match="No such file"), opened(tmp_path / "no"):
        pass
    (tmp_path / "latin").write_bytes(b"caf\xe9\n")
    with pytest.raises(ReadError, match="not UTF-8"):
        list(lines(tmp_path / "latin"))


@pytest.mark.parametrize("name", ["out.txt", "out.txt.gz", "out.txt.zst"])
def test_whole_or_not_at_all(tmp_path, name):
    path = tmp_path / name
    with whole(path) as file:
        file.write("é\n")
    assert list(lines(path)) == [(1, "é")]
    with pytest.raises(ZeroDivisionError), whole(path) as file:
        file.write("half")
        1 / 0
    assert list(lines(path)) == [(1, "é")]
    assert [p.name for p in tmp_path.iterdir()] == [name]
    for wrong in (tmp_path / "none" / "x", tmp_path):
        with pytest.raises(UsageError, match="cannot be written"), whole(wrong):
            pass
    with whole("/dev/null") as file:
        file.write("gone")


def test_ledger_goes_on_after_a_crash(tmp_path):
    path = tmp_path / "rows.jsonl"
    with Ledger(path, {"system": "a", "k": 3}) as ledger:
        ledger.add({"id": "1", "answer": "é"})
        ledger.add({"id": "2", "answer": "x"})
    path.write_bytes(path.read_bytes()[:-4])  # the last line was being written
    with Ledger(path, {"system": "a", "k": 3}) as ledger:
        assert ledger.rows == {"1": {"id": "1", "answer": "é"}}
        ledger.add({"id": "2", "answer": "y"})
    assert [json.loads(line).get("answer") for line in path.read_text().splitlines()] == [None, "é", "y"]


def test_ledger_of_something_else_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    Ledger(path, {"system": "a"}).__exit__()
    with pytest.raises(UsageError, match=r"system = 'a', this run has 'b'"):
        Ledger(path, {"system": "b"})
    before = path.read_bytes()
    for mine in ("notes of mine\n", "notes of mine", '{"q1": "an answer"}'):
        (tmp_path / "other").write_text(mine)
        with pytest.raises(ReadError, match="line 1"):
            Ledger(tmp_path / "other", {"system": "a"})
        assert (tmp_path / "other").read_text() == mine and path.read_bytes() == before
    (tmp_path / "torn").write_text('{"rows_of": {"sys')  # killed in its very first line
    Ledger(tmp_path / "torn", {"system": "a"}).__exit__()
    assert json.loads((tmp_path / "torn").read_text()) == {"rows_of": {"system": "a"}}
    with Ledger(None, {}) as ledger:  # without a file: memory only
        ledger.add({"id": "1"})
        assert "1" in ledger.rows
