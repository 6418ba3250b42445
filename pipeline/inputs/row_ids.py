"""The name of an output row: `FILE:ROW:SAMPLE`, which no retry, resume or cluster changes."""

from __future__ import annotations

from typing import NamedTuple

from pipeline.inputs.units import Unit

ROW_ID = "row_id"
"""The column that holds it."""


class RowId(NamedTuple):
    """A row id in its parts.

    Attributes:
        file: the input file's name.
        row: the row's number in the file, from 0.
        sample: the sample's number, from 0.
    """

    file: str
    row: int
    sample: int


def row_id(unit: Unit, index: int, sample: int = 0) -> str:
    """The name of a sample of a unit's row, which is the unit's `index`th."""
    name, row = unit.place(index)
    return f"{name}:{row}:{sample}"


def sibling(row_id: str, sample: int) -> str:
    """The name of another sample of the same row."""
    return f"{row_id.rpartition(':')[0]}:{sample}"


def parse_row_id(text: str) -> RowId:
    """The parts of a row id; text that is none has row -1 and sample -1."""
    match text.rsplit(":", 2):
        case [file, row, sample] if f"{row}{sample}".isascii() and f"{row}{sample}".isdecimal():
            return RowId(file, int(row), int(sample))
    return RowId(text, -1, -1)
