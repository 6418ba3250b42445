"""What flows through Ray Data: sealed envelopes, one unit each.

Ray Data sees blocks of one row, a unit each, with bytes in them. User columns stay out of its
sight, so no schema is unified, no value converted, and no unit split on its way.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.errors import RowError
from pipeline.inputs.units import Unit


@dataclass(frozen=True)
class UnitRows:
    """The rows of one unit as they were read.

    Attributes:
        unit: which rows.
        table: the input columns, one row per row of the unit, types untouched.
        raw_lines: for JSONL, the text of each line that is not a JSON object, by row in the unit;
            the row's columns are null.
    """

    unit: Unit
    table: pa.Table
    raw_lines: dict[int, str]

    def row(self, index: int, columns: Iterable[str]) -> dict[str, Any]:
        """Some columns of a row as Python values; columns that the unit does not have are left out.

        Args:
            index: of the row in the unit.
            columns: their names.

        Raises:
            RowError: a value is no valid text, or nothing that Python has.
        """
        there = [column for column in columns if column in self.table.column_names]
        try:
            (row,) = self.table.select(there).slice(index, 1).to_pylist()
        except UnicodeDecodeError as error:
            raise RowError("MalformedText", f"a column is not valid UTF-8: {error}") from None
        except (pa.ArrowException, ValueError, OverflowError) as error:
            raise RowError("MalformedValue", f"a column holds no usable value: {error}") from None
        return dict(row)

    def to_block(self) -> pa.Table:
        """One row that Ray Data carries without looking inside."""
        lines = pa.array([self.raw_lines.get(i) for i in range(self.unit.rows)], pa.large_string())
        payload = [_ipc(self.table), _ipc(pa.table({"line": lines}))]
        return pa.table(
            {
                "unit": [self.unit.to_json()],
                "rows": pa.array(payload[:1], pa.large_binary()),
                "raw_lines": pa.array(payload[1:], pa.large_binary()),
            }
        )

    @staticmethod
    def from_block(block: pa.Table) -> UnitRows:
        """What `to_block` packed."""
        if block.num_rows != 1:
            raise ValueError(f"a block must hold one unit, got {block.num_rows}")
        lines = _table(block["raw_lines"][0])["line"].to_pylist()
        return UnitRows(
            unit=Unit.from_json(block["unit"][0].as_py()),
            table=_table(block["rows"][0]),
            raw_lines={i: line for i, line in enumerate(lines) if line is not None},
        )


def _ipc(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def _table(cell: pa.LargeBinaryScalar) -> pa.Table:
    with pa.ipc.open_stream(cell.as_buffer()) as reader:
        return reader.read_all()


@dataclass(frozen=True)
class UnitFiles:
    """What a generated unit commits.

    Attributes:
        unit_id: the unit.
        files: names in the output folder and contents, in the order in which they must be written:
            the last one is the commit. Empty if the unit was not generated.
    """

    unit_id: str
    files: tuple[tuple[str, bytes], ...]

    def to_block(self) -> pa.Table:
        """One row that Ray Data carries without looking inside."""
        names = [name for name, _ in self.files]
        contents = [data for _, data in self.files]
        return pa.table(
            {
                "unit": [self.unit_id],
                "names": pa.array([names], pa.list_(pa.string())),
                "contents": pa.array([contents], pa.large_list(pa.large_binary())),
            }
        )

    @staticmethod
    def from_block(block: pa.Table) -> UnitFiles:
        """What `to_block` packed."""
        (row,) = block.to_pylist()
        files = zip(row["names"], row["contents"], strict=True)
        return UnitFiles(row["unit"], tuple(files))
