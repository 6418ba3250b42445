"""The ledger of jobs that really ran: killed, stopped, resumed, and stopped at a budget."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from jobs.cli import app
from jobs.reports.summary import read_summary
from pipeline.config.job import JobConfig, S3Config
from pipeline.config.prices import Hardware, Prices
from pipeline.errors import BudgetReached, JobStopped, UserError
from pipeline.layout import LEDGER
from pipeline.observe.budget import Budget, _tokens_to_come
from pipeline.observe.ledger import Account, Run, read_ledger, write_run
from pipeline.observe.monitor import Posted
from pipeline.observe.progress import Tally
from pipeline.observe.run_ledger import RunLedger
from pipeline.storage.folder import Folder, open_folder
from specdec.request import Counts
from tests.conftest import TinyModels
from tests.pipeline.small_jobs import run

PRICES = {"source": "a test", "date": "2026-11-25", "cpu_hour": 3600.0}  # a dollar a second
ROWS = 48


def account(**changes: Any) -> Account:
    values = {
        "run": "r",
        "actor": "a",
        "worker": "w",
        "node": "n",
        "hardware": Hardware({"CPU": 1.0}, {"CPU": 2.0}),
        "began": 1_000.0,
        "seconds": {"load": 2.0, "verify": 3.0},
    }
    return Account(**{**values, **changes})


def folder(path: Path) -> Folder:
    return open_folder(str(path), S3Config())


# ------------------------------------------------------------------------- files


def test_an_account_is_carried_on_to_its_end() -> None:
    assert account().seen == 1_005.0
    idle, lost = account().until(1_006.0), account(busy=True).until(1_006.0)
    assert (idle.seconds["idle"], idle.tail) == (1.0, 1.0)
    assert (lost.seconds["lost"], lost.booked) == (1.0, 6.0)
    began = account(seconds={"start": 4.0, "load": 2.0}).since(1_003.0)
    assert (began.seconds["start"], began.seen) == (1.0, 1_006.0)
    assert account().until(1_004.0).booked == 5.0  # clocks differ; what is booked stays


def test_a_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    there = Run("r", 1_000.0, 1_010.0, "done", {"currency": "USD"}, {"dollars": 1.0}, (account(),))
    write_run(folder(tmp_path), there)
    assert read_ledger(folder(tmp_path)) == [there]


def test_accounts_of_a_killed_driver_are_found_and_then_settled(tmp_path: Path) -> None:
    output = folder(tmp_path)
    write_run(output, Run("r", 1_000.0))
    for worker in ("v", "w"):
        output.put(f"{LEDGER}/r/{worker}.json", account(worker=worker).to_json())
    (found,) = read_ledger(output)
    assert [one.worker for one in found.accounts] == ["v", "w"]
    assert (found.ended, found.seen, found.alive) == (None, 1_005.0, False)
    write_run(output, replace(found, ended=found.seen, end="unknown"))
    assert not output.list(f"{LEDGER}/r")
    assert read_ledger(output)[0].accounts == found.accounts


# -------------------------------------------------------------------- real jobs


def settings(models: TinyModels, inputs: Path, output: Path, **sections: Any) -> dict[str, Any]:
    return {
        "input": {"paths": [str(inputs)], "prompt_column": "prompt"},
        "output": str(output),
        "models": {"target": models.target, "draft": models.draft},
        "sampling": {"max_new_tokens": 40, "ignore_eos": True},
        "speculation": {"policy": "fixed", "k": 2, "control_share": 0.2},
        "actors": {"num_cpus": 1, "slots": 4},
        "unit_rows": 4,
        "prices": PRICES,
        **sections,
    }


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    prompts = [f"count to {i}" for i in range(ROWS)]
    pq.write_table(pa.table({"prompt": prompts}), tmp_path / "in" / "p.parquet")
    return tmp_path / "in"


def committed(output: Path) -> int:
    return len(list(output.glob("completions/*")))


def when(happened: Callable[[], bool], act: Callable[[], object]) -> threading.Thread:
    """A thread that waits for something to happen and acts then."""

    def wait() -> None:
        deadline = time.monotonic() + 240
        while not happened() and time.monotonic() < deadline:
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def kill_an_actor() -> None:
    """Kill one of the actors of the Ray that this process started."""
    for process in psutil.Process().children(recursive=True):
        if "MapWorker" in " ".join(process.cmdline()):
            os.kill(process.pid, signal.SIGKILL)
            return


@pytest.mark.ray
@pytest.mark.slow  # on a machine that is busy otherwise, a process is held for less than it booked
def test_a_job_with_a_killed_actor_and_a_resume_adds_up(
    local_ray: None, tiny_models: TinyModels, inputs: Path, tmp_path: Path
) -> None:
    output, stop = tmp_path / "out", threading.Event()
    values = settings(tiny_models, inputs, output)
    when(lambda: committed(output) >= 2, kill_an_actor)
    when(lambda: committed(output) >= 6, stop.set)
    with pytest.raises(JobStopped) as stopped:
        run(values, stop=stop)
    assert not isinstance(stopped.value, BudgetReached)
    unfinished, _ = read_summary(str(output), S3Config())
    result = run(values)
    summary, finished = read_summary(result.output, S3Config())
    cost = summary["cost"]

    first, second = read_ledger(folder(output))
    assert (first.end, second.end, finished) == ("stopped", "done", True)
    killed, *others = sorted(first.accounts, key=lambda one: one.began)
    assert killed.killed and not any(one.killed for one in [*others, *second.accounts])
    assert len(others) == 1  # the actor was restarted

    # Ray knows of each process, and booked time is held time within 1%, each by each.
    for one in [*first.accounts, *second.accounts]:
        assert one.held is not None
        assert one.booked == pytest.approx(one.held, rel=0.01, abs=0.05)
    for one in (first, second):
        assert one.reconciled is not None and one.reconciled["ok"]
    assert cost["reconciled"]["ok"] and cost["reconciled"]["holders"] == 3
    states = cost["seconds_by_state"]
    assert sum(states.values()) == pytest.approx(cost["seconds_held"], rel=0.01)
    assert {"start", "load", "verify", "draft", "host", "control", "idle", "lost"} <= states.keys()

    # The dead actor's unfinished work is lost, and nothing else is.
    lost = {holder["end"]: holder["seconds_by_state"].get("lost", 0) for holder in cost["by_actor"]}
    assert lost["killed"] > 0.02
    assert lost["done"] == pytest.approx(0, abs=0.05)
    work = ("prefill", "draft", "decide", "verify", "sample", "host", "control")
    footers = sum(summary["phase_seconds"].get(state, 0.0) for state in work)
    assert sum(states.get(state, 0.0) for state in work) == pytest.approx(footers, rel=0.02)

    # A dollar a second, and more of them after the second run.
    assert cost["total"] == pytest.approx(cost["seconds_held"])
    assert unfinished["cost"]["total"] == pytest.approx(cost["by_run"][0]["cost"])
    assert cost["total"] == pytest.approx(sum(one["cost"] for one in cost["by_run"]))
    assert cost["per_thousand_rows"] == pytest.approx(cost["total"] / ROWS * 1000)


@pytest.mark.ray
def test_a_budget_stops_the_job_and_a_higher_one_finishes_it(
    local_ray: None,
    tiny_models: TinyModels,
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output, job, cap = tmp_path / "out", tmp_path / "job.yaml", 0.5
    values = settings(tiny_models, inputs, output, budget={"dollars": cap})
    values["sampling"]["max_new_tokens"] = 120
    look = Budget.look

    def look_once_it_generates(self: Budget, posted: Posted | None) -> None:
        # To load the models alone costs more than the budget.
        if posted is not None and posted.tally is not None:
            look(self, posted)

    with monkeypatch.context() as patch:
        patch.setattr(Budget, "look", look_once_it_generates)
        with pytest.raises(BudgetReached, match=r"budget\.dollars: .* USD are spent"):
            run(values)
    (first,) = read_ledger(folder(output))
    units = committed(output)
    assert first.end == "budget" and first.budget == {"dollars": cap, "hours": None}
    assert units < ROWS // 4
    spent = read_summary(str(output), S3Config())[0]["cost"]
    assert spent["seconds_by_state"].get("lost", 0.0) == pytest.approx(0, abs=0.1)

    # With nothing left it does not even begin, and says so with an exit code of its own.
    small = {**values, "budget": {"dollars": spent["total"] / 2}}
    job.write_text(json.dumps(small))
    ended = CliRunner().invoke(app, ["run", str(job)])
    assert ended.exit_code == 3
    assert "budget.dollars" in ended.output and "raise the budget" in ended.output
    assert committed(output) == units

    result = run({**values, "budget": {"dollars": 10_000, "hours": 1}})
    assert result.summary["rows"] == ROWS
    assert [one.end for one in read_ledger(folder(output))] == ["budget", "done"]


@pytest.mark.parametrize(
    ("budget", "in_flight", "stops"),
    [
        # An actor that costs a dollar a second has been there for 60 of them, and earlier runs took
        # 10 seconds and as many dollars.
        ({"dollars": 100}, 0, False),
        ({"dollars": 100}, 28, False),
        ({"dollars": 100}, 32, True),
        ({"dollars": 69}, 0, True),
        ({"hours": 100 / 3600}, 28, False),
        ({"hours": 100 / 3600}, 32, True),
        ({"dollars": 1000, "hours": 1}, 32, False),
    ],
)
def test_units_in_flight_count_on_the_budget(
    tmp_path: Path, budget: dict[str, float], in_flight: float, stops: bool
) -> None:
    now = time.time()
    earlier = account(run="0", began=0.0, seconds={"load": 10.0}, ended=10.0)
    write_run(folder(tmp_path), Run("0", 0.0, 10.0, "stopped", accounts=(earlier,)))
    job = budget_job(tmp_path, prices=PRICES, budget=budget)
    ledger, stop = RunLedger(folder(tmp_path), job), threading.Event()
    it = Budget(job, ledger, stop)
    ledger.run = replace(ledger.run, began=now - 60)
    seen = Posted(None, (account(began=now - 60, seconds={"verify": 60.0}),), 0, 0, 1, False)
    it._in_flight = in_flight
    it.look(None)  # the monitor does not answer
    assert ledger.stopped_by is None and not stop.is_set()
    ledger.look(seen)
    it.look(seen)
    reason = ledger.stopped_by
    assert isinstance(reason, BudgetReached) == stops == stop.is_set()
    if stops:
        key, cap = next(iter(budget.items()))
        form = ".4g" if key == "dollars" else ".3g"
        assert f"budget.{key}: " in str(reason) and f"of {cap:{form}} " in str(reason)


@pytest.mark.parametrize(
    ("begun", "done", "tokens"),
    [
        # Three rows of 20 tokens are completed, one failed; four live ones have 10 tokens each.
        (8, Tally(rows=3, errors=1, finished=60, counts=Counts(committed=100)), 40),
        (4, Tally(rows=3, errors=1, finished=60, counts=Counts(committed=60)), 0),
        # A row that is longer than those completed: not less than nothing.
        (4, Tally(rows=3, finished=60, counts=Counts(committed=100)), 0),
    ],
)
def test_what_is_in_flight_is_counted_in_tokens(begun: int, done: Tally, tokens: float) -> None:
    assert _tokens_to_come(begun, done) == tokens


def test_a_budget_in_money_needs_prices(tmp_path: Path) -> None:
    job = budget_job(tmp_path, budget={"dollars": 1}, prices={**PRICES, "cpu_hour": None})
    ledger, stop = RunLedger(folder(tmp_path), job), threading.Event()
    seen = Posted(None, (account(),), 0, 0, 1, False)
    ledger.look(seen)
    Budget(job, ledger, stop).look(seen)
    assert stop.is_set()
    assert isinstance(ledger.stopped_by, UserError)
    assert "budget.dollars: there is no price for CPU" in str(ledger.stopped_by)


def test_spent_hours_stop_a_job_before_it_begins(
    tiny_models: TinyModels, inputs: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    write_run(folder(output), Run("r", 0.0, 7200.0, "stopped"))
    values = settings(tiny_models, inputs, output, budget={"hours": 2})
    with pytest.raises(BudgetReached, match=r"budget\.hours: 2 of 2 hours are spent"):
        run(values)


PRICED = Prices.model_validate(PRICES).model_dump(mode="json")


@pytest.mark.parametrize(
    ("budget", "prices", "message"),
    [
        ({"dollars": 12}, PRICES, r"10 of 12 USD are spent, and an earlier run stopped for that"),
        ({"dollars": 11, "hours": 1}, PRICES, "budget.dollars: 10 of 11 USD"),
        ({"dollars": 13}, PRICES, None),
        ({"hours": 1}, PRICES, None),
        ({"dollars": 12}, {**PRICES, "cpu_hour": 1800.0}, None),
        ({"dollars": 9}, PRICES, "10 of 9 USD are spent$"),
    ],
)
def test_a_run_that_stopped_at_its_budget_is_not_begun_again_until_that_is_higher(
    tmp_path: Path, budget: dict[str, float], prices: dict[str, Any], message: str | None
) -> None:
    """What it left may be too little for a unit, and loading models alone would spend it."""
    earlier = account(run="0", began=0.0, seconds={"load": 10.0}, ended=10.0)
    caps = {"dollars": 12.0, "hours": None}
    first = Run("0", 0.0, 10.0, "budget", prices=PRICED, budget=caps, accounts=(earlier,))
    write_run(folder(tmp_path), first)
    write_run(folder(tmp_path), Run("1", 10.0, 10.0, "stopped"))
    job = budget_job(tmp_path, budget=budget, prices=prices)
    ledger = RunLedger(folder(tmp_path), job)
    if message is None:
        Budget(job, ledger, threading.Event())
        return
    with pytest.raises(BudgetReached, match=message):
        Budget(job, ledger, threading.Event())


def test_hardware_without_a_price_is_not_spent_on_again(tmp_path: Path) -> None:
    earlier = account(run="0", began=0.0, seconds={"load": 10.0}, ended=10.0)
    write_run(folder(tmp_path), Run("0", 0.0, 10.0, "stopped", accounts=(earlier,)))
    job = budget_job(tmp_path, budget={"dollars": 1}, prices={**PRICES, "cpu_hour": None})
    with pytest.raises(UserError, match=r"budget\.dollars: there is no price for CPU"):
        Budget(job, RunLedger(folder(tmp_path), job), threading.Event())


def budget_job(output: Path, **sections: Any) -> JobConfig:
    return JobConfig.model_validate(
        {
            "input": {"paths": "in", "prompt_column": "prompt"},
            "output": str(output),
            "models": {"target": "t"},
            "speculation": {"policy": "none"},
            **sections,
        }
    )
