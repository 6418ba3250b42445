"""How likely a candidate is accepted: what is read off a draft step, and estimators over it.

An estimator gives two probabilities for a candidate y_k, both on condition that y_1..y_{k-1} are
accepted:

    before  from the draft's state and distribution alone: what one knows before y_k is drawn
    after   knowing y_k as well

Rejection sampling may decide whether to *submit* y_k by the first only (specdec/policies/base.py).

Everything an estimator looks at is read off the device once per draft step, as a few numbers per
row (`Signal`). Estimators and policies then work on the host, on arrays over rows.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, Protocol

import numpy as np
import torch
from scipy.special import expit
from torch import Tensor, nn

from specdec.kernels.choose import kernels_over
from specdec.measure.calibration import Array, Calibration, Flags


class Signal(IntEnum):
    """Columns of what is read off a draft step; logarithms and entropy are in nats.

    All are of the draft's raw distribution (temperature 1), so that they mean something for greedy
    rows too. The head's two are its logits without the bias that its training weights put in.
    """

    LOG_Q = 0  # of the candidate
    LOG_TOP = 1  # of the likeliest token
    ENTROPY = 2
    HEAD_BEFORE = 3
    HEAD_AFTER = 4


HEAD_SIGNALS = frozenset({Signal.HEAD_BEFORE, Signal.HEAD_AFTER})
_TOKEN_SIGNALS = (Signal.LOG_Q, Signal.LOG_TOP, Signal.ENTROPY)

LEAST_LOG = math.log(torch.finfo(torch.float32).tiny)
"""What the logarithm of less is taken for."""

BOUND, MOST_LOGIT = 10.0, 12.0
"""What signals and the logits of estimates are kept within."""


class ResidualBlock(nn.Module):
    """x + SiLU(W x + b)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        # As the identity at first: training starts from a linear head.
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.silu(self.linear(x))


class AcceptanceHead(nn.Module):
    """Predicts acceptance from the draft's last hidden state (SpecDec++, arXiv 2405.19715, §3.2).

    D residual blocks, each with weights of its own, then a linear layer. The published head reads
    the state after y_k was fed, and so judges y_k one draft step late. This one reads the state
    that y_k is drawn from; a second linear layer sees y_k's `LOG_Q`, `LOG_TOP` and `ENTROPY` too,
    and so judges y_k at once.

    Args:
        width: size of the hidden state.
        depth: D.
        reject_weight: w_rej / w_acc of the training loss. A head trained with it estimates
            P / (P + w (1 - P)); ln w added to the logit takes that back.
    """

    def __init__(self, width: int, depth: int = 3, reject_weight: float = 1.0) -> None:
        super().__init__()
        self.width, self.depth, self.reject_weight = width, depth, reject_weight
        self.blocks = nn.Sequential(*(ResidualBlock(width) for _ in range(depth)))
        self.before = nn.Linear(width, 1)
        self.after = nn.Linear(width + len(_TOKEN_SIGNALS), 1)

    def forward(self, hidden: Tensor, token_signals: Tensor) -> Tensor:
        """Weighted logits, as trained.

        Args:
            hidden: float32 [n, width], states that the candidates are drawn from.
            token_signals: float32 [n, 3]: LOG_Q, LOG_TOP, ENTROPY.

        Returns:
            float32 [n, 2]: before and after.
        """
        state = self.blocks(hidden)
        after = self.after(torch.cat([state, token_signals], -1))
        return torch.cat([self.before(state), after], -1)

    def debiased(self, hidden: Tensor, token_signals: Tensor) -> Tensor:
        """As `forward`, with the bias of the training weights taken back."""
        logits: Tensor = self(hidden, token_signals)
        return logits + float(np.log(self.reject_weight))


def read_signals(
    logits: Tensor,
    tokens: Tensor,
    hidden: Tensor,
    wanted: frozenset[Signal],
    head: AcceptanceHead | None = None,
) -> Tensor:
    """What policies and estimators want to know of the candidates just drawn.

    Args:
        logits: [n, V], raw; tokens: int64 [n]; hidden: [n, width], the states behind the logits.
        wanted: the columns to compute; the others are 0.
        head: needed for its own columns.

    Returns:
        float32 [n, len(Signal)] on the device.
    """
    judging = head is not None and bool(wanted & HEAD_SIGNALS)
    of_tokens = frozenset(_TOKEN_SIGNALS) if judging else wanted & frozenset(_TOKEN_SIGNALS)
    signals = torch.zeros(len(tokens), len(Signal), device=logits.device)
    if (kernels := kernels_over(logits)) is not None:
        kernels.token_signals(logits, tokens, signals, of_tokens)
    else:
        _token_signals(logits, tokens, signals, of_tokens)
    if head is not None and judging:
        judged = head.debiased(hidden.float(), signals[:, : len(_TOKEN_SIGNALS)])
        signals[:, len(_TOKEN_SIGNALS) :] = judged
    return signals


def _token_signals(logits: Tensor, tokens: Tensor, out: Tensor, wanted: frozenset[Signal]) -> None:
    """`Kernels.token_signals` by torch's operators."""
    # As few as there can be: after a forward each takes longer to begin than to run.
    log_q = torch.log_softmax(logits.float(), -1)
    if Signal.LOG_Q in wanted:
        out[:, Signal.LOG_Q] = log_q.gather(1, tokens[:, None])[:, 0].clamp_(min=LEAST_LOG)
    if Signal.LOG_TOP in wanted:
        out[:, Signal.LOG_TOP] = log_q.amax(-1)
    if Signal.ENTROPY in wanted:
        probs = log_q.exp()
        log_q.clamp_(min=LEAST_LOG)  # 0 * -inf is no number
        out[:, Signal.ENTROPY] = torch.linalg.vecdot(probs, log_q).neg_().clamp_(min=0)


# ------------------------------------------------------------------- estimators


@dataclass(slots=True)
class RowHistory:
    """Candidates of one row that were judged lately; older ones count less.

    Attributes:
        judged, accepted: decayed counts.
    """

    FORGET: ClassVar[float] = 0.97
    """Weight that is left of old candidates after one more round."""

    judged: float = 0.0
    accepted: float = 0.0

    def add(self, judged: float, accepted: float) -> None:
        """Book a round."""
        self.judged = self.FORGET * self.judged + judged
        self.accepted = self.FORGET * self.accepted + accepted


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
    """Weight that is left of old evidence after one more candidate."""

    PRIOR = 4.0
    """Precision of each first weight."""

    TOGETHER, SHARE = 16, 1 / 16
    """Candidates that are collected before weights are fitted to them: at least so many, and so
    large a share of the evidence behind the weights, which fewer would hardly move."""

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

    LEAST, MOST_ECE = 500, 0.15
    """Judged candidates before the head is doubted, and the calibration error that it may have."""

    FORGET = 0.999
    """Weight that is left of old evidence after one more candidate: 1,000 are remembered."""

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
        p = expit(x @ weights)
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
    p: Array = expit(np.minimum(np.maximum(x, -MOST_LOGIT), MOST_LOGIT))
    return p
