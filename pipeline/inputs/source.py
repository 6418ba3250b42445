"""Reading pending units: a Ray Data `Datasource` whose every block is one bundle of whole units."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import chain, groupby, islice

import pyarrow as pa
from ray.data.block import Block, BlockMetadata
from ray.data.context import DataContext
from ray.data.datasource import Datasource, ReadTask

from pipeline.config.job import S3Config
from pipeline.errors import UserError
from pipeline.inputs.blocks import UnitRows
from pipeline.inputs.columns import taken, without_columns
from pipeline.inputs.formats.base import Rows, Wanted
from pipeline.inputs.formats.readers import READERS
from pipeline.inputs.joining import Bundle
from pipeline.inputs.jsonl import BadLine
from pipeline.inputs.listing import check_unchanged
from pipeline.inputs.partitions import filled, partition_of
from pipeline.inputs.units import Piece, Unit, readable
from pipeline.storage.folder import locate

_MOST_TASKS = 1000
"""Read tasks of a job, about. The driver keeps each of them, so a larger job has larger ones."""

_AHEAD = 8
"""Pieces read ahead, at once: on S3 this is mostly waiting. More would hold more of them in memory
when the actors are slower."""


class UnitDatasource(Datasource):
    """Reads units. Those cut from one row group share a read task, which decodes it once.

    A job of very many units has read tasks of several row groups or files each: Ray Data keeps
    every task in the driver. A task hands its bundles on one by one, as fast as they are taken.

    Args:
        bundles: what to read; units of one file next to each other and in row order.
        table: the columns and types that all rows are read as.
        s3: how to reach files on S3.
        reserved: names that no column may have; lines of JSONL with such a key are bad ones.
    """

    def __init__(
        self,
        bundles: Sequence[Bundle],
        table: pa.Schema,
        s3: S3Config,
        reserved: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._reserved = reserved
        groups: list[list[Bundle]] = []
        last = None
        for bundle in bundles:
            if last is None or _read_together(bundle[0].pieces[0]) != last:
                groups.append([])
            groups[-1].append(bundle)
            last = _read_together(bundle[-1].pieces[-1])
        size = -(-len(groups) // _MOST_TASKS) or 1
        parts = [groups[i : i + size] for i in range(0, len(groups), size)]
        self._tasks = [list(chain.from_iterable(part)) for part in parts]
        self._table = table
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
                _reader(bundles, self._table, self._s3, self._reserved),
                BlockMetadata(
                    num_rows=len(bundles),
                    size_bytes=None,
                    exec_stats=None,
                    input_files=None,
                ),
            )
            for bundles in self._tasks
        ]


def _read_together(piece: Piece) -> tuple[str, int]:
    return piece.url, piece.offset


def _reader(
    bundles: Sequence[Bundle], table: pa.Schema, s3: S3Config, reserved: frozenset[str]
) -> Callable[[], Iterable[Block]]:
    # A plain closure over plain values: what is pickled to the worker stays small.
    def read() -> Iterable[Block]:
        units = read_units([u for bundle in bundles for u in bundle], table, s3, reserved)
        for bundle in bundles:
            yield UnitRows.to_block(list(islice(units, len(bundle))))

    return read


def read_units(
    units: Sequence[Unit],
    table: pa.Schema,
    s3: S3Config,
    reserved: frozenset[str] = frozenset(),
) -> Iterator[UnitRows]:
    """Read units one after the other; files are read ahead, several at once.

    Args:
        units: in input order, so that those cut from one row group are next to each other.
        table: the job's columns, which the rows are brought into.
        s3: how to reach files on S3.
        reserved: names that no column may have.

    Raises:
        UserError: a file is gone, damaged, or not the one that was planned on.
    """
    read = _read_ahead([piece for unit in units for piece in unit.pieces], table, s3, reserved)
    for unit in units:
        yield _put_together(unit, list(islice(read, len(unit.pieces))))


def _put_together(unit: Unit, pieces: Sequence[Rows]) -> UnitRows:
    """A unit of what its pieces hold, without rows that are not to be completed."""
    table = _one([rows.table for rows in pieces])
    bad: dict[int, BadLine] = {}
    start = 0
    for piece, rows in zip(unit.pieces, pieces, strict=True):
        bad |= {start + index: line for index, line in rows.bad_lines.items()}
        start += piece.rows
    if unit.only is not None:
        table = taken(table, unit.only) if table.num_columns else without_columns(len(unit.only))
        bad = {i: bad[index] for i, index in enumerate(unit.only) if index in bad}
    return UnitRows(unit, table, bad)


def _one(tables: list[pa.Table]) -> pa.Table:
    """Tables behind each other."""
    if tables[0].num_columns:
        return pa.concat_tables(tables)
    return without_columns(sum(table.num_rows for table in tables))


def _read_ahead(
    pieces: Sequence[Piece], table: pa.Schema, s3: S3Config, reserved: frozenset[str]
) -> Iterator[Rows]:
    """What each piece holds, in this order. A row group of many pieces is read when it is due."""
    coming: deque[Callable[[], Iterable[Rows]]] = deque()
    with ThreadPoolExecutor(_AHEAD) as pool:
        for _, group in groupby(pieces, _read_together):
            together = list(group)
            read = partial(_read_pieces, together, table, s3, reserved)
            coming.append(pool.submit(list, read()).result if len(together) == 1 else read)
            if len(coming) > _AHEAD:
                yield from coming.popleft()()
        while coming:
            yield from coming.popleft()()


def _read_pieces(
    pieces: Sequence[Piece], table: pa.Schema, s3: S3Config, reserved: frozenset[str]
) -> Iterator[Rows]:
    """What pieces hold that begin at the same place of a file, in row order."""
    first = pieces[0]
    check_unchanged(first.url, first.size, first.modified, s3)
    reader, wanted = READERS[first.format], Wanted(table, first.prefix, reserved)
    partition = partition_of(first.url)
    folder, name = locate(first.url, s3)
    with readable(first.url, reader.name), folder.open(name) as file:
        read = reader.read(file, [piece.cut for piece in pieces], wanted)
        for piece in pieces:
            rows = next(read, None)
            if rows is None or rows.table.num_rows != piece.rows:
                raise UserError(
                    f"{piece.url}: has changed since the job was planned: it had {piece.rows} rows "
                    f"from row {piece.start} on; restore it, or start again with another output"
                )
            yield replace(rows, table=filled(rows.table, partition, piece.url))
