"""The recipe's schedule, written for what runs it: cron, Kubernetes, KubeRay, Airflow."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from jobs.nightly.recipe import Recipe

_MOUNT, _KEY = "/recipes", "recipe.yaml"


@dataclass(frozen=True)
class Scheduled:
    """What is to run, and where.

    Attributes:
        recipe: the recipe.
        file: its file on this machine.
        image: container image that has specbatch and its models' access.
        address: of a Ray cluster that is there already, for Kubernetes.
    """

    recipe: Recipe
    file: Path
    image: str
    address: str

    @property
    def command(self) -> str:
        """In a container."""
        return f"specbatch nightly {_MOUNT}/{_KEY} --quiet"

    @property
    def label(self) -> str:
        """A name that Kubernetes accepts."""
        return re.sub(r"[^a-z0-9]+", "-", f"nightly-{self.recipe.name}".lower()).strip("-")[:52]


def render(what: str, scheduled: Scheduled) -> str:
    """The schedule as text, for `cron`, `kubernetes`, `kuberay` or `airflow`."""
    return _RENDERERS[what](scheduled)


def _cron(scheduled: Scheduled) -> str:
    recipe, file = scheduled.recipe, scheduled.file.resolve()
    program = Path(sys.argv[0]).resolve()
    command = str(program) if program.name == "specbatch" else "specbatch"
    log = file.with_suffix(".log")
    line = f"{shlex.quote(command)} nightly {shlex.quote(str(file))} --quiet"
    line = f"cd {shlex.quote(str(file.parent))} && {line} >> {shlex.quote(str(log))} 2>&1"
    escaped = line.replace("%", "\\%")  # an end of line, to cron
    zone = recipe.schedule.timezone
    note = f"# {recipe.name}; cron's own time zone should be {zone}, or set CRON_TZ where it can be"
    return f"{note}\n{recipe.schedule.cron} {escaped}\n"


def _container(scheduled: Scheduled, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "image": scheduled.image,
        "volumeMounts": [{"name": "recipe", "mountPath": _MOUNT}],
    }


def _volumes(scheduled: Scheduled) -> list[dict[str, Any]]:
    return [{"name": "recipe", "configMap": {"name": scheduled.label}}]


def _config_map(scheduled: Scheduled) -> dict[str, Any]:
    """The recipe itself; its paths must be s3:// or absolute in the image."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": scheduled.label},
        "data": {_KEY: scheduled.file.read_text(encoding="utf-8")},
    }


def _kubernetes(scheduled: Scheduled) -> str:
    container = _container(scheduled, "specbatch") | {
        "command": ["sh", "-c", scheduled.command],
        "env": [{"name": "RAY_ADDRESS", "value": scheduled.address}],
    }
    pod = {
        "restartPolicy": "Never",
        "containers": [container],
        "volumes": _volumes(scheduled),
    }
    job = {
        "apiVersion": "batch/v1",
        "kind": "CronJob",
        "metadata": {"name": scheduled.label},
        "spec": {
            "schedule": scheduled.recipe.schedule.cron,
            "timeZone": scheduled.recipe.schedule.timezone,
            "concurrencyPolicy": "Forbid",
            "jobTemplate": {"spec": {"backoffLimit": 2, "template": {"spec": pod}}},
        },
    }
    return _documents(scheduled, job)


def _kuberay(scheduled: Scheduled) -> str:
    actors = scheduled.recipe.job.actors
    resources: dict[str, Any] = {"cpu": f"{max(actors.num_cpus, 1):g}"}
    if actors.num_gpus:
        resources["nvidia.com/gpu"] = f"{max(1, round(actors.num_gpus))}"
    head = _container(scheduled, "ray-head")
    worker = _container(scheduled, "ray-worker") | {
        "resources": {"limits": resources, "requests": resources}
    }

    def group(container: dict[str, Any]) -> dict[str, Any]:
        pod = {"containers": [container], "volumes": _volumes(scheduled)}
        return {"rayStartParams": {}, "template": {"spec": pod}}

    job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayCronJob",
        "metadata": {"name": scheduled.label},
        "spec": {
            "schedule": scheduled.recipe.schedule.cron,
            "jobTemplate": {
                # Inside the cluster, RAY_ADDRESS is set for the entry point.
                "entrypoint": scheduled.command,
                "shutdownAfterJobFinishes": True,
                "backoffLimit": 2,
                "rayClusterSpec": {
                    # The head leads and holds no actor.
                    "headGroupSpec": group(head) | {"rayStartParams": {"num-cpus": "0"}},
                    "workerGroupSpecs": [
                        group(worker)
                        | {
                            "groupName": "actors",
                            "replicas": actors.min,
                            "minReplicas": actors.min,
                            "maxReplicas": actors.max_actors,
                        }
                    ],
                },
            },
        },
    }
    zone = scheduled.recipe.schedule.timezone
    note = (
        f"# KubeRay 1.6 or newer. The schedule counts in the operator's time zone, not in {zone}.\n"
    )
    return (note if zone != "UTC" else "# KubeRay 1.6 or newer.\n") + _documents(scheduled, job)


def _documents(scheduled: Scheduled, job: dict[str, Any]) -> str:
    documents = [_config_map(scheduled), job]
    return yaml.safe_dump_all(documents, sort_keys=False, allow_unicode=True, width=10_000)


def _airflow(scheduled: Scheduled) -> str:
    recipe, file = scheduled.recipe, scheduled.file.resolve()
    zone = recipe.schedule.timezone
    date = f"{{{{ data_interval_end.in_timezone({zone!r}) | ds }}}}"
    command = f"specbatch nightly {shlex.quote(str(file))} --quiet --date {date}"
    command += f" --catch-up {recipe.catch_up}"
    return f'''"""Made by specbatch for {os.path.basename(file)}."""

from datetime import timedelta

import pendulum

try:
    from airflow.providers.standard.operators.bash import BashOperator
    from airflow.sdk import DAG
except ImportError:  # Airflow 2
    from airflow import DAG
    from airflow.operators.bash import BashOperator

with DAG(
    dag_id={scheduled.label!r},
    schedule={recipe.schedule.cron!r},
    start_date=pendulum.datetime(2026, 1, 1, tz={zone!r}),
    catchup=False,  # specbatch makes missed nights up itself
    max_active_runs=1,
):
    BashOperator(
        task_id="night",
        bash_command={command!r},
        retries=2,
        retry_delay=timedelta(minutes={max(1, round(recipe.lock_minutes))}),
    )
'''


_RENDERERS: dict[str, Callable[[Scheduled], str]] = {
    "cron": _cron,
    "kubernetes": _kubernetes,
    "kuberay": _kuberay,
    "airflow": _airflow,
}
KINDS = tuple(_RENDERERS)
