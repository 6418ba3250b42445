"""How true probabilities are: AUC, calibration error, log-loss, and what mends them."""

from __future__ import annotations

from typing import Any

import numpy as np

from specdec.measure.calibration import Array, Calibration
from specdec.policies.estimators import posterior_mode


def reliability(predicted: Array, accepted: Array) -> dict[str, Any]:
    """How good predictions are.

    Args:
        predicted: float [n] in [0, 1]; accepted: float [n], probabilities of acceptance.

    Returns:
        `auc`, `ece`, `log_loss` (nats), and `bins`, the reliability curve (see `Calibration`).
    """
    calibration = Calibration()
    calibration.add(predicted, accepted)
    p = np.clip(predicted, 1e-7, 1 - 1e-7)
    log_loss = -np.mean(accepted * np.log(p) + (1 - accepted) * np.log(1 - p))
    return {
        "auc": weighted_auc(predicted, accepted),
        "ece": calibration.ece,
        "log_loss": float(log_loss),
        "bins": calibration.bins.tolist(),
    }


def weighted_auc(predicted: Array, accepted: Array) -> float | None:
    """Area under the ROC curve where a candidate counts as accepted with weight y, else with 1 - y.

    P(an accepted one is ranked above a rejected one), ties counting half; None if all are alike.
    """
    _, index = np.unique(predicted, return_inverse=True)
    positive = np.bincount(index, accepted)
    negative = np.bincount(index, 1 - accepted)
    total = positive.sum() * negative.sum()
    if total <= 0:
        return None
    below = np.cumsum(negative) - negative
    return float((positive * (below + negative / 2)).sum() / total)


def sigmoid(x: Array) -> Array:
    """1 / (1 + e^-x)."""
    result: Array = 1 / (1 + np.exp(-np.clip(x, -500.0, 500.0)))
    return result


def fit_platt(logits: Array, accepted: Array, rounds: int = 50) -> tuple[float, float]:
    """Scale a and shift b that minimise the cross-entropy of sigmoid(a x + b).

    Newton's method with a faint pull towards (1, 0), which decides where the data do not.

    Args:
        logits: float [n]; accepted: float [n], probabilities.
    """
    x = np.stack([logits, np.ones_like(logits)], -1)
    weights = posterior_mode(x, accepted, np.array([1.0, 0.0]), np.eye(2), rounds, tolerance=1e-9)
    return float(weights[0]), float(weights[1])
