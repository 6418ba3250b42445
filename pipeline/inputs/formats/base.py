"""What every format of input files can do: be cut into row ranges, and read one of them."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pyarrow as pa

from pipeline.inputs.columns import conformed
from pipeline.inputs.json_values import Seen
from pipeline.inputs.jsonl import BadLine
from pipeline.inputs.listing import read_as

_BUFFER = 1 << 20
"""Bytes that are read at once. On S3, less makes more requests."""


@dataclass(frozen=True, slots=True)
class Cut:
    """A row range that can be read without the rest of the file.

    Attributes:
        start: number of its first row in the file.
        rows: how many rows.
        offset: where reading starts: what the format counts, such as bytes or row groups.
        end: where it ends.
        skip: rows between `offset` and `start`.
    """

    start: int
    rows: int
    offset: int
    end: int
    skip: int = 0


@dataclass(frozen=True)
class Found:
    """What is in a file.

    Attributes:
        rows: how many; bad ones count.
        schema: its columns, in the types that most of its rows have.
        cuts: row ranges that cover all rows, in order.
        seen: for JSON lines, their values, which the job's types are told from.
    """

    rows: int
    schema: pa.Schema
    cuts: Sequence[Cut]
    seen: Seen | None = None


@dataclass(frozen=True)
class Wanted:
    """What rows are read as.

    Attributes:
        table: the job's columns.
        prefix: what comes before the names of columns that an earlier job added.
        reserved: names that no column may have.
    """

    table: pa.Schema
    prefix: str = ""
    reserved: frozenset[str] = frozenset()

    def conformed(self, rows: pa.Table) -> pa.Table:
        """Rows of a file in the job's columns and types."""
        names = [read_as(name, self.prefix) for name in rows.column_names]
        return conformed(rows.rename_columns(names), self.table)


@dataclass(frozen=True)
class Rows:
    """Rows as they were read.

    Attributes:
        table: in the job's columns.
        bad_lines: lines of text that are no rows, by row; the row's columns are null.
    """

    table: pa.Table
    bad_lines: dict[int, BadLine] = field(default_factory=dict)


class Reader(ABC):
    """A format.

    Attributes:
        name: what messages call it.
    """

    name: str

    @abstractmethod
    def find(self, file: pa.NativeFile, url: str, unit_rows: int) -> Found:
        """Cut a file into ranges of at most `unit_rows` rows.

        Raises:
            UserError: it is not what its name says; the message begins with `url`.
            pa.ArrowException: the same, of a binary format.
        """

    @abstractmethod
    def read(self, file: pa.NativeFile, cuts: Sequence[Cut], wanted: Wanted) -> Iterator[Rows]:
        """Read ranges that begin at the same `offset`, in row order."""


def buffered(file: pa.NativeFile) -> io.BufferedReader:
    """A file that is read in large pieces. It stays open when the reader is closed."""
    return io.BufferedReader(_Borrowed(file), _BUFFER)


class _Borrowed(io.RawIOBase):
    """A file that others close."""

    def __init__(self, file: pa.NativeFile) -> None:
        super().__init__()
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return int(self._file.readinto(buffer))

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())


def cut_groups(groups: Sequence[int], unit_rows: int) -> list[Cut]:
    """Row ranges of at most `unit_rows` rows that cover all rows once, in order.

    Groups that fit are kept whole and small neighbours are joined; larger ones are cut into equal
    parts, so that no range needs parts of different groups.

    Args:
        groups: rows of each group of the file; zero is allowed.
        unit_rows: most rows of a range.

    >>> [(c.start, c.rows) for c in cut_groups([2, 3, 9], 5)]
    [(0, 5), (5, 5), (10, 4)]
    """
    cuts: list[Cut] = []
    start = joined = first = 0
    for index, rows in enumerate(groups):
        if joined and joined + rows > unit_rows:
            cuts.append(Cut(start, joined, first, index))
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
        cuts.append(Cut(start, joined, first, len(groups)))
    return cuts


def sliced(batches: Iterable[pa.RecordBatch], cuts: Sequence[Cut]) -> Iterator[pa.Table]:
    """The rows of ranges that begin at the same offset, of the batches from there on."""
    position, wanted = 0, iter(cuts)
    cut, pieces = next(wanted), list[pa.RecordBatch]()
    for batch in batches:
        batch_end = position + batch.num_rows
        while cut.skip < batch_end:
            low = max(cut.skip, position) - position
            high = min(cut.skip + cut.rows, batch_end) - position
            pieces.append(batch.slice(low, high - low))
            if cut.skip + cut.rows > batch_end:
                break
            # pandas and Hugging Face describe the whole file's columns in the schema's metadata;
            # with columns added that description would be wrong.
            yield pa.Table.from_batches(pieces).replace_schema_metadata(None)
            following = next(wanted, None)
            if following is None:
                return
            cut, pieces = following, []
        position = batch_end
