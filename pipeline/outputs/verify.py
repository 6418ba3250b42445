"""Checking a job's output again, from its files alone: nothing is taken on trust but the plan.

Every file is read whole, a few units at a time, so memory does not grow with the rows: what is kept
of a unit is its row range. Row ids need no list either. A unit may hold the ids of its own range
only, each once, and the ranges must cover every input file without gap or overlap; then no row is
missing and none is there twice.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.commit import manifest, planned_inputs
from pipeline.commit.manifest import NamedFile
from pipeline.commit.stats import FOOTER_KEY, UnitRecord
from pipeline.config.job import S3Config
from pipeline.config.model_identity import digest
from pipeline.inputs.prompts import SAMPLING_COLUMN
from pipeline.inputs.row_ids import ROW_ID, parse_row_id
from pipeline.inputs.units import unit_id
from pipeline.storage.folder import Folder
from pipeline.storage.local import STAGING

_THREADS = 8
_MOST_PROBLEMS = 10_000
_IDS_SHOWN = 3
_UNREADABLE = (pa.ArrowException, OSError, KeyError, TypeError, ValueError)

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Problem:
    """Something that is wrong.

    Attributes:
        kind: unreadable, checksum, count, missing, duplicate, foreign, stray, half-written,
            manifest or unfinished.
        file: where, as a name in the output folder; or the input file whose rows are missing.
        message: what.
    """

    kind: str
    file: str
    message: str


@dataclass
class Verification:
    """What was checked, and what is wrong with it.

    Attributes:
        output: the folder.
        finished: whether it has `_SUCCESS`.
        rows_in: rows of the input files that the job was planned on.
        rows_out: rows in completions.
        rows_in_errors: rows in errors.
        units, files, bytes: how many were read.
        problems: the first ten thousand.
        problems_found: how many there are.
    """

    output: str
    finished: bool = False
    rows_in: int = 0
    rows_out: int = 0
    rows_in_errors: int = 0
    units: int = 0
    files: int = 0
    bytes: int = 0
    problems: list[Problem] = field(default_factory=list)
    problems_found: int = 0

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems_found

    def add(self, problems: Iterable[Problem]) -> None:
        """Note problems."""
        for problem in problems:
            self.problems_found += 1
            if len(self.problems) < _MOST_PROBLEMS:
                self.problems.append(problem)


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
    job = json.loads(output.read(manifest.JOB) or b"{}")
    found = Verification(output.url, finished=output.read(manifest.SUCCESS) is not None)
    listed = _Listed.read(output, found)
    there = {
        folder: output.tree(folder)
        for folder in ("completions", "errors", "trace", manifest.HISTORY, STAGING)
    }
    units = sorted(n.removesuffix(".parquet") for n in there["completions"] if _is_unit(n))
    samples = job.get("fingerprint", {}).get("sampling", {}).get("n", 1)
    check = _UnitCheck(output, manifest.accepted_digests(job), samples, listed)
    spans: dict[str, list[tuple[int, int, str]]] = {}
    named: set[str] = set()
    with ThreadPoolExecutor(_THREADS) as pool:
        for unit in _windowed(pool, check, units):
            found.add(unit.problems)
            found.units += 1
            found.files += len(unit.sizes)
            found.bytes += sum(unit.sizes.values())
            found.rows_out += unit.completions
            found.rows_in_errors += unit.failed
            named |= unit.sizes.keys()
            if unit.span is not None:
                name, start, rows = unit.span
                spans.setdefault(name, []).append((start, rows, unit.id))
            progress(found.units, len(units))
    _check_ranges(output, spans, found)
    _check_strays(there, named, found)
    listed.check(output, job, named, found)
    if not found.finished:
        found.add([Problem("unfinished", manifest.SUCCESS, "not there: run the job to its end")])
    return found


def _is_unit(name: str) -> bool:
    return name.endswith(".parquet") and "/" not in name


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


# ----------------------------------------------------------------------- one unit


@dataclass
class _Unit:
    """What is left of a unit after it was checked; `span`: input file, first row, rows."""

    id: str
    span: tuple[str, int, int] | None = None
    completions: int = 0
    failed: int = 0
    sizes: dict[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def wrong(self, kind: str, file: str, message: str) -> None:
        self.problems.append(Problem(kind, file, message))


@dataclass(frozen=True)
class _UnitCheck:
    """Checks a committed unit and the files that it names."""

    output: Folder
    digests: set[str]
    samples: int
    listed: _Listed

    def __call__(self, unit: str) -> _Unit:
        found = _Unit(unit)
        name = f"completions/{unit}.parquet"
        data = self._content(found, (name, -1, None))
        if data is None:
            return found
        try:
            with pq.ParquetFile(pa.BufferReader(data)) as parquet:
                record = UnitRecord.from_json(parquet.metadata.metadata[FOOTER_KEY])
                table = parquet.read()
            ids = table[ROW_ID].to_pylist()
        except _UNREADABLE as error:
            found.wrong("unreadable", name, f"not a file that specbatch wrote: {_line(error)}")
            return found
        found.span = (record.input, record.start, record.rows)
        found.completions, found.failed = len(ids), record.failed
        if record.unit != unit or unit_id(record.input, record.start, record.rows) != unit:
            found.wrong("foreign", name, f"holds unit {record.unit} of {record.input}")
        if record.job not in self.digests:
            found.wrong("foreign", name, "was committed by a job with other settings")
        if record.completions != len(ids):
            found.wrong("count", name, f"{len(ids)} rows, its footer says {record.completions}")
        samples = None if record.own_n or SAMPLING_COLUMN in table.column_names else self.samples
        if record.samples != record.completions + record.failed:
            found.wrong("count", name, f"its rows ask for {record.samples} samples")
        found.problems += _wrong_ids(name, record, samples, ids, self._errors(found, record))
        self._trace(found, record, set(ids))
        for earlier in manifest.superseded(record):
            self._table(found, earlier)
        return found

    def _content(self, found: _Unit, file: NamedFile) -> bytes | None:
        """A file's bytes, once their checksum is found right."""
        name, rows, expected = file
        data = self.output.read(name)
        if data is None:
            found.wrong("missing", name, f"not there, but unit {found.id} names it")
            return None
        found.sizes[name] = len(data)
        sha256 = hashlib.sha256(data).hexdigest()
        if expected not in (None, sha256):
            found.wrong("checksum", name, "its content has changed since it was written")
        elif problem := self.listed.differs(name, sha256, rows):
            found.problems.append(problem)
        return data

    def _table(self, found: _Unit, file: NamedFile) -> pa.Table | None:
        """The rows of a file that a footer names."""
        name, rows, _ = file
        data = self._content(found, file)
        if data is None:
            return None
        try:
            table = pq.read_table(pa.BufferReader(data))
        except _UNREADABLE as error:
            found.wrong("unreadable", name, _line(error))
            return None
        if table.num_rows != rows:
            found.wrong("count", name, f"{table.num_rows} rows, the unit's footer says {rows}")
        return table

    def _errors(self, found: _Unit, record: UnitRecord) -> list[str]:
        """Row ids in the unit's errors."""
        if not record.errors_file:
            return []
        name = f"errors/{record.errors_file}"
        table = self._table(found, (name, record.failed, record.errors_sha256))
        if table is None or ROW_ID not in table.column_names:
            found.failed = 0
            return []
        classes = Counter(table["error_class"].to_pylist())
        if classes != Counter(record.errors):
            found.wrong("count", name, f"its classes of errors are {dict(classes)}")
        found.failed = table.num_rows
        ids: list[str] = table[ROW_ID].to_pylist()
        return ids

    def _trace(self, found: _Unit, record: UnitRecord, completed: set[str]) -> None:
        if not record.trace_file:
            return
        name = f"trace/{record.trace_file}"
        table = self._table(found, (name, record.trace_rounds, record.trace_sha256))
        if table is not None and (others := set(table[ROW_ID].to_pylist()) - completed):
            found.wrong("foreign", name, f"rounds of rows that are not completed: {_some(others)}")


def _wrong_ids(
    name: str, record: UnitRecord, samples: int | None, completed: Sequence[str], failed: list[str]
) -> Iterator[Problem]:
    """Compare the row ids of a unit's completions and errors with its row range.

    Args:
        name: of the completions file.
        record: the unit's.
        samples: how many each row has; None: each may have as many as it asked for.
        completed, failed: the ids.
    """
    counts = Counter([*completed, *failed])
    if repeated := [each for each, n in counts.items() if n > 1]:
        where = "in completions" if len(set(completed)) < len(completed) else "in errors, too"
        yield Problem("duplicate", name, f"rows that are there twice, {where}: {_some(repeated)}")
    others: list[str] = []
    there: dict[int, int] = {}  # samples by row
    for each in counts:
        own, row, sample = parse_row_id(each)
        known = own == record.input and 0 <= row - record.start < record.rows
        if known and (samples is None or 0 <= sample < samples):
            there[row] = there.get(row, 0) + 1
        else:
            others.append(each)
    if others:
        yield Problem("foreign", name, f"rows that are not the unit's: {_some(others)}")
    missing = [
        f"{record.input}:{row}"
        for row in range(record.start, record.start + record.rows)
        if there.get(row, 0) < (samples or 1)
    ]
    if missing:
        text = f"rows neither in completions nor in errors: {_some(missing)}"
        yield Problem("missing", name, text)


def _some(names: Iterable[str]) -> str:
    """The first few names, and how many more."""
    names = sorted(names)
    more = f" and {len(names) - _IDS_SHOWN:,} more" if len(names) > _IDS_SHOWN else ""
    return ", ".join(names[:_IDS_SHOWN]) + more


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


# ------------------------------------------------------------------ all units together


def _check_ranges(
    output: Folder, spans: dict[str, list[tuple[int, int, str]]], found: Verification
) -> None:
    """Compare the row ranges of all units with the rows of the input files."""
    planned = planned_inputs.read_planned(output)
    if not planned:
        lost = "not there: what the input was is not known"
        found.add([Problem("missing", planned_inputs.INPUTS, lost)])
    found.rows_in = sum(file.rows for file in planned.values())
    for name in sorted(planned.keys() | spans.keys()):
        rows = planned[name].rows if name in planned else 0
        if planned and name not in planned:
            units = _some(unit for _, _, unit in spans[name])
            found.add([Problem("foreign", name, f"not an input file of this job; units: {units}")])
            continue
        end, gaps = 0, list[str]()
        for start, count, unit in [*sorted(spans.get(name, [])), (rows, 0, "")]:
            if start > end:
                gaps.append(f"{end}-{start - 1}" if start - end > 1 else str(end))
            elif start < end and unit:
                problem = f"rows from {start} on are in another unit, too"
                found.add([Problem("duplicate", f"completions/{unit}.parquet", problem)])
            end = max(end, start + count)
        if gaps:
            found.add([Problem("missing", name, f"rows that no unit holds: {', '.join(gaps)}")])
        if planned and end > rows:
            found.add([Problem("foreign", name, f"has {rows} rows, but units go up to {end}")])


def _check_strays(there: dict[str, dict[str, int]], named: set[str], found: Verification) -> None:
    """Name the files that belong to no unit."""
    strays = [
        f"{folder}/{name}"
        for folder, files in there.items()
        for name in sorted(files)
        if folder != STAGING and f"{folder}/{name}" not in named
    ]
    left = [f"{STAGING}/{name}" for name in sorted(there[STAGING])]
    found.add(Problem("stray", name, "belongs to no unit of this job") for name in strays)
    text = "a writer that was killed left it; running the job again removes it"
    found.add(Problem("half-written", name, text) for name in left)


@dataclass(frozen=True)
class _Listed:
    """What the manifest says.

    Attributes:
        values: the manifest; empty if there is none.
        files: rows and checksum by name.
    """

    values: dict[str, Any]
    files: dict[str, tuple[int, str]]

    @staticmethod
    def read(output: Folder, found: Verification) -> _Listed:
        data = output.read(manifest.MANIFEST) if found.finished else None
        if data is None:
            if found.finished:
                text = f"not there, but {manifest.SUCCESS} is"
                found.add([Problem("manifest", manifest.MANIFEST, text)])
            return _Listed({}, {})
        try:
            values = json.loads(data)
            entries = [e for kind in ("files", "history", "stats") for e in values.get(kind, [])]
            files = {entry["name"]: (entry["rows"], entry["sha256"]) for entry in entries}
            return _Listed(values, files)
        except (ValueError, KeyError, TypeError) as error:
            found.add([Problem("unreadable", manifest.MANIFEST, _line(error))])
            return _Listed({}, {})

    def differs(self, name: str, sha256: str, rows: int) -> Problem | None:
        """What is wrong with a file according to the manifest; `rows` below 0: not known."""
        if not self.values:
            return None
        if name not in self.files:
            return Problem("manifest", name, "not in the manifest")
        listed_rows, listed_sha256 = self.files[name]
        if listed_sha256 != sha256:
            return Problem("checksum", name, "its checksum is not the one in the manifest")
        if rows >= 0 and listed_rows != rows:
            return Problem("manifest", name, f"{rows} rows, the manifest says {listed_rows}")
        return None

    def check(
        self, output: Folder, job: dict[str, Any], named: set[str], found: Verification
    ) -> None:
        """Check the manifest's own claims; `named` are the files that were read."""
        if not self.values:
            return
        for name in sorted(self.files.keys() - named):
            data = output.read(name)
            if data is None:
                found.add([Problem("missing", name, "not there, but in the manifest")])
            elif name.startswith("stats/"):
                problem = self.differs(name, hashlib.sha256(data).hexdigest(), -1)
                found.add([problem] if problem else [])
                found.files, found.bytes = found.files + 1, found.bytes + len(data)
        if self.values.get("fingerprint") != digest(job.get("fingerprint", {})):
            text = f"is of another job than {manifest.JOB}"
            found.add([Problem("manifest", manifest.MANIFEST, text)])
        sums = {
            "rows_in": found.rows_in,
            "rows_out": found.rows_out,
            "rows_in_errors": found.rows_in_errors,
        }
        for key, value in sums.items():
            if self.values.get(key) != value:
                text = f"{key} is {self.values.get(key)}, the files have {value}"
                found.add([Problem("manifest", manifest.MANIFEST, text)])
