"""Cutting input files into units: row ranges of one file that are read, generated and committed.

A unit's id is a function of the file's name and the row range alone, so the same input gives the
same units on any cluster, and a committed file's name says which rows it holds.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import S3Config
from pipeline.errors import UserError
from pipeline.faults import explained
from pipeline.listing import InputFile
from pipeline.rows import jsonl_schema
from pipeline.storage import open_file

_THREADS = 16
_SAMPLE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)  # a job may have a million of them
class Unit:
    """The smallest piece of work that is committed.

    Attributes:
        id: file name of its outputs, without extension.
        url: the input file.
        name: the input file's name in row ids.
        format: "parquet" or "jsonl".
        start: number of its first row in the file.
        rows: how many rows.
        offset: where reading starts: first row group (Parquet) or byte (JSONL).
        end: where it ends: one past the last row group or byte.
        skip: rows before `start` in the first row group; 0 for JSONL.
    """

    id: str
    url: str
    name: str
    format: str
    start: int
    rows: int
    offset: int
    end: int
    skip: int = 0

    def to_json(self) -> str:
        """One line that `from_json` reads back."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(line: str) -> Unit:
        """The unit that `to_json` wrote."""
        return Unit(**json.loads(line))


@dataclass(frozen=True, slots=True)
class FilePlan:
    """What planning learned about one input file.

    Attributes:
        file: the file.
        rows: how many rows it has; malformed lines count.
        schema: its columns, without the schema's metadata. For JSONL: of its first lines.
        units: its units, in row order.
    """

    file: InputFile
    rows: int
    schema: pa.Schema
    units: tuple[Unit, ...]


def unit_id(name: str, start: int, rows: int) -> str:
    """A readable, unique and safe file name for a row range of an input file."""
    stem = re.sub(r"[^A-Za-z0-9]+", "-", name.rsplit(".", 1)[0]).strip("-")[-60:]
    digest = hashlib.sha256(f"{name}:{start}:{rows}".encode()).hexdigest()[:10]
    return f"{stem or 'rows'}-{start:09d}-{digest}"


def plan_files(files: Sequence[InputFile], s3: S3Config, unit_rows: int) -> list[FilePlan]:
    """Read footers (Parquet) or count lines (JSONL) and cut every file into units.

    Args:
        files: the input.
        s3: how to reach the files on S3.
        unit_rows: about how many rows a unit has; no unit has more.

    Raises:
        UserError: a file that cannot be read; the message names it.
    """
    known: dict[pa.Schema, pa.Schema] = {}

    def plan(file: InputFile) -> FilePlan:
        with explained(file.url, s3):
            if file.format == "parquet":
                plan = _plan_parquet(file, s3, unit_rows)
            else:
                plan = _plan_jsonl(file, s3, unit_rows)
        # Most files of a job have the same schema: it is kept once.
        schema = plan.schema.remove_metadata()
        return replace(plan, schema=known.setdefault(schema, schema))

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(plan, files))


def _plan_parquet(file: InputFile, s3: S3Config, unit_rows: int) -> FilePlan:
    try:
        with open_file(file.url, s3) as opened, pq.ParquetFile(opened) as parquet:
            metadata, schema = parquet.metadata, parquet.schema_arrow
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(f"{file.url}: not a readable Parquet file: {error}") from None
    groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    units = tuple(
        Unit(
            id=unit_id(file.name, cut.start, cut.rows),
            url=file.url,
            name=file.name,
            format="parquet",
            start=cut.start,
            rows=cut.rows,
            offset=cut.first_group,
            end=cut.end_group,
            skip=cut.skip,
        )
        for cut in cut_row_groups(groups, unit_rows)
    )
    return FilePlan(file, metadata.num_rows, schema, units)


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
    equal parts, so that no unit needs two pieces of different row groups.

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


def _plan_jsonl(file: InputFile, s3: S3Config, unit_rows: int) -> FilePlan:
    # Row count and byte offset where each unit begins; a unit then reads its own bytes only.
    starts: list[tuple[int, int]] = []
    row = position = 0
    sample: list[bytes] = []
    with open_file(file.url, s3) as stream:
        for line in io.BufferedReader(stream, 1 << 20):
            if line.strip():
                if row % unit_rows == 0:
                    starts.append((row, position))
                row += 1
            if position < _SAMPLE_BYTES:
                sample.append(line)
            position += len(line)
    bounds = [*starts, (row, position)]
    units = tuple(
        Unit(
            id=unit_id(file.name, start, end - start),
            url=file.url,
            name=file.name,
            format="jsonl",
            start=start,
            rows=end - start,
            offset=offset,
            end=limit,
        )
        for (start, offset), (end, limit) in pairwise(bounds)
    )
    return FilePlan(file, row, jsonl_schema(sample), units)


def check_columns(plans: Iterable[FilePlan], required: Iterable[str]) -> None:
    """Check that every file has the columns that prompts are made of.

    Raises:
        UserError: names the column, the file, and the columns it has.
    """
    required = list(required)
    for plan in plans:
        names = plan.schema.names
        repeated = {name for name in names if names.count(name) > 1}
        if repeated:
            raise UserError(f"{plan.file.url}: two columns are named {sorted(repeated)[0]!r}")
        for column in required:
            if column not in names and plan.rows:
                have = ", ".join(names) or "none"
                raise UserError(f"{plan.file.url}: no column {column!r}; its columns: {have}")
