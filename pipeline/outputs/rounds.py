"""The rounds of a completed row, found by its id, in a job that kept them."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import layout
from pipeline.commit import manifest, planned_inputs
from pipeline.commit.footer import read_record
from pipeline.commit.record import UnitRecord
from pipeline.errors import UserError
from pipeline.inputs.joining import MOST_PIECES
from pipeline.inputs.row_ids import ROW_ID, parse_row_id
from pipeline.inputs.units import unit_stem
from pipeline.storage.folder import Folder


def read_rounds(output: Folder, row: str) -> list[dict[str, Any]]:
    """The rounds of a completed row, in order; none if its only token came with its prompt.

    Raises:
        UserError: there is no such row, it was not completed, or its rounds were not kept.
    """
    record = _unit_of(output, row)
    if record is None:
        raise UserError(f"--row {row}: {_instead(output, row)}")
    errors, trace = record.files.errors, record.files.trace
    with output.open(record.completions_file.name) as file:
        if row not in pq.read_table(file, columns=[ROW_ID])[ROW_ID].to_pylist():
            why = f"; {output.join(errors.name)} says why" if errors else ""
            raise UserError(f"--row {row}: this row was not completed{why}")
    if trace is None:
        raise UserError(
            f"{output.url}: the rounds of this row were not kept; run the job with "
            "--set speculation.trace=true into another output"
        )
    with output.open(trace.name) as file:
        table = pq.read_table(file)
    rounds: list[dict[str, Any]] = table.filter(pc.equal(table[ROW_ID], row)).to_pylist()
    return rounds


def _unit_of(output: Folder, row: str) -> UnitRecord | None:
    """The committed unit that a row belongs to. Names of units tell where to look."""
    name, index, sample = parse_row_id(row)
    units: dict[str, list[tuple[int, str]]] = {}  # first row and id by stem
    for unit in manifest.committed_ids(output):
        stem, number, _ = ["", "", *unit.rsplit("-", 2)][-3:]
        if number.isdigit():
            units.setdefault(stem, []).append((int(number), unit))
    for first in _beginnings(output, name):
        for start, unit in sorted(units.get(unit_stem(first), []), reverse=True):
            if first == name and start > index:
                continue
            record = read_record(output, unit)
            # Files whose names differ in signs only share a stem.
            if record.ranges[0].name != first:
                continue
            results = record.results
            most = None if results.own_n else results.samples // record.rows
            there = any(
                each.name == name and 0 <= index - each.start < each.rows for each in record.ranges
            )
            return record if there and (most is None or sample < most) else None
    return None


def _beginnings(output: Folder, name: str) -> Iterator[str]:
    """Input files in which the unit of a file's row may begin: itself, or one before it."""
    yield name
    planned = planned_inputs.read_planned(output)
    if name in planned:
        before: list[str] = []
        for each, file in planned.items():
            if each == name:
                break
            if file.rows and file.step == planned[name].step:
                before.append(each)
        yield from reversed(before[-MOST_PIECES:])


def _instead(output: Folder, row: str) -> str:
    """What may have been meant by an id that no committed row has."""
    data = output.read(layout.INPUTS)
    inputs = pq.read_table(pa.BufferReader(data)).to_pylist() if data else []
    rows = {each["name"]: each["rows"] for each in inputs if each["rows"]}
    parsed = parse_row_id(row)
    if parsed.row < 0:
        parsed = parse_row_id(f"{row}:0")
    name, index = parsed.file, max(parsed.row, 0)
    if 0 <= index < rows.get(name, 0) and row == f"{name}:{index}:0":
        return "this row is not committed yet; run the job to its end"
    names = [name] if name in rows else get_close_matches(name, rows, 3, 0.0)
    near = [f"{each}:{min(index, rows[each] - 1)}:0" for each in names]
    return f"no such row; nearest: {', '.join(near)}" if near else "the job has no rows"
