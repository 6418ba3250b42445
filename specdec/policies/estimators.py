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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol

import numpy as np

from specdec.measure.calibration import Array, Calibration, Flags
from specdec.policies.base import FEW, HEAD_SIGNALS, Head, Signal
from specdec.policies.chains import Evidence

BOUND = 10.0
"""What signals are kept within, in nats: one odd candidate must not carry the fit. Set by hand."""

LEAST_DOUBT = 1e-3
"""The least probability that a draft is taken to leave to other tokens than its likeliest.

Lowered, sure candidates are told apart by rounding errors.
"""

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


@dataclass(frozen=True, slots=True)
class Feature:
    """A number that acceptance is judged by.

    Attributes:
        signals: what it is made of.
        of: makes it of these, in their order: of numbers or of arrays.
        first: its weight before anything was judged, in the estimates before and after the draw.
            The first is None where the feature knows the candidate.
    """

    signals: tuple[IntEnum, ...]
    of: Callable[..., Any]
    first: tuple[float | None, float]


class OnlineEstimator:
    """Logistic regression on a few features, updated as candidates are judged; needs no training.

    Two features are always there: one, and the log odds of the row's rate. Each update fits the new
    candidates with what was learnt before as the prior: a normal distribution whose precision is
    the curvature of the candidates seen, slowly forgotten.

    Args:
        features: the others.
        one, rate: first weights of the two, as of a `Feature`.
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

    def __init__(
        self,
        features: Sequence[Feature],
        one: tuple[float, float] = (0.4, 0.7),
        rate: tuple[float, float] = (0.3, 0.3),
    ) -> None:
        self._features_of = [(feature.signals, feature.of) for feature in features]
        known = [one, *(feature.first for feature in features), rate]
        # Weights of each estimate; the first has none for what knows the candidate.
        firsts = list(zip(*known, strict=True))
        self._used = [np.flatnonzero([w is not None for w in first]) for first in firsts]
        self._weights: list[list[float]] = [[w or 0.0 for w in first] for first in firsts]
        self._precisions = [self.PRIOR * np.eye(len(used)) for used in self._used]
        self._collected: list[tuple[Array, Array, Flags]] = []
        # Candidates collected, and those behind the weights, the forgotten taken off.
        self._fresh, self._evidence = 0, 0.0

    @property
    def wanted(self) -> frozenset[Signal]:
        columns = {column for columns, _ in self._features_of for column in columns}
        return frozenset(column for column in columns if isinstance(column, Signal))

    def predict(self, signals: Array, typical: Array) -> tuple[Array, Array]:
        if len(signals) > FEW:
            p = _sigmoid(self._features(signals, typical) @ np.array(self._weights).T)
            return p[:, 0], p[:, 1]
        # In plain Python: after a forward an array operation takes longer than a row does here.
        found: list[list[float]] = [[], []]
        for row, rate in zip(signals.tolist(), typical.tolist(), strict=True):
            made = (of(*(row[column] for column in columns)) for columns, of in self._features_of)
            features = [1.0, *(min(max(each, -BOUND), BOUND) for each in made), log_odds_of(rate)]
            for each, weights in zip(found, self._weights, strict=True):
                logit = sum(map(operator.mul, weights, features))
                each.append(1 / (1 + math.exp(-min(max(logit, -MOST_LOGIT), MOST_LOGIT))))
        return np.array(found[0]), np.array(found[1])

    def _features(self, signals: Array, typical: Array) -> Array:
        """One, the features of n candidates, and the log odds of their rows' rates: float64 [n, d].

        The same numbers as in `predict`, where few candidates are quicker without arrays.
        """
        made = [of(*(signals[:, c] for c in columns)) for columns, of in self._features_of]
        bounded = [np.minimum(np.maximum(each, -BOUND), BOUND) for each in made]
        return np.stack([np.ones(len(signals)), *bounded, log_odds_of(typical)], 1)

    def learn(self, signals: Array, typical: Array, accepted: Flags) -> None:
        self._collected.append((signals, typical, accepted))
        self._fresh += len(accepted)
        if self._fresh < max(self.TOGETHER, self.SHARE * self._evidence):
            return
        signals, typical, outcomes = map(np.concatenate, zip(*self._collected, strict=True))
        features = self._features(signals, typical)
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


def log_odds(log_p: Any) -> Any:
    """Of probabilities that are given by their logarithms: a number or an array."""
    return log_p - np.log(np.maximum(-np.expm1(log_p), LEAST_DOUBT))


def log_odds_of(p: Any) -> Any:
    """Of probabilities: a number or an array."""
    return np.log(p / (1 - p))


ONLINE = {
    "confidence": (
        Feature((Signal.LOG_TOP,), log_odds, (0.55, 0.5)),
        Feature((Signal.LOG_TOP, Signal.LOG_Q), operator.sub, (None, -0.35)),
    ),
    "entropy": (
        Feature((Signal.ENTROPY,), operator.pos, (-0.5, -0.5)),
        Feature((Signal.LOG_Q,), operator.pos, (None, 0.5)),
    ),
}
"""Online estimators by name, and what they look at.

The first weights of `confidence` are about the mean of two pairs' own: 0.5B and 1.5B of one family
(87% accepted) and a distilled draft of two layers (27%).
"""


def _often(followed: Any, seen: Any) -> Any:
    """Log odds that a context is followed so again, from so few times."""
    return np.log((followed + 0.5) / (seen - followed + 0.5))


def lookup_estimator() -> OnlineEstimator:
    """An online estimator of candidates that were looked up: it judges by `Evidence`.

    Its first weights are those of a small chat model's outputs, greedy and at temperature 0.8.
    """
    features = (
        Feature((Evidence.LENGTH,), np.log2, (0.6, 0.6)),
        Feature((Evidence.FOLLOWED, Evidence.SEEN), _often, (1.5, 1.5)),
        Feature((Evidence.OWN,), operator.pos, (1.0, 1.0)),
        Feature((Evidence.CORPUS,), operator.pos, (0.0, 0.0)),
    )
    return OnlineEstimator(features, one=(-3.1, -3.1), rate=(0.3, 0.3))


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
