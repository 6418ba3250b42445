from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest

from jobs.reports.cost import Cost, cost_of
from pipeline.config.prices import Hardware, Prices
from pipeline.observe.ledger import Account, Run

PRICES = Prices.model_validate(
    {"source": "a test", "date": "2026-11-25", "gpus": {"L4": 3600.0}, "cpu_hour": 36.0}
)
CPU = Hardware({"CPU": 2.0}, {"CPU": 8.0})
GPU = Hardware({"CPU": 2.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 1.0}, gpu_type="L4")
SUMMARY = {"output_tokens": 2_000, "rows": 10, "speedup": 1.5, "speedup_ci": [1.2, 1.8]}


def account(worker: str = "w", **changes: Any) -> Account:
    seconds = {"start": 1.0, "load": 4.0, "profile": 2.0, "verify": 20.0, "control": 3.0}
    values = {"hardware": CPU, "began": 1_000.0, "seconds": seconds, "ended": 1_030.0}
    return Account("run", "actor", worker, "node", **{**values, "held": 30.0, **changes})


def run(*accounts: Account, **changes: Any) -> Run:
    return replace(Run("run", 990.0, 1_050.0, "done", accounts=accounts), **changes)


def cost(*runs: Run, committed: Any = None, **summary: Any) -> Cost:
    kept = {"w": {"verify": 20.0, "control": 3.0}}
    return cost_of(runs, {**SUMMARY, **summary}, committed or kept, PRICES)


def test_held_seconds_are_paid_at_the_price_of_what_was_held() -> None:
    found = cost(run(account(), account("v", hardware=GPU, held=10.0)))
    # Two cores at a cent a second, and a GPU at a dollar a second.
    assert [holder.cost for holder in found.by_actor] == pytest.approx([0.6, 10.0])
    assert found.total == pytest.approx(10.6)
    assert found.per_million_output_tokens == pytest.approx(10.6 * 500)
    assert found.per_thousand_rows == pytest.approx(10.6 * 100)
    assert found.seconds_held == 40.0
    assert found.hours == pytest.approx(60 / 3600)


def test_work_that_was_not_committed_is_lost() -> None:
    found = cost(run(account(killed=True)), committed={"w": {"verify": 15.0}})
    assert found.seconds_by_state == {
        "start": 1.0,
        "load": 4.0,
        "profile": 2.0,
        "verify": 15.0,
        "lost": 8.0,
    }
    assert found.cost_by_state is not None
    assert sum(found.cost_by_state.values()) == pytest.approx(found.total)
    assert found.by_actor[0].end == "killed"


def test_what_a_running_job_has_in_flight_is_not_lost_yet() -> None:
    now = time.time()
    live = account(began=now - 30, ended=None, held=None)
    found = cost(run(live, began=now - 40, ended=None, end=None), committed={"w": {"verify": 5.0}})
    assert "lost" not in found.seconds_by_state
    assert (found.by_run[0].end, found.by_actor[0].end) == ("running", "running")
    killed_driver = run(replace(live, began=1_000.0), ended=None, end=None)
    found = cost(killed_driver, committed={"w": {"verify": 5.0}})
    assert found.seconds_by_state["lost"] == 18.0
    assert (found.by_run[0].end, found.by_actor[0].end) == ("unknown", "unknown")
    assert found.reconciled is not None and found.reconciled.unsettled == 1


def test_what_speculation_saved_has_the_interval_of_the_speedup() -> None:
    found = cost(run(account()))
    # 20 seconds of rounds with speculation at two cents; 2 seconds of measuring costs served it.
    assert found.saved == pytest.approx((0.5 * 20 - 2) * 0.02)
    assert found.saved_ci == pytest.approx([(0.2 * 20 - 2) * 0.02, (0.8 * 20 - 2) * 0.02])
    unmeasured = cost(run(account()), speedup=None, speedup_ci=None)
    assert (unmeasured.saved, unmeasured.saved_ci) == (None, None)


def test_a_missing_price_leaves_the_seconds_and_no_total() -> None:
    lost = replace(GPU, gpu_type="H100")
    found = cost(run(account(), account("v", hardware=lost)))
    assert found.total is None
    assert found.unpriced == ["H100 (on_demand)"]
    assert found.seconds_held == 60.0
    assert found.cost_by_state is None and found.saved is None


def test_runs_add_up() -> None:
    first = run(account(), run="a", end="stopped", began=0.0, ended=100.0)
    second = run(account("v", began=2_000.0), run="b", budget={"dollars": 2.0, "hours": None})
    found = cost(first, second)
    assert [one.end for one in found.by_run] == ["stopped", "done"]
    assert sum(one.cost or 0 for one in found.by_run) == pytest.approx(found.total)
    assert found.budget == {"dollars": 2.0, "hours": None}


@pytest.mark.parametrize(("held", "ok"), [(30.2, True), (31.0, False), (29.0, False)])
def test_booked_seconds_are_held_against_rays_events(held: float, ok: bool) -> None:
    found = cost(run(account(held=held))).reconciled
    assert found is not None
    assert (found.booked, found.held, found.ok) == (30.0, held, ok)
    assert found.difference == pytest.approx(abs(30 - held) / held)


def test_a_long_silence_at_a_processes_end_is_not_accounted_for() -> None:
    silent = account(ended=1_040.0, held=40.0, tail=10.0, seconds={"verify": 30.0, "lost": 10.0})
    found = cost(run(silent)).reconciled
    assert found is not None
    assert (found.booked, found.held, found.ok) == (40.0, 40.0, False)
    assert found.difference == pytest.approx(5 / 40)
