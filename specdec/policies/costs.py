"""What a forward costs, as measured: seconds by packed tokens.

A policy can weigh costs only if it knows them. Cost curves are staircases that differ by machine,
precision and kernel: in fp32 on a CPU, 4 tokens through a layer take 3 times as long as one; in
int8, 8 tokens take 1.5 times as long. So they are profiled when a model is loaded
(specdec/policies/profiling.py) and refined by every round. A round is made of draft steps, D(n)
each, and one verification, V(n), which is all the rest of the round. Both include sampling and what
the host does, so that they sum to the round's wall time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from specdec.measure.calibration import Array

SPEED_ERROR = 0.3
"""By what share a machine's speed, the same for all forwards, differs between a profile and rounds.

Raised, the first rounds move all of a table further. Chosen for machines that are a fifth to a
third slower for a while (benchmarks/LOG.md).
"""

SPEED_WALK = 0.04
"""By what share that speed changes from one round to the next.

Raised, a slow round is more readily taken for a slow machine. Any walk from 0.03 to 0.1 found the
same differences between sizes on a machine whose speed changes by itself (benchmarks/LOG.md).
"""

PROFILE_ERROR = 0.05
"""Relative error of a profiled place of a table against the others.

Raised, rounds correct single places faster, and their noise does, too.
"""

EXTRAPOLATED_ERROR = 1.0
"""The same of a place beyond the profile: next to nothing is known there, so rounds decide."""

ROUND_NOISE = 0.15
"""What rounds of the same size differ by, relative: measured on a CPU.

Raised, tables follow measurements more slowly.
"""

PLACE_WALK = 0.001
"""By what share a place changes against others between two observations: rows become longer.

Raised, tables forget sooner how sizes differ. Set by hand, far below ROUND_NOISE.
"""

OUTLIER = 2.0
"""An error of more than this factor counts as this one: a pause of the machine is no cost.

Raised, pauses move tables further; lowered, a real change takes more rounds.
"""

NEAR = 0.05
"""By what share the rows' mean context may change before a table takes note.

Raised, costs follow growing rows in larger steps; lowered, tables are laid out more often.
"""

BEYOND = 1.25
"""A measurement at more than so many times the tokens of a table makes the table longer.

Raised, costs beyond the profile stay extrapolated; lowered, tables grow a place for every size.
"""

_UNKNOWN = np.zeros(0)


class CostTable:
    """Seconds of one kind of forward by packed tokens; linear between the tokens of the table.

    More tokens never take less time: what measurements say otherwise is noise, and is averaged out.
    A policy decides by differences between neighbours, which are small against the noise of each.

    What is learnt is the machine's speed, which all places share, and each place's own part: a
    Kalman filter over relative errors. A machine is a fifth slower for a while now and then, and a
    place that happened to be visited then must not be taken for an expensive one.

    Rows with more in their caches take longer: so much a position, for each row of the forward.

    Args:
        tokens: increasing, from 1.
        seconds: measured at these.
        position: seconds of each further cached position of a row.
        context: cached positions of each row when the table was measured.

    Attributes:
        speed: how much longer all forwards take than they did at first, in logarithms.
    """

    def __init__(
        self,
        tokens: Sequence[int],
        seconds: Sequence[float],
        position: float = 0.0,
        context: float = 0.0,
    ) -> None:
        self.position, self.context = position, context
        self._rows, self._further = 1, 0.0  # rows, and positions of each beyond `context`
        self.tokens = np.asarray(tokens, dtype=np.float64)
        self._first = _rising(np.asarray(seconds, dtype=np.float64))
        # What has become of it since, in logarithms: for all, and for each place besides.
        self.speed, self._places = 0.0, np.zeros(len(self.tokens))
        # Of the errors of the speed, first, and of the places.
        errors = [SPEED_ERROR, *[PROFILE_ERROR] * len(self.tokens)]
        self._covariance = np.diag(np.square(errors))
        self._dense = _UNKNOWN

    @property
    def seconds(self) -> Array:
        """At the tokens of the table."""
        return _rising(self._first * np.exp(self.speed + self._places))

    def __call__(self, tokens: Any) -> Any:
        """Seconds at integer token counts (a number or an array); no tokens cost nothing.

        Beyond the table seconds grow as they do over its upper half.
        """
        if isinstance(tokens, int):
            return self.curve(tokens, tokens)[0]
        return self.curve(0, int(np.max(tokens)) if np.size(tokens) else 0)[tokens]

    def at(self, rows: int, context: float) -> bool:
        """Say how many rows there are and how many positions each has cached, in the mean.

        Returns:
            Whether costs are others now.
        """
        further = context - self.context
        near = abs(further - self._further) <= NEAR * context
        if not self.position or (near and rows == self._rows):
            return False
        self._rows, self._further, self._dense = rows, further, _UNKNOWN
        return True

    def curve(self, first: int, last: int) -> Array:
        """Seconds at `first`, `first` + 1, ... `last` tokens."""
        if last >= len(self._dense):
            self._dense = self._at(np.arange(max(2 * last, int(self.tokens[-1])) + 1))
            self._dense[0] = 0.0
        return self._dense[first : last + 1]

    def observe(self, tokens: int, *seconds: float) -> None:
        """Move the table towards measurements; an outlier counts as one of a factor of 2.

        Those far beyond the table become its new end: what is extrapolated is not kept for good.
        """
        expected = float(self._at(np.array([tokens]))[0])
        if tokens > BEYOND * self.tokens[-1]:
            self.tokens = np.append(self.tokens, tokens)
            self._first = np.append(self._first, expected / math.exp(self.speed))
            self._places = np.append(self._places, 0.0)
            self._covariance = np.pad(self._covariance, (0, 1))
            self._covariance[-1, -1] = EXTRAPOLATED_ERROR**2
        above = min(int(self.tokens.searchsorted(tokens)), len(self.tokens) - 1)
        below = max(above - 1, 0)
        span = self.tokens[above] - self.tokens[below]
        share = (min(tokens, self.tokens[-1]) - self.tokens[below]) / span if span else 1.0
        seen = np.zeros(1 + len(self.tokens))
        seen[[0, 1 + below]] = 1.0, 1 - share
        seen[1 + above] += share
        # Of times, not of their logarithms: what a pause costs now and then is part of the mean.
        n = len(seconds)
        error = sum(min(max(s / expected, 1 / OUTLIER), OUTLIER) for s in seconds) / n - 1
        self._covariance.flat[:: len(seen) + 1] += n * PLACE_WALK**2
        self._covariance[0, 0] += n * (SPEED_WALK**2 - PLACE_WALK**2)
        along = self._covariance @ seen
        gain = along / (seen @ along + ROUND_NOISE**2 / n)
        self._covariance -= np.outer(gain, along)
        self.speed += math.log1p(gain[0] * error)
        self._places = self._places + np.log1p(gain[1:] * error)
        self._dense = _UNKNOWN  # until it is asked for: several observations may come together

    def follow(self, speed: float) -> None:
        """Take over a change of the machine's speed, in logarithms, that was seen elsewhere."""
        self.speed += speed
        self._dense = _UNKNOWN

    def _at(self, counts: Any) -> Array:
        """Seconds at token counts, an array that rises, off the table itself."""
        table = self.seconds
        found: Array = np.interp(counts, self.tokens, table)
        tokens, seconds = float(self.tokens[-1]), float(table[-1])
        if counts[-1] > tokens:
            # Over half the table: a single step of a staircase may be flat, or a jump.
            rise = seconds - float(np.interp(tokens / 2, self.tokens, table))
            slope = max(rise, 0.0) / (tokens / 2) if len(self.tokens) > 1 else seconds / tokens
            found += slope * np.maximum(counts - tokens, 0.0)
        if self.position:
            # A forward of fewer tokens than there are rows has so many rows.
            a_row = self.position * self._further * math.exp(self.speed)
            found += np.maximum(a_row * np.minimum(counts, self._rows), -found / 2)
        return found

    def points(self) -> list[tuple[int, float]]:
        """(tokens, seconds) of the table at the context it was measured at, for reports."""
        return [(int(n), float(s)) for n, s in zip(self.tokens, self.seconds, strict=True)]


def _rising(seconds: Array) -> Array:
    """The same, where it rises; a stretch that falls becomes the mean of what bounds it."""
    above = np.maximum.accumulate(seconds)
    below = np.minimum.accumulate(seconds[::-1])[::-1]
    rising: Array = np.sqrt(above * below)
    return rising


class CostModel:
    """D(n) and V(n) of a pair.

    Attributes:
        draft: seconds of a draft step by packed tokens.
        verify: seconds of the rest of a round by the target's packed tokens.
    """

    def __init__(self, draft: CostTable, verify: CostTable) -> None:
        self.draft, self.verify = draft, verify

    def at(self, rows: int, context: float) -> bool:
        """See `CostTable.at`; all rows are in a verification, and so many in a draft step."""
        changed = [table.at(rows, context) for table in (self.draft, self.verify)]
        return any(changed)

    def observe_draft(self, tokens: int, *seconds: float) -> None:
        """Learn from draft steps of so many tokens."""
        self.draft.observe(tokens, *seconds)

    def observe_verify(self, tokens: int, *seconds: float) -> None:
        """Learn from the rest of rounds of so many tokens.

        What it says of the machine's speed holds for the draft, too, which may be resting: else a
        machine that has become faster since would have an expensive draft.
        """
        before = self.verify.speed
        self.verify.observe(tokens, *seconds)
        self.draft.follow(self.verify.speed - before)

    def points(self) -> dict[str, list[tuple[int, float]]]:
        """Both tables, JSON-able."""
        return {"draft": self.draft.points(), "verify": self.verify.points()}
