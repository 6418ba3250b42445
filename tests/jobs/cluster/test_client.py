"""Jobs on a real Ray: a head with its dashboard and token authentication, beside the tests."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import yaml
from ray.job_submission import JobDetails, JobSubmissionClient, JobType
from ray.job_submission import JobStatus as RayStatus
from typer.testing import CliRunner, Result

from jobs.cli import app
from jobs.cluster import client
from jobs.cluster.client import environment, find_address, source_folders
from jobs.cluster.commands import _exit_code
from pipeline.errors import UserError
from pipeline.run.ray_address import find_token
from tests.conftest import RAY_WORKERS, TinyModels, free_port

ROOT = Path(__file__).parents[3]
TOKEN = "c0ffee00c0ffee00c0ffee00c0ffee00"
SECRET = "a-key-of-the-nodes-that-nobody-may-see"


@dataclass(frozen=True)
class Head:
    """A running head, and its user's commands."""

    address: str
    gcs: str

    def call(self, *arguments: object, token: str = TOKEN) -> Result:
        """What a command of specbatch does."""
        env = {"RAY_API_SERVER_ADDRESS": self.address, "RAY_AUTH_TOKEN": token}
        cwd = os.getcwd()
        os.chdir(ROOT)  # a checkout, for --code working-dir
        try:
            return CliRunner(env=env).invoke(app, [str(a) for a in arguments])
        finally:
            os.chdir(cwd)

    def ok(self, *arguments: object) -> str:
        """What a command prints that succeeds."""
        result = self.call(*arguments)
        assert result.exit_code == 0, result.output
        return result.stdout

    def status(self, target: object) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.ok("status", target, "--json"))
        return found


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A head of two cores whose processes have a secret, and find the packages where they are."""
    folder = tempfile.mkdtemp(prefix="sb")  # short: it holds sockets
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "AWS_"))}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "AWS_SECRET_ACCESS_KEY": SECRET}
    env |= {
        **RAY_WORKERS,
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{env['PATH']}",
    }
    port, dashboard, agent = free_port(), free_port(), free_port()
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    command += ["--node-ip-address=127.0.0.1", f"--port={port}", f"--temp-dir={folder}/ray"]
    command += ["--num-cpus=2", f"--dashboard-port={dashboard}", "--disable-usage-stats"]
    command += [f"--dashboard-agent-listen-port={agent}", "--object-store-memory=100000000"]
    command += ["--min-worker-port=0", "--max-worker-port=0"]
    with open(f"{folder}/log", "w") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        _wait_for(address, process)
        yield Head(address, f"127.0.0.1:{port}")
    finally:
        # All at once, since they have nothing to save.
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait(20)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for(address: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/api/version", timeout=5)
        except urllib.error.HTTPError as error:
            assert error.code == 401  # it asks for the token
            return
        except OSError:
            time.sleep(0.3)
    pytest.fail("Ray's head did not start")


@pytest.fixture
def job_file(tiny_models: TinyModels, tmp_path: Path) -> Path:
    """A job of 24 rows in 2 units."""
    from pyarrow import table

    pq.write_table(table({"prompt": [f"say {i}" for i in range(24)]}), tmp_path / "in.parquet")
    job = {
        "name": "tiny",
        "input": {"paths": "in.parquet", "prompt_column": "prompt"},
        "output": "out",
        "models": {"target": tiny_models.target, "draft": tiny_models.draft},
        "sampling": {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True},
        "actors": {"slots": 2},
        "unit_rows": 12,
    }
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(job))
    return file


def submitted(text: str) -> str:
    """The job's id."""
    word, job_id = text.splitlines()[0].split()
    assert word == "submitted"
    return job_id


@pytest.mark.ray
def test_a_job_on_a_cluster(
    head: Head, job_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # where no token is
    for token, message in (("", "asks for a token"), ("wrong" * 7, "does not take this token")):
        refused = head.call("list", token=token)
        assert refused.exit_code == 2
        assert refused.stderr.startswith(f"error: {head.address} {message}")
    assert "No jobs yet" in head.ok("list")

    followed = head.ok("submit", job_file, "--follow", "--set", "sampling.seed=3")
    job_id = submitted(followed)
    assert job_id.startswith("tiny-")
    assert "rows completed" in followed
    assert head.call("logs", job_id).stdout.rstrip() in followed

    by_job, by_folder = head.status(job_id), head.status(tmp_path / "out")
    assert by_job.pop("job") == {
        "id": job_id,
        "state": "succeeded",
        "message": "Job finished successfully.",
    }
    assert by_folder.pop("job") is None
    assert by_job == by_folder
    expected = {"state": "finished", "rows": 24, "rows_total": 24, "units": 2, "units_total": 2}
    assert expected.items() <= by_job.items()
    assert by_job["output_tokens"] >= 24 * 8
    assert by_job["spent"] > 0

    # The job is what was submitted, its overrides included.
    record = json.loads((tmp_path / "out/_specbatch/job.json").read_text())
    assert record["config"]["sampling"]["seed"] == 3
    [listed] = json.loads(head.ok("list", "--json"))
    assert (listed["id"], listed["state"]) == (job_id, "succeeded")
    assert "Nothing to stop: this job is succeeded" in head.ok("stop", job_id)
    assert "this job is done" in head.ok("resume", job_id)
    unknown = head.call("status", "tiny-nobody")
    assert unknown.exit_code == 2
    assert "no such job" in unknown.stderr

    # Everybody who can open the dashboard sees these.
    shown = urllib.request.urlopen(
        urllib.request.Request(
            f"{head.address}/api/jobs/{job_id}", headers={"Authorization": f"Bearer {TOKEN}"}
        )
    ).read()
    for secret in (TOKEN, SECRET):
        assert secret.encode() not in shown
        assert secret not in followed


CONNECT = """
from pipeline.run.ray_session import connected

with connected():
    import ray
    print("nodes:", len(ray.nodes()))
"""


@pytest.mark.ray
@pytest.mark.parametrize(
    ("token", "end"),
    [
        (TOKEN, ""),
        ("", "asks for a token: set RAY_AUTH_TOKEN"),
        ("wrong" * 7, "asks for a token, and does not take this one: set RAY_AUTH_TOKEN"),
    ],
)
def test_run_gives_the_token_that_submit_gives(
    head: Head, tmp_path: Path, token: str, end: str
) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    env |= {"RAY_ADDRESS": head.gcs, "RAY_AUTH_TOKEN": token, "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", CONNECT], cwd=ROOT, env=env, capture_output=True, text=True
    )
    if not end:
        assert done.stdout == "nodes: 1\n", done.stderr
        return
    said = done.stderr.splitlines()[-1]
    assert f"UserError: RAY_ADDRESS: the Ray cluster at {head.gcs} {end}" in said


@pytest.mark.ray
def test_a_ray_job_that_no_retry_can_mend_is_stopped_and_not_failed(head: Head) -> None:
    """KubeRay retries what failed, but not what was stopped."""
    ray_client = JobSubmissionClient(head.address, headers={"Authorization": f"Bearer {TOKEN}"})
    submitted_id = ray_client.submit_job(
        entrypoint=f"{sys.executable} -m jobs.cli validate /nowhere/job.yaml",
        runtime_env={"env_vars": {"SPECBATCH_STOP_RAY_JOB": "1"}},
    )
    _until(lambda: ray_client.get_job_status(submitted_id).is_terminal())
    log = ray_client.get_job_logs(submitted_id)
    assert ray_client.get_job_status(submitted_id) == RayStatus.STOPPED, log
    assert "error: /nowhere/job.yaml: no such job file" in log
    assert "no retry can mend this" in log


@pytest.mark.ray
@pytest.mark.slow
def test_stop_and_resume(head: Head, job_file: Path, tmp_path: Path) -> None:
    long = ("--set", "sampling.max_new_tokens=200", "--set", "unit_rows=1", "--code", "working-dir")
    job_id = submitted(head.ok("submit", job_file, *long))
    _until(lambda: len(list(tmp_path.glob("out/completions/*"))) >= 2)
    still = head.call("resume", job_id)
    assert still.exit_code == 2
    assert "still running; stop it first" in still.stderr
    assert "stopping" in head.ok("stop", job_id, "--wait")
    halted = head.status(job_id)
    assert (halted["state"], halted["finished"]) == ("stopped", False)
    assert 2 <= halted["units"] < 24
    # What was in flight was committed: no row that was completed is missing.
    assert halted["units"] == halted["rows"]

    resumed = head.call("resume", job_id, "--wait")
    assert resumed.exit_code == 0, resumed.output
    done = head.status(tmp_path / "out")
    assert (done["state"], done["units"], done["rows"]) == ("finished", 24, 24)
    assert len(list(tmp_path.glob("out/completions/*"))) == 24


@pytest.mark.ray
@pytest.mark.slow
def test_stop_by_the_output_folder(head: Head, job_file: Path, tmp_path: Path) -> None:
    long = ("--set", "sampling.max_new_tokens=200", "--set", "unit_rows=1")
    job_id = submitted(head.ok("submit", job_file, *long))
    _until(lambda: len(list(tmp_path.glob("out/completions/*"))) >= 2)
    assert "stopping" in head.ok("stop", tmp_path / "out", "--wait")
    assert head.status(tmp_path / "out")["state"] == "stopped"
    assert "Nothing to stop" in head.ok("stop", tmp_path / "out")
    _until(lambda: head.status(job_id)["job"]["state"] == "failed")  # Ray did not stop it
    assert head.status(job_id)["state"] == "stopped"


@pytest.mark.ray
@pytest.mark.slow
def test_a_job_that_fails_says_why(head: Head, job_file: Path) -> None:
    missing = ("--set", "input.paths=/nowhere/*.parquet")
    failed = head.call("submit", job_file, "--wait", *missing)
    assert failed.exit_code == 2  # as `run` has it
    assert "error: input.paths: /nowhere/*.parquet" in failed.stdout
    no_python = head.call("submit", job_file, "--wait", "--python", "no-such-python")
    assert no_python.exit_code == 1
    assert "no-such-python" in no_python.stdout


@pytest.mark.parametrize(
    ("state", "driver", "code"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 1, 1),
        ("FAILED", 3, 3),  # a budget
        ("FAILED", 4, 4),
        ("FAILED", 130, 130),  # stopped by its output folder
        ("FAILED", None, 1),  # its head died
        ("FAILED", -9, 1),
        ("FAILED", 127, 1),
        ("STOPPED", None, 130),
        ("STOPPED", 3, 130),
    ],
)
def test_the_exit_code_of_waiting_is_that_of_running(
    state: str, driver: int | None, code: int
) -> None:
    record = {"submission": {"code": "installed"}, "job": {"output": "out"}}
    metadata = {"job_name": "tiny", "specbatch": json.dumps(record)}
    details = JobDetails(
        type=JobType.SUBMISSION,
        submission_id="tiny-1",
        entrypoint="",
        status=RayStatus(state),
        metadata=metadata,
        driver_exit_code=driver,
    )
    described = client._described(details)
    assert described is not None
    assert _exit_code(described) == code


def _until(condition: Any) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.2)


# ------------------------------------------------------------------ without a Ray


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No address and no token in the environment."""
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_addresses(bare: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--address: which cluster"):
        find_address(None)
    bare.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # not a dashboard
    with pytest.raises(UserError, match="--address: which cluster"):
        find_address(None)
    bare.setenv("RAY_ADDRESS", "http://a:8265/")
    assert find_address(None) == "http://a:8265"
    bare.setenv("RAY_API_SERVER_ADDRESS", "b:8265")
    assert find_address(None) == "http://b:8265"
    assert find_address("https://c/ray") == "https://c/ray"
    with pytest.raises(UserError, match="--address: ray:// is no URL of a dashboard"):
        find_address("ray://a:10001")
    with pytest.raises(UserError, match="must not hold a user name or password") as error:
        find_address("http://me:hunter2@a:8265")
    assert "hunter2" not in str(error.value)


def test_tokens(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bare.setenv("HOME", str(tmp_path))
    assert find_token() is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("home\n")
    assert find_token() == "home"
    bare.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"RAY_AUTH_TOKEN_PATH: .*none cannot be read"):
        find_token()
    (tmp_path / "none").write_text("file")
    assert find_token() == "file"
    bare.setenv("RAY_AUTH_TOKEN", "variable")
    assert find_token() == "variable"


def test_nobody_answers(bare: pytest.MonkeyPatch, job_file: Path) -> None:
    result = CliRunner().invoke(app, ["list", "-a", f"http://127.0.0.1:{free_port()}"])
    assert result.exit_code == 2
    assert "no Ray dashboard answers at" in result.stderr


def test_a_client_that_is_not_installed(bare: pytest.MonkeyPatch) -> None:
    bare.setattr(client.importlib.util, "find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["list", "-a", "http://127.0.0.1:1"])
    assert result.exit_code == 2
    assert "pip install '.[submit]'" in result.stderr


def test_variables_for_the_job() -> None:
    assert environment(["HF_HUB_OFFLINE=1", "A=b=c"]) == {"HF_HUB_OFFLINE": "1", "A": "b=c"}
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "openai_api_key"):
        with pytest.raises(UserError, match=f"--env {name}: looks like a secret") as error:
            environment([f"{name}=hunter2"])
        assert "hunter2" not in str(error.value)
    with pytest.raises(UserError, match="write it as NAME=VALUE"):
        environment(["no-name"])


def test_code_of_the_working_directory(tmp_path: Path) -> None:
    assert [Path(folder).name for folder in source_folders(ROOT)] == ["jobs", "pipeline", "specdec"]
    with pytest.raises(UserError, match="no checkout of specbatch: it has no jobs/"):
        source_folders(tmp_path)
