from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from specdec.policies import profiling
from specdec.policies.profiling import CONTEXT, LEAST_POINTS, PROMPT, profile_costs
from tests.specdec.tiny_models import TinyPair


@pytest.mark.parametrize("slots", [1, 3, 16])
def test_a_profile_covers_the_rounds_that_are_to_come(pair: TinyPair, slots: int) -> None:
    """Draft steps of all rows, a prompt to catch up with; verifications of 8 candidates a row."""
    assert pair.draft is not None
    model = profile_costs(pair.target, pair.draft, slots, seconds=60)
    for table, most in ((model.draft, max(2 * slots, PROMPT)), (model.verify, 9 * slots)):
        assert table.tokens[0] == 1 and (np.diff(table.tokens) > 0).all()
        assert most / 1.6 < table.tokens[-1] <= most
        assert (table.seconds > 0).all()


def test_a_profile_without_time_is_short_but_of_use(pair: TinyPair) -> None:
    assert pair.draft is not None
    model = profile_costs(pair.target, pair.draft, 64, seconds=0)
    for table in (model.draft, model.verify):
        tokens = table.tokens.tolist()
        assert len(tokens) == LEAST_POINTS and tokens[0] == 1 and tokens[-1] > 64
        assert (table.seconds > 0).all()


def test_what_a_cached_position_costs_is_measured(
    pair: TinyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds(_: Any, __: Any, slots: int, tokens: int, context: int = CONTEXT) -> float:
        return 1e-3 + 1e-6 * context * min(slots, tokens)

    monkeypatch.setattr(profiling, "_time", seconds)
    table = profiling._profile(pair.target, 8, 16, budget=0.1)
    assert table.position == pytest.approx(1e-6) and table.context == CONTEXT
    assert float(table(8)) == pytest.approx(1e-3 + 8e-6 * CONTEXT)
