"""A unit's files as bytes: what an attempt at it brings to the sink."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import layout
from pipeline.commit.footer import to_footer
from pipeline.commit.record import Actor, AttachedFiles, UnitFile, UnitRecord, Work
from pipeline.commit.schema import Outcomes, completions_table, errors_table
from pipeline.commit.trace import trace_table
from pipeline.inputs.blocks import UnitFiles, UnitRows


def parquet_bytes(table: pa.Table, footer: Mapping[bytes, bytes] | None = None) -> bytes:
    """A table as a Parquet file, with what its footer says of it, if anything."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, table.schema, compression="zstd") as writer:
        if table.num_rows:  # `datasets` cannot read a row group without rows
            writer.write_table(table)
        if footer:
            writer.add_key_value_metadata(footer)
    return bytes(sink.getvalue())


def attached_file(folder: str, unit: str, table: pa.Table) -> tuple[UnitFile, bytes]:
    """A unit's failed rows or rounds: the file that its footer will name, and its content."""
    content = parquet_bytes(table)
    sha256 = hashlib.sha256(content).hexdigest()
    return UnitFile(layout.attached(folder, unit, sha256), table.num_rows, sha256), content


def unit_files(
    rows: UnitRows,
    outcomes: Outcomes,
    *,
    job: str,
    own_n: bool,
    actor: Actor,
    work: Work,
    optional: Sequence[str],
    token_text: Callable[[int], str],
    trace: bool,
) -> UnitFiles:
    """The output of an attempt that has just ended; the file that commits the unit comes last.

    Args:
        rows: the unit as it was read.
        outcomes: of its rows.
        job: digest of the job's fingerprint.
        own_n: whether each row may say how many samples it has.
        actor: who tried.
        work: what it took.
        optional: which of the optional columns the job has.
        token_text: the text of a token.
        trace: whether rounds are kept.
    """
    unit = rows.unit
    written: list[tuple[str, bytes]] = []

    def attach(folder: str, table: pa.Table) -> UnitFile:
        file, content = attached_file(folder, unit.id, table)
        written.append((file.name, content))
        return file

    failed = errors_table(rows, outcomes)
    errors = attach(layout.ERRORS, failed) if failed.num_rows else None
    rounds = None
    if trace:
        rounds = attach(layout.TRACE, trace_table(rows, outcomes, token_text))
    record = UnitRecord.of_attempt(
        unit,
        outcomes,
        job=job,
        own_n=own_n,
        actor=actor,
        work=work,
        files=AttachedFiles(errors, rounds),
    )
    table = completions_table(rows, outcomes, optional, token_text)
    content = parquet_bytes(table, to_footer(record))
    return UnitFiles(unit.id, (*written, (record.completions_file.name, content)))
