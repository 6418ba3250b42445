from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from jobs.cli import app
from jobs.job_file import load_job
from jobs.plan import bounded, mean, seconds_per_row
from pipeline import layout
from pipeline.commit import manifest
from pipeline.config.job import S3Config
from pipeline.config.prices import Hardware
from pipeline.generate.rehearsal import Rehearsal, TimedRound
from pipeline.observe.ledger import Account, Run, write_run
from pipeline.run.plan import plan_job
from pipeline.storage.folder import open_folder
from tests.conftest import TinyModels

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]

WriteRows = Callable[..., str]
ROWS = 40


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["plan", *(str(a) for a in arguments)])


@pytest.fixture
def job(tiny_models: TinyModels, write_rows: WriteRows, tmp_path: Path) -> Path:
    rows: list[dict[str, Any]] = [{"prompt": f"say {i}"} for i in range(ROWS - 4)]
    write_rows("in/prompts.parquet", [*rows, *({"prompt": ""} for _ in range(4))])
    file = tmp_path / "job.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "input": {"paths": "in", "prompt_column": "prompt"},
                "output": "out",
                "models": {"target": tiny_models.target, "draft": tiny_models.draft},
                "sampling": {"max_new_tokens": 10, "ignore_eos": True},
                "speculation": {"policy": "fixed", "k": 2},
                "actors": {"slots": 4, "num_cpus": 2, "max": 2},
                "unit_rows": 8,
                "prices": {"source": "a test", "date": "2026-11-25", "cpu_hour": 1.5},
                "budget": {"dollars": 1e-9, "hours": 1000},
            }
        )
    )
    return file


def test_a_plan_writes_nothing(job: Path, tmp_path: Path) -> None:
    result = call(job, "--rows", 12)
    assert result.exit_code == 0, result.output
    for words in ("prompt tokens", "output tokens", "time with 2 actors", "95% CI", "$"):
        assert words in result.stdout
    assert "these figures are rough" in result.stdout
    assert "not enough" in result.stdout.split("budget.dollars")[1].splitlines()[0]
    assert "enough" in result.stdout.split("budget.hours")[1].splitlines()[0]
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_a_plan_as_json_reckons_with_what_rows_take(job: Path) -> None:
    result = call(job, "--json", "--rows", ROWS)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["files"], found["rows"], found["units"], found["rows_left"]) == (1, ROWS, 5, ROWS)
    assert found["sample_rows"] == ROWS
    assert found["left_out"] == pytest.approx(0.1)
    assert any("EmptyPrompt" in note for note in found["notes"])
    # Every row makes ten tokens, so their number is certain.
    tokens = found["output_tokens"]
    assert [tokens["value"], tokens["low"], tokens["high"]] == pytest.approx([360.0] * 3)
    prompts = found["prompt_tokens"]
    assert prompts["low"] < prompts["value"] < prompts["high"]
    for key in ("hours", "dollars"):
        assert 0 < found[key]["low"] < found[key]["value"] < found[key]["high"]
    # Two actors of two cores each at 1.5 an hour and core.
    assert found["price_per_hour"] == pytest.approx(3.0)
    assert found["dollars"]["value"] == pytest.approx(2 * 3.0 * found["hours"]["value"])


def test_every_sample_of_a_row_is_reckoned_with(job: Path) -> None:
    result = call(job, "--json", "--rows", 8, "--set", "sampling.n=3")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    share = 1 - found["left_out"]
    assert found["output_tokens"]["value"] == pytest.approx(3 * 10 * ROWS * share)


def test_what_is_done_is_not_planned_again(
    job: Path, tiny_models: TinyModels, tmp_path: Path
) -> None:
    ledger = open_folder(str(tmp_path / "out"), S3Config())
    hardware = Hardware({"CPU": 2.0}, {"CPU": 2.0})
    account = Account("r", "a", "w", "n", hardware, 0.0, {"load": 1200.0}, ended=1200.0)
    write_run(ledger, Run("r", 0.0, 3600.0, "stopped", accounts=(account,)))
    found = json.loads(call(job, "--json", "--rows", 8).stdout)
    assert (found["done"]["hours"], found["done"]["dollars"]) == (1.0, pytest.approx(1.0))


@pytest.mark.parametrize("command", ["validate", "plan"])
def test_the_output_of_another_job_is_refused_as_run_refuses_it(
    job: Path, tmp_path: Path, command: str
) -> None:
    planned = plan_job(load_job(job, []))
    mark = manifest.fingerprint(planned.job, planned.files)
    manifest.claim(planned.output, planned.job, planned.files, mark)
    record = planned.output.read(layout.JOB)
    planned.output.put(layout.completions(planned.units[0].id), b"a unit")
    asked = [command, str(job), "--set", "sampling.temperature=0.5"]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 2, result.output
    assert "holds another job" in result.output and "temperature" in result.output
    assert planned.output.read(layout.JOB) == record


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("input.prompt_column=text", "no column"),
        ("models.draft=./none", "none"),
        ("prices=./none.yaml", "no such price table"),
    ],
)
def test_mistakes_show_before_anything_is_generated(job: Path, change: str, message: str) -> None:
    result = call(job, "--set", change)
    assert result.exit_code == 2, result.output
    assert message in result.stderr and "Traceback" not in result.output


def test_rows_that_all_fail_are_an_error(job: Path) -> None:
    result = call(job, "--set", "input.template=", "--set", "input.prompt_column=null")
    assert result.exit_code == 2
    assert "can be completed" in result.stderr or "template" in result.stderr


# ---------------------------------------------------------------------- reckoning


def rehearsal(rounds: list[TimedRound], prompts: list[int], outputs: list[int]) -> Rehearsal:
    return Rehearsal(
        len(prompts), 1.0, 0.0, tuple(prompts), tuple(outputs), sum(prompts), tuple(rounds), 4.0, {}
    )


def test_rows_are_charged_for_their_prompts_and_their_outputs() -> None:
    rounds = [TimedRound(seconds=1.5, prefill=0.5, tokens=10)] * 16
    tried = rehearsal(rounds, [100] * 8, [20] * 8)
    # 8 seconds fed 800 tokens; 16 seconds made 160.
    found = seconds_per_row(tried)
    assert found.value == pytest.approx(100 * 0.01 + 20 * 0.1)
    assert found.low == pytest.approx(found.value) == pytest.approx(found.high)


def test_rows_or_speeds_that_differ_widen_the_interval() -> None:
    steady = [TimedRound(1.0, 0.0, 10)] * 16
    uneven = [TimedRound(1.0, 0.0, tokens) for tokens in (5, 15) for _ in range(8)]
    alike, apart = [20] * 8, [5, 35] * 4
    widths = [
        (found := seconds_per_row(rehearsal(rounds, [0] * 8, outputs))).high / found.low
        for rounds, outputs in ((steady, alike), (steady, apart), (uneven, apart))
    ]
    assert widths[0] == pytest.approx(1) and widths[0] < widths[1] < widths[2]


def test_a_bound_that_one_row_does_not_tell_is_null() -> None:
    told = bounded({"tokens": asdict(mean([7.0])), "notes": ["x"]})
    assert told == {"tokens": {"value": 7.0, "low": 0.0, "high": None}, "notes": ["x"]}


def test_a_mean_has_the_interval_of_its_sample() -> None:
    found = mean([1.0, 2.0, 3.0])
    assert found.value == 2.0
    assert found.high - 2.0 == pytest.approx(4.303 / 3**0.5, rel=1e-3)  # t of 2 degrees, by hand
    assert mean([2.0, 2.0]).times(10, plus=1).high == 21.0
