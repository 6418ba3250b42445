"""Which input files a job was planned on, and what became of them since."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import layout
from pipeline.commit.files import parquet_bytes
from pipeline.inputs.listing import InputFile
from pipeline.inputs.units import UNJOINED, FilePlan
from pipeline.storage.folder import Folder

_SHOWN = 5
"""Changed files that a refusal names; the rest are counted."""


@dataclass(frozen=True)
class Planned:
    """An input file as it was when the job was planned.

    Attributes:
        size: bytes.
        rows: how many it has.
        modified: nanoseconds since the epoch; 0: an older version did not note it.
        step: when it became part of the job (`FilePlan`).
    """

    size: int
    rows: int
    modified: int = 0
    step: int = UNJOINED


def to_bytes(plans: Sequence[FilePlan]) -> bytes:
    """The content of `layout.INPUTS`."""
    table = pa.table(
        {
            "name": pa.array([p.file.name for p in plans], pa.string()),
            "size": pa.array([p.file.size for p in plans], pa.int64()),
            "rows": pa.array([p.rows for p in plans], pa.int64()),
            "modified": pa.array([p.file.modified for p in plans], pa.int64()),
            "step": pa.array([p.step for p in plans], pa.int64()),
        }
    )
    return parquet_bytes(table)


def read_planned(output: Folder) -> dict[str, Planned]:
    """The files that an output was planned on, by name; none if that was not noted."""
    data = output.read(layout.INPUTS)
    if data is None:
        return {}
    rows = pq.read_table(pa.BufferReader(data)).to_pylist()
    return {row.pop("name"): Planned(**row) for row in rows}


def new_files(files: Sequence[InputFile], planned: Mapping[str, Planned]) -> list[InputFile]:
    """The files that the job was not planned on."""
    return [file for file in files if file.name not in planned]


def in_steps(
    plans: Sequence[FilePlan], planned: Mapping[str, Planned], *, begun: bool = True
) -> list[FilePlan]:
    """Each file with its step: the one that is noted, or for all new ones together the next.

    Units depend on steps, so a step that is noted never changes.

    Args:
        plans: the input.
        planned: what the output was planned on, as it is noted.
        begun: whether units are committed. Without notes they are of an older version.
    """
    if begun and not planned:
        return [replace(plan, step=UNJOINED) for plan in plans]
    following = 1 + max((each.step for each in planned.values()), default=-1)
    return [
        replace(plan, step=planned[name].step if (name := plan.file.name) in planned else following)
        for plan in plans
    ]


def other_steps(plans: Sequence[FilePlan], planned: Mapping[str, Planned]) -> bool:
    """Whether other steps are noted by now than files were planned with."""
    noted = in_steps(plans, planned) if planned else plans
    return [plan.step for plan in noted] != [plan.step for plan in plans]


def changes(
    planned: Mapping[str, Planned], plans: Sequence[FilePlan], *, times: bool = True
) -> list[str]:
    """A line for each file that is not what it was, or is gone, or new; the first few by name.

    Args:
        planned: what the files were.
        plans: what they are.
        times: whether one that was written again with the same size and rows has changed.
    """
    here = {p.file.name: Planned(p.file.size, p.rows, p.file.modified, p.step) for p in plans}
    lines = []
    for name in sorted(planned.keys() | here.keys()):
        if name not in here:
            lines.append(f"input file {name} is gone")
        elif name not in planned:
            lines.append(f"input file {name} is new")
        elif difference := _difference(planned[name], here[name], times):
            lines.append(f"input file {name} has changed: {difference}")
    more = len(lines) - _SHOWN
    return [*lines[:_SHOWN], f"and {more:,} more input files"] if more > 0 else lines


def _difference(there: Planned, here: Planned, times: bool) -> str:
    parts = []
    if there.size != here.size:
        parts.append(f"{there.size:,} bytes there, {here.size:,} here")
    if there.rows != here.rows:
        parts.append(f"{there.rows:,} rows there, {here.rows:,} here")
    known = times and there.modified and here.modified
    if known and there.modified != here.modified:
        parts.append(f"modified {_time(there.modified)} there, {_time(here.modified)} here")
    return ", ".join(parts)


def _time(nanoseconds: int) -> str:
    when = datetime.fromtimestamp(nanoseconds / 1e9, UTC)
    return when.isoformat(sep=" ", timespec="milliseconds").removesuffix("+00:00")
