"""The one table of a job: which columns all its files have together, and of which types."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import types as t

from pipeline.config.job import S3Config
from pipeline.errors import UserError
from pipeline.inputs.columns import (
    EXACT,
    JSON_TEXT,
    NoCommonType,
    common,
    is_json_text,
    is_text,
    settled,
)
from pipeline.inputs.json_values import Mixed, Seen
from pipeline.storage.folder import locate

Inexact = Callable[[str], str | None]
"""Names a Parquet file whose integers in a column may be no float64, if there is one."""

_FIX = "cast the column in one of them, or make two jobs of them"


@dataclass
class _Column:
    """What files say of a column.

    Attributes:
        kind: a type that holds its values in all Parquet files.
        stored: the first Parquet file that has it; None if none has.
        lines: the first file of JSON lines that has it; None if none has.
        whole: whether it has integers in a Parquet file.
    """

    kind: pa.DataType
    stored: str | None = None
    lines: str | None = None
    whole: bool = False


def job_table(
    files: Mapping[tuple[str, pa.Schema], str], seen: Seen, inexact: Inexact
) -> pa.Schema:
    """The columns of a job, in the order in which its files name them.

    Args:
        files: each format and schema that there is, with the first file of them.
        seen: the values of all JSON lines; most of them decide a column's type.
        inexact: asked about columns in which integers meet fractions.

    Raises:
        UserError: no type holds the values of two files; it names both.
    """
    columns: dict[str, _Column] = {}
    for (format, schema), url in files.items():
        for field in schema:
            column = columns.setdefault(field.name, _Column(pa.null()))
            if format == "jsonl":
                column.lines = column.lines or url
                continue
            column.kind = _both(field.name, field.type, url, column.kind, column.stored)
            column.stored = column.stored or url
            column.whole |= t.is_integer(field.type)
    return pa.schema(
        [_field(name, column, seen.fields.get(name), inexact) for name, column in columns.items()]
    )


def _field(name: str, column: _Column, seen: Seen | None, inexact: Inexact) -> pa.Field:
    try:
        kind = pa.null() if seen is None else seen.kind(inside=False)
    except Mixed:
        if t.is_null(column.kind) or is_text(column.kind):
            return pa.field(name, settled(column.kind), metadata=JSON_TEXT)
        kind = pa.null()  # what Parquet has is certain, and lines must be of it
    kind = _both(name, kind, column.lines, column.kind, column.stored)
    if t.is_floating(kind) and column.whole and (url := inexact(name)):
        raise UserError(
            f"{url}: column {name!r} is of integers, some beyond 2**53, and of fractions in other "
            f"files, which no type holds exactly; {_FIX}"
        )
    return pa.field(name, settled(kind))


def _both(
    name: str, kind: pa.DataType, url: str | None, other: pa.DataType, other_url: str | None
) -> pa.DataType:
    try:
        return common(other, kind)
    except NoCommonType:
        raise UserError(
            f"{url}: column {name!r} is {kind}, but {other} in {other_url}, and a job writes one "
            f"table; {_FIX}"
        ) from None


def check_fits(
    format: str, schema: pa.Schema, url: str, table: pa.Schema, inexact: Inexact
) -> None:
    """Check that a file's columns are of a table that is written already.

    Args:
        format: the file's.
        schema: its own columns.
        url: the file.
        table: the job's columns.
        inexact: asked about columns in which integers would become fractions.

    Raises:
        UserError: names the file, the column, both types and the fix.
    """
    for field in schema:
        index = table.get_field_index(field.name)
        if index < 0:
            raise UserError(
                f"{url}: column {field.name!r} is new, and what this job has written lacks it; "
                "leave it out, or start a new output (--fork OUT)"
            )
        wanted = table.field(index)
        if format == "jsonl" and is_json_text(wanted):
            continue
        if is_json_text(field) or not _holds(wanted.type, field.type, format):
            found = "of several kinds" if is_json_text(field) else str(field.type)
            raise UserError(
                f"{url}: column {field.name!r} is {found}, but {wanted.type} in what this job has "
                "written; cast it, or start a new output (--fork OUT)"
            )
        stored = format == "parquet" and t.is_integer(field.type)
        if stored and t.is_floating(wanted.type) and inexact(field.name):
            raise UserError(
                f"{url}: column {field.name!r} has integers beyond 2**53, but is {wanted.type} "
                "in what this job has written; start a new output (--fork OUT)"
            )


def _holds(wanted: pa.DataType, kind: pa.DataType, format: str) -> bool:
    """Whether values of a type are of the other without loss, but for single ones of JSON lines."""
    wanted = _loose(wanted, format)
    try:
        return bool(settled(common(wanted, _loose(kind, format))).equals(wanted))
    except NoCommonType:
        return False


def _loose(kind: pa.DataType, format: str) -> pa.DataType:
    """A type without what does not matter: how long a text may be, how wide a number of JSON is."""
    if format == "jsonl" and (t.is_integer(kind) or t.is_floating(kind)):
        return pa.int64() if t.is_integer(kind) else pa.float64()
    if t.is_large_string(kind) or t.is_large_binary(kind):
        return pa.string() if t.is_large_string(kind) else pa.binary()
    if t.is_struct(kind):
        return pa.struct([field.with_type(_loose(field.type, format)) for field in kind])
    if t.is_list(kind) or t.is_large_list(kind):
        return pa.list_(_loose(kind.value_type, format))
    return kind


def integers_are_exact(url: str, column: str, s3: S3Config) -> bool:
    """Whether a Parquet file says of the integers in a column that each is a float64, too."""
    folder, name = locate(url, s3)
    with folder.open(name) as opened, pq.ParquetFile(opened) as parquet:
        place = [parquet.schema.column(i).path for i in range(len(parquet.schema))].index(column)
        groups = range(parquet.metadata.num_row_groups)
        told = [parquet.metadata.row_group(i).column(place).statistics for i in groups]
    return all(
        each is not None
        and (-EXACT <= each.min <= each.max <= EXACT if each.has_min_max else not each.num_values)
        for each in told
    )
