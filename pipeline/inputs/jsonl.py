"""Rows of JSON lines as Arrow columns: those of the job's table, in its types."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pyarrow import types as t

from pipeline.errors import RowError
from pipeline.inputs.columns import (
    EXACT,
    is_json_text,
    is_list,
    is_text,
    plain,
    without_columns,
)
from pipeline.inputs.listing import read_as

_MAX_DEPTH = 200
"""Lists and objects in each other on a line, at most: what Python can read, walk and write."""

BOM = b"\xef\xbb\xbf"
"""What some programs write before UTF-8. Files put together have it before any of their lines."""

RAW_LINE = "raw_line"
"""Column of `errors/` that holds a line that is no row."""


@dataclass(frozen=True)
class BadLine:
    """A line that is no row of the job's table: its text, and the error of its row."""

    text: str
    error_class: str
    message: str

    @property
    def error(self) -> RowError:
        """The error of its row."""
        return RowError(self.error_class, self.message)


def parse_row(
    line: bytes, table: pa.Schema, prefix: str = "", reserved: frozenset[str] = frozenset()
) -> dict[str, Any] | BadLine:
    """The row of a job's table that is on a line, or why none is.

    Args:
        line: the line.
        table: the job's columns.
        prefix: what comes before the names of columns that an earlier job added.
        reserved: names that no column may have.
    """
    row = parse_line(line)
    if row is None:
        return no_object(line)
    if prefix:
        row = {read_as(name, prefix): value for name, value in row.items()}
    if taken := sorted(reserved & row.keys()):
        why = f"the line has a key {taken[0]!r}, the name of an output column; rename it"
        return BadLine(_text(line), "ReservedColumn", why)
    if (misfitting := misfit(row, table)) is not None:
        return BadLine(_text(line), "MalformedValue", misfitting)
    return row


def no_object(line: bytes) -> BadLine:
    """A line that is not an object of JSON."""
    why = "the line is not a JSON object, is nested too deeply, or has half of a character in it"
    return BadLine(_text(line), "MalformedLine", why)


def _text(line: bytes) -> str:
    return line.decode(errors="replace").rstrip("\r\n")


def deeply_nested(line: bytes) -> bool:
    """Whether a line may have more lists and objects in each other than `parse_line` takes."""
    return len(line) > 2 * _MAX_DEPTH and line.count(b"{") + line.count(b"[") > _MAX_DEPTH


def is_row(line: bytes) -> bool:
    """Whether there is anything on a line."""
    return bool(line.strip().removeprefix(BOM).strip())


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The object on one line; None if it is not one, nested too deeply, or has half characters."""
    try:
        value = json.loads(line)
        if not isinstance(value, dict) or (deeply_nested(line) and _deeper(value, _MAX_DEPTH)):
            return None
        if b"\\u" in line or b"\xed" in line:
            # Half of a character (a lone surrogate) is no text, wherever it is.
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError):
        return None


def _deeper(value: Any, depth: int) -> bool:
    """Whether lists and objects are nested more than `depth` deep."""
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list):
        return False
    return not depth or any(_deeper(each, depth - 1) for each in value)


def misfit(row: dict[str, Any], schema: pa.Schema) -> str | None:
    """Why a row is none of the table's: the first value that its column cannot hold."""
    for name, value in row.items():
        index = schema.get_field_index(name)
        if index < 0:
            return f"{name!r} is no column of this job"
        field = schema.field(index)
        if not is_json_text(field) and (why := _misfit(value, field.type, name)):
            return why
    return None


def _misfit(value: Any, kind: pa.DataType, place: str) -> str | None:
    """Why a value is not of a type; None if it is."""
    if value is None:
        return None
    if isinstance(value, list):
        if t.is_fixed_size_list(kind) and len(value) != kind.list_size:
            return f"{place} has {len(value)} items, not {kind.list_size} as in most rows"
        if is_list(kind):
            inner = kind.value_type
            found = (_misfit(v, inner, f"{place}[{i}]") for i, v in enumerate(value))
            return next(filter(None, found), None)
    elif isinstance(value, dict):
        if t.is_struct(kind):
            fields = {field.name: field.type for field in kind}
            if unknown := next((key for key in value if key not in fields), None):
                return f"{place}: {unknown!r} is no field of this column"
            found = (_misfit(v, fields[key], f"{place}.{key}") for key, v in value.items())
            return next(filter(None, found), None)
    elif isinstance(value, str):
        if is_text(kind):
            return None
    elif isinstance(value, bool):
        if t.is_boolean(kind):
            return None
    elif isinstance(value, int):
        if t.is_integer(kind) and _in_range(value, kind):
            return None
        if t.is_floating(kind) and -EXACT <= value <= EXACT:
            return None
        if t.is_integer(kind) or t.is_floating(kind):
            return f"{place}: {value} does not fit the column's type, {kind}"
    elif t.is_floating(kind):
        return None
    what = _KINDS[type(value)]
    return f"{place} is {what}, where most rows have {_expected(kind)}"


_KINDS: dict[type, str] = {
    str: "text",
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
}


def _in_range(value: int, kind: pa.DataType) -> bool:
    signed = t.is_signed_integer(kind)
    bits = kind.bit_width - signed
    return bool((-(1 << bits) if signed else 0) <= value < 1 << bits)


def _expected(kind: pa.DataType) -> str:
    """A type in the words of `_KINDS`, or Arrow's."""
    if is_text(kind):
        return "text"
    if t.is_boolean(kind):
        return "true or false"
    if t.is_integer(kind):
        return "a whole number"
    if t.is_floating(kind):
        return "a number"
    if is_list(kind):
        return "a list"
    return "an object" if t.is_struct(kind) else str(kind)


def to_table(rows: Sequence[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    """Rows, none of them a `misfit`, in the columns and types of the job."""
    if not len(schema):
        return without_columns(len(rows))
    columns = []
    for field in schema:
        values = [row.get(field.name) for row in rows]
        if is_json_text(field):
            values = [v if v is None or isinstance(v, str) else json.dumps(v) for v in values]
        columns.append(_column(values, field.type))
    return pa.table(columns, schema=plain(schema))


def _column(values: list[Any], kind: pa.DataType) -> pa.ChunkedArray:
    """Values as a column, in several pieces where one of Arrow's would be too long."""
    try:
        found = pa.array(values, kind)
    except pa.ArrowCapacityError:
        if len(values) < 2:
            raise
        half = len(values) // 2
        parts = [_column(values[:half], kind), _column(values[half:], kind)]
        return pa.chunked_array([chunk for part in parts for chunk in part.chunks], kind)
    return found if isinstance(found, pa.ChunkedArray) else pa.chunked_array([found], kind)
