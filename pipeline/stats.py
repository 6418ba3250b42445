"""What a unit's generation took, and the sums of it: per actor, per phase, per job.

A record travels in the footer of the unit's completions file, so that statistics are committed
with the rows they describe and any set of committed files adds up, whatever run they come from.
Every second and forward of an actor is booked on the unit that finished next.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from specdec.request import Counts

FOOTER_KEY = b"specbatch.unit"


@dataclass(frozen=True)
class UnitRecord:
    """One committed unit.

    Attributes:
        unit: its id.
        job: digest of the fingerprint of the job that it was generated for.
        input: name of its input file.
        start, rows: its row range; `rows` = `completions` + all of `errors`.
        completions: rows completed.
        errors: failed rows by error class.
        errors_file: name of the file that holds them, in `errors/`; None if there is none.
        errors_sha256: its checksum.
        prompt_tokens, output_tokens: of completed rows.
        counts: rounds, drafted, verified, accepted, committed of completed rows.
        actor: which actor generated it.
        node: and where that was.
        started, finished: seconds since the epoch.
        engine: the actor's forwards and tokens through each model, booked on this unit.
        phase_seconds: the actor's seconds by phase, booked on this unit.
        peak_live: most rows in the engine's slots at once.
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

    @property
    def failed(self) -> int:
        """Rows in errors."""
        return sum(self.errors.values())

    def to_json(self) -> bytes:
        """What the footer holds under FOOTER_KEY."""
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def from_json(data: bytes) -> UnitRecord:
        """What `to_json` wrote."""
        return UnitRecord(**json.loads(data))


def busy_seconds(records: Iterable[UnitRecord]) -> float:
    """Seconds in which at least one unit was in work; pauses between runs do not count."""
    total, end = 0.0, float("-inf")
    for record in sorted(records, key=lambda r: r.started):
        total += max(0.0, record.finished - max(record.started, end))
        end = max(end, record.finished)
    return total


def summarise(records: Sequence[UnitRecord]) -> dict[str, Any]:
    """The job in numbers, JSON-able. `speedup` and `cost` are null until they are measured.

    Args:
        records: one per committed unit.
    """
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
        "units": len(records),
        "prompt_tokens": sum(r.prompt_tokens for r in records),
        "output_tokens": output_tokens,
        "seconds": seconds,
        "tokens_per_second": output_tokens / seconds if seconds else None,
        **asdict(counts),
        "acceptance_rate": counts.acceptance_rate,
        "block_efficiency": counts.block_efficiency,
        "speedup": None,
        "speedup_ci": None,
        "cost": None,
        **dict(engine),
        "peak_live": max((r.peak_live for r in records), default=0),
        "phase_seconds": dict(phases),
    }


def stats_tables(records: Sequence[UnitRecord]) -> dict[str, pa.Table]:
    """The tables of `stats/`: units, actors, and phases (one row per actor and phase)."""
    by_actor: dict[str, list[UnitRecord]] = {}
    for record in records:
        by_actor.setdefault(record.actor, []).append(record)
    actors, phases = [], []
    for actor, mine in sorted(by_actor.items()):
        summary = summarise(mine)
        for phase, seconds in summary.pop("phase_seconds").items():
            phases.append({"actor": actor, "phase": phase, "seconds": seconds})
        for unmeasured in ("speedup", "speedup_ci", "cost", "errors_by_class"):
            del summary[unmeasured]
        actors.append({"actor": actor, "node": mine[0].node, **summary})
    units = [_unit_row(record) for record in records]
    return {
        "units": pa.Table.from_pylist(units),
        "actors": pa.Table.from_pylist(actors),
        "phases": pa.Table.from_pylist(phases),
    }


def _unit_row(record: UnitRecord) -> dict[str, Any]:
    row = asdict(record)
    counts = Counts(**row.pop("counts"))
    engine, phase_seconds = row.pop("engine"), row.pop("phase_seconds")
    return {
        **row,
        "errors": record.failed,
        "errors_by_class": json.dumps(record.errors),
        **asdict(counts),
        "acceptance_rate": counts.acceptance_rate,
        "block_efficiency": counts.block_efficiency,
        **engine,
        "phase_seconds": json.dumps(phase_seconds),
    }
