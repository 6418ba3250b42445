"""Cutting input files into units: rows that are read, generated and committed together.

A file is cut into pieces; `pipeline.inputs.joining` makes units of them, of one large piece or of
many small ones. A unit's id is a function of its files' names and row ranges alone, so the same
input gives the same units on any cluster.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial

import pyarrow as pa

from pipeline.config.job import S3Config
from pipeline.errors import UserError
from pipeline.inputs.formats.base import Cut, Found
from pipeline.inputs.formats.readers import READERS, format_of
from pipeline.inputs.job_table import check_fits, integers_are_exact, job_table
from pipeline.inputs.json_values import Seen, check_columns_are_names, without_strays
from pipeline.inputs.listing import InputFile, read_as
from pipeline.inputs.openai_requests import LINES_SCHEMA
from pipeline.inputs.partitions import partition_of, partition_types
from pipeline.storage.folder import locate

_THREADS = 16
"""Files that are looked at together: on S3 this is mostly waiting."""


@dataclass(frozen=True, slots=True)
class RowRange:
    """Rows of one input file that lie next to each other.

    Attributes:
        name: the input file's name in row ids.
        start: number of the first in the file.
        rows: how many.
    """

    name: str
    start: int
    rows: int


@dataclass(frozen=True, slots=True)  # a job may have a million of them
class Piece(RowRange):
    """A row range that can be read by itself.

    Attributes:
        url: the input file.
        format: the name of its reader.
        offset, end, skip: where it is in the file (`Cut`).
        size, modified, prefix: of the file when it was planned (`InputFile`).
    """

    url: str
    format: str
    offset: int
    end: int
    skip: int = 0
    size: int = 0
    modified: int = 0
    prefix: str = ""

    @property
    def cut(self) -> Cut:
        """Its rows in the file."""
        return Cut(self.start, self.rows, self.offset, self.end, self.skip)


@dataclass(frozen=True, slots=True)  # a job may have a million of them
class Unit:
    """The smallest piece of work that is committed.

    Attributes:
        id: file name of its outputs, without extension.
        pieces: its rows, in this order.
        generation: how often its files were replaced when this work on it is committed.
        only: the rows to complete, by their index in it; None: all.
    """

    id: str
    pieces: tuple[Piece, ...]
    generation: int = 0
    only: tuple[int, ...] | None = None

    @staticmethod
    def of(*pieces: Piece) -> Unit:
        """The unit of these pieces."""
        return Unit(unit_id(*pieces), pieces)

    @property
    def rows(self) -> int:
        """How many rows it has."""
        return sum(piece.rows for piece in self.pieces)

    @property
    def wanted(self) -> Sequence[int]:
        """The rows to complete, by their index in the unit."""
        return range(self.rows) if self.only is None else self.only

    def place(self, index: int) -> tuple[str, int]:
        """The file's name and the number in it of the unit's `index`th row."""
        for piece in self.pieces:
            if index < piece.rows:
                return piece.name, piece.start + index
            index -= piece.rows
        raise IndexError(f"unit {self.id} has {self.rows} rows")

    def to_json(self) -> str:
        """One line that `from_json` reads back."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(line: str) -> Unit:
        """The unit that `to_json` wrote."""
        values = json.loads(line)
        only = values.pop("only")
        pieces = tuple(Piece(**piece) for piece in values.pop("pieces"))
        return Unit(**values, pieces=pieces, only=None if only is None else tuple(only))


NO_COLUMNS = pa.schema([])


@dataclass(frozen=True, slots=True)
class FilePlan:
    """What planning learned about one input file.

    Attributes:
        file: the file.
        rows: how many rows it has; malformed lines count.
        schema: its own columns, in the types that most of its rows have, and its folders'.
        pieces: what it is cut into, in row order.
        step: when it became part of the job: 0 from the beginning, else by which extension;
            UNJOINED: its pieces are units of their own.
        table: the columns of all files of the job, which its rows are brought into.
    """

    file: InputFile
    rows: int
    schema: pa.Schema
    pieces: tuple[Piece, ...]
    step: int = 0
    table: pa.Schema = NO_COLUMNS


UNJOINED = -1
"""The step of a file of an output that was begun by a version that joined no pieces."""


def unit_id(*ranges: RowRange) -> str:
    """A readable, unique and safe file name for rows of input files; it begins as the first."""
    first = ranges[0]
    digest = hashlib.sha256(
        "\0".join(f"{each.name}:{each.start}:{each.rows}" for each in ranges).encode()
    ).hexdigest()[:10]
    return f"{unit_stem(first.name)}-{first.start:09d}-{digest}"


def unit_stem(name: str) -> str:
    """What the ids of units begin with whose first row is of this input file."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name.rsplit(".", 1)[0]).strip("-")[-60:] or "rows"


def plan_files(
    files: Sequence[InputFile],
    s3: S3Config,
    unit_rows: int,
    *,
    format: str | None = None,
    reserved: frozenset[str] = frozenset(),
) -> list[FilePlan]:
    """Look into every file, cut it into pieces, and make one table of all.

    Args:
        files: the input.
        s3: how to reach the files on S3.
        unit_rows: about how many rows a unit has; no piece has more.
        format: "openai": lines are requests, each of which stays whole.
        reserved: names that no column may have; a few lines with such a key do not make it one.

    Raises:
        UserError: a file that cannot be read, or columns that no type fits; the message names it.
    """
    kinds = partition_types(file.url for file in files) if format is None else {}

    def plan(file: InputFile) -> tuple[FilePlan, pa.Schema, Seen | None]:
        found = _found(file, s3, unit_rows, format)
        schema, seen = found.schema, found.seen
        names = [read_as(name, file.prefix) for name in schema.names]
        _check_distinct(names, file)
        if seen is not None:
            seen.fields = dict(zip(names, seen.fields.values(), strict=True))
            seen = without_strays(seen, reserved)
            schema = seen.schema()
        else:
            schema = pa.schema([f.with_name(n) for f, n in zip(schema, names, strict=True)])
        folders = partition_of(file.url).keys() & kinds.keys() - set(schema.names)
        more = pa.schema([(name, kinds[name]) for name in kinds if name in folders])
        pieces = tuple(_piece(file, cut, format) for cut in found.cuts)
        return FilePlan(file, found.rows, schema, pieces), more, seen

    # Most files of a job have the same schema: it is kept once.
    known: dict[bytes, pa.Schema] = {}
    first: dict[tuple[str, pa.Schema], str] = {}
    plans, lines = list[FilePlan](), Seen()
    with ThreadPoolExecutor(_THREADS) as pool:
        for found, more, seen in pool.map(plan, files):
            schema = found.schema
            if found.rows:
                first.setdefault((found.file.format, schema), found.file.url)
                first.setdefault(("folder", more), found.file.url)
            schema = pa.schema([*schema, *more])
            schema = known.setdefault(bytes(schema.serialize()), schema)
            plans.append(replace(found, schema=schema))
            if seen is not None:
                lines.add(seen)
                check_columns_are_names(lines, found.file.url)
    if format is not None:
        return [replace(each, table=LINES_SCHEMA) for each in plans]
    table = job_table(first, lines, partial(_inexact, plans, s3))
    return [replace(each, table=table) for each in plans]


def _found(file: InputFile, s3: S3Config, unit_rows: int, format: str | None) -> Found:
    reader = READERS[format_of(file, format)]
    folder, name = locate(file.url, s3)
    with readable(file.url, reader.name), folder.open(name, file.size) as opened:
        return reader.find(opened, file.url, unit_rows)


def _piece(file: InputFile, cut: Cut, format: str | None) -> Piece:
    return Piece(
        name=file.name,
        start=cut.start,
        rows=cut.rows,
        url=file.url,
        format=format_of(file, format),
        offset=cut.offset,
        end=cut.end,
        skip=cut.skip,
        size=file.size,
        modified=file.modified,
        prefix=file.prefix,
    )


def _inexact(plans: Iterable[FilePlan], s3: S3Config, column: str) -> str | None:
    """The first file whose integers in a column may be no float64; None if all are.

    Lines are counted value by value, and of other formats Parquet alone says what it has.
    """
    for plan in plans:
        if plan.file.format != "jsonl" and column in plan.schema.names:
            kind = plan.schema.field(column).type
            wide = pa.types.is_integer(kind) and kind.bit_width > 32
            name = column.removeprefix(plan.file.prefix)
            name = name if read_as(name, plan.file.prefix) == column else column
            told = plan.file.format == "parquet"
            if wide and not (told and integers_are_exact(plan.file.url, name, s3)):
                return plan.file.url
    return None


def table_of(plans: Sequence[FilePlan]) -> pa.Schema:
    """The columns of the job that some files were planned as."""
    return plans[0].table if plans else NO_COLUMNS


def check_added(added: Sequence[FilePlan], table: pa.Schema, s3: S3Config) -> None:
    """Check that files which are added to a job have no other columns and types than it.

    Args:
        added: the files.
        table: the job's columns so far, which the files that it has written have.
        s3: how to reach the files on S3.

    Raises:
        UserError: names the file, the column, both types and the fix.
    """
    for plan in added:
        if plan.rows:
            inexact = partial(_inexact, [plan], s3)
            check_fits(plan.file.format, plan.schema, plan.file.url, table, inexact)


@contextmanager
def readable(url: str, format: str) -> Iterator[None]:
    """Turn what a file's content or its absence raises into one line that names it.

    Args:
        url: the file.
        format: what its format is called.
    """
    try:
        yield
    except FileNotFoundError:
        raise UserError(
            f"{url}: is gone since the input was listed, or is a link that leads nowhere; restore "
            "it, and run the same command again"
        ) from None
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's, not the content's
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"{url}: not a readable {format} file: {reason}") from None


def _check_distinct(names: Sequence[str], file: InputFile) -> None:
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if repeated:
        fix = "take another input.prefix" if file.prefix else "rename one"
        raise UserError(f"{file.url}: two columns are named {repeated[0]!r}; {fix}")


def check_columns(plans: Iterable[FilePlan], required: Iterable[str]) -> None:
    """Check that every file has the columns that prompts are made of.

    Raises:
        UserError: names the column, the file, and the columns it has.
    """
    required = list(required)
    for plan in plans:
        names = plan.schema.names
        for column in required:
            if column not in names and plan.rows:
                have = ", ".join(names) or "none"
                raise UserError(f"{plan.file.url}: no column {column!r}; its columns: {have}")
