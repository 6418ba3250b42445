"""The end of a job: does all add up? Then statistics, manifest and `_SUCCESS`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline import layout
from pipeline.commit import manifest
from pipeline.commit.failed_rows import check_failed_rows
from pipeline.commit.files import parquet_bytes
from pipeline.commit.footer import Inconsistent, read_records
from pipeline.commit.provenance import commits
from pipeline.commit.record import UnitFile, UnitRecord
from pipeline.commit.stats import stats_tables, summarise
from pipeline.config.job import JobConfig
from pipeline.config.model_identity import digest
from pipeline.errors import TooManyErrors
from pipeline.inputs.units import Unit
from pipeline.storage.folder import Folder

_THREADS = 16
"""Files whose checksums are read at once. More would be faster on S3, and take more memory."""


def finish(
    output: Folder,
    job: JobConfig,
    units: Sequence[Unit],
    mark: dict[str, Any],
    checksums: Mapping[str, str],
    most_errors: float | None = None,
    job_folder: Path | None = None,
) -> dict[str, Any]:
    """Check that every row is accounted for; write statistics, manifest and `_SUCCESS`.

    With more rows in errors than the job allows, all is written but `_SUCCESS`.

    Args:
        output: the folder; all units are committed.
        job: the job.
        units: its units.
        mark: its fingerprint.
        checksums: SHA-256 of files, where it is known; other files are read.
        most_errors: the largest share of rows that may have failed; None: any.
        job_folder: where the job file is, for the record of what it was made from.

    Returns:
        The job's summary (`stats.summarise`).

    Raises:
        Inconsistent: the files do not add up.
        TooManyErrors: more rows failed than the job allows.
    """
    missing = {unit.id for unit in units} - manifest.committed(output, units)
    if missing:
        raise Inconsistent(f"{len(missing)} units were not committed, {min(missing)} among them")
    records = read_records(output, [unit.id for unit in units])
    record_of_job = json.loads(output.read(layout.JOB) or b"{}")
    digests = {digest(mark), *manifest.accepted_digests(record_of_job)}
    _reconcile(output, units, records, digests, job.sampling.n)
    files = [record.completions_file for record in records]
    history: list[UnitFile] = []
    for record in records:
        files += record.files.there
        history += record.superseded_files
    with ThreadPoolExecutor(_THREADS) as pool:
        listed = list(pool.map(lambda file: _checked(output, checksums, file), files))
        kept = list(pool.map(lambda file: _checked(output, {}, file), history))
    # Written by attempts at units that other attempts committed.
    named = {file.name for file in (*files, *history)}
    for folder in (layout.ERRORS, layout.TRACE, layout.HISTORY):
        for name in output.list(folder):
            if f"{folder}/{name}" not in named:
                output.delete(f"{folder}/{name}")
    tables = []
    for name, table in stats_tables(records).items():
        content = parquet_bytes(table)
        output.put(layout.stats(name), content)
        tables.append(_entry(layout.stats(name), table.num_rows, content))
    summary = summarise(records)
    listing = {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "fingerprint": digest(mark),
        "versions": manifest.versions(),
        "git": commits(job_folder),
        "config": job.model_dump(mode="json"),
        "rows_in": sum(unit.rows for unit in units),
        "samples": sum(record.results.samples for record in records),
        "rows_out": summary["rows"],
        "rows_in_errors": summary["errors"],
        "summary": summary,
        "files": listed,
        "history": kept,
        "stats": tables,
    }
    output.put(layout.MANIFEST, json.dumps(listing, indent=1).encode())
    output.clear_staging()
    if most_errors is not None:
        try:
            check_failed_rows(output, records, most_errors)
        except TooManyErrors:
            output.delete(layout.SUCCESS)  # of an earlier run, which allowed more
            raise
    output.put(layout.SUCCESS, b"")
    return summary


def _reconcile(
    output: Folder,
    units: Sequence[Unit],
    records: Sequence[UnitRecord],
    digests: set[str],
    n: int,
) -> None:
    """Check samples asked for = rows out + errors for each unit, and that its errors are there.

    A unit's rows are those of the plan. Each has the job's `n` samples, unless rows may have an `n`
    of their own: then only the actor that read them could count.
    """
    rows = {unit.id: unit.rows for unit in units}
    error_files = {f"{layout.ERRORS}/{name}" for name in output.list(layout.ERRORS)}
    for record in records:
        if record.job not in digests:
            raise Inconsistent(f"unit {record.unit} was committed by a job with other settings")
        results, errors = record.results, record.files.errors
        asked = results.samples if results.own_n else n * rows[record.unit]
        found = results.completions + results.failed
        if record.rows != rows[record.unit] or not results.samples == asked == found:
            raise Inconsistent(
                f"unit {record.unit}: {rows[record.unit]} rows in, which ask for {asked} samples; "
                f"{results.completions} completed, {results.failed} in errors"
            )
        if errors is not None and errors.name not in error_files:
            raise Inconsistent(f"{output.join(errors.name)} is missing")


def _checked(output: Folder, checksums: Mapping[str, str], file: UnitFile) -> dict[str, Any]:
    """A file's entry in the manifest; its checksum must be the one that a footer says, if any."""
    name = file.name
    sha256 = checksums.get(name) or hashlib.sha256(output.read(name) or b"").hexdigest()
    if file.sha256 not in (None, sha256):
        raise Inconsistent(f"{output.join(name)}: its content has changed since it was written")
    return {"name": name, "rows": file.rows, "sha256": sha256}


def _entry(name: str, rows: int, content: bytes) -> dict[str, Any]:
    return {"name": name, "rows": rows, "sha256": hashlib.sha256(content).hexdigest()}
