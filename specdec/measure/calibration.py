"""Predicted against observed acceptance.

Imports no torch, so that whoever only reads a job's statistics starts without it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Flags = NDArray[np.bool_]

BINS = 10
"""Classes of predictions, of equal width. More tell finer and need more candidates each."""


@dataclass(slots=True, eq=False)
class Calibration:
    """Predicted against observed acceptance, in counts that add up over rows, units and actors.

    Attributes:
        bins: float64 [BINS, 3]: by tenth of the prediction, how many, their predictions' sum, how
            many were accepted.
    """

    bins: Array = field(default_factory=lambda: np.zeros((BINS, 3)))

    def add(self, predicted: Array, accepted: Flags | Array) -> None:
        """Count judged candidates: predictions float [n] in [0, 1], and what happened.

        That is bool [n], or float [n] where only the probability of acceptance is known.
        """
        index = np.minimum((predicted * BINS).astype(int), BINS - 1)
        np.add.at(self.bins, index, np.stack([np.ones_like(predicted), predicted, accepted], -1))

    @property
    def judged(self) -> float:
        """Candidates counted."""
        return float(self.bins[:, 0].sum())

    @property
    def ece(self) -> float | None:
        """Expected calibration error: mean over candidates of |mean prediction - frequency|."""
        if not self.judged:
            return None
        return float(np.abs(self.bins[:, 1] - self.bins[:, 2]).sum() / self.judged)
