"""Checking one committed unit: its footer, its rows, and the files that it names."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import layout
from pipeline.commit.files import parquet_bytes
from pipeline.commit.footer import from_footer
from pipeline.commit.record import UnitFile, UnitRecord
from pipeline.commit.schema import completions_schema
from pipeline.inputs.row_ids import ROW_ID, parse_row_id
from pipeline.inputs.row_sampling import SAMPLING_COLUMN
from pipeline.inputs.units import RowRange, unit_id
from pipeline.outputs.problems import Problem, first_line, some
from pipeline.outputs.verify_manifest import ListedFiles
from pipeline.storage.folder import Folder

_UNREADABLE = (pa.ArrowException, OSError, KeyError, TypeError, ValueError)
"""What reading a file raises that is not what was written."""


@dataclass
class CheckedUnit:
    """What is kept of a unit after it was checked.

    Attributes:
        id: the unit.
        ranges: which rows it is of; none if its file could not be read.
        completions, failed: its rows.
        sizes: bytes by name of the files that were read.
        problems: what is wrong.
    """

    id: str
    ranges: tuple[RowRange, ...] = ()
    completions: int = 0
    failed: int = 0
    sizes: dict[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def wrong(self, kind: str, file: str, message: str) -> None:
        """Note a problem."""
        self.problems.append(Problem(kind, file, message))


def columns_of(table: pa.Schema, optional: Sequence[str]) -> list[str]:
    """Names and types of the columns of completions, as files give them back.

    Args:
        table: the input's columns, as the job record has them.
        optional: which of the optional columns the job has.
    """
    empty = parquet_bytes(completions_schema(table, optional).empty_table())
    return _shown(pq.read_schema(pa.BufferReader(empty)))


def _shown(schema: pa.Schema) -> list[str]:
    return [f"{field.name}: {field.type}" for field in schema]


@dataclass(frozen=True)
class UnitCheck:
    """Checks a committed unit and the files that it names.

    Attributes:
        output: the folder.
        digests: of the fingerprints that the job's units may have.
        samples: how many each row has, unless rows may say so.
        listed: what the manifest says of files.
        columns: what all units have (`columns_of`); None: an older version noted none.
    """

    output: Folder
    digests: set[str]
    samples: int
    listed: ListedFiles
    columns: list[str] | None

    def __call__(self, unit: str) -> CheckedUnit:
        """Check it, by its id."""
        found = CheckedUnit(unit)
        there = self._completions(found)
        if there is None:
            return found
        record, columns, ids = there
        found.ranges = record.ranges
        found.completions = len(ids)
        self._whose_it_is(found, record)
        self._counts(found, record, len(ids))
        failed = self._failed_rows(found, record)
        own_n = record.results.own_n or SAMPLING_COLUMN in columns
        found.problems += _wrong_ids(record, None if own_n else self.samples, ids, failed)
        self._trace(found, record, set(ids))
        for earlier in record.superseded_files:
            self._table(found, earlier)
        return found

    def _completions(self, found: CheckedUnit) -> tuple[UnitRecord, list[str], list[str]] | None:
        """The unit's record, its columns, and its row ids; None if they cannot be read."""
        name = layout.completions(found.id)
        data = self._content(found, UnitFile(name, -1, None))
        if data is None:
            return None
        try:
            with pq.ParquetFile(pa.BufferReader(data)) as parquet:
                record, table = from_footer(parquet.metadata.metadata), parquet.read()
            self._columns(found, name, table.schema)
            return record, table.column_names, table[ROW_ID].to_pylist()
        except _UNREADABLE as error:
            text = f"not a file that specbatch wrote: {first_line(error)}"
            found.wrong("unreadable", name, text)
            return None

    def _columns(self, found: CheckedUnit, name: str, schema: pa.Schema) -> None:
        """The columns that all units of the job have, so that they are one table."""
        there = _shown(schema)
        if self.columns is not None and there != self.columns:
            differ = some({*there} ^ {*self.columns}) or "their order"
            found.wrong("columns", name, f"not those of the job's table: {differ}")

    def _whose_it_is(self, found: CheckedUnit, record: UnitRecord) -> None:
        """The unit that its name says, of this job."""
        name = layout.completions(found.id)
        if record.unit != found.id or unit_id(*record.ranges) != found.id:
            inputs = some(record.inputs)
            found.wrong("foreign", name, f"holds unit {record.unit} of {inputs}")
        if record.job not in self.digests:
            found.wrong("foreign", name, "was committed by a job with other settings")

    def _counts(self, found: CheckedUnit, record: UnitRecord, rows: int) -> None:
        """As many rows as its footer says, and these all that were asked for."""
        name, results = layout.completions(found.id), record.results
        planned = sum(each.rows for each in record.ranges)
        if record.rows != planned:
            found.wrong("count", name, f"its footer says {record.rows} of its {planned} rows")
        if results.completions != rows:
            found.wrong("count", name, f"{rows} rows, its footer says {results.completions}")
        if results.samples != results.completions + results.failed:
            found.wrong("count", name, f"its rows ask for {results.samples} samples")

    def _failed_rows(self, found: CheckedUnit, record: UnitRecord) -> list[str]:
        """Row ids in the unit's errors, which must be of the classes that its footer counts."""
        errors = record.files.errors
        found.failed = record.results.failed
        if errors is None:
            return []
        table = self._table(found, errors)
        if table is None or ROW_ID not in table.column_names:
            found.failed = 0
            return []
        classes = Counter(table["error_class"].to_pylist())
        if classes != Counter(record.results.errors):
            found.wrong("count", errors.name, f"its classes of errors are {dict(classes)}")
        found.failed = table.num_rows
        ids: list[str] = table[ROW_ID].to_pylist()
        return ids

    def _trace(self, found: CheckedUnit, record: UnitRecord, completed: set[str]) -> None:
        """Rounds of completed rows only."""
        trace = record.files.trace
        table = None if trace is None else self._table(found, trace)
        if trace is None or table is None:
            return
        if others := set(table[ROW_ID].to_pylist()) - completed:
            text = f"rounds of rows that are not completed: {some(others)}"
            found.wrong("foreign", trace.name, text)

    def _table(self, found: CheckedUnit, file: UnitFile) -> pa.Table | None:
        """The rows of a file that a footer names, as many as it says."""
        data = self._content(found, file)
        if data is None:
            return None
        try:
            table = pq.read_table(pa.BufferReader(data))
        except _UNREADABLE as error:
            found.wrong("unreadable", file.name, first_line(error))
            return None
        if table.num_rows != file.rows:
            text = f"{table.num_rows} rows, the unit's footer says {file.rows}"
            found.wrong("count", file.name, text)
        return table

    def _content(self, found: CheckedUnit, file: UnitFile) -> bytes | None:
        """A file's bytes, whose checksum must be that of the footer and of the manifest."""
        data = self.output.read(file.name)
        if data is None:
            found.wrong("missing", file.name, f"not there, but unit {found.id} names it")
            return None
        found.sizes[file.name] = len(data)
        sha256 = hashlib.sha256(data).hexdigest()
        if file.sha256 not in (None, sha256):
            found.wrong("checksum", file.name, "its content has changed since it was written")
        elif problem := self.listed.differs(file.name, sha256, file.rows):
            found.problems.append(problem)
        return data


def _wrong_ids(
    record: UnitRecord, samples: int | None, completed: Sequence[str], failed: Sequence[str]
) -> Iterator[Problem]:
    """Compare the row ids of a unit's completions and errors with its row ranges.

    Args:
        record: the unit's.
        samples: how many each row has; None: each may have as many as it asked for.
        completed, failed: the ids.
    """
    name = layout.completions(record.unit)
    counts = Counter([*completed, *failed])
    if repeated := [each for each, n in counts.items() if n > 1]:
        where = "in completions" if len(set(completed)) < len(completed) else "in errors, too"
        yield Problem("duplicate", name, f"rows that are there twice, {where}: {some(repeated)}")
    others: list[str] = []
    # Samples by row.
    there = {(r.name, row): 0 for r in record.ranges for row in range(r.start, r.start + r.rows)}
    for each in counts:
        own, row, sample = parse_row_id(each)
        if (own, row) in there and sample >= 0 and (samples is None or sample < samples):
            there[own, row] += 1
        else:
            others.append(each)
    if others:
        yield Problem("foreign", name, f"rows that are not the unit's: {some(others)}")
    if missing := [f"{own}:{row}" for (own, row), n in there.items() if n < (samples or 1)]:
        text = f"rows neither in completions nor in errors: {some(missing)}"
        yield Problem("missing", name, text)
