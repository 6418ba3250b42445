"""CSV and TSV: records of fields, in which a quoted field may hold line breaks.

A file has no types, and none are guessed: a field is its text, so that what was written as 007 or
1.50 stays that. Where records begin is found by the parser that reads them, so no line break within
quotes ever cuts one.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import IO, Any

import pyarrow as pa

from pipeline.errors import UserError
from pipeline.inputs.formats.base import Cut, Found, Reader, Rows, Wanted, buffered
from pipeline.inputs.formats.lines import check_text
from pipeline.inputs.jsonl import BOM, BadLine

csv.field_size_limit(sys.maxsize)  # a prompt may be longer than Python's limit of 128 KiB


@dataclass(frozen=True, slots=True)
class _Record:
    """A record of a file.

    Attributes:
        fields: their texts; a text alone: why there are none.
        offset: the byte where it begins.
        line: the number of its first line, from 1.
        lines: what it was made of.
    """

    fields: list[str] | str
    offset: int
    line: int
    lines: list[bytes]


class DelimitedReader(Reader):
    """Cuts by bytes.

    Args:
        name: what messages call the format.
        delimiter: what is between fields.
    """

    def __init__(self, name: str, delimiter: str) -> None:
        self.name = name
        self._delimiter = delimiter

    def find(self, file: pa.NativeFile, url: str, unit_rows: int) -> Found:
        with buffered(file) as stream:
            check_text(stream.peek(8), url, self.name)
            return self._find(_records(stream, self._delimiter), url, unit_rows)

    def _find(self, records: Iterator[_Record], url: str, unit_rows: int) -> Found:
        last = header = next(records, None)
        if header is None:
            return Found(0, pa.schema([]), [])
        if why := _why_bad(header, len(header.fields)):
            raise UserError(f"{url}: its first line is no header of {self.name}: {why}; convert it")
        starts: list[tuple[int, int]] = []
        rows = 0
        for last in records:
            if rows % unit_rows == 0:
                starts.append((rows, last.offset))
            rows += 1
        assert last is not None
        if self._is_open(last):
            raise UserError(
                f"{url}: line {last.line}: a field begins with a quote that nothing closes; "
                "close it, or double the quotes that are part of the text and quote the field"
            )
        bounds = [*starts, (rows, last.offset + sum(map(len, last.lines)))]
        cuts = [
            Cut(start, end - start, offset, limit)
            for (start, offset), (end, limit) in pairwise(bounds)
        ]
        return Found(rows, pa.schema([(name, pa.string()) for name in header.fields]), cuts)

    def read(self, file: pa.NativeFile, cuts: Sequence[Cut], wanted: Wanted) -> Iterator[Rows]:
        (cut,) = cuts
        with buffered(file) as stream:
            names = list(next(_records(stream, self._delimiter)).fields)
            stream.seek(cut.offset)
            data = io.BytesIO(stream.read(cut.end - cut.offset))
        columns: list[list[str | None]] = [[] for _ in names]
        bad: dict[int, BadLine] = {}
        for row, record in enumerate(_records(data, self._delimiter)):
            fields: Sequence[str | None] = record.fields
            if why := _why_bad(record, len(names)):
                text = b"".join(record.lines).decode(errors="replace").rstrip("\r\n")
                bad[row] = BadLine(text, "MalformedLine", why)
                fields = [None] * len(names)
            for column, value in zip(columns, fields, strict=True):
                column.append(value)
        arrays = [pa.array(values, pa.large_string()) for values in columns]
        yield Rows(wanted.conformed(pa.table(arrays, names=names)), bad)

    def _is_open(self, last: _Record) -> bool:
        """Whether the last record ends within quotes."""
        try:
            lines = [last.lines[0].removeprefix(BOM), *last.lines[1:]]
            list(csv.reader(_texts(lines), delimiter=self._delimiter, strict=True))
        except csv.Error as error:
            return "unexpected end of data" in str(error)
        return False


def _records(stream: IO[bytes] | Any, delimiter: str) -> Iterator[_Record]:
    """The records of a file, without blank lines."""
    taken: list[bytes] = []
    position = 0

    def lines() -> Iterator[bytes]:
        nonlocal position
        for line in stream:
            position += len(line)
            taken.append(line)
            # A byte order mark is one at the beginning, and text within quotes.
            yield line.removeprefix(BOM) if len(taken) == 1 else line

    reader = csv.reader(_texts(lines()), delimiter=delimiter)
    while True:
        offset, line = position, reader.line_num + 1
        taken = []
        fields: list[str] | str
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            fields = str(error)
        if fields:
            yield _Record(fields, offset, line, taken)


def _texts(lines: Iterator[bytes] | Sequence[bytes]) -> Iterator[str]:
    # Bytes that are no text go through, and make their record a bad one.
    return (line.decode(errors="surrogateescape") for line in lines)


def _why_bad(record: _Record, count: int) -> str | None:
    """Why a record is no row; None if it is one."""
    if isinstance(record.fields, str):
        return f"the line cannot be read: {record.fields}"
    if len(record.fields) != count:
        return f"the line has {len(record.fields)} fields, and the header {count}"
    if any(not field.isascii() and not _is_text(field) for field in record.fields):
        return "the line is not UTF-8"
    return None


def _is_text(field: str) -> bool:
    try:
        field.encode()
    except UnicodeEncodeError:
        return False
    return True
