"""Cutting input files into units: rows that are read, generated and committed together.

A file is cut into pieces; `pipeline.inputs.joining` makes units of them, of one large piece or of
many small ones. A unit's id is a function of its files' names and row ranges alone, so the same
input gives the same units on any cluster.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.job import S3Config
from pipeline.errors import UserError
from pipeline.inputs.columns import stored
from pipeline.inputs.job_table import check_fits, integers_are_exact, job_table
from pipeline.inputs.json_values import Seen, check_columns_are_names, see_lines, without_strays
from pipeline.inputs.jsonl import is_row
from pipeline.inputs.listing import InputFile, read_as
from pipeline.inputs.openai_requests import LINES_SCHEMA
from pipeline.storage.folder import locate

_THREADS = 16
"""Files that are looked at together: on S3 this is mostly waiting."""

_SEEN_BYTES = 1 << 18
"""Bytes of JSON lines whose types are told together. Where a line is odd, all of them take longer.
"""

_OTHER_FORMATS = {
    b"\x1f\x8b": "compressed with gzip",
    b"BZh": "compressed with bzip2",
    b"\xfd7zXZ": "compressed with xz",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"PK\x03\x04": "a zip archive",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"\xff\xfe": "text in UTF-16, not UTF-8",
    b"\xfe\xff": "text in UTF-16, not UTF-8",
}
"""What a file begins with that has the name of JSON lines and is something else."""


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
        format: "parquet" or "jsonl".
        offset: where reading starts: first row group (Parquet) or byte (JSONL).
        end: where it ends: one past the last row group or byte.
        skip: rows before `start` in the first row group; 0 for JSONL.
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
        schema: its own columns, in the types that most of its rows have.
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
    """Read footers (Parquet) or all lines (JSONL), cut files into pieces, and make one table.

    Args:
        files: the input.
        s3: how to reach the files on S3.
        unit_rows: about how many rows a unit has; no piece has more.
        format: "openai": lines are requests, each of which stays whole.
        reserved: names that no column may have; a few lines with such a key do not make it one.

    Raises:
        UserError: a file that cannot be read, or columns that no type fits; the message names it.
    """

    def plan(file: InputFile) -> tuple[FilePlan, Seen | None]:
        with readable(file.url):
            if file.format == "parquet" and format is None:
                return _plan_parquet(file, s3, unit_rows), None
            return _plan_jsonl(file, s3, unit_rows, format, reserved)

    # Most files of a job have the same schema: it is kept once.
    known: dict[bytes, pa.Schema] = {}
    first: dict[tuple[str, pa.Schema], str] = {}
    plans, lines = list[FilePlan](), Seen()
    with ThreadPoolExecutor(_THREADS) as pool:
        for found, seen in pool.map(plan, files):
            schema = known.setdefault(bytes(found.schema.serialize()), found.schema)
            plans.append(replace(found, schema=schema))
            if found.rows:
                first.setdefault((found.file.format, schema), found.file.url)
            if seen is not None:
                lines.add(seen)
                check_columns_are_names(lines, found.file.url)
    if format is not None:
        return [replace(each, table=LINES_SCHEMA) for each in plans]
    table = job_table(first, lines, partial(_inexact, plans, s3))
    return [replace(each, table=table) for each in plans]


def _inexact(plans: Iterable[FilePlan], s3: S3Config, column: str) -> str | None:
    """The first Parquet file whose integers in a column may be no float64; None if all are."""
    for plan in plans:
        if plan.file.format == "parquet" and column in plan.schema.names:
            kind = plan.schema.field(column).type
            wide = pa.types.is_integer(kind) and kind.bit_width > 32
            name = column.removeprefix(plan.file.prefix)
            name = name if read_as(name, plan.file.prefix) == column else column
            if wide and not integers_are_exact(plan.file.url, name, s3):
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
def readable(url: str) -> Iterator[None]:
    """Turn what a file's content or its absence raises into one line that names it."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(
            f"{url}: was there when the input was listed, but is gone; restore it, and run the "
            "same command again"
        ) from None
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's, not the content's
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"{url}: not a readable Parquet file: {reason}") from None


def _plan_parquet(file: InputFile, s3: S3Config, unit_rows: int) -> FilePlan:
    folder, name = locate(file.url, s3)
    with folder.open(name, file.size) as opened, pq.ParquetFile(opened) as parquet:
        metadata, schema = parquet.metadata, parquet.schema_arrow
        schema = pa.schema([(read_as(f.name, file.prefix), stored(f.type)) for f in schema])
        _check_distinct(schema.names, file)
    groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    pieces = tuple(
        Piece(
            name=file.name,
            start=cut.start,
            rows=cut.rows,
            url=file.url,
            format="parquet",
            offset=cut.first_group,
            end=cut.end_group,
            skip=cut.skip,
            size=file.size,
            modified=file.modified,
            prefix=file.prefix,
        )
        for cut in cut_row_groups(groups, unit_rows)
    )
    return FilePlan(file, metadata.num_rows, schema, pieces)


@dataclass(frozen=True)
class Cut:
    """A row range in terms of row groups: `rows` rows after `skip` rows of `first_group`."""

    start: int
    rows: int
    first_group: int
    end_group: int
    skip: int


def cut_row_groups(groups: Sequence[int], unit_rows: int) -> list[Cut]:
    """Row ranges of at most `unit_rows` rows that cover all rows once, in order.

    Row groups that fit are kept whole and small neighbours are joined; larger ones are cut into
    equal parts, so that no range needs parts of different row groups.

    Args:
        groups: rows of each row group; zero is allowed.
        unit_rows: most rows of a range.

    >>> [(c.start, c.rows) for c in cut_row_groups([2, 3, 9], 5)]
    [(0, 5), (5, 5), (10, 4)]
    """
    cuts: list[Cut] = []
    start = joined = first = 0
    for index, rows in enumerate(groups):
        if joined and joined + rows > unit_rows:
            cuts.append(Cut(start, joined, first, index, 0))
            start, joined = start + joined, 0
        if rows > unit_rows:
            parts = -(-rows // unit_rows)
            bounds = [-(-rows * part // parts) for part in range(parts + 1)]
            for low, high in pairwise(bounds):
                cuts.append(Cut(start + low, high - low, index, index + 1, low))
            start += rows
        elif rows:
            first = first if joined else index
            joined += rows
    if joined:
        cuts.append(Cut(start, joined, first, len(groups), 0))
    return cuts


def _plan_jsonl(
    file: InputFile, s3: S3Config, unit_rows: int, format: str | None, reserved: frozenset[str]
) -> tuple[FilePlan, Seen]:
    if file.format != "jsonl":
        raise UserError(f"{file.url}: input.format {format} needs .jsonl files")
    # Row count and byte offset where each piece begins; its own bytes alone are read then.
    starts: list[tuple[int, int]] = []
    row = position = 0
    seen = Seen()
    waiting: list[bytes] = []
    told = 0  # bytes until those in `waiting`
    folder, name = locate(file.url, s3)
    with folder.open(name, file.size) as stream:
        lines = io.BufferedReader(stream, 1 << 20)
        _check_format(file, lines.peek(8))
        for line in lines:
            if is_row(line):
                if row % unit_rows == 0:
                    starts.append((row, position))
                row += 1
                if format is None:
                    waiting.append(line)
            position += len(line)
            if position - told > _SEEN_BYTES:
                seen.add(see_lines(waiting))
                waiting, told = [], position
    seen.add(see_lines(waiting))
    if file.prefix:
        names = [read_as(name, file.prefix) for name in seen.fields]
        _check_distinct(names, file)
        seen.fields = dict(zip(names, seen.fields.values(), strict=True))
    seen = without_strays(seen, reserved)
    schema = LINES_SCHEMA if format is not None else seen.schema()
    bounds = [*starts, (row, position)]
    pieces = tuple(
        Piece(
            name=file.name,
            start=start,
            rows=end - start,
            url=file.url,
            format="jsonl",
            offset=offset,
            end=limit,
            size=file.size,
            modified=file.modified,
            prefix=file.prefix,
        )
        for (start, offset), (end, limit) in pairwise(bounds)
    )
    return FilePlan(file, row, schema, pieces), seen


def _check_format(file: InputFile, start: bytes) -> None:
    for magic, what in _OTHER_FORMATS.items():
        if start.startswith(magic):
            raise UserError(f"{file.url}: is {what}, though its name says JSON lines; convert it")


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
