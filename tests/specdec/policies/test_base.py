from __future__ import annotations

import numpy as np
import pytest

from specdec.policies.memory import RowHistory, context_classes


@pytest.mark.parametrize(
    ("tokens", "least"), [(0, 128), (1, 128), (128, 128), (129, 256), (256, 256), (1025, 2048)]
)
def test_context_classes(tokens: int, least: int) -> None:
    assert context_classes(np.array([tokens, 1.0])).tolist() == [least, 128]


def test_a_rows_history_forgets() -> None:
    """Round by round, to what the last rounds alone would give."""
    history = RowHistory()
    history.add(4, 4)
    history.add(2, 0)
    kept = RowHistory.FORGET
    assert (history.judged, history.accepted) == (kept * 4 + 2, kept * 4)
    for _ in range(500):
        history.add(3, 0)
    assert history.accepted < 1e-3
    assert history.judged == pytest.approx(3 / (1 - kept), rel=1e-3)
