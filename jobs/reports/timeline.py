"""A job's speed over time, from what its units say about themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.commit.record import UnitRecord
from specdec.request import Counts

Array = NDArray[np.float64]

_STEPS_PER_UNIT = 2
"""Steps of a timeline for each unit. More would draw detail that totals of units do not have."""

_MOST_STEPS = 60
"""Steps of a timeline: about as many as a chart of a phone's width can show."""

_COUNTS = ("committed", "rounds", "verified", "accepted")


@dataclass(frozen=True)
class Steps:
    """Counts by step of a job's time.

    Attributes:
        seconds: float [steps], how long each step is.
        committed, rounds, verified, accepted: float [steps].
    """

    seconds: Array
    committed: Array
    rounds: Array
    verified: Array
    accepted: Array

    @staticmethod
    def of(seconds: Array) -> Steps:
        """Steps in which nothing was done yet."""
        return Steps(seconds, *(np.zeros_like(seconds) for _ in _COUNTS))

    def add(self, counts: Counts, share: Array) -> None:
        """Add counts in place, spread over the steps by their shares."""
        for name in _COUNTS:
            getattr(self, name)[:] += getattr(counts, name) * share

    @property
    def goodput(self) -> Array:
        """Committed tokens per second."""
        return self.committed / self.seconds

    @property
    def block_efficiency(self) -> Array:
        """Committed tokens per round of a row; NaN where there was none."""
        return _ratio(self.committed, self.rounds)

    @property
    def acceptance_rate(self) -> Array:
        """Accepted / verified candidates; NaN where none was verified."""
        return _ratio(self.accepted, self.verified)


@dataclass(frozen=True)
class Timeline:
    """What was done by step of the job's time: the time in which at least one unit was in work.

    A unit's counts are spread evenly over the time between its start and its end, since only its
    totals are kept.

    Attributes:
        edges: float [steps + 1], seconds.
        total: of all actors.
        actors: of each.
        pauses: seconds at which the job was stopped and resumed later.
    """

    edges: Array
    total: Steps
    actors: dict[str, Steps]
    pauses: tuple[float, ...]


def _ratio(above: Array, below: Array) -> Array:
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 1e-9)


def timeline(records: Sequence[UnitRecord], least_pause: float = 60.0) -> Timeline:
    """The timeline of a job.

    Args:
        records: one per committed unit.
        least_pause: seconds without work that count as a pause between two runs.
    """
    clock, working, pauses = _working_time(records, least_pause)
    total = float(working[-1]) if len(working) else 0.0
    steps = max(1, min(_STEPS_PER_UNIT * len(records), _MOST_STEPS))
    edges = np.linspace(0.0, total or 1.0, steps + 1)
    length = np.diff(edges)
    everything, actors = Steps.of(length), dict[str, Steps]()
    for record in records:
        begin, end = np.interp([record.work.started, record.work.finished], clock, working)
        share = _shares(edges, float(begin), float(end))
        for steps_of in (everything, actors.setdefault(record.actor.id, Steps.of(length))):
            steps_of.add(record.results.counts, share)
    return Timeline(edges, everything, actors, pauses)


def _shares(edges: Array, begin: float, end: float) -> Array:
    """Which share of an interval lies in each step; sums to 1."""
    if end <= begin:
        share = np.zeros(len(edges) - 1)
        share[min(int(np.searchsorted(edges, begin, "right")) - 1, len(share) - 1)] = 1.0
        return share
    inside = np.minimum(edges[1:], end) - np.maximum(edges[:-1], begin)
    shares: Array = np.maximum(inside, 0.0) / (end - begin)
    return shares


def _working_time(
    records: Sequence[UnitRecord], least_pause: float
) -> tuple[Array, Array, tuple[float, ...]]:
    """A piecewise linear map from the clock to the seconds worked till then, and its pauses."""
    clock: list[float] = []
    working: list[float] = []
    pauses: list[float] = []
    for work in sorted((record.work for record in records), key=lambda work: work.started):
        if not clock or work.started > clock[-1]:
            so_far = working[-1] if working else 0.0
            if clock and work.started - clock[-1] >= least_pause:
                pauses.append(so_far)
            clock.append(work.started)
            working.append(so_far)
        if work.finished > clock[-1]:
            working.append(working[-1] + work.finished - clock[-1])
            clock.append(work.finished)
    return np.array(clock), np.array(working), tuple(pauses)
