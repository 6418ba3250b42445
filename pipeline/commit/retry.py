"""Trying failed rows again, alone (`--only-failed`): a unit's files get a new generation.

The rows that a unit's completions file lacks are generated again. What comes out is put together
with the rows that are there, and the whole replaces the completions file in one atomic step, if the
file still is the one that the new rows were made for (`Folder.replace`). See
`pipeline.commit.sink`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.commit import manifest
from pipeline.commit.sink import CommitSink
from pipeline.commit.stats import FOOTER_KEY, UnitRecord, parquet_bytes
from pipeline.inputs.blocks import UnitFiles
from pipeline.inputs.row_ids import ROW_ID, parse_row_id
from pipeline.inputs.units import Unit
from pipeline.storage.folder import Folder

_THREADS = 16


def failed_units(output: Folder, units: Iterable[Unit]) -> list[Unit]:
    """The units that have failed rows, each narrowed to these, for the next generation.

    Args:
        output: the folder.
        units: committed ones.

    Raises:
        Inconsistent: a file that no unit committed.
    """
    units = list(units)
    records = {r.unit: r for r in manifest.read_records(output, [unit.id for unit in units])}
    failed = [unit for unit in units if records[unit.id].failed]

    def narrowed(unit: Unit) -> Unit:
        record = records[unit.id]
        completed = _row_numbers(output.read(f"completions/{unit.id}.parquet"))
        # Those that are named, and should their file be lost, all that nothing is left of.
        wanted = _row_numbers(output.read(f"errors/{record.errors_file}"))
        wanted |= set(range(unit.start, unit.start + unit.rows)) - completed
        only = tuple(sorted(number - unit.start for number in wanted))
        return replace(unit, only=only, generation=record.generation + 1)

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(narrowed, failed))


def _row_numbers(data: bytes | None) -> set[int]:
    """Numbers of the rows that a file holds."""
    if data is None:
        return set()
    table = pq.read_table(pa.BufferReader(data), columns=[ROW_ID])
    return {parse_row_id(each).row for each in table[ROW_ID].to_pylist()}


class RetrySink(CommitSink):
    """Commits the next generation of units that are committed already."""

    def commit(self, unit: UnitFiles) -> dict[str, str]:
        """Replace a unit's files, unless another attempt has. Returns checksums of what it wrote.

        Errors, trace and history are written first, under names of their own; the completions file
        is the commit, and says which of them belong to it. What it superseded goes last.
        """
        if not unit.files:
            return {}
        name = f"completions/{unit.unit_id}.parquet"
        data, version = self._output.read_version(name)
        before, tried = _Generation.read(data), _Generation.read(dict(unit.files)[name])
        if before.record.generation >= tried.record.generation:
            return {}
        new = _together(self._output, before, tried, dict(unit.files))
        written = {}
        for other, content in new[:-1]:
            if self._output.put_if_absent(other, content):
                written[other] = hashlib.sha256(content).hexdigest()
        content = new[-1][1]
        if not self._output.replace(name, content, version):
            return {}
        old = {f"errors/{before.record.errors_file}", f"trace/{before.record.trace_file}"}
        for superseded in old - {other for other, _ in new}:
            self._output.delete(superseded)
        return {**written, name: hashlib.sha256(content).hexdigest()}


@dataclass(frozen=True)
class _Generation:
    """A completions file: its rows and its record."""

    table: pa.Table
    record: UnitRecord

    @staticmethod
    def read(data: bytes) -> _Generation:
        with pq.ParquetFile(pa.BufferReader(data)) as parquet:
            record = UnitRecord.from_json(parquet.metadata.metadata[FOOTER_KEY])
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
    errors: Counter[str] = Counter()
    errors_file = errors_sha256 = trace_file = trace_sha256 = None
    failed_before = output.read(f"errors/{old.errors_file}")
    if failed_before is not None:
        found.append((f"{manifest.HISTORY}/{old.errors_file}", failed_before))
    else:
        old = replace(old, errors_file=None, errors_sha256=None)  # lost: nothing to keep
    if new.errors_file is not None:
        failed = _unless(completed, _read(files[f"errors/{new.errors_file}"]))
        failed = _add_attempts(failed, failed_before)
        errors.update(failed["error_class"].to_pylist())
        errors_file, errors_sha256, content = named(old.unit, failed)
        found.append((f"errors/{errors_file}", content))
    traces = []
    if old.trace_file and (data := output.read(f"trace/{old.trace_file}")) is not None:
        traces.append(_read(data))
    if new.trace_file:
        traces.append(_unless(completed, _read(files[f"trace/{new.trace_file}"])))
    trace = _in_order(traces) if traces else None
    if trace is not None:
        trace_file, trace_sha256, content = named(old.unit, trace)
        found.append((f"trace/{trace_file}", content))
    table = _in_order([before.table, _unless(completed, tried.table)])
    record = replace(
        new,
        rows=old.rows,
        samples=old.samples,
        retried=new.rows,
        completions=table.num_rows,
        errors=dict(errors),
        errors_file=errors_file,
        errors_sha256=errors_sha256,
        prompt_tokens=sum(table["prompt_tokens"].to_pylist()),
        output_tokens=sum(table["output_tokens"].to_pylist()),
        counts={name: n + old.counts.get(name, 0) for name, n in new.counts.items()},
        trace_file=trace_file,
        trace_sha256=trace_sha256,
        trace_rounds=0 if trace is None else trace.num_rows,
        earlier=[*old.earlier, asdict(replace(old, earlier=[]))],
    )
    ids = table[ROW_ID].to_pylist()
    if len(set(ids)) != len(ids) or len(ids) + record.failed != old.completions + old.failed:
        raise manifest.Inconsistent(f"unit {old.unit}: retried rows are not those that failed")
    found.append((f"completions/{old.unit}.parquet", parquet_bytes(table, record)))
    return found


def named(unit: str, table: pa.Table) -> tuple[str, str, bytes]:
    """File name, checksum and content of a unit's errors or trace.

    Named after the content too: another attempt at the unit writes another file, and the
    completions file says which one belongs to it.
    """
    content = parquet_bytes(table)
    sha256 = hashlib.sha256(content).hexdigest()
    return f"{unit}-{sha256[:8]}.parquet", sha256, content


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
    return table.take(pa.array(order, pa.int64()))


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
