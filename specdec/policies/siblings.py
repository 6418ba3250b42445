"""How likely further children of a node are accepted, given that its better ones were rejected.

A node's children are the draft's choices behind it. The first is judged as a chain's candidate is
(specdec/policies/estimators.py). The others count only where it fell: what they are worth depends
on how much of the draft's probability it left, and how much of this they hold themselves.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from enum import IntEnum

import numpy as np

from specdec.measure.calibration import Array
from specdec.policies.base import Indices, Signal
from specdec.policies.estimators import Feature, OnlineEstimator, log_odds

SEEN = frozenset({Signal.LOG_Q, Signal.LOG_TOP, Signal.ENTROPY})
"""The signals that it is judged by."""

LEAST_LEFT = 1e-4
"""The least probability that better children are taken to leave. Lowered, rounding shows."""


class Sibling(IntEnum):
    """Columns of what is known of a child behind better ones; logarithms in nats."""

    LOG_SHARE = 0  # its part of the probability that the better ones left
    LOG_LEFT = 1  # what they left
    LOG_TOP = 2  # as the `Signal`s
    ENTROPY = 3
    RANK = 4  # 0 for a second child


def sibling_estimator() -> OnlineEstimator:
    """An online estimator of children behind better ones: it judges by `Sibling`.

    Its first weights are about those of two pairs: 0.5B and 1.5B of one family, and a distilled
    draft of two layers.
    """
    features = (
        Feature((Sibling.LOG_SHARE,), log_odds, (None, 0.4)),
        Feature((Sibling.LOG_LEFT,), log_odds, (0.0, 0.0)),
        Feature((Sibling.LOG_TOP,), log_odds, (0.0, 0.0)),
        Feature((Sibling.ENTROPY,), operator.pos, (-0.3, 0.0)),
        Feature((Sibling.RANK,), operator.pos, (-0.4, -0.3)),
    )
    return OnlineEstimator(features, one=(0.0, 0.0), rate=(0.3, 0.3))


def sibling_evidence(signals: Array, ranks: Indices) -> Array:
    """What is known of children, float64 [n, len(Sibling)].

    Args:
        signals: float [n, len(Signal)]; children of a node stand next to each other, best first.
        ranks: int [n].
    """
    q, left = np.exp(signals[:, Signal.LOG_Q]), np.ones(len(ranks))
    for at in _worse(ranks):
        left[at] = left[at - 1] - q[at - 1]
    left = np.log(np.maximum(left, LEAST_LEFT))
    share = np.minimum(signals[:, Signal.LOG_Q] - left, 0.0)
    others = signals[:, Signal.LOG_TOP], signals[:, Signal.ENTROPY]
    return np.stack([share, left, *others, ranks - 1.0], axis=1)


def given_parent(chances: Array, ranks: Indices) -> Array:
    """P(a child is accepted | its parent is).

    No child is taken for likelier than a better one, so that the likeliest are the best ones.

    Args:
        chances: float [n], given that the better ones were rejected as well; order as above.
        ranks: int [n].
    """
    reached, found = np.ones(len(chances)), chances.copy()
    for at in _worse(ranks):
        reached[at] = reached[at - 1] * (1 - chances[at - 1])
        found[at] = np.minimum(chances[at] * reached[at], found[at - 1])
    return found


def _worse(ranks: Indices) -> Iterator[Indices]:
    """Children of rank 1, then of rank 2, and so on; the next better sibling stands before each."""
    for rank in range(1, int(ranks.max(initial=0)) + 1):
        yield np.flatnonzero(ranks == rank)
