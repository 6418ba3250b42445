"""How likely a candidate is accepted, judged by what it shows.

An estimator gives two probabilities for a candidate y_k, both on condition that y_1..y_{k-1} are
accepted:

    before  from the draft's state and distribution alone: what one knows before y_k is drawn
    after   knowing y_k as well

Rejection sampling may decide whether to *submit* y_k by the first only (specdec/policies/base.py).

Everything an estimator looks at is read off the device once per draft step, as a few numbers per
row (`Signal`). Estimators and policies then work on the host, on arrays over rows. An online
estimator learns from the job's own verdicts and needs no training; a trained head sees the draft's
hidden state as well.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from specdec.measure.calibration import Array, Calibration, Flags
from specdec.policies.base import HEAD_SIGNALS, Head, Signal

BOUND = 10.0
"""What signals are kept within, in nats: one odd candidate must not carry the fit. Set by hand."""

MOST_LOGIT = 12.0
"""What logits of estimates are kept within: probabilities of 6e-6 and its complement.

Raised, a sure and wrong prediction costs more; at 0 and 1 there is no way back.
"""


class Estimator(Protocol):
    """Acceptance probabilities from signals."""

    @property
    def wanted(self) -> frozenset[Signal]:
        """The signals it looks at."""

    def predict(self, signals: Array, typical: Array) -> tuple[Array, Array]:
        """Probabilities of acceptance, before and after the draw.

        Args:
            signals: float [n, len(Signal)].
            typical: float [n], how often candidates of each candidate's row are accepted.

        Returns:
            float [n] each, in (0, 1).
        """

    def learn(self, signals: Array, typical: Array, accepted: Flags) -> None:
        """Take in what became of judged candidates: the same arrays, and bool [n]."""


class OnlineEstimator:
    """Logistic regression on a few signals, updated as candidates are judged; needs no training.

    Each update fits the new candidates with what was learnt before as the prior: a normal
    distribution whose precision is the curvature of the candidates seen, slowly forgotten.

    Args:
        before: signals that do not know the candidate.
        after: signals that do, in addition.
    """

    FORGET = 0.9998
    """Weight that is left of old evidence after one more candidate: 5,000 are remembered.

    Raised, weights are steadier and follow a change of the text more slowly. Set by hand.
    """

    PRIOR = 4.0
    """Precision of each first weight.

    Raised, more candidates are needed to leave the first guess. Set by hand.
    """

    TOGETHER = 16
    """Least candidates that are collected before weights are fitted to them.

    Each fit takes array operations; candidate by candidate, the policy took 4% of a round at one
    row. Raised, the first lessons come later.
    """

    SHARE = 1 / 16
    """Least share of the evidence behind the weights to be collected: less would hardly move them.

    Raised, fits are fewer, and later.
    """

    def __init__(self, before: Sequence[Signal], after: Sequence[Signal] = (Signal.LOG_Q,)) -> None:
        self._columns = [*after, *before]
        # A guess to begin with: acceptance grows with the draft's confidence and the row's rate.
        signs = {Signal.ENTROPY: -0.5}
        guess = np.array([0.5, *(signs.get(column, 0.5) for column in self._columns), 0.5])
        # Weights of each estimate; the first has none for what knows the candidate.
        every = np.arange(len(guess))
        self._used = [np.delete(every, slice(1, 1 + len(after))), every]
        self._weights: list[list[float]] = [
            np.where(np.isin(every, used), guess, 0.0).tolist() for used in self._used
        ]
        self._precisions = [self.PRIOR * np.eye(len(used)) for used in self._used]
        self._collected: list[tuple[Array, Array, Flags]] = []
        # Candidates collected, and those behind the weights, the forgotten taken off.
        self._fresh, self._evidence = 0, 0.0

    @property
    def wanted(self) -> frozenset[Signal]:
        return frozenset(self._columns)

    def predict(self, signals: Array, typical: Array) -> tuple[Array, Array]:
        # In plain Python: after a forward an array operation takes longer than a row does here.
        found: list[list[float]] = [[], []]
        for row, rate in zip(signals.tolist(), typical.tolist(), strict=True):
            features = self._features(row, rate)
            for each, weights in zip(found, self._weights, strict=True):
                logit = sum(map(operator.mul, weights, features))
                each.append(1 / (1 + math.exp(-min(max(logit, -MOST_LOGIT), MOST_LOGIT))))
        return np.array(found[0]), np.array(found[1])

    def _features(self, row: Sequence[float], rate: float) -> list[float]:
        """One, the signals of a row, and the log odds of its rate."""
        bounded = [min(max(row[column], -BOUND), BOUND) for column in self._columns]
        return [1.0, *bounded, math.log(rate / (1 - rate))]

    def learn(self, signals: Array, typical: Array, accepted: Flags) -> None:
        self._collected.append((signals, typical, accepted))
        self._fresh += len(accepted)
        if self._fresh < max(self.TOGETHER, self.SHARE * self._evidence):
            return
        signals, typical, outcomes = map(np.concatenate, zip(*self._collected, strict=True))
        features = np.array(list(map(self._features, signals.tolist(), typical.tolist())))
        self._collected, self._fresh = [], 0
        kept = self.FORGET ** len(outcomes)
        self._evidence = kept * self._evidence + len(outcomes)
        for i, used in enumerate(self._used):
            x = features[:, used]
            # Evidence is forgotten, the prior is not: signals may be collinear (greedy candidates
            # are the likeliest token), and without it the system would become singular.
            prior = self.PRIOR * np.eye(len(used))
            precision = kept * self._precisions[i] + (1 - kept) * prior
            known = np.array(self._weights[i])
            known[used] = weights = posterior_mode(x, outcomes, known[used], precision)
            p = _sigmoid(x @ weights)
            self._weights[i] = known.tolist()
            self._precisions[i] = precision + x.T @ (x * (p * (1 - p))[:, None])


class HeadEstimator:
    """A trained head, as long as what it says is true; after that, an online estimator.

    Attributes:
        calibration: the head's predictions after the draw, slowly forgotten.
        fallen_back: whether the head was found out of calibration.
    """

    LEAST = 500
    """Judged candidates before the head is doubted. Raised, a wrong head is believed for longer."""

    MOST_ECE = 0.15
    """The calibration error that the head may have.

    A true one has about 0.03 over the candidates that are remembered. Raised, worse heads stay.
    """

    FORGET = 0.999
    """Weight that is left of old evidence after one more candidate: 1,000 are remembered.

    Raised, a head that goes wrong on later text is noticed later.
    """

    def __init__(self, fallback: OnlineEstimator | None = None) -> None:
        self.fallback = fallback or online_estimator("confidence")
        self.calibration = Calibration()
        self.fallen_back = False

    @property
    def wanted(self) -> frozenset[Signal]:
        return HEAD_SIGNALS | self.fallback.wanted

    def predict(self, signals: Array, typical: Array) -> tuple[Array, Array]:
        if self.fallen_back:
            return self.fallback.predict(signals, typical)
        return _sigmoid(signals[:, Signal.HEAD_BEFORE]), _sigmoid(signals[:, Signal.HEAD_AFTER])

    def learn(self, signals: Array, typical: Array, accepted: Flags) -> None:
        self.fallback.learn(signals, typical, accepted)
        self.calibration.bins *= self.FORGET ** len(accepted)
        self.calibration.add(_sigmoid(signals[:, Signal.HEAD_AFTER]), accepted)
        ece = self.calibration.ece
        if ece is not None and ece > self.MOST_ECE and self.calibration.judged >= self.LEAST:
            self.fallen_back = True


ONLINE = {
    "confidence": (Signal.LOG_TOP,),
    "entropy": (Signal.ENTROPY,),
}
"""Online estimators by name, and what they look at besides the candidate's own probability."""


def online_estimator(name: str) -> OnlineEstimator:
    """The online estimator called `name`, one of ONLINE."""
    return OnlineEstimator(ONLINE[name])


ESTIMATORS = (*ONLINE, "head")
"""All estimators, by the names that a job file uses."""


def make_estimator(name: str | None, head: Head | None) -> Estimator:
    """The estimator called `name`; None: the head if there is one, else confidence.

    Raises:
        ValueError: there is no such estimator, or it needs a head.
    """
    name = name or ("head" if head is not None else "confidence")
    if name == "head":
        if head is None:
            raise ValueError("the estimator head needs a trained head")
        return HeadEstimator()
    if name not in ONLINE:
        raise ValueError(f"no estimator {name!r}; there are {', '.join(ESTIMATORS)}")
    return online_estimator(name)


def posterior_mode(
    x: Array,
    accepted: Flags | Array,
    mean: Array,
    precision: Array,
    rounds: int = 8,
    tolerance: float = 1e-3,
) -> Array:
    """float64 [d]: a logistic model's likeliest weights, after outcomes [n] at features [n, d].

    Newton's steps, halved where they go too far. Without that they do where a confident prediction
    is wrong: the curvature there is next to nothing, and weights run off to where all is 0 or 1.

    Args:
        accepted: outcomes, or their probabilities.
        mean, precision: [d], [d, d], of the normal distribution that was believed before.
        rounds, tolerance: steps at most, and the length of a step that is not worth taking.
    """

    def loss(weights: Array) -> float:
        logits, moved = x @ weights, weights - mean
        surprise = np.logaddexp(0.0, logits) - accepted * logits
        return float(surprise.sum() + 0.5 * moved @ precision @ moved)

    weights, least = mean, loss(mean)
    for _ in range(rounds):
        p = _logistic(x @ weights)
        gradient = x.T @ (accepted - p) - precision @ (weights - mean)
        step = np.linalg.solve(precision + x.T @ (x * (p * (1 - p))[:, None]), gradient)
        # The loss is convex, so that a short enough step lowers it, if any does.
        while (reached := loss(weights + step)) > least and np.abs(step).max() > tolerance:
            step = step / 2
        if reached > least:
            break
        weights, least = weights + step, reached
        if np.abs(step).max() < tolerance:
            break
    return weights


def _sigmoid(x: Array) -> Array:
    """1 / (1 + e^-x), kept off 0 and 1."""
    return _logistic(np.minimum(np.maximum(x, -MOST_LOGIT), MOST_LOGIT))


def _logistic(x: Array) -> Array:
    """1 / (1 + e^-x)."""
    # Not at the top: `specbatch --help` reads the policies' settings, and need not wait for scipy.
    from scipy.special import expit

    p: Array = expit(x)
    return p
