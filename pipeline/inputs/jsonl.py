"""Rows of JSON lines as Arrow columns: nothing is lost, and types agree between units."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa

_MAX_DEPTH = 200
"""Lists and objects in each other on a line, at most: what Python can read, walk and write."""

_MAX_TYPE_DEPTH = 20
"""The same for a column's type: Arrow's files end at 64, where a list counts twice."""

BOM = b"\xef\xbb\xbf"
"""What some programs write before UTF-8. Files put together have it before any of their lines."""

RAW_LINE = "raw_line"
"""Column of `errors/` that holds a line that is not a JSON object."""


def is_row(line: bytes) -> bool:
    """Whether there is anything on a line."""
    return bool(line.strip().removeprefix(BOM).strip())


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The object on one line; None if it is not one, nested too deeply, or has half characters."""
    try:
        value = json.loads(line)
        deep = line.count(b"{") + line.count(b"[") > _MAX_DEPTH and _deeper(value, _MAX_DEPTH)
        if isinstance(value, dict) and not deep:
            for text in (*value, *value.values()):
                if isinstance(text, str):
                    text.encode()  # half of a character (a lone surrogate) is no text
            return value
    except (ValueError, RecursionError):
        pass
    return None


def jsonl_schema(lines: Iterable[bytes]) -> pa.Schema:
    """Columns and types of a file, from its first lines; lines that are not objects are skipped."""
    rows = [row for line in lines if (row := parse_line(line)) is not None]
    return to_table(rows, pa.schema([])).schema


def to_table(rows: Sequence[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    """Rows as columns: those of `schema` first, in its types, then any others.

    A column whose values `schema`'s type cannot hold without loss gets the type they need; values
    that have no common Arrow type are kept as JSON text.
    """
    names = list(schema.names)
    names += list(dict.fromkeys(name for row in rows for name in row if name not in schema.names))
    columns = {
        name: _column([row.get(name) for row in rows], _type_of(schema, name)) for name in names
    }
    return pa.table(columns) if columns else without_columns(len(rows))


def without_columns(rows: int) -> pa.Table:
    """A table of so many rows and no column, which has no length of its own."""
    return pa.table({"_": pa.nulls(rows)}).select([])


def _type_of(schema: pa.Schema, name: str) -> pa.DataType | None:
    return schema.field(name).type if name in schema.names else None


def _column(values: list[Any], expected: pa.DataType | None) -> pa.Array:
    try:
        array = pa.array(values)
        if not _storable(array.type):
            raise TypeError(f"Parquet cannot hold {array.type}")
        if _turns_truth_to_number(values, array.type):
            raise TypeError("true would become 1.0")
        if expected is None or array.type == expected:
            return array
        # Conversion to a narrower struct would drop fields silently, so widen first.
        fields = [pa.schema([pa.field("c", t)]) for t in (expected, array.type)]
        wide = pa.unify_schemas(fields, promote_options="permissive").field("c").type
        return pa.array(values, type=wide)
    except (pa.ArrowException, OverflowError, UnicodeError, TypeError, ValueError):
        texts = [None if v is None else v if _is_text(v) else json.dumps(v) for v in values]
        return pa.array(texts, pa.string())


def _deeper(value: Any, depth: int) -> bool:
    """Whether lists and objects are nested more than `depth` deep."""
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list):
        return False
    return not depth or any(_deeper(each, depth - 1) for each in value)


def _storable(kind: pa.DataType, depth: int = _MAX_TYPE_DEPTH) -> bool:
    """Parquet has no structs without fields, which is what `{}` alone is taken for."""
    if not depth:
        return False
    if pa.types.is_struct(kind):
        return bool(kind.num_fields) and all(_storable(field.type, depth - 1) for field in kind)
    return not pa.types.is_list(kind) or _storable(kind.value_type, depth - 1)


def _turns_truth_to_number(values: Iterable[Any], kind: pa.DataType) -> bool:
    """Arrow takes true for 1.0 among fractions."""
    if pa.types.is_floating(kind):
        return any(value is True or value is False for value in values)
    there = [value for value in values if value is not None]
    if pa.types.is_list(kind):
        return any(_turns_truth_to_number(value, kind.value_type) for value in there)
    return pa.types.is_struct(kind) and any(
        _turns_truth_to_number([value.get(field.name) for value in there], field.type)
        for field in kind
    )


def _is_text(value: object) -> bool:
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
