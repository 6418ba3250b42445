"""The recipe's schedule, written for what runs it, as `specbatch render` writes a job's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jobs.cluster import manifests
from jobs.cluster.airflow import airflow_dag
from jobs.cluster.manifests import Pods
from jobs.nightly.recipe import Recipe
from pipeline.config.job import JobConfig


@dataclass(frozen=True)
class Scheduled:
    """What is to run, and where.

    Attributes:
        recipe: the recipe.
        file: its file on this machine.
        pods: those of a Ray cluster that KubeRay brings up for the night; and the overrides of the
            recipe, whatever runs it.
        kubectl: an image that has kubectl.
    """

    recipe: Recipe
    file: Path
    pods: Pods
    kubectl: str = "registry.k8s.io/kubectl:v1.34.0"

    @property
    def job(self) -> JobConfig:
        """The job by whose name and actors a night is known to schedulers."""
        return self.recipe.job.model_copy(
            update={
                "name": f"nightly-{self.recipe.name}",
                "output": self.recipe.output,
                "input": self.recipe.job.input.model_copy(
                    update={"paths": self.recipe.seeds.paths}
                ),
            }
        )


def render(kind: str, scheduled: Scheduled) -> str:
    """The schedule as text.

    Args:
        kind: one of KINDS.
        scheduled: what is to run.

    Raises:
        UserError: for pods: a local path that none of their volumes holds.
    """
    return _RENDERERS[kind](scheduled)


def _cron(scheduled: Scheduled) -> str:
    recipe, file = scheduled.recipe, scheduled.file.resolve()
    line = manifests.crontab_line(
        [*manifests.program(), "nightly", str(file), "--quiet", *_changes(scheduled)],
        recipe.schedule.cron,
        Path.cwd(),
        file.with_suffix(".lock"),
        file.with_suffix(".log"),
    )
    zone = recipe.schedule.timezone
    return f"# {recipe.name}: cron's own time zone should be {zone}\n{line}"


def _airflow(scheduled: Scheduled) -> str:
    recipe, zone = scheduled.recipe, scheduled.recipe.schedule.timezone
    command = ["specbatch", "nightly", str(scheduled.file.resolve()), "--quiet"]
    command += _changes(scheduled)
    # Double quotes, since a shell's single ones are put around it before Airflow fills it in.
    command += ["--date", f'{{{{ data_interval_end.in_timezone("{zone}") | ds }}}}']
    command += ["--catch-up", str(recipe.catch_up)]
    cron = recipe.schedule.cron
    return airflow_dag(scheduled.job, command, cron, Path.cwd(), zone)


def _changes(scheduled: Scheduled) -> list[str]:
    """The keys of the recipe that are overridden, as options."""
    return [part for override in scheduled.pods.overrides for part in ("--set", override)]


def _kuberay(scheduled: Scheduled) -> str:
    job, pods, schedule = scheduled.job, scheduled.pods, scheduled.recipe.schedule
    manifests.check_paths(job, pods.volumes)
    # Before KubeRay 1.7 a RayCronJob takes no time zone, and UTC is what most operators have.
    zone = schedule.timezone if schedule.timezone != "UTC" else None
    return manifests.dump(manifests.ray_cron_job(job, pods, schedule.cron, zone))


def _kubernetes(scheduled: Scheduled) -> str:
    job, pods, schedule = scheduled.job, scheduled.pods, scheduled.recipe.schedule
    manifests.check_paths(job, pods.volumes)
    made = manifests.cron_job(job, pods, schedule.cron, schedule.timezone, scheduled.kubectl)
    return manifests.dump(made)


_RENDERERS: dict[str, Callable[[Scheduled], str]] = {
    "cron": _cron,
    "airflow": _airflow,
    "kuberay": _kuberay,
    "kubernetes": _kubernetes,
}
KINDS = tuple(_RENDERERS)
