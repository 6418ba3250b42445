from __future__ import annotations

import numpy as np
import pytest

from jobs.reports.timeline import timeline
from pipeline.commit.record import UnitRecord
from tests.pipeline.commit.records import record as record_of


def record(started: float, finished: float, committed: int, actor: str = "a") -> UnitRecord:
    """A unit of `committed` tokens, two to a round, half of whose candidates were accepted."""
    rounds = committed // 2
    counts = {"rounds": rounds, "drafted": committed, "verified": committed, "accepted": rounds}
    counts = {**counts, "committed": committed}
    return record_of(actor=actor, started=started, finished=finished, counts=counts)


def test_what_units_did_is_spread_over_their_time() -> None:
    line = timeline([record(100, 110, 100), record(105, 110, 50, "b")])
    assert line.edges.tolist() == [0.0, 2.5, 5.0, 7.5, 10.0]
    assert line.total.goodput == pytest.approx([10, 10, 20, 20])
    assert line.actors["a"].committed == pytest.approx([25, 25, 25, 25])
    assert line.actors["b"].committed == pytest.approx([0, 0, 25, 25])
    assert line.total.block_efficiency == pytest.approx([2, 2, 2, 2])
    assert line.total.acceptance_rate == pytest.approx([0.5] * 4)
    assert line.pauses == ()


def test_the_time_between_two_runs_is_cut_out() -> None:
    line = timeline([record(0, 10, 100), record(10_000, 10_010, 300), record(10_011, 10_031, 10)])
    assert line.edges[-1] == 40
    # The second between the last two units is no pause, only time in which nothing was in work.
    assert line.pauses == (10.0,)
    assert line.total.committed.sum() == pytest.approx(410)
    assert line.total.goodput[0] == pytest.approx(10)
    assert line.total.goodput[2] == pytest.approx(30, rel=0.2)


def test_units_of_no_length_and_no_rounds() -> None:
    line = timeline([record(5, 5, 0)])
    assert np.isnan(line.total.block_efficiency).all()
    assert line.total.goodput.tolist() == [0.0, 0.0]
    both = timeline([record(0, 10, 20), record(10, 10, 7)])
    assert both.total.committed.sum() == pytest.approx(27)
