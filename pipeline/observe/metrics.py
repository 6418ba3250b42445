"""Live metrics of a running job, for Prometheus through Ray.

Each actor reads its engine's running totals every EXPORT_SECONDS and books what has been added
since; nothing is measured or exported within a round. Ray puts `ray_` before the names, and
`_total` behind those of counters.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.observe.progress import Tally
from specdec.request import Counts

EXPORT_SECONDS = 2.0
"""Between two exports. Less costs the actor more time, and Prometheus asks less often anyway."""

COUNTERS = {
    "specbatch_rows": "rows completed",
    "specbatch_row_errors": "rows failed",
    "specbatch_output_tokens": "tokens committed to outputs",
    "specbatch_drafted": "candidates drawn from the draft",
    "specbatch_verified": "candidates submitted to the target",
    "specbatch_accepted": "candidates that stand in outputs",
    "specbatch_row_rounds": "target forwards that committed tokens for a row, summed over rows",
    "specbatch_rounds": "target forwards",
    "specbatch_phase_seconds": "seconds by phase: load, profile, prefill, draft, verify, idle, ...",
    "specbatch_cost": "money, at the price of what the actor holds",
}
"""Counters by name; tags: job_name, actor, and phase for specbatch_phase_seconds."""

GAUGES = {
    "specbatch_goodput": "tokens committed per second",
    "specbatch_acceptance_rate": "accepted / verified candidates",
    "specbatch_candidates_per_round": "candidates verified per row and round",
    "specbatch_live_batch": "rows per round",
}
"""Gauges by name, over the time since the last export; tags: job_name and actor."""

# Not "job": Prometheus gives that label to what it scrapes.
_TAGS = ("job_name", "actor")


@dataclass(frozen=True)
class Reading:
    """Running totals of an actor.

    Attributes:
        tally: rows, errors and counts.
        rounds: target forwards.
        live_rows: rows, summed over these.
        seconds: by phase.
    """

    tally: Tally = field(default_factory=Tally)
    rounds: int = 0
    live_rows: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)


def totals(reading: Reading) -> dict[tuple[str, str], float]:
    """The counters' values by name and phase; no phase: an empty one."""
    tally, counts = reading.tally, reading.tally.counts
    plain = {
        "specbatch_rows": tally.rows,
        "specbatch_row_errors": tally.errors,
        "specbatch_output_tokens": counts.committed,
        "specbatch_drafted": counts.drafted,
        "specbatch_verified": counts.verified,
        "specbatch_accepted": counts.accepted,
        "specbatch_row_rounds": counts.rounds,
        "specbatch_rounds": reading.rounds,
    }
    phases = {("specbatch_phase_seconds", name): s for name, s in reading.seconds.items()}
    return {(name, ""): float(value) for name, value in plain.items()} | phases


def recent(now: Reading, before: Reading, seconds: float) -> dict[str, float]:
    """The gauges' values for the time between two readings; none where nothing was done."""
    counts = Counts()
    counts.add(now.tally.counts)
    old = before.tally.counts
    if old.rounds > counts.rounds:  # the engine was replaced, and counts from the beginning
        before, old = Reading(), Counts()
    committed, rounds = counts.committed - old.committed, counts.rounds - old.rounds
    verified, accepted = counts.verified - old.verified, counts.accepted - old.accepted
    forwards = now.rounds - before.rounds
    values = {"specbatch_goodput": committed / seconds}
    if verified > 0:
        values["specbatch_acceptance_rate"] = accepted / verified
    if rounds > 0:
        values["specbatch_candidates_per_round"] = verified / rounds
    if forwards > 0:
        values["specbatch_live_batch"] = (now.live_rows - before.live_rows) / forwards
    return values


class LiveMetrics:
    """Exports an actor's readings in a thread of its own, until the process ends.

    Args:
        job, actor: tags of all metrics.
        read: takes a reading; may be called from any thread.
        price_per_hour: of what the actor holds; None: not known, `specbatch_cost` stays 0.
    """

    def __init__(
        self,
        job: str,
        actor: str,
        read: Callable[[], Reading],
        price_per_hour: float | None = None,
    ) -> None:
        from ray.util.metrics import Counter, Gauge

        tags = {"job_name": job, "actor": actor}
        self._read, self._price = read, price_per_hour
        self._counters: dict[str, Any] = {}
        for name, what in COUNTERS.items():
            keys = (*_TAGS, "phase") if name == "specbatch_phase_seconds" else _TAGS
            self._counters[name] = Counter(name, what, keys)
        self._gauges = {name: Gauge(name, what, _TAGS) for name, what in GAUGES.items()}
        for metric in (*self._counters.values(), *self._gauges.values()):
            metric.set_default_tags(tags)
        self._booked: dict[tuple[str, str], float] = {}
        self._last, self._at = Reading(), time.monotonic()
        threading.Thread(target=self._run, name="metrics", daemon=True).start()

    def export(self) -> None:
        """Book what has been added since the last call."""
        reading, now = self._read(), time.monotonic()
        values = totals(reading)
        if self._price is not None:
            values["specbatch_cost", ""] = sum(reading.seconds.values()) * self._price / 3600
        for (name, phase), value in values.items():
            booked = self._booked.get((name, phase), 0.0)
            # Less than before: the engine was replaced, and counts from the beginning.
            added = value - booked if value >= booked else value
            if added > 0:
                tags = {"phase": phase} if phase else None
                self._counters[name].inc(added, tags)
            self._booked[name, phase] = value
        for name, value in recent(reading, self._last, max(now - self._at, 1e-6)).items():
            self._gauges[name].set(value)
        self._last, self._at = reading, now

    def _run(self) -> None:
        while True:
            time.sleep(EXPORT_SECONDS)
            try:
                self.export()
            except Exception:  # metrics are for eyes; work goes on without them
                logging.getLogger(__name__).exception("metrics could not be exported")
