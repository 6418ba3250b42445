"""`specbatch run` and what is asked before and after it: validate, report, explain."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests.conftest import TinyModels
from tests.jobs.command_line import call, one_error

JobFile = Callable[..., Path]


def write_job(folder: Path, draft_and_target: TinyModels, /, **changes: Any) -> Path:
    """A job file over eight good rows and one null prompt; sections may be replaced."""
    rows = [*(f"say {i}" for i in range(8)), None]
    pq.write_table(pa.table({"prompt": rows}), folder / "in.parquet")
    job: dict[str, Any] = {
        "input": {"paths": "in.parquet", "prompt_column": "prompt"},
        "output": "out",
        "models": {"target": draft_and_target.target, "draft": draft_and_target.draft},
        "sampling": {"max_new_tokens": 8, "temperature": 0},
        "actors": {"num_cpus": 2},
    }
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump({**job, **changes}))
    return file


@pytest.fixture
def job_file(tiny_models: TinyModels, tmp_path: Path) -> JobFile:
    """Writes a job file, in which sections may be replaced."""
    return partial(write_job, tmp_path, tiny_models)


@pytest.fixture(scope="module")
def ran(
    local_ray: None, tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """The folder of a job that has run, and what that printed."""
    folder = tmp_path_factory.mktemp("ran")
    speculation = {"policy": "goodput", "control_share": 0.2, "trace": True}
    first = call("run", write_job(folder, tiny_models, speculation=speculation))
    assert first.exit_code == 0, first.output
    return folder, first.stdout


@pytest.fixture
def folder(ran: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy of the folder."""
    return Path(shutil.copytree(ran[0], tmp_path / "ran"))


@pytest.mark.ray
def test_run_report_explain_and_run_again(ran: tuple[Path, str], folder: Path) -> None:
    assert "rows completed" in ran[1]
    assert "NullPrompt" in ran[1]
    assert f"Outputs: {ran[0] / 'out'}" in ran[1]
    file, output = folder / "job.yaml", folder / "out"

    numbers = json.loads(call("report", output, "--json").stdout)
    assert numbers["rows"] == 8
    assert numbers["errors"] == 1
    assert numbers["finished"]
    assert {
        "output_tokens",
        "tokens_per_second",
        "acceptance_rate",
        "block_efficiency",
        "speedup",
        "speedup_ci",
        "cost",
        "phase_seconds",
    } <= set(numbers)

    explained = call("explain", output, "--row", "in.parquet:0:0")
    assert explained.exit_code == 0, explained.output
    assert "candidates" in explained.stdout
    limited = call("explain", output, "--row", "in.parquet:0:0", "--limit", 1)
    assert "more rounds: --limit" in limited.stdout
    assert len(limited.stdout.splitlines()) < len(explained.stdout.splitlines())
    assert "not completed" in one_error(call("explain", output, "--row", "in.parquet:8:0"))
    message = one_error(call("explain", output, "--row", "in.parquet:99:0"))
    assert "no such row; nearest: in.parquet:8:0" in message

    again = call("run", file)
    assert again.exit_code == 0
    assert "Nothing was missing" in again.stdout
    assert call("run", file, "--quiet").output == ""

    (output / "_SUCCESS").unlink()
    assert "not finished" in call("report", output).stdout
    assert "holds another job" in one_error(call("run", file, "--set", "sampling.seed=1"))


def test_explain_of_what_is_no_job(tmp_path: Path) -> None:
    assert "no job's output here" in one_error(call("explain", tmp_path, "--row", "x"))
    message = one_error(call("explain", tmp_path, "--row", "x", "--endpoint", "nowhere"))
    assert message == "--endpoint: must be a URL such as https://s3.example.com"


def test_validate_says_what_will_run(job_file: JobFile) -> None:
    result = call("validate", job_file(), "--set", "speculation.policy=none")
    assert result.exit_code == 0, result.output
    assert "valid" in result.stdout
    assert "input files: 1 (0.0 MB), 9 rows in 1 units" in result.stdout
    assert '"policy": "none"' in result.stdout
    assert "models.target: " in result.output
    wide = ["--set", "speculation.width=2", "--set", "models.draft=null"]
    told = " ".join(call("validate", job_file(), *wide).output.split())
    assert "speculation.width: 2 has no effect, since there is no draft" in told


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"outputs": "x"}, "outputs: unknown key; did you mean 'output'?"),
        ({"input": {"paths": "no/*.parquet", "prompt_column": "p"}}, "no files match this glob"),
        ({"models": {"target": "./gone", "draft": "./gone"}}, "gone: no such folder"),
        ({"speculation": {"head": "gone"}}, "no acceptance head here"),
        ({"s3": {"profile": "nobody"}, "output": "s3://b/x"}, "no AWS profile named 'nobody'"),
        ({"input": {"paths": "in.parquet", "prompt_column": "q"}}, "no column 'q'; its columns: p"),
        ({"input": {"paths": "in.parquet", "template": "{{ promt }}"}}, "no column 'promt'"),
        ({"input": {"paths": "empty.parquet", "prompt_column": "p"}}, "empty.parquet: "),
        ({"input": {"paths": "taken.jsonl", "prompt_column": "p"}}, "name of an output column"),
        ({"output": "in.parquet"}, "part of this path is a file, not a folder"),
    ],
)
@pytest.mark.parametrize("command", ["validate", "run"])
def test_mistakes_stop_before_anything_starts(
    job_file: JobFile, tmp_path: Path, command: str, changes: dict[str, Any], message: str
) -> None:
    (tmp_path / "empty.parquet").touch()
    (tmp_path / "taken.jsonl").write_text('{"p": "x", "completion": "y"}')
    assert message in one_error(call(command, job_file(**changes)))


def test_a_second_run_is_told_of_the_first(job_file: JobFile, tmp_path: Path) -> None:
    file = job_file()
    record = tmp_path / "out" / "_specbatch" / "status.json"
    record.parent.mkdir(parents=True)
    with subprocess.Popen(["sleep", "60"]) as first:
        numbers = ("rows", "errors", "rows_total", "units", "units_total", "output_tokens")
        values = dict.fromkeys((*numbers, "seconds"), 0) | {"name": "job", "stage": "generating"}
        values |= dict.fromkeys(("tokens_per_second", "acceptance_rate", "seconds_left", "message"))
        values |= {"started": time.time(), "updated": time.time(), "state": "running"}
        record.write_text(json.dumps({**values, "host": socket.gethostname(), "pid": first.pid}))
        message = one_error(call("run", file))
        first.kill()
    assert f"another run is at work on {tmp_path / 'out'}: process {first.pid} on " in message
    assert "--take-over" in message


@pytest.mark.ray
def test_a_job_of_which_too_many_rows_fail_does_not_succeed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is generated again: not to say so, and not once more is allowed."""
    monkeypatch.setattr("pipeline.run.run.connected", lambda: pytest.fail("Ray was wanted"))
    file, output, few = folder / "job.yaml", folder / "out", ("--set", "max_error_share=0.1")
    first = call("run", file, *few, "--quiet")
    assert first.exit_code == 4, first.output
    assert "failed: 1 of 9 rows failed, more than max_error_share (0.1). " in first.stderr
    assert "NullPrompt (1), as in row in.parquet:8:0: " in first.stderr
    assert "only-failed" in first.stderr
    # All is there and accounted for, though nobody is told that the job succeeded.
    assert not (output / "_SUCCESS").exists()
    assert "too many rows in errors" in (output / "_specbatch" / "report.html").read_text()
    assert "has ended with too many rows in errors" in call("report", output).stdout
    status = json.loads(call("status", output, "--json").stdout)
    assert status["state"] == "failed" and status["message"].startswith("1 of 9 rows failed")

    assert call("run", file, *few).exit_code == 4
    accepted = call("run", file, "--set", "max_error_share=0.2", "--quiet")
    assert (accepted.exit_code, accepted.output) == (0, "")
    assert call("verify", output).exit_code == 0
    assert call("run", file, "--set", "max_error_share=0.2").exit_code == 0
    assert call("run", file, *few).exit_code == 4
    assert not (output / "_SUCCESS").exists()


@pytest.mark.ray
def test_a_gpu_where_there_is_none(local_ray: None, job_file: JobFile) -> None:
    message = one_error(call("run", job_file(), "--quiet", "--set", "actors.num_gpus=1"))
    assert "needs 1 GPU" in message


def test_report_of_what_is_no_job(tmp_path: Path) -> None:
    assert "no job's output here" in one_error(call("report", tmp_path))
