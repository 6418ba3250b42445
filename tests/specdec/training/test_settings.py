from __future__ import annotations

from typing import Any

import pytest

from specdec.training.settings import DistillError, DistillSettings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"held_out": 1.0}, "held_out must be between 0 and 1"),
        ({"lr": float("nan")}, "lr must be more than 0"),
        ({"minutes": 0.0}, "minutes must be more than 0"),
    ],
)
def test_settings_out_of_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(DistillError, match=message):
        DistillSettings(**values)
