"""A unit's record as it is stored: JSON in the footer of its completions file.

One level of names, which are also columns of `stats/units`. Versions before this one wrote the same
names, so any version reads what any other has written.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import layout
from pipeline.commit.record import (
    Actor,
    AttachedFiles,
    Results,
    Retries,
    UnitFile,
    UnitRecord,
    Work,
)
from pipeline.inputs.units import RowRange
from pipeline.storage.folder import Folder
from specdec.request import Counts

FOOTER_KEY = b"specbatch.unit"
"""Key of the record in the metadata of a completions file."""

_THREADS = 16
"""Footers read at once. They are small, and reading one from S3 is mostly waiting."""


class Inconsistent(RuntimeError):
    """Committed files that do not add up. It takes a bug, or a hand in the output folder."""


def to_plain(record: UnitRecord) -> dict[str, Any]:
    """A record as the footer has it."""
    results, actor, work, retries = record.results, record.actor, record.work, record.retries
    errors, trace = record.files.errors, record.files.trace
    return {
        "unit": record.unit,
        "job": record.job,
        "input": record.ranges[0].name,
        "start": record.ranges[0].start,
        "rows": record.rows,
        "completions": results.completions,
        "errors": dict(results.errors),
        "errors_file": errors and _base_name(errors),
        "errors_sha256": errors and errors.sha256,
        "prompt_tokens": results.prompt_tokens,
        "output_tokens": results.output_tokens,
        "counts": asdict(results.counts),
        "actor": actor.id,
        "node": actor.node,
        "started": work.started,
        "finished": work.finished,
        "engine": dict(work.engine),
        "phase_seconds": dict(work.phase_seconds),
        "peak_live": work.peak_live,
        "trace_file": trace and _base_name(trace),
        "trace_sha256": trace and trace.sha256,
        "trace_rounds": trace.rows if trace else 0,
        "speedup": work.speedup,
        "calibration": results.calibration,
        "outcomes": work.rounds,
        "slowest": results.slowest,
        "costs": work.forward_seconds,
        "fell_back": work.fell_back,
        "generation": retries.generation,
        "retried": retries.retried,
        "earlier": [to_plain(each) for each in retries.earlier],
        "group": actor.group,
        "samples": results.samples,
        "own_n": results.own_n,
        "worker": actor.worker,
        "files": len(record.inputs),
        "ranges": [(each.name, each.start, each.rows) for each in record.ranges],
        "nodes": work.nodes,
    }


def from_plain(values: Mapping[str, Any]) -> UnitRecord:
    """What `to_plain` gave, in this version or in an older one, which lacks what has a default.

    Raises:
        KeyError, TypeError, ValueError: it is something else.
    """
    values = dict(values)
    get = values.get
    errors: dict[str, int] = values["errors"]
    whole = (values["input"], values["start"], values["rows"])  # a unit was of one file
    return UnitRecord(
        unit=values["unit"],
        job=values["job"],
        ranges=tuple(RowRange(*each) for each in get("ranges", [whole])),
        rows=values["rows"],
        results=Results(
            samples=get("samples", values["rows"]),  # a row was one sample
            own_n=get("own_n", False),
            completions=values["completions"],
            errors=errors,
            prompt_tokens=values["prompt_tokens"],
            output_tokens=values["output_tokens"],
            counts=Counts(**values["counts"]),
            calibration=get("calibration", {}),
            slowest=[(row, seconds) for row, seconds in get("slowest", ())],
        ),
        actor=Actor(values["actor"], values["node"], get("group"), get("worker", "")),
        work=Work(
            started=values["started"],
            finished=values["finished"],
            engine=values["engine"],
            phase_seconds=values["phase_seconds"],
            peak_live=values["peak_live"],
            speedup=get("speedup"),
            rounds=[(verified, accepted, n) for verified, accepted, n in get("outcomes", ())],
            nodes=[tuple(each) for each in get("nodes", ())],
            forward_seconds={
                kind: [(tokens, seconds) for tokens, seconds in points]
                for kind, points in get("costs", {}).items()
            },
            fell_back=get("fell_back", False),
        ),
        files=AttachedFiles(
            errors=_file(values, layout.ERRORS, "errors", sum(errors.values())),
            trace=_file(values, layout.TRACE, "trace", get("trace_rounds", 0)),
        ),
        retries=Retries(
            generation=get("generation", 0),
            retried=get("retried", 0),
            earlier=tuple(from_plain(each) for each in get("earlier", ())),
        ),
    )


def _base_name(file: UnitFile) -> str:
    return file.name.rpartition("/")[2]


def _file(values: Mapping[str, Any], folder: str, kind: str, rows: int) -> UnitFile | None:
    name = values.get(f"{kind}_file")
    return UnitFile(f"{folder}/{name}", rows, values.get(f"{kind}_sha256")) if name else None


def to_footer(record: UnitRecord) -> dict[bytes, bytes]:
    """The metadata of a unit's completions file."""
    return {FOOTER_KEY: json.dumps(to_plain(record)).encode()}


def from_footer(metadata: Mapping[bytes, bytes]) -> UnitRecord:
    """The record in the metadata of a completions file.

    Raises:
        KeyError, TypeError, ValueError: it has none.
    """
    return from_plain(json.loads(metadata[FOOTER_KEY]))


def read_record(output: Folder, unit: str) -> UnitRecord:
    """The record in the footer of a unit's completions file.

    Raises:
        Inconsistent: the file is not what a unit commits.
    """
    name = layout.completions(unit)
    try:
        with output.open(name) as file, pq.ParquetFile(file) as parquet:
            metadata = parquet.metadata
            record = from_footer(metadata.metadata)
    except (pa.ArrowInvalid, KeyError, TypeError, ValueError) as error:
        raise Inconsistent(
            f"{output.join(name)}: not a file that specbatch wrote: {error}"
        ) from None
    if metadata.num_rows != record.results.completions or record.unit != unit:
        raise Inconsistent(f"{output.join(name)}: its rows are not those that its footer counts")
    return record


def read_records(output: Folder, units: Iterable[str]) -> list[UnitRecord]:
    """The records of committed units, read in parallel, in the order of their ids."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(lambda unit: read_record(output, unit), sorted(units)))
