"""Rows of every kind become the documents they say they are; what cannot is counted with its reason."""

import csv
import datetime
import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ralm.errors import ReadError
from ralm.what.read import read
from ralm.what.records import NAMES, SAMPLE, document

KNOWN = {name for names in NAMES.values() for name in names} | {"meta", "metadata"}
TEXT = st.text(min_size=1, max_size=40)
SOLID = TEXT.filter(lambda t: not t.isspace())
NUMBER = st.integers(-2**62, 2**62) | st.floats(allow_nan=False, allow_infinity=False)
SCALAR = st.none() | st.booleans() | NUMBER | st.text(max_size=20)
VALUE = st.recursive(SCALAR, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=3), max_leaves=6)
ROW = st.fixed_dictionaries({"id": SOLID, "text": SOLID}, optional=dict.fromkeys(("title", "licence", "date", "source"), SOLID))
METADATA = st.dictionaries(TEXT.filter(lambda k: k not in KNOWN), VALUE, max_size=4)


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8"))
    return path


def jsonl(path, *rows):
    return write(path, "".join(json.dumps(r) + "\n" for r in rows))


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.tuples(ROW, METADATA), min_size=1, max_size=4), ascii=st.booleans(),
       nested=st.sampled_from(["", "meta", "metadata"]))
def test_json_rows_round_trip(tmp_path_factory, rows, ascii, nested):
    path = tmp_path_factory.mktemp("rows") / "a.jsonl"
    made = [{**row, nested: metadata} if nested else {**row, **metadata} for row, metadata in rows]
    write(path, "\n".join(json.dumps(r, ensure_ascii=ascii) for r in made))
    for (row, metadata), d in zip(rows, read(path), strict=True):
        assert (d.id, d.text, d.title) == (row["id"], row["text"], row.get("title", ""))
        assert (d.licence, d.date) == (row.get("licence", ""), row.get("date", ""))
        assert d.source == row.get("source", str(path))
        assert d.metadata.keys() == metadata.keys()
        for key, value in metadata.items():
            assert (json.loads(d.metadata[key]) if isinstance(value, dict | list) else d.metadata[key]) == value


@settings(max_examples=60, deadline=None)
@given(value=VALUE)
def test_any_json_value_is_a_document_or_a_counted_row(tmp_path_factory, value):
    skipped = []
    documents = list(read(jsonl(tmp_path_factory.mktemp("any") / "a.jsonl", value), skipped=skipped))
    assert len(documents) + len(skipped) == 1
    for d in documents:
        assert d.text.encode("utf-8") and d.id.encode("utf-8")
        assert all(v is None or isinstance(v, str | int | float | bool) for v in d.metadata.values())


@pytest.mark.parametrize("id_name", NAMES["id"])
@pytest.mark.parametrize("text_name", NAMES["text"])
def test_accepted_names(id_name, text_name):
    d = document({id_name: "x", text_name: "some words", "url": "http://a", "license": "cc0", "year": 2020}, "f:1", "f")
    assert (d.id, d.text, d.source, d.licence, dict(d.metadata)) == ("x", "some words", "http://a", "cc0", {"year": 2020})


def test_ids(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"text": "one"}, {"id": 7, "text": "two"}, {"id": 8.0, "text": "three"},
                 {"id": "", "text": "four"})
    assert [d.id for d in read(path)] == ["a.jsonl:1", "7", "8", "a.jsonl:4"]


def test_first_of_two_names_wins_and_the_other_is_metadata():
    d = document({"id": "a", "_id": "b", "text": "t", "contents": "c", "title": None}, "f", "f")
    assert (d.id, d.text, dict(d.metadata)) == ("a", "t", {"_id": "b", "contents": "c"})


def test_top_level_wins_over_nested_metadata():
    d = document({"text": "t", "k": 1, "metadata": {"k": 2, "title": "T", "id": "inner", "deep": {"a": [1]}}}, "f:1", "f")
    assert (d.id, d.title, dict(d.metadata)) == ("f:1", "T", {"k": 1, "id": "inner", "deep": '{"a": [1]}'})


def test_text_falls_back_to_the_title_only():
    assert document({"_id": "d", "title": "Only a title", "text": ""}, "f", "f").text == "Only a title"


def test_bad_rows_are_counted_by_reason(tmp_path):
    lines = ['{"text": "good"}', "{broken", '{"text": ""}', '{"text": 5}', "3", '{"title": ""}', "", '{"id": [1], "text": "x"}',
             '{"text": "nul"}\0', "[" * 100_000, '{"text": "last"}']
    path, skipped = write(tmp_path / "a.jsonl", "\n".join(lines)), []
    assert [d.text for d in read(path, skipped=skipped)] == [] and skipped  # NUL bytes near the beginning: no text file at all
    lines[8] = '{"text": "nan", "x": NaN, "y": Infinity}'
    skipped.clear()
    documents = list(read(write(path, "\n".join(lines)), skipped=skipped))
    assert [d.text for d in documents] == ["good", "nan", "last"] and dict(documents[1].metadata) == {"x": None, "y": None}
    assert documents[-1].id == "a.jsonl:11"
    reasons = [r for _, r in skipped]
    assert "2 rows: has no text, contents, passage or body (first: line 3)" in reasons
    assert "line 4 has a number as its text" in reasons and "line 8 has an array as its id" in reasons
    assert "line 5 is a number, not an object with a text" in reasons and "line 10 is nested too deep" in reasons
    assert any("line 2 is not valid JSON" in r for r in reasons) and len(reasons) == 6
    with pytest.raises(ReadError, match=r"a\.jsonl:2: is not valid JSON"):
        list(read(path, strict=True))


def test_lone_surrogates_do_not_leave(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"id": "\\ud800", "text": "a\\udc00b \\ud83d\\ude00", "k\\ud800": ["\\ud800"]}')
    [d] = read(path)
    assert d.text == "a\ufffdb \U0001f600" and d.id == "\ufffd" and dict(d.metadata) == {"k\ufffd": '["\ufffd"]'}


def test_csv_quotes_lines_and_separators(tmp_path):
    rows = [["1", 'He said "no",\nthen left', "A, B"], ["2", "plain", ""]]
    for separator in ",;\t|":
        out = io.StringIO()
        csv.writer(out, delimiter=separator).writerows([["id", "Text", "Title"], *rows])
        documents = list(read(write(tmp_path / "a.csv", out.getvalue())))
        assert [(d.id, d.text, d.title) for d in documents] == [tuple(r) for r in rows]


def test_csv_ids_count_physical_lines_and_ragged_rows_are_named(tmp_path):
    path, skipped = write(tmp_path / "a.csv", 'text,year\n"two\nlines",2020\nshort\n"x",1,2\nend,2021\n'), []
    documents = list(read(path, skipped=skipped))
    assert [(d.id, d.text, dict(d.metadata)) for d in documents] == [
        ("a.csv:2", "two\nlines", {"year": 2020}), ("a.csv:6", "end", {"year": 2021})]
    assert len(skipped) == 1 and skipped[0][1].startswith("2 rows: has not as many cells as the header (2)")


@pytest.mark.parametrize("name, separator", [("a.csv", ","), ("a.tsv", "\t")])
def test_columns_of_numbers_are_numbers_and_lose_nothing(tmp_path, name, separator):
    head = ["id", "text", "year", "price", "zip", "version", "mixed", "empty", "big"]
    rows = [["7", "one", "1899", "2.5", "01067", "3.9", "3", "", "9" * 30], ["8", "two", "", "3", "10115", "3.10", "n.d.", "", "1"]]
    rows += [["9", f"row {i}", "2000", "4.25", "1", "3.9", "3", "", "2"] for i in range(SAMPLE)]
    rows += [["10", "late", "c. 1900", *"12345", ""]]
    path = write(tmp_path / name, "\n".join(separator.join(r) for r in [head, *rows]))
    first, second, *_, last = (dict(d.metadata) for d in read(path))
    assert first == {"year": 1899, "price": 2.5, "zip": "01067", "version": "3.9", "mixed": "3", "empty": "", "big": int("9" * 30)}
    assert second == {"year": None, "price": 3.0, "zip": "10115", "version": "3.10", "mixed": "n.d.", "empty": "", "big": 1}
    assert last["year"] == "c. 1900" and last["price"] == 1.0 and last["big"] is None
    assert [d.id for d in read(path)][:2] == ["7", "8"]


def test_rows_before_a_fault_within_the_first_ones_are_kept(tmp_path):
    skipped = []
    path = write(tmp_path / "a.csv", 'text,year\nfirst,2020\nsecond,2021\n"open' + "x" * 70 * 2**20)
    assert [(d.text, d.metadata["year"]) for d in read(path, skipped=skipped)] == [("first", 2020), ("second", 2021)]
    assert len(skipped) == 1


def test_csv_without_a_text_column_names_the_columns(tmp_path):
    skipped = []
    assert list(read(write(tmp_path / "a.csv", "name,price\nx,1\n"), skipped=skipped)) == []
    assert "(name, price)" in skipped[0][1] and "rename" in skipped[0][1]


def test_dpr_tsv(tmp_path):
    quoted = 'id\ttext\ttitle\r\n1\t"""Aaron"" is a prophet, "" they say"\tAaron\r\n2\tBare " quote\tB\r\n'
    path = tmp_path / "psgs_w100.tsv.gz"
    path.write_bytes(gzip.compress(quoted.encode()))
    assert [(d.id, d.text, d.title) for d in read(path)] == [
        ("1", '"Aaron" is a prophet, " they say', "Aaron"), ("2", 'Bare " quote', "B")]


def test_ms_marco_tsv_has_no_header(tmp_path):
    path = write(tmp_path / "collection.tsv", '0\t"Quoted" start\n1\t"open quote\n')
    assert [(d.id, d.text) for d in read(path)] == [("0", '"Quoted" start'), ("1", '"open quote')]
    skipped = []
    assert list(read(write(tmp_path / "b.tsv", "name\tprice\na\t1\n"), skipped=skipped)) == [] and "rename" in skipped[0][1]


def test_json_array_object_lines_and_squad(tmp_path):
    path = tmp_path / "a.json"
    assert [d.id for d in read(write(path, '[{"text": "a"}, {"id": "x", "text": "b"}]'))] == ["a.json:1", "x"]
    assert [d.text for d in read(write(path, '{"text": "a"}'))] == ["a"]
    assert [d.text for d in read(write(path, '{"text": "a"}\n{"text": "b"}\n'))] == ["a", "b"]
    squad = {"version": "1.1", "data": [{"title": "T", "paragraphs": [{"context": "c1", "qas": []}, {"context": "c2"}]}]}
    assert [(d.title, d.text) for d in read(write(path, json.dumps(squad)))] == [("T", "c1"), ("T", "c2")]


def test_parquet_types(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({
        "id": [1, None, 3], "text": ["x" * 9, "y", None], "when": [datetime.datetime(2020, 1, 2), None, None],
        "tags": [["a"], [], None],
        "date": [datetime.date(2021, 5, 6)] * 3, "blob": [b"\xff", b"ok", None], "score": [1.5, float("nan"), None]}), path)
    skipped = []
    first, second = read(path, skipped=skipped)
    assert (first.id, first.date, second.id) == ("1", "2021-05-06", "a.parquet:2") and len(skipped) == 1
    assert dict(first.metadata) == {"when": "2020-01-02T00:00:00", "tags": '["a"]', "blob": "/w==", "score": 1.5}
    assert second.metadata["score"] is None


def test_parquet_batches_and_progress(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"row {i}" for i in range(2000)]}), path, row_group_size=300)
    documents = list(read(path))
    assert len(documents) == 2000 and documents[1999].text == "row 1999" and documents[1999].id == "a.parquet:2000"
