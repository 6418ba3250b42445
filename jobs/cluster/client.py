"""A Ray cluster from outside: its Job Submission API, and what a job becomes to run there.

The job file travels as data, with the paths that it names resolved here; code is the cluster's own
installed package, or the packages of the working directory. Nothing secret is sent: an entrypoint,
metadata and runtime environment can be read by everybody who can open the dashboard. Credentials
are looked up on the cluster, in the environment of its nodes.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import secrets
import shlex
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from pipeline.config.job import JobConfig
from pipeline.errors import UserError
from pipeline.run.ray_address import TOKEN_FIX, find_token

PACKAGES = ("jobs", "pipeline", "specdec")
"""What a checkout of specbatch consists of, and what `--code working-dir` uploads."""

ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Where Ray's own tools look for a cluster, in their order."""

_METADATA = "specbatch"
"""Key of a Ray job's metadata that marks it as submitted from here."""

_JOB_FILE = "job.yaml"
"""Name of the job file in the working directory that the cluster's driver starts in."""

_CONNECT_SECONDS = 10
"""Longest wait for the dashboard's first answer. Ray's client itself would wait for ever."""

_SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|ACCESS_KEY|API_KEY|PRIVATE", re.IGNORECASE)
"""Names of variables that `--env` refuses."""


class Code(StrEnum):
    """The code that runs on the cluster."""

    installed = "installed"
    working_dir = "working-dir"


@dataclass(frozen=True)
class Submission:
    """How a job is run on a cluster.

    Attributes:
        code: what code runs there.
        python: the interpreter there; a name is looked up in the PATH of the head's Ray.
        environment: variables for the job's processes; nothing secret.
        stop_seconds: how long the units in flight may take after the job was asked to stop.
        take_over: whether a run that is at work on the output is to end.
    """

    code: Code = Code.installed
    python: str = "python"
    environment: dict[str, str] = field(default_factory=dict)
    stop_seconds: int = 3600
    take_over: bool = False


@dataclass(frozen=True)
class ClusterJob:
    """A job on a cluster, as its Job Submission API tells of it.

    Attributes:
        id: its submission id.
        name: the job file's name for it.
        state: `pending`, `running`, `stopped`, `succeeded` or `failed`.
        message: what Ray says about that.
        exit_code: of its driver, once that has ended by itself.
        started, ended: seconds since the epoch.
        output: its output folder.
        config: the job itself, as it was submitted.
        submission: how it was.
    """

    id: str
    name: str
    state: str
    message: str
    exit_code: int | None
    started: float | None
    ended: float | None
    output: str
    config: dict[str, Any]
    submission: Submission

    @property
    def over(self) -> bool:
        """Whether it runs no more."""
        return self.state in {"stopped", "succeeded", "failed"}


def find_address(address: str | None) -> str:
    """The URL of the cluster's dashboard: the option, or the variables that Ray reads.

    Raises:
        UserError: none is given, or one that is no URL of a dashboard.
    """
    given, origin = address, "--address"
    for variable in ADDRESS_VARIABLES:
        value = os.environ.get(variable, "")
        if given is None and (variable != "RAY_ADDRESS" or value.startswith("http")):
            given, origin = value or None, variable
    if not given:
        raise UserError(
            "--address: which cluster? Give the URL of its dashboard, such as "
            f"--address http://HEAD:8265, or set {ADDRESS_VARIABLES[0]}"
        )
    url = given if "://" in given else f"http://{given}"
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise UserError(
            f"{origin}: {parts.scheme}:// is no URL of a dashboard; write http://HEAD:8265"
        )
    if parts.username or parts.password:
        raise UserError(f"{origin}: must not hold a user name or password")
    return url.rstrip("/")


class Cluster:
    """A connection to the Job Submission API of a running Ray.

    A Ray that asks for a token is sent the one that Ray's own tools would send; see `find_token`.

    Args:
        address: URL of its dashboard.

    Raises:
        UserError: no Ray answers there, it refuses the token, or the client is not installed.
    """

    def __init__(self, address: str) -> None:
        if importlib.util.find_spec("aiohttp") is None:
            raise UserError(
                "submitting to a cluster needs Ray's client for it: "
                "pip install '.[submit]' in the checkout (or 'ray[default]')"
            )
        self.address = address
        headers = self._headers()
        from ray.job_submission import JobSubmissionClient

        with self._explained(), _without(ADDRESS_VARIABLES):  # Ray prefers them to the argument
            self._client = JobSubmissionClient(address, headers=headers)

    def _headers(self) -> dict[str, str]:
        """Ask for the dashboard's version. Returns the token's header if it wants a token."""
        import requests

        try:
            answer = requests.get(f"{self.address}/api/version", timeout=_CONNECT_SECONDS)
        except requests.RequestException as error:
            raise UserError(
                f"--address: no Ray dashboard answers at {self.address} ({type(error).__name__}); "
                "is it the dashboard's port (8265), and is 'ray[default]' installed on the head?"
            ) from None
        if answer.status_code not in (401, 403):
            return {}
        token = find_token()
        if token is None:
            raise UserError(f"{self.address} asks for a token: {TOKEN_FIX}")
        return {"Authorization": f"Bearer {token}"}

    @contextmanager
    def _explained(self, job_id: str | None = None) -> Iterator[None]:
        """Turn what Ray's client raises into an error for the user, where it is the user's."""
        from ray.exceptions import AuthenticationError

        logging.disable(logging.INFO)  # Ray's client tells of each request
        try:
            yield
        except AuthenticationError:
            raise UserError(f"{self.address} does not take this token: {TOKEN_FIX}") from None
        except RuntimeError as error:
            message = str(error)
            if job_id is not None and ("404" in message or "does not exist" in message):
                raise UserError(
                    f"{job_id}: no such job on {self.address}; `specbatch list` shows them"
                ) from None
            raise
        finally:
            logging.disable(logging.NOTSET)

    def submit(self, job: JobConfig, how: Submission) -> str:
        """Have the cluster run a job. Returns its id.

        Raises:
            UserError: the working directory holds no specbatch, though its code should run.
        """
        from pipeline.commit.manifest import versions

        stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        config = job.model_dump(mode="json", exclude_unset=True)
        runtime_env: dict[str, Any] = {
            # Ray kills a job 3 seconds after it asked it to stop, unless this says otherwise.
            "env_vars": {**how.environment, "RAY_JOB_STOP_WAIT_TIME_S": str(how.stop_seconds)}
        }
        if how.code is Code.working_dir:
            runtime_env["py_modules"] = source_folders(Path.cwd())
            runtime_env["excludes"] = ["__pycache__"]
        command = [how.python, "-m", "jobs.cli", "run", _JOB_FILE]
        command += ["--take-over"] if how.take_over else []
        record = {"version": versions()["specbatch"], "submission": asdict(how), "job": config}
        with tempfile.TemporaryDirectory() as folder, self._explained():
            Path(folder, _JOB_FILE).write_text(yaml.safe_dump(config, sort_keys=False))
            return str(
                self._client.submit_job(
                    submission_id=f"{job.name}-{stamp}-{secrets.token_hex(2)}",
                    entrypoint=shlex.join(command),
                    runtime_env={**runtime_env, "working_dir": folder},
                    metadata={"job_name": job.name, _METADATA: json.dumps(record)},
                )
            )

    def jobs(self) -> list[ClusterJob]:
        """The jobs of specbatch that this cluster knows of, latest first."""
        with self._explained():
            found = [_described(details) for details in self._client.list_jobs()]
        jobs = [job for job in found if job is not None]
        return sorted(jobs, key=lambda job: job.started or 0.0, reverse=True)

    def job(self, job_id: str) -> ClusterJob:
        """One job.

        Raises:
            UserError: there is no such job, or specbatch did not submit it.
        """
        with self._explained(job_id):
            job = _described(self._client.get_job_info(job_id))
        if job is None:
            raise UserError(f"{job_id}: not a job that `specbatch submit` has submitted")
        return job

    def stop(self, job_id: str) -> bool:
        """Ask a job to stop cleanly. Returns False if it was over already.

        Raises:
            UserError: there is no such job.
        """
        with self._explained(job_id):
            return bool(self._client.stop_job(job_id))

    def logs(self, job_id: str) -> str:
        """What a job's driver has printed so far.

        Raises:
            UserError: there is no such job.
        """
        with self._explained(job_id):
            return str(self._client.get_job_logs(job_id))

    async def follow_logs(self, job_id: str) -> AsyncIterator[str]:
        """What a job's driver prints, from its start, until the job is over."""
        with self._explained(job_id):
            async for text in self._client.tail_job_logs(job_id):
                yield text


def _described(details: Any) -> ClusterJob | None:
    """A job as Ray tells of it; None if it is not one of specbatch's."""
    metadata = details.metadata or {}
    if details.submission_id is None or _METADATA not in metadata:
        return None
    record = json.loads(metadata[_METADATA])
    how = record["submission"]
    return ClusterJob(
        id=details.submission_id,
        name=metadata["job_name"],
        state=details.status.value.lower(),
        message=details.message or "",
        exit_code=details.driver_exit_code,
        started=details.start_time and details.start_time / 1000,
        ended=details.end_time and details.end_time / 1000,
        output=record["job"]["output"],
        config=record["job"],
        submission=Submission(**{**how, "code": Code(how["code"])}),
    )


def source_folders(folder: Path) -> list[str]:
    """The packages of a checkout of specbatch.

    Raises:
        UserError: it is none.
    """
    for package in PACKAGES:
        if not (folder / package / "__init__.py").is_file():
            raise UserError(
                f"--code working-dir: {folder} is no checkout of specbatch: it has no {package}/; "
                "go to one, or use --code installed"
            )
    return [str(folder / package) for package in PACKAGES]


def environment(settings: Sequence[str]) -> dict[str, str]:
    """Variables for the job's processes from NAME=VALUE.

    Raises:
        UserError: it is written otherwise, or its name says that it is secret.
    """
    found = {}
    for setting in settings:
        name, separator, value = setting.partition("=")
        if not separator or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise UserError(f"--env {name}: write it as NAME=VALUE, such as HF_HUB_OFFLINE=1")
        if _SECRET.search(name):
            raise UserError(
                f"--env {name}: looks like a secret, and everybody who can open the dashboard "
                "could read it; set it where the cluster's nodes start Ray"
            )
        found[name] = value
    return found


@contextmanager
def _without(variables: Sequence[str]) -> Iterator[None]:
    kept = {name: os.environ.pop(name) for name in variables if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)
