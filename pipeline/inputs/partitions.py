"""Columns that are in the names of folders, as Hive, Spark and pyarrow write them.

The rows of `date=2026-11-28/lang=en/part.parquet` have columns `date` and `lang`. All folders of a
file's path count, so that a row has the same columns whether one day of a table is asked for or all
of it. Types are those that pyarrow infers: int32 if all values of the job are such, otherwise text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import UserError

_NULL = "__HIVE_DEFAULT_PARTITION__"
"""The value of a folder whose rows have null."""

_INT32 = re.compile(r"-?\d{1,10}")

Partition = Mapping[str, str | None]
"""Values by column, as they stand in the names of folders; None: null."""


def partition_of(url: str) -> Partition:
    """The columns in the names of a file's folders."""
    found: dict[str, str | None] = {}
    for folder in url.split("/")[:-1]:
        name, equals, value = folder.partition("=")
        if name and equals:
            found[unquote(name)] = None if value == _NULL else unquote(value)
    return found


def partition_types(urls: Iterable[str]) -> dict[str, pa.DataType]:
    """The types of the columns in the names of some files' folders."""
    kinds: dict[str, pa.DataType] = {}
    for url in urls:
        for name, value in partition_of(url).items():
            kind = pa.null() if value is None else _type(value)
            if pa.string() in (kind, kinds.get(name)):
                kinds[name] = pa.string()
            elif name not in kinds or pa.types.is_null(kinds[name]):
                kinds[name] = kind
    return kinds


def _type(value: str) -> pa.DataType:
    is_int = _INT32.fullmatch(value) and -(2**31) <= int(value) < 2**31
    return pa.int32() if is_int else pa.string()


def filled(table: pa.Table, partition: Partition, url: str) -> pa.Table:
    """A table with the values of its folders' names, where it has none itself.

    Args:
        table: rows of a file, in the columns and types of the job.
        partition: of the file.
        url: the file.

    Raises:
        UserError: a value in the file is another than its folder's.
    """
    for name, value in partition.items():
        index = table.schema.get_field_index(name)
        if index < 0 or value is None:
            continue
        field, column = table.schema.field(index), table[index]
        try:
            scalar = pa.scalar(value).cast(field.type)
            others = column.filter(pc.not_equal(column, scalar))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            others = column.drop_null()
            scalar = pa.scalar(None, field.type)
        if len(others):
            raise UserError(
                f"{url}: column {name!r} holds {str(others[0])[:60]!r}, but the folder says "
                f"{name}={value}; rename the folder or the column"
            )
        table = table.set_column(index, field, pc.fill_null(column, scalar))
    return table
