"""One table for all files of a job: each column has one type, which every usual reader knows.

Files of one job may call the same text `string`, `large_string` or a dictionary, and hold the same
numbers in 32 or 64 bits. What their columns have in common is decided once, when the job is planned
(`common`), and every unit's rows are brought into it (`conformed`). So any two files of an output
are one table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types as t

EXACT = 2**53
"""Up to here, and down to minus this, every integer is a float64."""

JSON_TEXT = {b"specbatch.values": b"json"}
"""Metadata of a column whose values of JSON lines are kept as text, whatever they are."""


_DIGITS = 38
"""Of a decimal, at most. Longer ones are text."""


_MOST_BYTES = 1 << 30
"""Of rows that are picked at once: a piece of a column has 2 GiB of text, at most."""


class NoCommonType(Exception):
    """No type holds the values of both without loss."""


def is_json_text(field: pa.Field) -> bool:
    """Whether a column keeps values of JSON lines as their text."""
    return JSON_TEXT.items() <= (field.metadata or {}).items()


def stored(kind: pa.DataType) -> pa.DataType:
    """The type that values of an Arrow type are kept in.

    Readers differ in what they know. So ways to write values down are undone (dictionaries, runs,
    views), a type with a name of its own is what it is made of, a map is a list of its keys and
    values, and decimals have 128 bits, or are text.
    """
    if isinstance(kind, pa.BaseExtensionType):
        return stored(kind.storage_type)
    if t.is_dictionary(kind) or t.is_run_end_encoded(kind):
        return stored(kind.value_type)
    if t.is_string_view(kind):
        return pa.large_string()
    if t.is_binary_view(kind):
        return pa.large_binary()
    if t.is_struct(kind):
        return pa.struct([field.with_type(stored(field.type)) for field in kind])
    if t.is_map(kind):
        key = pa.field("key", stored(kind.key_type), nullable=False)
        return pa.list_(pa.struct([key, pa.field("value", stored(kind.item_type))]))
    if t.is_fixed_size_list(kind):
        return pa.list_(_inner(kind.value_field), kind.list_size)
    if t.is_large_list(kind) or t.is_large_list_view(kind):
        return pa.large_list(_inner(kind.value_field))
    if t.is_list(kind) or t.is_list_view(kind):
        return pa.list_(_inner(kind.value_field))
    if t.is_decimal(kind):
        short = kind.precision <= _DIGITS
        return pa.decimal128(kind.precision, kind.scale) if short else pa.string()
    return kind


def _inner(field: pa.Field) -> pa.Field:
    return field.with_type(stored(field.type))


def common(a: pa.DataType, b: pa.DataType) -> pa.DataType:
    """The narrowest type that holds the values of two stored types.

    Integers and fractions have float64 in common, which holds integers up to `EXACT` only.

    Raises:
        NoCommonType: there is none.
    """
    if a.equals(b) or t.is_null(b):
        return a
    if t.is_null(a):
        return b
    if t.is_struct(a) and t.is_struct(b):
        return _common_struct(a, b)
    if is_list(a) and is_list(b):
        value = common(a.value_type, b.value_type)
        large = t.is_large_list(a) or t.is_large_list(b)
        return pa.large_list(value) if large else pa.list_(value)
    numbers = [kind for kind in (a, b) if t.is_integer(kind) or t.is_floating(kind)]
    if len(numbers) == 2 and any(map(t.is_floating, numbers)) and any(map(t.is_integer, numbers)):
        return pa.float64()
    if _family(a) is None or _family(a) != _family(b):
        raise NoCommonType
    try:
        fields = [pa.schema([pa.field("c", kind)]) for kind in (a, b)]
        kind = pa.unify_schemas(fields, promote_options="permissive").field("c").type
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        raise NoCommonType from None
    if {a, b} == {pa.uint64(), kind}:
        raise NoCommonType  # Arrow calls int64 the wider of these two
    if t.is_decimal(kind) and kind != stored(kind):
        raise NoCommonType
    return kind


def _common_struct(a: pa.StructType, b: pa.StructType) -> pa.StructType:
    """All fields of both, those of the first in front."""
    theirs = {field.name: field for field in b}
    fields = []
    for field in a:
        other = theirs.pop(field.name, None)
        nullable = field.nullable or other is None or other.nullable
        kind = field.type if other is None else common(field.type, other.type)
        fields.append(pa.field(field.name, kind, nullable))
    fields += [field.with_nullable(True) for field in theirs.values()]
    return pa.struct(fields)


def is_text(kind: pa.DataType) -> bool:
    """Whether a type is of text, short or long."""
    return bool(t.is_string(kind) or t.is_large_string(kind))


def is_list(kind: pa.DataType) -> bool:
    """Whether a type is of lists, short, long or all of one length."""
    return bool(t.is_list(kind) or t.is_large_list(kind) or t.is_fixed_size_list(kind))


_FAMILIES = {
    "text": (t.is_string, t.is_large_string),
    "bytes": (t.is_binary, t.is_large_binary, t.is_fixed_size_binary),
    "integer": (t.is_integer,),
    "fraction": (t.is_floating,),
    "decimal": (t.is_decimal,),
    "date": (t.is_date,),
    "time": (t.is_time,),
    "timestamp": (t.is_timestamp,),
    "duration": (t.is_duration,),
}
"""Types of which one may hold the values of another."""


def _family(kind: pa.DataType) -> str | None:
    return next((name for name, of in _FAMILIES.items() if any(is_(kind) for is_ in of)), None)


def settled(kind: pa.DataType) -> pa.DataType:
    """A type without nulls' own type in it, which some readers do not know: it becomes text."""
    if t.is_null(kind):
        return pa.string()
    if t.is_struct(kind):
        return pa.struct([field.with_type(settled(field.type)) for field in kind])
    if t.is_fixed_size_list(kind):
        return pa.list_(settled(kind.value_type), kind.list_size)
    if t.is_large_list(kind):
        return pa.large_list(settled(kind.value_type))
    return pa.list_(settled(kind.value_type)) if t.is_list(kind) else kind


def conformed(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """A table's values in the columns and types of a job; a column that it lacks is null.

    Args:
        table: of one input file, whose columns the job's types were made for.
        schema: the job's columns.

    Raises:
        pa.ArrowInvalid: a value does not fit.
    """
    there = dict(zip(table.column_names, table.columns, strict=True))
    columns = []
    for field in schema:
        if field.name in there:
            columns.append(_cast(there[field.name], field.type))
        else:
            columns.append(pa.chunked_array([pa.nulls(table.num_rows, field.type)]))
    return pa.table(columns, schema=plain(schema)) if columns else without_columns(table.num_rows)


def without_columns(rows: int) -> pa.Table:
    """A table of so many rows and no column, which has no length of its own."""
    return pa.table({"_": pa.nulls(rows)}).select([])


def _cast(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    if column.type.equals(kind):
        return column
    if _has_list_views(column.type):
        column = pa.chunked_array([_without_list_views(chunk) for chunk in column.chunks])
    return column.cast(kind)


def _has_list_views(kind: pa.DataType) -> bool:
    if t.is_list_view(kind) or t.is_large_list_view(kind):
        return True
    return any(_has_list_views(kind.field(i).type) for i in range(kind.num_fields))


def _without_list_views(array: pa.Array) -> pa.Array:
    """Views of lists as lists, in lists and structs, too. Arrow's own cast loses its offsets."""
    kind = array.type
    if t.is_struct(kind):
        columns = [_without_list_views(each) for each in array.flatten()]
        return pa.StructArray.from_arrays(columns, kind.names, mask=array.is_null())
    if not (t.is_list(kind) or t.is_large_list(kind) or _has_list_views(kind)):
        return array
    lengths = pc.fill_null(pc.list_value_length(array).cast(pa.int64()), 0)
    offsets = pa.concat_arrays([pa.array([0]), pc.cumulative_sum(lengths)])
    values = _without_list_views(array.flatten())
    return pa.LargeListArray.from_arrays(offsets, values, mask=array.is_null())


def taken(table: pa.Table, rows: Sequence[int], most: int = _MOST_BYTES) -> pa.Table:
    """Some rows of a table, in pieces that Arrow can make.

    Args:
        table: the table.
        rows: their numbers, in the order in which they are wanted; a row may be wanted again.
        most: bytes of a piece, about; a row may have more.
    """
    low, end = min(rows, default=0), max(rows, default=-1) + 1
    part = table.slice(low, end - low)
    again = max(Counter(rows).values(), default=0)
    if len(rows) > 1 and part.nbytes * again > most:
        half = len(rows) // 2
        return pa.concat_tables([taken(table, rows[:half], most), taken(table, rows[half:], most)])
    return part.take(pa.array([row - low for row in rows], pa.int64()))


def plain(schema: pa.Schema) -> pa.Schema:
    """A schema as files show it."""
    return pa.schema([field.remove_metadata() for field in schema])
