"""Trying failed rows again, alone (`--only-failed`): a unit's files get a new generation.

The rows that a unit's completions file lacks are generated again and joined with the rows that are
there. The whole replaces the completions file in one atomic step, if that still is the file that
the new rows were made for (`Folder.replace`). Of two attempts one wins, and a straggler of an
earlier retry cannot undo a later one.

Errors and trace of the new generation are written before it, under new names, since these hold a
checksum of the content; errors that it supersedes are copied to the history. A reader who opens the
completions file once sees the old generation or the new one, each complete.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import layout
from pipeline.commit.files import attached_file, parquet_bytes
from pipeline.commit.footer import Inconsistent, from_footer, read_records, to_footer
from pipeline.commit.record import AttachedFiles, Results, Retries, UnitFile, UnitRecord
from pipeline.commit.sink import CommitSink
from pipeline.inputs.blocks import UnitFiles
from pipeline.inputs.columns import taken
from pipeline.inputs.row_ids import ROW_ID, parse_row_id
from pipeline.inputs.units import Unit
from pipeline.storage.folder import Folder
from specdec.request import Counts

_THREADS = 16
"""Units whose failed rows are looked up at once, before anything starts."""


def failed_units(output: Folder, units: Iterable[Unit]) -> list[Unit]:
    """The units that have failed rows, each narrowed to these, for the next generation.

    Args:
        output: the folder.
        units: committed ones.

    Raises:
        Inconsistent: a file that no unit committed.
    """
    units = list(units)
    records = {r.unit: r for r in read_records(output, [unit.id for unit in units])}
    failed = [unit for unit in units if records[unit.id].results.failed]

    def narrowed(unit: Unit) -> Unit:
        record = records[unit.id]
        completed = _places(output.read(layout.completions(unit.id)))
        # Those that are named, and should their file be lost, all that nothing is left of.
        named = _places(_content(output, record.files.errors))
        places = map(unit.place, range(unit.rows))
        only = tuple(i for i, at in enumerate(places) if at in named or at not in completed)
        return replace(unit, only=only, generation=record.retries.generation + 1)

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(narrowed, failed))


def _content(output: Folder, file: UnitFile | None) -> bytes | None:
    """What a file holds; None if the unit has no such file, or it was lost."""
    return None if file is None else output.read(file.name)


def _places(data: bytes | None) -> set[tuple[str, int]]:
    """Input file and number in it of the rows that a file holds."""
    if data is None:
        return set()
    table = pq.read_table(pa.BufferReader(data), columns=[ROW_ID])
    return {parse_row_id(each)[:2] for each in table[ROW_ID].to_pylist()}


class RetrySink(CommitSink):
    """Commits the next generation of units that are committed already."""

    def commit(self, unit: UnitFiles) -> dict[str, str]:
        """Replace a unit's files, unless another attempt has. Returns checksums of what it wrote.

        Errors, trace and history are written first, under names of their own; the completions file
        is the commit, and says which of them belong to it. What it superseded goes last.
        """
        if not unit.files:
            return {}
        name = layout.completions(unit.unit_id)
        data, version = self._output.read_version(name)
        before, tried = _Generation.read(data), _Generation.read(dict(unit.files)[name])
        if before.record.retries.generation >= tried.record.retries.generation:
            return {}
        new = _together(self._output, before, tried, dict(unit.files))
        written = {}
        for other, content in new[:-1]:
            if self._output.put_if_absent(other, content):
                written[other] = hashlib.sha256(content).hexdigest()
        content = new[-1][1]
        if not self._output.replace(name, content, version):
            return {}
        kept = {other for other, _ in new}
        for file in before.record.files.there:
            if file.name not in kept:
                self._output.delete(file.name)
        return {**written, name: hashlib.sha256(content).hexdigest()}


@dataclass(frozen=True)
class _Generation:
    """A completions file: its rows and its record."""

    table: pa.Table
    record: UnitRecord

    @staticmethod
    def read(data: bytes) -> _Generation:
        with pq.ParquetFile(pa.BufferReader(data)) as parquet:
            record = from_footer(parquet.metadata.metadata)
            return _Generation(_plain(parquet.read()), record)


def _together(
    output: Folder, before: _Generation, tried: _Generation, files: dict[str, bytes]
) -> list[tuple[str, bytes]]:
    """Files that hold the rows of both; the completions file last.

    Args:
        output: where the files of `before` are.
        before: the unit as it is committed.
        tried: its failed rows, tried again.
        files: what the new attempt would commit.
    """
    old, new, completed = before.record, tried.record, before.table[ROW_ID]
    found: list[tuple[str, bytes]] = []
    failed = trace = None
    failed_before = _content(output, old.files.errors)
    if old.files.errors is not None and failed_before is not None:
        found.append((layout.superseded(old.files.errors.name), failed_before))
    else:
        old = replace(old, files=replace(old.files, errors=None))  # lost: nothing to keep
    if new.files.errors is not None:
        failed = _unless(completed, _read(files[new.files.errors.name]))
        failed = _add_attempts(failed, failed_before)
    traces = []
    if (data := _content(output, old.files.trace)) is not None:
        traces.append(_read(data))
    if new.files.trace is not None:
        traces.append(_unless(completed, _read(files[new.files.trace.name])))
    if traces:
        trace = _in_order(traces)

    def attach(folder: str, table: pa.Table | None) -> UnitFile | None:
        if table is None:
            return None
        file, content = attached_file(folder, old.unit, table)
        found.append((file.name, content))
        return file

    table = _in_order([before.table, _unless(completed, tried.table)])
    record = replace(
        new,
        ranges=old.ranges,
        rows=old.rows,
        results=_all_results(old.results, new.results, table, failed),
        files=AttachedFiles(attach(layout.ERRORS, failed), attach(layout.TRACE, trace)),
        retries=Retries(
            generation=new.retries.generation,
            retried=new.rows,
            earlier=(*old.retries.earlier, replace(old, retries=replace(old.retries, earlier=()))),
        ),
    )
    ids = table[ROW_ID].to_pylist()
    settled = old.results.completions + old.results.failed
    if len(set(ids)) != len(ids) or len(ids) + record.results.failed != settled:
        raise Inconsistent(f"unit {old.unit}: retried rows are not those that failed")
    found.append((record.completions_file.name, parquet_bytes(table, to_footer(record))))
    return found


def _all_results(old: Results, new: Results, completed: pa.Table, failed: pa.Table) -> Results:
    """What became of all rows: of those that were completed before, and those tried again.

    Args:
        old, new: of the generation before, and of the rows that were tried again.
        completed: the completed rows of both.
        failed: the rows that failed again; None if none did.
    """
    counts = Counts()
    for results in (old, new):
        counts.add(results.counts)
    return replace(
        new,
        samples=old.samples,
        completions=completed.num_rows,
        errors=Counter() if failed is None else Counter(failed["error_class"].to_pylist()),
        prompt_tokens=sum(completed["prompt_tokens"].to_pylist()),
        output_tokens=sum(completed["output_tokens"].to_pylist()),
        counts=counts,
    )


def _read(data: bytes) -> pa.Table:
    return _plain(pq.read_table(pa.BufferReader(data)))


def _plain(table: pa.Table) -> pa.Table:
    return table.replace_schema_metadata(None)


def _unless(completed: pa.ChunkedArray, table: pa.Table) -> pa.Table:
    """The rows that are not completed already: of a row's samples some may have been."""
    return table.filter(pc.invert(pc.is_in(table[ROW_ID], completed)))


def _in_order(tables: Sequence[pa.Table]) -> pa.Table:
    """Rows of all the tables in the order of the input; rows of one id stay in theirs."""
    table = pa.concat_tables(tables, promote_options="permissive").unify_dictionaries()
    ids = [parse_row_id(each) for each in table[ROW_ID].to_pylist()]
    order = sorted(range(len(ids)), key=ids.__getitem__)
    return taken(table, order)


def _add_attempts(errors: pa.Table, before: bytes | None) -> pa.Table:
    """Failed rows with the attempts of earlier generations counted in."""
    earlier: dict[str, int] = {}
    if before is not None:
        table = _read(before)
        pairs = zip(table[ROW_ID].to_pylist(), table["attempts"].to_pylist(), strict=True)
        earlier = dict(pairs)
    attempts = [
        n + earlier.get(name, 1)
        for name, n in zip(errors[ROW_ID].to_pylist(), errors["attempts"].to_pylist(), strict=True)
    ]
    column = errors.column_names.index("attempts")
    field = errors.schema.field(column)
    return errors.set_column(column, field, pa.array(attempts, field.type))
