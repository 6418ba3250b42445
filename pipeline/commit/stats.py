"""Sums over units' records: the job in numbers, and the tables of `stats/`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.commit.footer import to_plain
from pipeline.commit.record import UnitRecord, parts
from specdec.measure.calibration import Calibration
from specdec.measure.speedup import SpeedupMeter
from specdec.request import Counts

COSTS_SCHEMA = pa.schema(
    {"actor": pa.string(), "kind": pa.string(), "tokens": pa.int64(), "seconds": pa.float64()}
)
POSITIONS_SCHEMA = pa.schema({"position": pa.int64(), "judged": pa.int64(), "accepted": pa.int64()})
NODES_SCHEMA = pa.schema(
    {name: pa.int64() for name in ("depth", "rank", "drafted", "verified", "judged", "accepted")}
)
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


def busy_seconds(records: Iterable[UnitRecord]) -> float:
    """Seconds in which at least one unit was in work; pauses between runs do not count."""
    total, end = 0.0, float("-inf")
    for work in sorted((record.work for record in records), key=lambda work: work.started):
        total += max(0.0, work.finished - max(work.started, end))
        end = max(end, work.finished)
    return total


def measured_speedup(records: Iterable[UnitRecord]) -> dict[str, Any]:
    """Speedup over decoding without speculation, with its 95% interval; null where unmeasured."""
    meter = SpeedupMeter()
    for record in records:
        if record.work.speedup is not None:
            meter.add(SpeedupMeter.from_json(record.work.speedup))
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
        for context, bins in record.results.calibration.items():
            for key in (("all", ""), ("input", _input(record)), ("context", context)):
                classes.setdefault(key, Calibration()).bins += np.array(bins)
    order = {"all": 0, "input": 1, "context": 2}
    return dict(
        sorted(classes.items(), key=lambda c: (order[c[0][0]], len(c[0][1]), c[0][1])),
    )


def _input(record: UnitRecord) -> str:
    """The input file of a unit; of a unit of several, the first, and how many more."""
    first, *others = record.inputs
    return f"{first} and {len(others):,} more" if others else first


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
        for depth, rank, _, _, asked, taken in record.work.nodes:
            judged[depth] += asked if not rank else 0
            accepted[depth] += taken
        for verified, taken, rounds in record.work.rounds if not record.work.nodes else ():
            judged.update(dict.fromkeys(range(1, min(verified, taken + 1) + 1), rounds))
            accepted.update(dict.fromkeys(range(1, taken + 1), rounds))
    return [
        {"position": at, "judged": judged[at], "accepted": accepted[at]}
        for at in sorted(+judged)  # trees may have depths that were drafted and never reached
    ]


def node_rows(records: Iterable[UnitRecord]) -> list[dict[str, int]]:
    """Candidates that branch, by depth in the round (from 1) and rank among siblings (from 0).

    Returns:
        Rows of: depth, rank, and how many were drafted, verified, judged and accepted. Judged are
        those whose parent stands and no better sibling does.
    """
    sums: dict[tuple[int, int], Counter[str]] = {}
    for record in records:
        for depth, rank, *counts in record.work.nodes:
            known = sums.setdefault((depth, rank), Counter())
            known.update(dict(zip(NODES_SCHEMA.names[2:], counts, strict=True)))
    names = NODES_SCHEMA.names
    return [
        {names[0]: depth, names[1]: rank, **{name: sums[depth, rank][name] for name in names[2:]}}
        for depth, rank in sorted(sums)
    ]


def summarise(records: Sequence[UnitRecord]) -> dict[str, Any]:
    """The job in numbers, JSON-able. What was not measured is null.

    Args:
        records: one per committed unit.
    """
    records = [part for record in records for part in parts(record)]
    counts, errors, phases, engine = Counts(), Counter[str](), Counter[str](), Counter[str]()
    for record in records:
        counts.add(record.results.counts)
        errors.update(record.results.errors)
        phases.update(record.work.phase_seconds)
        engine.update(record.work.engine)
    output_tokens = sum(r.results.output_tokens for r in records)
    seconds = busy_seconds(records)
    return {
        "rows": sum(r.results.completions for r in records),
        "errors": sum(errors.values()),
        "errors_by_class": dict(errors.most_common()),
        "prompts": sum(r.rows for r in records),
        "units": len({r.unit for r in records}),
        "prompt_tokens": sum(r.results.prompt_tokens for r in records),
        "output_tokens": output_tokens,
        "seconds": seconds,
        "tokens_per_second": output_tokens / seconds if seconds else None,
        **asdict(counts),
        "acceptance_rate": counts.acceptance_rate,
        "block_efficiency": counts.block_efficiency,
        **measured_speedup(records),
        "calibration": calibration_rows(records),
        "positions": position_rows(records),
        "nodes": node_rows(records),
        "actors_fell_back": len({r.actor.id for r in records if r.work.fell_back}),
        "cost": None,
        **dict(engine),
        "peak_live": max((r.work.peak_live for r in records), default=0),
        "phase_seconds": dict(phases),
    }


def stats_tables(records: Sequence[UnitRecord]) -> dict[str, pa.Table]:
    """The tables of `stats/`: units (by generation), actors, phases, costs, calibration, positions
    and nodes.
    """
    records = [part for record in records for part in parts(record)]
    by_actor: dict[str, list[UnitRecord]] = {}
    for record in records:
        by_actor.setdefault(record.actor.id, []).append(record)
    actors, phases, costs = [], [], []
    for actor, mine in sorted(by_actor.items()):
        summary = summarise(mine)
        for phase, seconds in summary.pop("phase_seconds").items():
            phases.append({"actor": actor, "phase": phase, "seconds": seconds})
        for nested in (
            "speedup_ci",
            "calibration",
            "positions",
            "nodes",
            "cost",
            "errors_by_class",
            "actors_fell_back",
        ):
            del summary[nested]
        summary |= _speedup_columns(mine)
        summary["fell_back"] = any(record.work.fell_back for record in mine)
        first = mine[0].actor
        actors.append({"actor": actor, "node": first.node, "group": first.group, **summary})
        latest = max((record.work for record in mine), key=lambda work: work.finished)
        for kind, points in latest.forward_seconds.items():
            costs += [{"actor": actor, "kind": kind, "tokens": n, "seconds": s} for n, s in points]
    units = [_unit_row(record) for record in records]
    return {
        "units": _typed(pa.Table.from_pylist(units)),
        "actors": _typed(pa.Table.from_pylist(actors)),
        "phases": pa.Table.from_pylist(phases),
        "costs": pa.Table.from_pylist(costs, schema=COSTS_SCHEMA),
        "calibration": pa.Table.from_pylist(calibration_rows(records), schema=CALIBRATION_SCHEMA),
        "positions": pa.Table.from_pylist(position_rows(records), schema=POSITIONS_SCHEMA),
        "nodes": pa.Table.from_pylist(node_rows(records), schema=NODES_SCHEMA),
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
    flat = {name: value for name, value in to_plain(record).items() if name not in _NESTED}
    counts = record.results.counts
    return {
        **flat,
        **_speedup_columns([record]),
        "errors": record.results.failed,
        "errors_by_class": json.dumps(record.results.errors),
        **asdict(counts),
        "acceptance_rate": counts.acceptance_rate,
        "block_efficiency": counts.block_efficiency,
        **record.work.engine,
        "phase_seconds": json.dumps(record.work.phase_seconds),
    }


_NESTED = {
    "counts",
    "engine",
    "phase_seconds",
    "speedup",
    "calibration",
    "outcomes",
    "nodes",
    "slowest",
    "costs",
    "earlier",
    "ranges",
}
"""What of a stored record is no column of `stats/units`, or not as it is."""
