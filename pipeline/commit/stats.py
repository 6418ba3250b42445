"""What a unit's generation took, and the sums of it: per actor, per phase, per job.

A record travels in the footer of the unit's completions file, so that statistics are committed
with the rows they describe and any set of committed files adds up, whatever run they come from.
An engine's seconds of a round are booked on the units of the rows that took part, in proportion;
its forwards, and seconds spent on no unit, on the unit that finished next.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from specdec.measure.calibration import Calibration
from specdec.measure.speedup import SpeedupMeter
from specdec.request import Counts

FOOTER_KEY = b"specbatch.unit"

COSTS_SCHEMA = pa.schema(
    {"actor": pa.string(), "kind": pa.string(), "tokens": pa.int64(), "seconds": pa.float64()}
)
POSITIONS_SCHEMA = pa.schema({"position": pa.int64(), "judged": pa.int64(), "accepted": pa.int64()})
CALIBRATION_SCHEMA = pa.schema(
    {
        "by": pa.string(),
        "name": pa.string(),
        "judged": pa.int64(),
        "predicted": pa.float64(),
        "accepted": pa.float64(),
        "ece": pa.float64(),
    }
)


@dataclass(frozen=True)
class UnitRecord:
    """One committed unit.

    Attributes:
        unit: its id.
        job: digest of the fingerprint of the job that it was generated for.
        input: name of its input file.
        start, rows: its row range.
        samples: how many samples its rows asked for: `completions` + all of `errors`.
        own_n: whether its rows may say how many, each for itself.
        completions: samples completed.
        errors: failed samples by error class.
        errors_file: name of the file that holds them, in `errors/`; None if there is none.
        errors_sha256: its checksum.
        prompt_tokens, output_tokens: of completed rows.
        counts: rounds, drafted, verified, accepted, committed of completed rows.
        actor: which actor generated it.
        node: and where that was.
        started, finished: seconds since the epoch.
        engine: the actor's forwards and tokens through each model, booked on this unit.
        phase_seconds: the actor's seconds by phase, booked on this unit: its share of the rounds
            that its rows took part in, and load, profile and idle since the last unit.
        peak_live: most rows in the engine's slots at once.
        trace_file, trace_sha256, trace_rounds: the file with its rounds in `trace/`, if there is
            one, its checksum, and how many rounds.
        speedup: the actor's rounds with speculation and control rounds, booked on this unit
            (`SpeedupMeter.to_json`).
        calibration: predicted against observed acceptance of its rows, by class of context length
            (`Calibration.bins`).
        outcomes: rounds of the actor's rows, booked on this unit: candidates verified, how many of
            them verification accepted, and how many rounds ended so.
        slowest: its rows that took longest from slot to end: row id, seconds.
        costs: the actor's cost tables when the unit ended.
        fell_back: whether the actor had given up its acceptance head by then.
        generation: how often the unit's failed rows were tried again (`pipeline.commit.retry`).
            What counts rows, tokens and errors is about all rows in the file; what measures an
            actor, about the last generation.
        retried: how many rows that generation tried; 0 for the first, which tried all.
        earlier: the records that this one superseded, oldest first.
        group: the actor's group, if the pool has groups.
        worker: the actor's process, by Ray's worker id.
    """

    unit: str
    job: str
    input: str
    start: int
    rows: int
    completions: int
    errors: dict[str, int]
    errors_file: str | None
    errors_sha256: str | None
    prompt_tokens: int
    output_tokens: int
    counts: dict[str, int]
    actor: str
    node: str
    started: float
    finished: float
    engine: dict[str, int]
    phase_seconds: dict[str, float]
    peak_live: int
    trace_file: str | None = None
    trace_sha256: str | None = None
    trace_rounds: int = 0
    speedup: dict[str, Any] | None = None
    calibration: dict[str, list[list[float]]] = field(default_factory=dict)
    outcomes: list[tuple[int, int, int]] = field(default_factory=list)
    slowest: list[tuple[str, float]] = field(default_factory=list)
    costs: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    fell_back: bool = False
    generation: int = 0
    retried: int = 0
    earlier: list[dict[str, Any]] = field(default_factory=list)
    group: str | None = None
    samples: int = 0
    own_n: bool = False
    worker: str = ""

    @property
    def failed(self) -> int:
        """Samples in errors."""
        return sum(self.errors.values())

    def to_json(self) -> bytes:
        """What the footer holds under FOOTER_KEY."""
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def from_json(data: bytes) -> UnitRecord:
        """What `to_json` wrote."""
        return UnitRecord.of(json.loads(data))

    @staticmethod
    def of(values: dict[str, Any]) -> UnitRecord:
        """A record as plain data. In an older version's, a row is one sample."""
        return UnitRecord(**{"samples": values["rows"], **values})


def parts(record: UnitRecord) -> list[UnitRecord]:
    """A record by generation: what each of them took, and the rows that it settled.

    Rows that failed and were tried again belong to the generation that tried them last, so the
    parts sum to the whole.
    """
    wholes = [*(UnitRecord.of(each) for each in record.earlier), replace(record, earlier=[])]
    found: list[UnitRecord] = []
    for before, whole, after in zip([None, *wholes], wholes, [*wholes[1:], None], strict=False):
        tried = whole.rows if before is None else whole.retried
        part = replace(whole, rows=tried - (after.retried if after else 0))
        if after is not None:
            part = replace(part, errors={})
        if before is not None:
            part = replace(
                part,
                completions=whole.completions - before.completions,
                prompt_tokens=whole.prompt_tokens - before.prompt_tokens,
                output_tokens=whole.output_tokens - before.output_tokens,
                counts={k: n - before.counts.get(k, 0) for k, n in whole.counts.items()},
            )
        found.append(replace(part, samples=part.completions + part.failed))
    return found


def busy_seconds(records: Iterable[UnitRecord]) -> float:
    """Seconds in which at least one unit was in work; pauses between runs do not count."""
    total, end = 0.0, float("-inf")
    for record in sorted(records, key=lambda r: r.started):
        total += max(0.0, record.finished - max(record.started, end))
        end = max(end, record.finished)
    return total


def measured_speedup(records: Iterable[UnitRecord]) -> dict[str, Any]:
    """Speedup over decoding without speculation, with its 95% interval; null where unmeasured."""
    meter = SpeedupMeter()
    for record in records:
        if record.speedup is not None:
            meter.add(SpeedupMeter.from_json(record.speedup))
    found = meter.estimate()
    if found is None:
        return {"speedup": None, "speedup_ci": None, "speedup_controls": 0}
    return {
        "speedup": found.value,
        "speedup_ci": [found.low, found.high],
        "speedup_controls": found.controls,
    }


def reliability(records: Iterable[UnitRecord]) -> dict[tuple[str, str], Calibration]:
    """Predicted against observed acceptance: over all, by input file, by class of context length.

    Returns:
        By ("all", ""), ("input", file) and ("context", class), in this order.
    """
    classes: dict[tuple[str, str], Calibration] = {}
    for record in records:
        for context, bins in record.calibration.items():
            for key in (("all", ""), ("input", record.input), ("context", context)):
                classes.setdefault(key, Calibration()).bins += np.array(bins)
    order = {"all": 0, "input": 1, "context": 2}
    return dict(
        sorted(classes.items(), key=lambda c: (order[c[0][0]], len(c[0][1]), c[0][1])),
    )


def calibration_rows(records: Iterable[UnitRecord]) -> list[dict[str, Any]]:
    """How well acceptance was predicted: over all, by input file and by class of context length.

    Returns:
        Rows of: by ("all", "input" or "context"), name, judged candidates, their mean prediction,
        the share accepted, and the expected calibration error. None if nothing was predicted.
    """
    rows = []
    for (by, name), calibration in reliability(records).items():
        judged, predicted, accepted = calibration.bins.sum(0)
        rows.append(
            {
                "by": by,
                "name": name,
                "judged": int(judged),
                "predicted": predicted / judged,
                "accepted": accepted / judged,
                "ece": calibration.ece,
            }
        )
    return rows


def position_rows(records: Iterable[UnitRecord]) -> list[dict[str, Any]]:
    """How many candidates were judged and accepted at each position of a round's proposal.

    Behind a rejected candidate nothing is judged. A candidate that verification accepted counts
    even if its row ended before it.

    Returns:
        Rows of: position (from 1), judged, accepted.
    """
    judged, accepted = Counter[int](), Counter[int]()
    for record in records:
        for verified, taken, rounds in record.outcomes:
            judged.update(dict.fromkeys(range(1, min(verified, taken + 1) + 1), rounds))
            accepted.update(dict.fromkeys(range(1, taken + 1), rounds))
    return [
        {"position": at, "judged": judged[at], "accepted": accepted[at]} for at in sorted(judged)
    ]


def summarise(records: Sequence[UnitRecord]) -> dict[str, Any]:
    """The job in numbers, JSON-able. What was not measured is null.

    Args:
        records: one per committed unit.
    """
    records = [part for record in records for part in parts(record)]
    counts, errors, phases, engine = Counts(), Counter[str](), Counter[str](), Counter[str]()
    for record in records:
        counts.add(Counts(**record.counts))
        errors.update(record.errors)
        phases.update(record.phase_seconds)
        engine.update(record.engine)
    output_tokens = sum(r.output_tokens for r in records)
    seconds = busy_seconds(records)
    return {
        "rows": sum(r.completions for r in records),
        "errors": sum(errors.values()),
        "errors_by_class": dict(errors.most_common()),
        "prompts": sum(r.rows for r in records),
        "units": len({r.unit for r in records}),
        "prompt_tokens": sum(r.prompt_tokens for r in records),
        "output_tokens": output_tokens,
        "seconds": seconds,
        "tokens_per_second": output_tokens / seconds if seconds else None,
        **asdict(counts),
        "acceptance_rate": counts.acceptance_rate,
        "block_efficiency": counts.block_efficiency,
        **measured_speedup(records),
        "calibration": calibration_rows(records),
        "positions": position_rows(records),
        "actors_fell_back": len({r.actor for r in records if r.fell_back}),
        "cost": None,
        **dict(engine),
        "peak_live": max((r.peak_live for r in records), default=0),
        "phase_seconds": dict(phases),
    }


def stats_tables(records: Sequence[UnitRecord]) -> dict[str, pa.Table]:
    """The tables of `stats/`: units (by generation), actors, phases, costs, calibration and
    positions.
    """
    records = [part for record in records for part in parts(record)]
    by_actor: dict[str, list[UnitRecord]] = {}
    for record in records:
        by_actor.setdefault(record.actor, []).append(record)
    actors, phases, costs = [], [], []
    for actor, mine in sorted(by_actor.items()):
        summary = summarise(mine)
        for phase, seconds in summary.pop("phase_seconds").items():
            phases.append({"actor": actor, "phase": phase, "seconds": seconds})
        for nested in (
            "speedup_ci",
            "calibration",
            "positions",
            "cost",
            "errors_by_class",
            "actors_fell_back",
        ):
            del summary[nested]
        summary |= _speedup_columns(mine)
        summary["fell_back"] = any(record.fell_back for record in mine)
        actors.append({"actor": actor, "node": mine[0].node, "group": mine[0].group, **summary})
        latest = max(mine, key=lambda record: record.finished)
        for kind, points in latest.costs.items():
            costs += [{"actor": actor, "kind": kind, "tokens": n, "seconds": s} for n, s in points]
    units = [_unit_row(record) for record in records]
    return {
        "units": _typed(pa.Table.from_pylist(units)),
        "actors": _typed(pa.Table.from_pylist(actors)),
        "phases": pa.Table.from_pylist(phases),
        "costs": pa.Table.from_pylist(costs, schema=COSTS_SCHEMA),
        "calibration": pa.Table.from_pylist(calibration_rows(records), schema=CALIBRATION_SCHEMA),
        "positions": pa.Table.from_pylist(position_rows(records), schema=POSITIONS_SCHEMA),
    }


def _typed(table: pa.Table) -> pa.Table:
    """The table with types for columns that are null in every row: names, or ratios."""
    for i, column in enumerate(table.schema):
        if pa.types.is_null(column.type):
            kind = (
                pa.string() if column.name.endswith(("_file", "_sha256", "group")) else pa.float64()
            )
            table = table.set_column(i, column.name, table[i].cast(kind))
    return table


def _speedup_columns(records: Iterable[UnitRecord]) -> dict[str, Any]:
    """Speedup and its interval as flat columns."""
    found = measured_speedup(records)
    low, high = found["speedup_ci"] or (None, None)
    return {
        "speedup": found["speedup"],
        "speedup_low": low,
        "speedup_high": high,
        "speedup_controls": found["speedup_controls"],
    }


def _unit_row(record: UnitRecord) -> dict[str, Any]:
    row = asdict(record)
    counts = Counts(**row.pop("counts"))
    engine, phase_seconds = row.pop("engine"), row.pop("phase_seconds")
    for nested in ("speedup", "calibration", "outcomes", "slowest", "costs", "earlier"):
        del row[nested]
    return {
        **row,
        **_speedup_columns([record]),
        "errors": record.failed,
        "errors_by_class": json.dumps(record.errors),
        **asdict(counts),
        "acceptance_rate": counts.acceptance_rate,
        "block_efficiency": counts.block_efficiency,
        **engine,
        "phase_seconds": json.dumps(phase_seconds),
    }


def parquet_bytes(table: pa.Table, record: UnitRecord | None = None) -> bytes:
    """A table as a Parquet file, with the unit's record in its footer if there is one."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, table.schema, compression="zstd") as writer:
        writer.write_table(table)
        if record is not None:
            writer.add_key_value_metadata({FOOTER_KEY: record.to_json()})
    return bytes(sink.getvalue())
