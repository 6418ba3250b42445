"""The rounds of a completed row, found by its id, in a job that kept them."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import layout
from pipeline.commit import manifest
from pipeline.commit.footer import read_record
from pipeline.commit.record import UnitRecord
from pipeline.errors import UserError
from pipeline.inputs.row_ids import ROW_ID, parse_row_id
from pipeline.inputs.units import unit_id
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
    stem = unit_id(name, 0, 0).rsplit("-", 2)[0]
    begins = []
    for unit in manifest.committed_ids(output):
        its_stem, start, _ = ["", "", *unit.rsplit("-", 2)][-3:]
        if its_stem == stem and start.isdigit() and int(start) <= index:
            begins.append((int(start), unit))
    for _, unit in sorted(begins, reverse=True):
        record = read_record(output, unit)
        # Files whose names differ in signs only share a stem.
        if record.input == name:
            results = record.results
            most = None if results.own_n else results.samples // record.rows
            there = index < record.start + record.rows and (most is None or sample < most)
            return record if there else None
    return None


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
