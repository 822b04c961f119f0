"""Rows of jsonl, json, csv, tsv and parquet files -> Documents.

A row is {"id", "text", "title"?, "source"?, "licence"?, "date"?, anything else}. Other names in use are taken too (NAMES): BEIR's
_id, Pyserini's docid and contents, DPR's psg_id and passage. Everything else becomes metadata: numbers, text and booleans as they
are, nested values as JSON text, one object called metadata or meta flattened. A row without an id is FILE:LINE; one whose text is
empty but which has a title (BEIR has such) takes its title as text. A further column of csv or tsv holds numbers where every cell
of the first SAMPLE rows is one as Python writes it (12, 2.5; not 007 or 2.50, whose writing may say something): nothing is lost."""

from __future__ import annotations

import base64
import csv
import datetime
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from ralm.types import Document
from ralm.what.stream import BLOCK, CAP, Reason, clean, decode, lines, whole

NAMES = {"id": ("id", "_id", "docid", "psg_id"), "text": ("text", "contents", "passage", "body"), "title": ("title",),
         "source": ("source", "url"), "licence": ("licence", "license"), "date": ("date",)}
NO_TEXT = f"has no {', '.join(NAMES['text'][:-1])} or {NAMES['text'][-1]}"
ROWS = 512  # rows of a parquet batch
SAMPLE = 1000  # rows of a csv or tsv file whose cells decide what a column holds
KNOWN = {name for names in NAMES.values() for name in names}

Row = tuple[int, Any]  # (line or row number from 1, the row or the Reason why it is none)
Remark = Callable[[str], None]


def document(row: Any, fallback: str, source: str) -> Document:
    """A row as a Document; `fallback` is its id where it has none, `source` where it came from. Raises Reason."""
    if isinstance(row, Reason):
        raise row
    if not isinstance(row, Mapping):
        raise Reason(f"is {_called(row)}, not an object with a text")
    rest, nested = dict(row), {}
    for key in ("meta", "metadata"):
        if isinstance(rest.get(key), Mapping):
            nested |= rest.pop(key)
    id = _taken(rest, "id")
    if id is not None and (isinstance(id, bool) or not isinstance(id, str | int)):
        if not (isinstance(id, float) and id.is_integer()):
            raise Reason(f"has {_called(id)} as its id")
        id = int(id)  # pandas turns a column of whole numbers with a gap into floats
    text = _taken(rest, "text")
    about = {}
    for key in ("title", "source", "licence", "date"):
        value = _taken(rest, key)
        about[key] = clean(_text(value if value is not None else _taken(nested, key)))
    if text is None or (isinstance(text, str) and blank(text)):
        text = about["title"]
    if isinstance(text, bytes):
        text = decode(text)[0]
    if not isinstance(text, str):
        raise Reason(f"has {_called(text)} as its text")
    if blank(text):
        raise Reason(NO_TEXT)
    metadata = {clean(str(k)): _scalar(v) for k, v in {**nested, **rest}.items()}
    return Document(clean(str(id)) if id is not None else fallback, clean(text), about["title"], about["source"] or source,
                    about["licence"], about["date"], metadata)


def _taken(row: dict, key: str) -> Any:
    """The value under the first of a field's names that has one, which leaves the row; empty ones leave it too."""
    value = None
    for name in NAMES[key]:
        if name in row and (row[name] is None or row[name] == ""):
            del row[name]
        elif name in row and value is None:
            value = row.pop(name)
    return value


def _called(value: Any) -> str:
    """What JSON calls a value."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else "true or false"
    names = {int: "a number", float: "a number", str: "a string", list: "an array", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")


def blank(text: str) -> bool:
    return not text or text.isspace()  # strip() would copy the text


def _scalar(value: Any) -> Any:
    """A metadata value: str, int, float, bool or None; what is nested becomes JSON text, NaN and infinities None."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return clean(_text(value))


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, bytes):
        return _bytes(value)
    if isinstance(value, Mapping | Sequence | bool):
        return json.dumps(value, ensure_ascii=False, default=_text)
    return str(value)


def _bytes(value: bytes) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return base64.b64encode(value).decode("ascii")


# ---- one function a format: (number, row or Reason) ---------------------------------------------------------------------


def jsonl(stream: io.BufferedReader, remark: Remark) -> Iterator[Row]:
    """One JSON value a line; empty lines are passed over."""
    for number, line in lines(stream, remark):
        if isinstance(line, Reason):
            yield number, line
        elif not line.isspace():
            yield number, _json(line)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        return Reason("is nested too deep")
    except ValueError as e:  # also a number of more than 4300 digits
        return Reason(f"is not valid JSON ({getattr(e, 'msg', e)})")


def json_file(stream: io.BufferedReader, remark: Remark) -> Iterator[Row]:
    """An array of rows, one row, SQuAD ({"data": [{title, paragraphs: [{context}]}]}: a row a paragraph), or lines after all."""
    text, note = decode(whole(stream))
    if note:
        remark(note)
    value = _json(text)
    if isinstance(value, Reason):
        if "Extra data" in str(value):  # many a .json holds a JSON value a line
            yield from jsonl(io.BufferedReader(io.BytesIO(text.encode("utf-8", "surrogatepass"))), remark)
            return
        raise value
    if isinstance(value, Mapping) and isinstance(value.get("data"), list):
        value = list(_squad(value["data"]))
    yield from enumerate(value if isinstance(value, list) else [value], 1)


def _squad(articles: list) -> Iterator[Any]:
    for article in articles:
        if isinstance(article, Mapping) and isinstance(article.get("paragraphs"), list):
            for paragraph in article["paragraphs"]:
                yield {"title": article.get("title"), "text": paragraph.get("context") if isinstance(paragraph, Mapping) else None}
        else:
            yield article


def csv_file(stream: io.BufferedReader, remark: Remark) -> Iterator[Row]:
    """Comma, semicolon or tab separated, quoted as RFC 4180 has it, the first line naming the columns."""
    csv.field_size_limit(CAP // 4)  # characters, which take up to four bytes each
    place = [0]
    source = _unbroken(stream, remark, place)
    first = next(source, "")
    while first and not first.strip():
        first = next(source, "")
    header, separator = _header(first)

    def rest() -> Iterator[Row]:
        reader = csv.reader(source, delimiter=separator)
        while True:
            start = place[0] + 1
            try:
                cells = next(reader, None)
            except csv.Error as e:
                raise Reason(f"line {place[0]}: {e}") from e
            if cells is None:
                return
            if cells:
                yield start, _named(header, cells)

    return _typed(rest())


def _unbroken(stream: io.BufferedReader, remark: Remark, place: list[int]) -> Iterator[str]:
    """The lines of a csv file; `place[0]` is the number of the last one. One that cannot be read ends the file, since no one
    can tell where the next row begins."""
    for number, line in lines(stream, remark):
        place[0] = number
        if isinstance(line, Reason):
            raise Reason(f"line {number} {line}")
        yield line


def _header(line: str) -> tuple[list[str], str]:
    """(names of the columns, separator). Raises Reason where no column can be the text."""
    try:
        for separator in ",\t;|":
            names = _names(next(csv.reader([line], delimiter=separator), []))
            if set(names) & set(NAMES["text"]):
                return names, separator
        columns = ", ".join(_names(next(csv.reader([line]), []))[:12])[:200]
    except csv.Error as e:
        raise Reason(f"has a first line that names no columns ({e})") from e
    raise Reason(f"{NO_TEXT} among its columns ({columns}): rename the one that holds the text" if columns else "is empty")


def _names(cells: Sequence[str]) -> list[str]:
    """Column names; those of NAMES are known in any case, as spreadsheets like to write Title."""
    return [c.strip().lower() if c.strip().lower() in KNOWN else c.strip() for c in cells]


def _named(header: Sequence[str], cells: Sequence[str]) -> Any:
    if len(cells) != len(header):
        return Reason(f"has not as many cells as the header ({len(header)}); a quote may be open")
    return dict(zip(header, cells))


def _typed(rows: Iterator[Row]) -> Iterator[Row]:
    """The same rows with numbers in the columns that hold numbers; a cell there that is none stays text, an empty one is None."""
    sample: list[Row] = []
    size, fault = 0, None
    try:
        for row in rows:
            sample.append(row)
            size += 0 if isinstance(row[1], Reason) else sum(map(len, row[1].values()))
            if len(sample) == SAMPLE or size > BLOCK:
                break
    except Reason as e:  # what was read before counts
        fault = e
    numbers = _numbers([row for _, row in sample if not isinstance(row, Reason)])
    for number, row in sample:
        yield number, _cast(row, numbers)
    if fault is not None:
        raise fault
    for number, row in rows:
        yield number, _cast(row, numbers)


def _numbers(rows: Sequence[Mapping[str, str]]) -> dict[str, type]:
    """int or float for each column, not among NAMES, whose cells all are written so."""
    out: dict[str, type] = {}
    for name in rows[0].keys() - KNOWN if rows else ():
        cells = {row[name] for row in rows} - {""}
        for kind in (int, float):
            if cells and all(_number(kind, cell) is not None for cell in cells):
                out[name] = kind
                break
    return out


def _number(kind: type, cell: str) -> int | float | None:
    """The cell as int or float where it is written so (for float: or as an int), else None."""
    try:
        value = kind(cell)
        plain = str(value) == cell and math.isfinite(value)
    except (ValueError, OverflowError):
        return None
    return value if plain or (kind is float and _number(int, cell) is not None) else None


def _cast(row: Any, numbers: Mapping[str, type]) -> Any:
    if isinstance(row, Reason):
        return row
    for name, kind in numbers.items():
        value = _number(kind, row[name])
        if value is not None or row[name] == "":
            row[name] = value
    return row


def tsv(stream: io.BufferedReader, remark: Remark) -> Iterator[Row]:
    """Rows of tab-separated lines, see _tsv."""
    return _typed(_tsv(stream, remark))


def _tsv(stream: io.BufferedReader, remark: Remark) -> Iterator[Row]:
    """One row a line. With a header as DPR's psgs_w100.tsv (id, text, title), or without as MS MARCO's collection.tsv (id, text).

    Quotes are undone only where they enclose a whole cell and are doubled inside, as DPR writes them: MS MARCO has bare ones."""
    header: list[str] = []
    for number, line in lines(stream, remark):
        if isinstance(line, Reason):
            yield number, line
            continue
        line = line.rstrip("\r\n")
        if not line.strip():
            continue
        cells = [_unquoted(c) for c in line.split("\t")]
        if header:
            yield number, _named(header, cells)
            continue
        header = _names(cells)
        if not set(header) & set(NAMES["text"]):
            if len(cells) not in (2, 3) or not any(c.isdigit() for c in cells[0]):
                raise Reason(f"{NO_TEXT} among its columns ({', '.join(header[:12])[:200]}): rename the one that holds the text")
            header = ["id", "text", "title"][:len(cells)]
            remark(f"has no header: its columns are taken as {', '.join(header)}")
            yield number, _named(header, cells)


def _unquoted(cell: str) -> str:
    if len(cell) < 2 or cell[0] != '"' or cell[-1] != '"':
        return cell
    inner = cell[1:-1]
    bare = inner.replace('""', "")
    return cell if '"' in bare else inner.replace('""', '"')


def parquet(file: str | bytes, count: Callable[[float], None]) -> Iterator[Row]:
    """Rows in batches of ROWS, from a path or from bytes; `count` hears the share of the file after each batch."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(file) if isinstance(file, bytes) else file, pre_buffer=False,
                                            buffer_size=BLOCK)
        names, total = table.schema_arrow.names, table.metadata.num_rows
        batches = table.iter_batches(batch_size=ROWS)
    except Exception as e:  # a damaged file makes pyarrow raise a dozen kinds of error
        raise Reason(f"is not a parquet file that can be read ({_line(e)})") from e
    with table:
        if not set(names) & set(NAMES["text"]):
            raise Reason(f"{NO_TEXT} among its columns ({', '.join(names[:12])[:200]}): rename the one that holds the text")
        number = 0
        while True:
            try:
                batch = next(batches, None)
                rows = batch.to_pylist() if batch is not None else None
            except Exception as e:
                raise Reason(f"is damaged after row {number} ({_line(e)})") from e
            if rows is None:
                return
            for row in rows:
                number += 1
                yield number, row
            count(len(rows) / max(1, total))


def _line(error: BaseException) -> str:
    """An exception of a library as part of one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


FORMATS: dict[str, Callable[[BinaryIO, Remark], Iterator[Row]]] = {
    "jsonl": jsonl, "json": json_file, "csv": csv_file, "tsv": tsv}
