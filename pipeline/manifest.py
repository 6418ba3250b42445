"""What the output folder says about itself: whose it is, what is done, and that it adds up.

_specbatch/job.json         the job and its fingerprint: all that changes results
_specbatch/inputs.parquet   the input files that the job was planned on
_specbatch/manifest.json    at the end: every file with rows and checksum, versions, totals
_SUCCESS                    last, once rows in = rows out + rows in errors
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import JobConfig, S3Config
from pipeline.errors import UserError
from pipeline.models import digest, head_identity, model_identity
from pipeline.stats import FOOTER_KEY, UnitRecord, stats_tables, summarise
from pipeline.storage import Folder, check_access, is_s3, resolved
from pipeline.units import FilePlan, Unit

JOB = "_specbatch/job.json"
INPUTS = "_specbatch/inputs.parquet"
MANIFEST = "_specbatch/manifest.json"
SUCCESS = "_SUCCESS"

_THREADS = 16
_POLICY_SETTINGS = {
    "none": (),
    "fixed": ("k",),
    "heuristic": ("k", "k_min", "k_max"),
    "confidence": ("threshold", "k_max"),
    "entropy": ("threshold", "k_max"),
    "head": ("threshold", "k_min", "k_max", "estimator"),
    "goodput": ("k_max", "estimator"),
}
_PACKAGES = ("specbatch", "torch", "transformers", "ray", "pyarrow")


class Inconsistent(RuntimeError):
    """Committed files that do not add up. It takes a bug, or a hand in the output folder."""


def fingerprint(job: JobConfig, plans: Sequence[FilePlan]) -> dict[str, Any]:
    """All that changes results, as plain data. The pool, its slots and the output are not in it.

    With `coupled` verification neither draft nor policy changes a token, so they are left out.

    Raises:
        UserError: a model is not there.
    """
    models, speculation = job.models, job.speculation
    result: dict[str, Any] = {
        "input": {
            **job.input.model_dump(mode="json", exclude={"paths"}),
            "files": len(plans),
            "rows": sum(p.rows for p in plans),
            "digest": digest([[p.file.name, p.file.size, p.rows] for p in plans]),
        },
        "unit_rows": job.unit_rows,
        "models": {
            "target": model_identity(models.target),
            **models.model_dump(mode="json", include={"dtype", "quantization", "deterministic"}),
        },
        "sampling": job.sampling.model_dump(mode="json"),
        "speculation": {"verification": speculation.verification},
    }
    if speculation.verification == "rejection":
        result["speculation"]["policy"] = speculation.policy
        for name in _POLICY_SETTINGS[speculation.policy]:
            result["speculation"][name] = getattr(speculation, name)
        if speculation.head is not None:
            result["speculation"]["head"] = head_identity(speculation.head)
        if models.draft is not None and speculation.policy != "none":
            result["models"]["draft"] = model_identity(models.draft)
    return result


def claim(output: Folder, job: JobConfig, plans: Sequence[FilePlan], mark: dict[str, Any]) -> None:
    """Make the output folder this job's, or make sure that it already is.

    Args:
        output: the folder.
        job: the job.
        plans: its input.
        mark: its fingerprint.

    Raises:
        UserError: the folder holds another job's output; the message shows the difference.
    """
    found = output.read(JOB)
    if found is not None:
        differences = difference(json.loads(found).get("fingerprint", {}), mark)
        if not differences:
            return
        if output.list("completions"):
            lines = [*differences, *_changed_inputs(output, plans)]
            raise UserError(
                f"output: {output.url} holds another job; choose another output, or restore:\n"
                + "\n".join(f"  {line}" for line in lines)
            )
        # A job that never committed anything, perhaps for a mistake that is corrected now.
    elif output.list("completions"):
        raise UserError(
            f"output: {output.url} has completions but no {JOB}; "
            "choose another output folder, or empty this one"
        )
    record = {
        "name": job.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "fingerprint": mark,
        "config": job.model_dump(mode="json"),
    }
    output.put(INPUTS, table_bytes(_inputs_table(plans)))
    output.put(JOB, json.dumps(record, indent=2).encode())


def difference(there: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Lines that say which settings of two fingerprints differ."""
    lines = []
    for key in [*there, *(key for key in here if key not in there)]:
        old, new = there.get(key), here.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += difference(old, new, f"{prefix}{key}.")
        elif old != new:
            lines.append(f"{prefix}{key}: {_short(old)} there, {_short(new)} here")
    return lines


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _inputs_table(plans: Sequence[FilePlan]) -> pa.Table:
    return pa.table(
        {
            "name": pa.array([p.file.name for p in plans], pa.string()),
            "size": pa.array([p.file.size for p in plans], pa.int64()),
            "rows": pa.array([p.rows for p in plans], pa.int64()),
        }
    )


def _changed_inputs(output: Folder, plans: Sequence[FilePlan]) -> list[str]:
    """Which input files differ from those that the job was planned on; the first few by name."""
    data = output.read(INPUTS)
    if data is None:
        return []
    there = {row["name"]: row for row in pq.read_table(pa.BufferReader(data)).to_pylist()}
    here = {row["name"]: row for row in _inputs_table(plans).to_pylist()}
    lines = []
    for name in sorted(there.keys() | here.keys()):
        if name not in here:
            lines.append(f"input file {name} is gone")
        elif name not in there:
            lines.append(f"input file {name} is new")
        elif there[name] != here[name]:
            lines.append(f"input file {name} has changed")
    return [*lines[:5], f"and {len(lines) - 5} more input files"] if len(lines) > 5 else lines


def open_output(url: str, s3: S3Config) -> Folder:
    """The output folder of a job, finished or not.

    Args:
        url: the folder, local or s3://.
        s3: how to reach it, if it is on S3.

    Raises:
        UserError: there is no job in this folder, or it is out of reach.
    """
    s3 = resolved(s3, used=is_s3(url))
    check_access(url, s3)
    output = Folder(url, s3)
    if output.read(JOB) is None:
        raise UserError(f"{url}: no job's output here: there is no {JOB}")
    return output


def committed_ids(output: Folder) -> set[str]:
    """Ids of the units that have a completions file, of whatever job."""
    return {
        name.removesuffix(".parquet")
        for name in output.list("completions")
        if name.endswith(".parquet")
    }


def committed(output: Folder, units: Iterable[Unit]) -> set[str]:
    """Ids of the units that are done: those whose completions file exists.

    Raises:
        UserError: a file in `completions/` that is none of theirs.
    """
    known = {unit.id for unit in units}
    found = committed_ids(output)
    foreign = sorted(found - known)
    if foreign:
        raise UserError(
            f"output: {output.join(f'completions/{foreign[0]}.parquet')} is not of this job; "
            "move it away"
        )
    return found


def read_record(output: Folder, unit: str) -> UnitRecord:
    """The record in the footer of a unit's completions file.

    Raises:
        Inconsistent: the file is not what a unit commits.
    """
    name = f"completions/{unit}.parquet"
    try:
        with output.open(name) as file, pq.ParquetFile(file) as parquet:
            metadata = parquet.metadata
            record = UnitRecord.from_json(metadata.metadata[FOOTER_KEY])
    except (pa.ArrowInvalid, KeyError, TypeError, ValueError) as error:
        raise Inconsistent(
            f"{output.join(name)}: not a file that specbatch wrote: {error}"
        ) from None
    if metadata.num_rows != record.completions or record.unit != unit:
        raise Inconsistent(f"{output.join(name)}: its rows are not those that its footer counts")
    return record


def read_records(output: Folder, units: Iterable[str]) -> list[UnitRecord]:
    """The records of committed units, read in parallel, in the order of their ids."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(lambda unit: read_record(output, unit), sorted(units)))


def finish(
    output: Folder,
    units: Sequence[Unit],
    mark: dict[str, Any],
    checksums: Mapping[str, str],
) -> dict[str, Any]:
    """Check that every row is accounted for; write statistics, manifest and `_SUCCESS`.

    Args:
        output: the folder; all units are committed.
        units: the job's.
        mark: its fingerprint.
        checksums: SHA-256 of files, where it is known; other files are read.

    Returns:
        The job's summary (`stats.summarise`).

    Raises:
        Inconsistent: the files do not add up.
    """
    missing = {unit.id for unit in units} - committed(output, units)
    if missing:
        raise Inconsistent(f"{len(missing)} units were not committed, {min(missing)} among them")
    records = read_records(output, [unit.id for unit in units])
    error_files = _reconcile(output, units, records, digest(mark))
    files: list[tuple[str, int, str | None]]
    files = [(f"completions/{r.unit}.parquet", r.completions, None) for r in records]
    files += [
        (f"errors/{r.errors_file}", r.failed, r.errors_sha256) for r in records if r.errors_file
    ]
    files += [
        (f"trace/{r.trace_file}", r.trace_rounds, r.trace_sha256) for r in records if r.trace_file
    ]
    with ThreadPoolExecutor(_THREADS) as pool:
        listed = list(pool.map(lambda file: _checked(output, checksums, *file), files))
    # Written by attempts at units that other attempts committed.
    for orphan in error_files - {r.errors_file for r in records}:
        output.delete(f"errors/{orphan}")
    for orphan in set(output.list("trace")) - {r.trace_file for r in records}:
        output.delete(f"trace/{orphan}")
    for name, table in stats_tables(records).items():
        output.put(f"stats/{name}.parquet", table_bytes(table))
    summary = summarise(records)
    manifest = {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "fingerprint": digest(mark),
        "versions": versions(),
        "rows_in": sum(unit.rows for unit in units),
        "rows_out": summary["rows"],
        "rows_in_errors": summary["errors"],
        "summary": summary,
        "files": listed,
    }
    output.put(MANIFEST, json.dumps(manifest, indent=1).encode())
    output.put(SUCCESS, b"")
    output.clear_staging()
    return summary


def _reconcile(
    output: Folder, units: Sequence[Unit], records: Sequence[UnitRecord], job: str
) -> set[str]:
    """Check rows in = rows out + errors for each unit. Returns the names in `errors/`."""
    rows = {unit.id: unit.rows for unit in units}
    error_files = set(output.list("errors"))
    for record in records:
        if record.job != job:
            raise Inconsistent(f"unit {record.unit} was committed by a job with other settings")
        if not record.rows == rows[record.unit] == record.completions + record.failed:
            raise Inconsistent(
                f"unit {record.unit}: {rows[record.unit]} rows in, {record.completions} completed, "
                f"{record.failed} in errors"
            )
        if record.errors_file and record.errors_file not in error_files:
            raise Inconsistent(f"{output.join(f'errors/{record.errors_file}')} is missing")
    return error_files


def _checked(
    output: Folder, checksums: Mapping[str, str], name: str, rows: int, expected: str | None
) -> dict[str, Any]:
    """A file's entry in the manifest; its checksum must be the one expected, if one is."""
    sha256 = checksums.get(name) or hashlib.sha256(output.read(name) or b"").hexdigest()
    if expected not in (None, sha256):
        raise Inconsistent(f"{output.join(name)}: its content has changed since it was written")
    return {"name": name, "rows": rows, "sha256": sha256}


def table_bytes(table: pa.Table) -> bytes:
    """A table as a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return bytes(sink.getvalue())


def versions() -> dict[str, str]:
    """Versions of this package and of what its results depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed as a package"
    return found
