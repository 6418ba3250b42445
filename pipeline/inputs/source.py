"""Reading pending units: a Ray Data `Datasource` whose every block is one whole unit."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby

import pyarrow as pa
import pyarrow.parquet as pq
from ray.data.block import Block, BlockMetadata
from ray.data.context import DataContext
from ray.data.datasource import Datasource, ReadTask

from pipeline.config.job import S3Config
from pipeline.errors import UserError
from pipeline.inputs.blocks import UnitRows
from pipeline.inputs.jsonl import BOM, is_row, parse_line, to_table
from pipeline.inputs.listing import check_unchanged, read_as
from pipeline.inputs.openai_requests import LINES_SCHEMA, REQUEST
from pipeline.inputs.units import Unit, readable
from pipeline.storage.folder import locate

_BATCH_ROWS = 4096
"""Rows of Parquet decoded at a time. More needs more memory; units are cut from these batches."""

_MOST_TASKS = 1000
"""Read tasks of a job, about. The driver keeps each of them, so a larger job has larger ones."""


class UnitDatasource(Datasource):
    """Reads units. Units cut from one row group share a read task, which decodes it once.

    A job of very many units has read tasks of several row groups or files each: Ray Data keeps
    every task in the driver. A task hands its units on one by one, as fast as they are taken.

    Args:
        units: what to read; units of one file next to each other and in row order.
        schemas: per file name, the columns and types that JSONL rows are read as.
        s3: how to reach files on S3.
        reserved: names that no column may have; lines of JSONL with such a key are kept as text.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        schemas: dict[str, pa.Schema],
        s3: S3Config,
        reserved: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._reserved = reserved
        groups = [list(g) for _, g in groupby(units, key=_read_together)]
        size = -(-len(groups) // _MOST_TASKS) or 1
        self._tasks = [groups[i : i + size] for i in range(0, len(groups), size)]
        self._schemas = schemas
        self._s3 = s3

    @property
    def read_tasks(self) -> int:
        """How many read tasks there are."""
        return len(self._tasks)

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: DataContext | None = None,
    ) -> list[ReadTask]:
        return [
            ReadTask(
                _reader(
                    [(g, self._schemas.get(g[0].name)) for g in groups], self._s3, self._reserved
                ),
                BlockMetadata(
                    num_rows=sum(map(len, groups)),
                    size_bytes=None,
                    exec_stats=None,
                    input_files=None,
                ),
            )
            for groups in self._tasks
        ]


def _read_together(unit: Unit) -> tuple[str, int]:
    return unit.url, unit.offset


def _reader(
    groups: list[tuple[list[Unit], pa.Schema | None]], s3: S3Config, reserved: frozenset[str]
) -> Callable[[], Iterable[Block]]:
    # A plain closure over plain values: what is pickled to the worker stays small.
    def read() -> Iterable[Block]:
        for units, schema in groups:
            for rows in read_units(units, schema, s3, reserved):
                yield rows.to_block()

    return read


def read_units(
    units: list[Unit],
    schema: pa.Schema | None,
    s3: S3Config,
    reserved: frozenset[str] = frozenset(),
) -> Iterator[UnitRows]:
    """Read units that start in the same row group, or one unit of JSONL.

    Args:
        units: of one file, in row order, all with the same `offset`.
        schema: for JSONL, the file's columns and types; None for Parquet.
        s3: how to reach files on S3.
        reserved: names that no column may have.

    Raises:
        UserError: the file is gone, damaged, or not the one that was planned on.
    """
    url = units[0].url
    check_unchanged(url, units[0].size, units[0].modified, s3)
    folder, name = locate(url, s3)
    with readable(url):
        if units[0].format == "jsonl":
            (unit,) = units
            with folder.open(name) as file:
                file.seek(unit.offset)
                data = file.read(unit.end - unit.offset)
            read = iter([parse_jsonl(unit, data, schema, reserved)])
        else:
            read = _read_parquet(units, s3)
        for unit in units:
            rows = next(read, None)
            if rows is None or rows.table.num_rows != unit.rows:
                raise UserError(
                    f"{url}: has changed since the job was planned: it had {unit.rows} rows from "
                    f"row {unit.start} on; restore it, or start again with another output"
                )
            yield rows


def _read_parquet(units: list[Unit], s3: S3Config) -> Iterator[UnitRows]:
    folder, name = locate(units[0].url, s3)
    with folder.open(name) as file, pq.ParquetFile(file) as parquet:
        groups = range(units[0].offset, max(u.end for u in units))
        position, wanted = 0, iter(units)
        unit, pieces = next(wanted), list[pa.RecordBatch]()
        for batch in parquet.iter_batches(_BATCH_ROWS, row_groups=list(groups)):
            batch_end = position + batch.num_rows
            while unit.skip < batch_end:
                low = max(unit.skip, position) - position
                high = min(unit.skip + unit.rows, batch_end) - position
                pieces.append(batch.slice(low, high - low))
                if unit.skip + unit.rows > batch_end:
                    break
                yield UnitRows(unit, _whole(pieces, unit.prefix), {})
                following = next(wanted, None)
                if following is None:
                    return
                unit, pieces = following, []
            position = batch_end


def _whole(pieces: list[pa.RecordBatch], prefix: str) -> pa.Table:
    # pandas and Hugging Face describe the whole file's columns in the schema's metadata; with
    # columns added that description would be wrong.
    table = pa.Table.from_batches(pieces).replace_schema_metadata(None)
    return table.rename_columns([read_as(name, prefix) for name in table.column_names])


def parse_jsonl(
    unit: Unit, data: bytes, schema: pa.Schema | None, reserved: frozenset[str] = frozenset()
) -> UnitRows:
    """Rows of a unit's bytes; a line that cannot be one of columns becomes a row of nulls."""
    lines = [line for line in io.BytesIO(data) if is_row(line)]
    if schema is not None and schema.equals(LINES_SCHEMA, check_metadata=True):
        return _whole_lines(unit, lines)
    parsed = [parse_line(line) for line in lines]
    if unit.prefix:
        parsed = [
            row and {read_as(name, unit.prefix): value for name, value in row.items()}
            for row in parsed
        ]
    parsed = [None if row and reserved & row.keys() else row for row in parsed]
    table = to_table([row or {} for row in parsed], schema or pa.schema([]))
    malformed = {
        i: line.decode(errors="replace").rstrip("\r\n")
        for i, (line, row) in enumerate(zip(lines, parsed, strict=True))
        if row is None
    }
    return UnitRows(unit, table, malformed)


def _whole_lines(unit: Unit, lines: list[bytes]) -> UnitRows:
    """A unit of requests: each line in one column, null if it is no text."""
    texts: list[str | None] = []
    malformed = {}
    for index, line in enumerate(lines):
        try:
            texts.append(line.removeprefix(BOM).decode().strip())
        except UnicodeDecodeError:
            texts.append(None)
            malformed[index] = line.decode(errors="replace").rstrip("\r\n")
    return UnitRows(unit, pa.table({REQUEST: pa.array(texts, pa.string())}), malformed)
