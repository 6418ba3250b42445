"""What is kept of a row from round to round."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

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
        classes: dict[int, list[tuple[float, bool]]] = {}
        for context, predicted, stands in self.judged:
            classes.setdefault(context_class(context), []).append((predicted, stands))
        result = {}
        for key, candidates in classes.items():
            predictions, verdicts = zip(*candidates, strict=True)
            result[key] = Calibration()
            result[key].add(np.array(predictions), np.array(verdicts))
        return result


def context_class(tokens: int) -> int:
    """The power of two that a context length falls under, at least 128: a class for reports."""
    return max(128, 1 << (max(tokens, 1) - 1).bit_length())
