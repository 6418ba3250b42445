"""What is kept of a row from round to round."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from specdec.measure.calibration import Calibration


@dataclass(slots=True)
class RowHistory:
    """Candidates of one row that were judged lately; older ones count less.

    Attributes:
        judged, accepted: decayed counts.
    """

    FORGET: ClassVar[float] = 0.97
    """Weight that is left of old candidates after one more round: 33 rounds are remembered.

    Raised, a row's rate is steadier and follows its text more slowly. Set by hand.
    """

    judged: float = 0.0
    accepted: float = 0.0

    def add(self, judged: float, accepted: float) -> None:
        """Count a round."""
        self.judged = self.FORGET * self.judged + judged
        self.accepted = self.FORGET * self.accepted + accepted


@dataclass(slots=True)
class RowMemory:
    """What a policy keeps about one row from round to round.

    Attributes:
        k: the current candidate length of policies that adapt it; 0 before the row's first round.
        catch_up: seconds that each of its rounds owes for what the draft had to read of it, the
            prompt mostly, before it could propose.
        history: how often its candidates were accepted lately.
        found: the same of those that were looked up.
        judged: of each judged candidate the row's context length, the predicted acceptance and
            whether it stands.
    """

    k: int = 0
    catch_up: float = 0.0
    history: RowHistory = field(default_factory=RowHistory)
    found: RowHistory = field(default_factory=RowHistory)
    judged: list[tuple[int, float, bool]] = field(default_factory=list)

    def calibration(self) -> dict[int, Calibration]:
        """Predicted against observed acceptance, by class of context length."""
        result: dict[int, Calibration] = {}
        context, predicted, stands = np.array(self.judged, dtype=float).reshape(-1, 3).T
        classes = context_classes(context)
        for key in np.unique(classes).tolist():
            result[key] = Calibration()
            result[key].add(predicted[classes == key], stands[classes == key])
        return result


def context_classes(tokens: NDArray[np.float64]) -> NDArray[np.int64]:
    """The powers of two that context lengths fall under, at least 128: classes for reports."""
    return 1 << np.ceil(np.log2(np.maximum(tokens, 128))).astype(np.int64)
