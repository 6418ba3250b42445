"""Checking a job's output again, from its files alone: nothing is taken on trust but the plan.

Every file is read whole, a few units at a time, so memory does not grow with the rows: what is kept
of a unit are its row ranges. Row ids need no list either. A unit may hold the ids of its own ranges
only, each once, and the ranges must cover every input file without gap or overlap; then no row is
missing and none is there twice.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from pipeline import layout
from pipeline.commit import manifest, planned_inputs
from pipeline.config.job import S3Config
from pipeline.config.sampling import optional_columns
from pipeline.outputs.problems import Problem, Verification, some
from pipeline.outputs.verify_manifest import ListedFiles, check_manifest
from pipeline.outputs.verify_unit import CheckedUnit, UnitCheck, columns_of
from pipeline.storage.folder import Folder

_THREADS = 8
"""Units read at once. More would be faster on S3, and hold more of them in memory."""

_OF_UNITS = (layout.COMPLETIONS, layout.ERRORS, layout.TRACE, layout.HISTORY)
"""Folders in which every file belongs to a unit."""

T = TypeVar("T")
R = TypeVar("R")


def verify(
    url: str, s3: S3Config, progress: Callable[[int, int], object] = lambda done, units: None
) -> Verification:
    """Read everything that a job has committed, and check that it adds up.

    Args:
        url: the job's output folder.
        s3: how to reach it, if it is on S3.
        progress: told how many units are checked, and how many there are.

    Raises:
        UserError: there is no job in this folder, or it is out of reach.
    """
    output = manifest.open_output(url, s3)
    job = json.loads(output.read(layout.JOB) or b"{}")
    found = Verification(output.url, finished=output.read(layout.SUCCESS) is not None)
    listed = ListedFiles.read(output, found)
    there = {folder: output.tree(folder) for folder in (*_OF_UNITS, layout.STAGING)}
    mark = job.get("fingerprint", {})
    sampling, source = mark.get("sampling", {}), mark.get("input", {})
    samples = sampling.get("n", 1)
    table = manifest.recorded_table(job)
    optional = manifest.optional_columns(output, job, optional_columns(sampling, source))
    columns = None if table is None else columns_of(table, optional)
    check = UnitCheck(output, manifest.accepted_digests(job), samples, listed, columns)

    units = sorted(filter(None, map(layout.unit_of, there[layout.COMPLETIONS])))
    read: set[str] = set()
    spans: dict[str, list[_Span]] = {}
    with ThreadPoolExecutor(_THREADS) as pool:
        for unit in _windowed(pool, check, units):
            _count(unit, found)
            read |= unit.sizes.keys()
            for each in unit.ranges:
                spans.setdefault(each.name, []).append((each.start, each.rows, unit.id))
            progress(found.units, len(units))

    check_ranges(output, spans, found)
    check_strays(there, read, found)
    check_manifest(output, listed, job, read, found)
    check_finished(found)
    return found


_Span = tuple[int, int, str]
"""First row, rows, and the unit that has them."""


def _windowed(
    pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T]
) -> Iterator[R]:
    """`map`, in order, with a few items in work at a time."""
    waiting: deque[Future[R]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= 2 * _THREADS:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _count(unit: CheckedUnit, found: Verification) -> None:
    found.add(unit.problems)
    found.units += 1
    found.files += len(unit.sizes)
    found.bytes += sum(unit.sizes.values())
    found.rows_out += unit.completions
    found.rows_in_errors += unit.failed


def check_ranges(output: Folder, spans: Mapping[str, Sequence[_Span]], found: Verification) -> None:
    """The row ranges of the units cover every input file, each row once."""
    planned = planned_inputs.read_planned(output)
    if not planned:
        lost = "not there: what the input was is not known"
        found.add([Problem("missing", layout.INPUTS, lost)])
    found.rows_in = sum(file.rows for file in planned.values())
    for name in sorted(planned.keys() | spans.keys()):
        rows = planned[name].rows if name in planned else 0
        if planned and name not in planned:
            units = some(unit for _, _, unit in spans[name])
            found.add([Problem("foreign", name, f"not an input file of this job; units: {units}")])
            continue
        end, gaps = 0, list[str]()
        for start, count, unit in [*sorted(spans.get(name, [])), (rows, 0, "")]:
            if start > end:
                gaps.append(f"{end}-{start - 1}" if start - end > 1 else str(end))
            elif start < end and unit:
                problem = f"rows from {start} on are in another unit, too"
                found.add([Problem("duplicate", layout.completions(unit), problem)])
            end = max(end, start + count)
        if gaps:
            found.add([Problem("missing", name, f"rows that no unit holds: {', '.join(gaps)}")])
        if planned and end > rows:
            found.add([Problem("foreign", name, f"has {rows} rows, but units go up to {end}")])


def check_strays(
    there: Mapping[str, Mapping[str, int]], read: set[str], found: Verification
) -> None:
    """Every file belongs to a unit, and no writer has left half of one."""
    names = [f"{folder}/{name}" for folder in _OF_UNITS for name in sorted(there[folder])]
    text = "belongs to no unit of this job"
    found.add(Problem("stray", name, text) for name in names if name not in read)
    left = [f"{layout.STAGING}/{name}" for name in sorted(there[layout.STAGING])]
    text = "a writer that was killed left it; running the job again removes it"
    found.add(Problem("half-written", name, text) for name in left)


def check_finished(found: Verification) -> None:
    """The job has come to its end."""
    if not found.finished:
        why = "not there: run the job to its end, which also says if too many of its rows failed"
        found.add([Problem("unfinished", layout.SUCCESS, why)])
