"""What flows through Ray Data: sealed envelopes, one bundle of units each.

Ray Data sees blocks of one row, a bundle each, with bytes in them. User columns stay out of its
sight, so no schema is unified, no value converted, and no bundle split on its way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from pipeline.inputs.jsonl import BadLine
from pipeline.inputs.row_ids import row_id
from pipeline.inputs.row_values import row_values
from pipeline.inputs.units import Unit

_BAD_LINES = pa.schema(
    {
        "row": pa.int64(),
        "text": pa.large_string(),
        "error_class": pa.string(),
        "message": pa.string(),
    }
)


@dataclass(frozen=True)
class UnitRows:
    """The rows of one unit that are to be completed, as they were read.

    Attributes:
        unit: which rows (`Unit.wanted`).
        table: the input columns, one row per row, those of the job in its types.
        bad_lines: for JSONL, each line that is no row of them, by row of the table; the row's
            columns are null.
    """

    unit: Unit
    table: pa.Table
    bad_lines: dict[int, BadLine]

    def row(self, index: int, columns: Iterable[str]) -> dict[str, Any]:
        """Some columns of a row as Python values; columns that the unit does not have are left out.

        Args:
            index: of the row in the table.
            columns: their names.

        Raises:
            RowError: a value is no valid text, or nothing that Python has.
        """
        there = [column for column in columns if column in self.table.column_names]
        return row_values(self.table.select(there), index)

    def row_id(self, index: int, sample: int = 0) -> str:
        """The name of a sample of a row of the table."""
        return row_id(self.unit, self.unit.wanted[index], sample)

    @staticmethod
    def to_block(bundle: Sequence[UnitRows]) -> pa.Table:
        """One row that Ray Data carries without looking inside."""
        rows = [_ipc(each.table) for each in bundle]
        lines = [_ipc(each._lines()) for each in bundle]
        return pa.table(
            {
                "units": [[each.unit.to_json() for each in bundle]],
                "rows": pa.array([rows], pa.large_list(pa.large_binary())),
                "bad_lines": pa.array([lines], pa.large_list(pa.large_binary())),
            }
        )

    @staticmethod
    def from_block(block: pa.Table) -> list[UnitRows]:
        """What `to_block` packed."""
        if block.num_rows != 1:
            raise ValueError(f"a block must hold one bundle, got {block.num_rows}")
        units, rows, lines = (block[name][0].values for name in ("units", "rows", "bad_lines"))
        return [
            UnitRows(
                unit=Unit.from_json(units[i].as_py()),
                table=_table(rows[i]),
                bad_lines={
                    line.pop("row"): BadLine(**line) for line in _table(lines[i]).to_pylist()
                },
            )
            for i in range(len(units))
        ]

    def _lines(self) -> pa.Table:
        lines = [{"row": row, **asdict(line)} for row, line in self.bad_lines.items()]
        return pa.Table.from_pylist(lines, _BAD_LINES)


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

    @staticmethod
    def to_block(bundle: Sequence[UnitFiles]) -> pa.Table:
        """One row that Ray Data carries without looking inside."""
        names = [[name for name, _ in each.files] for each in bundle]
        contents = [[data for _, data in each.files] for each in bundle]
        kind = pa.large_list(pa.large_list(pa.large_binary()))
        return pa.table(
            {
                "units": [[each.unit_id for each in bundle]],
                "names": pa.array([names], pa.list_(pa.list_(pa.string()))),
                "contents": pa.array([contents], kind),
            }
        )

    @staticmethod
    def from_block(block: pa.Table) -> list[UnitFiles]:
        """What `to_block` packed."""
        (row,) = block.to_pylist()
        units = zip(row["units"], row["names"], row["contents"], strict=True)
        return [
            UnitFiles(unit, tuple(zip(names, contents, strict=True)))
            for unit, names, contents in units
        ]
