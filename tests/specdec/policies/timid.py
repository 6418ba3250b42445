"""A policy of one's own, in a module that is imported without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from specdec.measure.calibration import Flags
from specdec.policies.base import DraftStep, RoundStart, Signal, StopPolicy
from specdec.policies.settings import setting


@dataclass
class Timid(StopPolicy):
    """Stops before a candidate behind one that was less than `threshold` times the likeliest."""

    name = "timid"
    summary = "stops behind a candidate that was not nearly the likeliest"
    wanted = frozenset({Signal.LOG_Q, Signal.LOG_TOP})

    threshold: float = setting(0.9, 0, 1, "stop where the ratio is lower")
    k_max: int = setting(6, 1, 64, "most candidates of a round")

    def budget(self, start: RoundStart) -> Sequence[int]:
        return [self.k_max] * len(start.rows)

    def go_on(self, step: DraftStep) -> Flags:
        ratio = step.signals[:, Signal.LOG_Q] - step.signals[:, Signal.LOG_TOP]
        flags: Flags = ratio >= -1 + self.threshold
        return flags
