"""How likely candidates stand that are known without a draft, and what became of them.

What the target writes next judges them, whether they were submitted or not. So all of them teach,
nothing is tried for that, and what is learnt of them and of a draft's candidates stays apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul

import numpy as np

from specdec.policies.base import RoundOutcome, RoundStart
from specdec.policies.chains import Chain
from specdec.policies.estimators import lookup_estimator
from specdec.policies.memory import RowHistory

FORCED = RowHistory(judged=20.0, accepted=19.0)
"""What is taken to have become of forced tokens before any was judged.

Of one text a grammar leaves no choice, of the tokens that make it some. Raised, what a model makes
of that counts later.
"""

FOUND = RowHistory(judged=24.0, accepted=14.4)
"""The same of candidates that were looked up; a new row is taken to be as others are, as often.

Raised, rows are told apart later; lowered, chance makes rows look different.
"""

LEAST_RATE, MOST_RATE = 0.02, 0.98
"""What a row's rate is kept within: beyond, its odds would drown all that evidence says."""

FORGET = 0.998
"""Weight that is left of old evidence after one more candidate: 500 are remembered.

Raised, a change of the text is noticed later. Set by hand.
"""

LATELY = 0.9
"""Weight that is left of what looking up took and gained after one more round of it.

Raised, a change of the text is noticed later; lowered, chance sends look-ups to rest.
"""

FIRST_LOOKUPS = 8
"""Rounds with look-ups before they may rest: at first there is little to find, and to judge by.

Raised, short jobs without repetition pay for more of them.
"""

REST = 32
"""Rounds without look-ups where these do not repay their time.

Raised, a change is noticed later; lowered, more is spent on look-ups in vain.
"""


class KnownChains:
    """Estimates the chains of a round, and learns from it.

    Attributes:
        judged: candidates that were judged so far.
    """

    def __init__(self) -> None:
        self._estimator, self.judged = lookup_estimator(), 0
        self._forced = RowHistory(FORCED.judged, FORCED.accepted)
        self._found = RowHistory(FOUND.judged, FOUND.accepted)

    def predict(self, start: RoundStart, chains: Sequence[Chain]) -> list[list[float]]:
        """How likely each candidate stands behind those before it, by row."""
        forced = self._forced.accepted / self._forced.judged
        evidence = [each for chain in chains for each in chain.evidence]
        typical = self._typical(start, chains)
        found: list[float] = []
        if evidence:
            _, after = self._estimator.predict(np.array(evidence, dtype=float), np.array(typical))
            found = after.tolist()
        predicted, at = [], 0
        for chain in chains:
            n = len(chain.evidence)
            predicted.append([*[forced] * chain.forced, *found[at : at + n]])
            at += n
        start.notes["known"] = chains, predicted, evidence, typical
        return predicted

    def _typical(self, start: RoundStart, chains: Sequence[Chain]) -> list[float]:
        """The rate of each looked-up candidate's row, as far as one knows."""
        weight = FOUND.judged
        known = weight * self._found.accepted / self._found.judged
        rates: list[float] = []
        for row, chain in zip(start.rows, chains, strict=True):
            rate = (row.found.accepted + known) / (row.found.judged + weight)
            rates += [min(max(rate, LEAST_RATE), MOST_RATE)] * len(chain.evidence)
        return rates

    def observe(self, outcome: RoundOutcome) -> None:
        """Learn from a round, if it had chains."""
        start = outcome.start
        if "known" not in start.notes or not outcome.looked_up:
            return
        chains, predicted, evidence, typical = start.notes["known"]
        at, known, stood = 0, list[int](), list[bool]()
        each = zip(start.rows, chains, outcome.looked_up, strict=True)
        for i, (row, chain, (judged, stand)) in enumerate(each):
            judged = min(judged, stand + 1)  # what is behind the first wrong one was not judged
            for depth in range(judged):
                row.judged.append((start.contexts[i], predicted[i][depth], depth < stand))
            forced = min(judged, chain.forced)
            _remember(self._forced, forced, min(stand, forced))
            if found := judged - forced:
                right = max(stand - forced, 0)
                known += range(at, at + found)
                stood += [depth < right for depth in range(found)]
                row.found.add(found, right)
            at += len(chain.evidence)
            self.judged += judged
        if known:
            _remember(self._found, len(stood), sum(stood))
            self._estimator.learn(
                np.array(evidence, dtype=float)[known], np.array(typical)[known], np.array(stood)
            )


class Lookups:
    """Whether looking up repays the time that it takes the host, as measured.

    Where chains are long and many rows wait, it takes some percent of a round, whether anything is
    submitted or not. So where it brings less, it rests, and is tried now and then.
    """

    def __init__(self) -> None:
        self._gained = self._taken = 0.0
        self._rounds = self._resting = 0

    def due(self) -> bool:
        """Whether to look up in this round."""
        self._resting -= 1
        return self._resting < 0

    def ended(self, taken: float, gained: float) -> None:
        """Learn from a round in which it was done.

        Args:
            taken: seconds, of looking up and choosing.
            gained: seconds that the candidates taken are expected to save, beyond their cost.
        """
        self._rounds += 1
        self._taken = LATELY * self._taken + taken
        self._gained = LATELY * self._gained + gained
        if self._rounds >= FIRST_LOOKUPS and self._taken > self._gained:
            self._resting = REST


def in_front(survival: Sequence[float], worth: float, *, draws_behind: bool = True) -> int:
    """How many candidates of a chain to take in front of a draft's, for the most tokens.

    A draft's candidates are behind all of them: what it is worth to a row comes with their survival
    only. So a chain that is less likely than the draft's own candidates stays away.

    Args:
        survival: of the chain's candidates.
        worth: tokens that a draft brings a row in a round, beyond their cost.
        draws_behind: whether there are any of the draft's behind a chain.
    """
    best, most, tokens = 0, 0.0, 0.0
    for n, stands in enumerate(survival, start=1):
        tokens += stands
        gain = tokens - (1 - stands * draws_behind) * worth
        if gain > most:
            best, most = n, gain
    return best


def survivals(predicted: Sequence[float]) -> list[float]:
    """How likely all candidates up to each stand."""
    return [*accumulate(predicted, mul)]


def _remember(history: RowHistory, judged: int, accepted: int) -> None:
    """Count candidates; older ones count less."""
    left = FORGET**judged
    history.judged = left * history.judged + judged
    history.accepted = left * history.accepted + accepted
