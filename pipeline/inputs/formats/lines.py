"""JSON lines: an object a line, cut by bytes; and lines that are requests, which stay whole."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import pyarrow as pa

from pipeline.errors import UserError
from pipeline.inputs.formats.base import Cut, Found, Reader, Rows, Wanted, buffered
from pipeline.inputs.json_values import Seen, see_lines
from pipeline.inputs.jsonl import (
    BOM,
    BadLine,
    is_row,
    no_object,
    parse_line,
    parse_row,
    to_table,
)
from pipeline.inputs.openai_requests import LINES_SCHEMA, REQUEST

_SEEN_BYTES = 1 << 18
"""Bytes of lines whose types are told together. Where a line is odd, all of them take longer."""

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
"""What a file begins with that has the name of a file of text and is something else."""


def check_text(start: bytes, url: str, what: str) -> None:
    """Check that a file may be one of text.

    Args:
        start: its first bytes.
        url: the file.
        what: the format that its name is of.

    Raises:
        UserError: it is of another kind.
    """
    for magic, other in _OTHER_FORMATS.items():
        if start.startswith(magic):
            raise UserError(f"{url}: is {other}, though its name says {what}; convert it")
    if b"\0" in start:
        raise UserError(
            f"{url}: begins with zero bytes, as text in UTF-16 and UTF-32 does, and damaged files; "
            "convert it to UTF-8"
        )


class LinesReader(Reader):
    """Cuts by bytes, at the ends of lines."""

    name = "JSON lines"

    def find(self, file: pa.NativeFile, url: str, unit_rows: int) -> Found:
        # Row count and byte offset where each range begins; its own bytes alone are read then.
        starts: list[tuple[int, int]] = []
        row = position = 0
        first = b""
        seen = Seen()
        waiting: list[bytes] = []
        told = 0  # bytes until those in `waiting`
        with buffered(file) as lines:
            check_text(lines.peek(8), url, self.name)
            for line in lines:
                if is_row(line):
                    first = first or line
                    if not row and url.lower().endswith(".json") and parse_line(line) is None:
                        raise _no_lines(url, first)
                    if row % unit_rows == 0:
                        starts.append((row, position))
                    row += 1
                    waiting.append(line.removeprefix(BOM))
                position += len(line)
                if position - told > _SEEN_BYTES:
                    seen.add(self._see(waiting))
                    waiting, told = [], position
        seen.add(self._see(waiting))
        if row and not seen.objects:
            raise _no_lines(url, first)
        bounds = [*starts, (row, position)]
        cuts = [
            Cut(start, end - start, offset, limit)
            for (start, offset), (end, limit) in pairwise(bounds)
        ]
        return self._found(row, cuts, seen)

    def _see(self, lines: Sequence[bytes]) -> Seen:
        return see_lines(lines)

    def _found(self, rows: int, cuts: Sequence[Cut], seen: Seen) -> Found:
        return Found(rows, seen.schema(), cuts, seen)

    def read(self, file: pa.NativeFile, cuts: Sequence[Cut], wanted: Wanted) -> Iterator[Rows]:
        (cut,) = cuts
        file.seek(cut.offset)
        data = file.read(cut.end - cut.offset)
        yield self._rows([line for line in io.BytesIO(data) if is_row(line)], wanted)

    def _rows(self, lines: Sequence[bytes], wanted: Wanted) -> Rows:
        """The rows on some lines; one that is none of the table's becomes a row of nulls."""
        rows: list[dict[str, Any]] = []
        bad: dict[int, BadLine] = {}
        for index, line in enumerate(lines):
            row = parse_row(line, wanted.table, wanted.prefix, wanted.reserved)
            if isinstance(row, BadLine):
                bad[index], row = row, {}
            rows.append(row)
        return Rows(to_table(rows, wanted.table), bad)


class RequestsReader(LinesReader):
    """Lines that are requests, each in one column; null if it is no text."""

    name = "JSON lines of requests"

    def _see(self, lines: Sequence[bytes]) -> Seen:
        return Seen(objects=len(lines))  # what is none becomes a line of the error file

    def _found(self, rows: int, cuts: Sequence[Cut], seen: Seen) -> Found:
        return Found(rows, LINES_SCHEMA, cuts)

    def _rows(self, lines: Sequence[bytes], wanted: Wanted) -> Rows:
        texts: list[str | None] = []
        bad = {}
        for index, line in enumerate(lines):
            try:
                texts.append(line.removeprefix(BOM).decode().strip())
            except UnicodeDecodeError:
                texts.append(None)
                bad[index] = no_object(line)
        return Rows(pa.table({REQUEST: pa.array(texts, pa.string())}), bad)


def _no_lines(url: str, first: bytes) -> UserError:
    """What is said of a file without an object on a line; a `.json` file is told by its first."""
    array = first.lstrip().removeprefix(BOM).startswith(b"[")
    what = "is one JSON array" if array else "has no JSON object on a line of its own"
    return UserError(
        f"{url}: {what}; files of this name are read as JSON lines, an object a line: convert it, "
        "as `jq -c .[]` does with an array"
    )
