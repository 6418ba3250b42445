from __future__ import annotations

import numpy as np
import pytest

from specdec.measure.calibration import Calibration


def test_calibration_counts_by_tenths() -> None:
    calibration = Calibration()
    calibration.add(np.array([0.0, 0.05, 0.55, 1.0]), np.array([False, True, True, True]))
    assert calibration.judged == 4
    assert calibration.bins[:, 0].tolist() == [2, 0, 0, 0, 0, 1, 0, 0, 0, 1]
    assert calibration.bins[:, 2].tolist() == [1, 0, 0, 0, 0, 1, 0, 0, 0, 1]
    np.testing.assert_allclose(calibration.bins[[0, 5, 9], 1], [0.05, 0.55, 1.0])
    # |0.05 - 1| + |0.55 - 1| + |1 - 1| over 4
    assert calibration.ece == pytest.approx((0.95 + 0.45) / 4)


def test_calibrations_add_up() -> None:
    random = np.random.default_rng(0)
    p = random.random(1000)
    accepted = random.random(1000) < 0.5
    whole, parts = Calibration(), [Calibration() for _ in range(3)]
    whole.add(p, accepted)
    for part, at in zip(parts, np.array_split(np.arange(1000), 3), strict=True):
        part.add(p[at], accepted[at])
    summed = Calibration(parts[0].bins + parts[1].bins + parts[2].bins)
    np.testing.assert_allclose(summed.bins, whole.bins)
    assert summed.ece == pytest.approx(whole.ece) and summed.judged == 1000


def test_calibration_of_nothing() -> None:
    calibration = Calibration()
    calibration.add(np.zeros(0), np.zeros(0, dtype=bool))
    assert (calibration.judged, calibration.ece) == (0, None)


@pytest.mark.statistical
def test_ece_tells_a_calibrated_predictor_from_a_miscalibrated_one() -> None:
    """Each of 10 bins of 2,000 strays by 5 standard deviations with probability 6e-7."""
    random = np.random.default_rng(1)
    p = random.random(20_000)
    accepted = random.random(20_000) < p
    honest, boastful = Calibration(), Calibration()
    honest.add(p, accepted)
    boastful.add(np.sqrt(p), accepted)
    assert honest.ece is not None and boastful.ece is not None
    assert honest.ece < 5 * np.sqrt(0.25 / 2000)
    assert boastful.ece == pytest.approx(2 / 3 - 1 / 2, abs=0.02)  # mean of sqrt(p) - p
