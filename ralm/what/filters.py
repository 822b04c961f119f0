"""Metadata as typed columns, so that `where="year > 2000 and licence = 'cc0'"` is a filter of the table engine.

Every document keeps its metadata word for word as JSON. Beside it, each key with a plain name gets a nullable column
of the type its first values have (text, int64, float64, bool); a value of another type stays in the JSON only."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from ralm.errors import StoreError, UsageError, unknown
from ralm.what.tables import DOCUMENTS, guard, reason

MOST = 256  # filter columns per store; further keys stay in the JSON
HIDDEN = {"rev", "metadata", "_key", "_chunks"}
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
TYPES = {bool: pa.bool_(), int: pa.int64(), float: pa.float64(), str: pa.string()}
ENGINE = {pa.string(): "Utf8", pa.int64(): "Int64", pa.float64(): "Float64", pa.bool_(): "Boolean"}  # names in its messages
HOLDS = {"Utf8": "text", "Int64": "numbers", "Float64": "numbers", "Boolean": "true or false"}
TAKEN = {name.lower() for name in DOCUMENTS.names} | {"text"}


def new_columns(schema: pa.Schema, metadata: Sequence[Mapping[str, Any]]) -> tuple[list[pa.Field], set[str]]:
    """Columns this metadata needs and the table lacks, and the keys that cannot be columns."""
    present = {name.lower(): name for name in schema.names}
    fields: dict[str, pa.Field] = {}
    refused: set[str] = set()
    room = MOST + len(DOCUMENTS) - len(schema)
    for row in metadata:
        for key, value in row.items():
            if key in refused or value is None or (present.get(key.lower()) == key and key.lower() not in TAKEN):
                continue
            kind = TYPES.get(type(value))
            if key in fields:
                if fields[key].type == pa.int64() and kind == pa.float64():
                    fields[key] = pa.field(key, kind)  # first seen as 3, then as 2.5
            elif (not NAME.fullmatch(key) or key.lower() in TAKEN or key.lower() in present or kind is None
                  or any(key.lower() == f.lower() for f in fields) or len(fields) >= room):
                refused.add(key)
            else:
                fields[key] = pa.field(key, kind)
    return list(fields.values()), refused


def values(field: pa.Field, metadata: Sequence[Mapping[str, Any]]) -> tuple[pa.Array, bool]:
    """The column of one key, and whether a value had another type than the column (it is null there)."""
    odd, out = False, []
    for row in metadata:
        value = row.get(field.name)
        kind = TYPES.get(type(value))
        if kind == pa.int64() and field.type == pa.float64() and abs(value) <= 2**53:
            value, kind = float(value), field.type
        if value is not None and (kind != field.type or (kind == pa.int64() and not -2**63 <= value < 2**63)):
            odd, value = True, None
        out.append(value)
    return pa.array(out, field.type), odd


def known(schema: pa.Schema) -> list[str]:
    """The columns a filter may name."""
    return [name for name in schema.names if name not in HIDDEN]


class UnknownColumn(UsageError):
    """A filter names a column this store does not have; a union asks its other parts before it gives up."""


def revs(documents, where: str) -> pa.ChunkedArray:
    """The revs of the documents that match. Raises UsageError where the filter is wrong."""
    if ";" in re.sub(r"'[^']*'|\"[^\"]*\"|`[^`]*`", "", where):  # the engine would read up to it and drop the rest
        raise UsageError(f"the filter {where!r} contains ';': write one condition")
    with guard(lambda e: _explain(where, documents.schema, e)):
        return documents.to_table(columns=["rev"], filter=where).column("rev")


def _explain(where: str, schema: pa.Schema, error: BaseException) -> Exception:
    text = reason(error)
    name = re.search(r"No field named [\"`']?([^\"`'.\s]+)", text)
    if name:
        return UnknownColumn(str(unknown("column", name[1], known(schema))))
    clash = re.search(r"Received literal (\w+)\(.*\) and could not convert to literal of type '(\w+)'", text)
    if clash and set(clash.groups()) <= set(HOLDS):
        return UsageError(_clash(where, schema, *(HOLDS[g] for g in clash.groups())))
    if re.search("not found|No such file|IO error|Io error", text):
        return StoreError(f"the documents table cannot be read ({text}); open the datastore again, or restore it from a copy")
    return UsageError(f"the filter {where!r} is not understood ({text}); write a condition such as \"year > 2000 and "
                      f"licence = 'cc0'\" on: {', '.join(known(schema))}")


def _clash(where: str, schema: pa.Schema, given: str, held: str) -> str:
    """What to say where a filter compares a column with a value of another type."""
    names = [n for n in known(schema) if HOLDS.get(ENGINE.get(schema.field(n).type, "")) == held and re.search(rf"\b{n}\b", where)]
    name = names[0] if names else "a column"
    way = {("numbers", "text"): f"write cast({name} as double) to compare it as a number",
           ("text", "numbers"): "write the number without quotes"}.get((given, held), "compare like with like")
    return f"the filter {where!r} compares {name}, which holds {held}, with {given}; {way}"
