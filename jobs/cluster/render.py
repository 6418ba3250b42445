"""`specbatch render`: a job as a manifest, a crontab line or an Airflow DAG."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from jobs.cluster import manifests
from jobs.cluster.airflow import airflow_dag
from jobs.cluster.client import find_address
from jobs.cluster.commands import PathsOnCluster
from jobs.cluster.manifests import Pods
from jobs.job_file import load_job
from jobs.terminal.console import explained
from jobs.terminal.options import JobFile, Overrides
from pipeline.config.job import JobConfig
from pipeline.errors import UserError

app = typer.Typer(
    help="Write a job for a scheduler to run: KubeRay, cron or Airflow. Prints to the terminal.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        "-a",
        metavar="URL",
        help="The cluster's dashboard; without it the job runs on the machine of the scheduler.",
        show_default=False,
    ),
]


@app.command()
def kuberay(
    file: JobFile,
    image: Annotated[
        str, typer.Option(help="Container image that has specbatch and Ray.", show_default=False)
    ],
    schedule: Annotated[
        str | None,
        typer.Option(
            metavar="CRON",
            help="When to run, such as `0 2 * * *`: a RayCronJob (KubeRay 1.6, behind its feature "
            "gate RayCronJob).",
            show_default=False,
        ),
    ] = None,
    cron_job: Annotated[
        bool,
        typer.Option(
            "--cron-job",
            help="With --schedule: a CronJob of Kubernetes that creates the RayJob, for any "
            "KubeRay.",
        ),
    ] = False,
    time_zone: Annotated[
        str | None,
        typer.Option(
            help="Time zone of the schedule, such as Europe/Paris. A RayCronJob takes it from "
            "KubeRay 1.7 on.",
            show_default=False,
        ),
    ] = None,
    secret: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A Secret whose keys become environment variables of the pods, such as "
            "`AWS_ACCESS_KEY_ID`.",
            show_default=False,
        ),
    ] = None,
    volume: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CLAIM:/PATH",
            help="A persistent volume claim to mount in every pod.",
            show_default=False,
        ),
    ] = None,
    service_account: Annotated[
        str | None,
        typer.Option(help="Whose cloud role the pods have, for S3.", show_default=False),
    ] = None,
    memory: Annotated[
        str, typer.Option(help="Memory of a worker, which holds one actor.")
    ] = "16Gi",
    head_memory: Annotated[str, typer.Option(help="Memory of the head.")] = "8Gi",
    token_auth: Annotated[
        bool, typer.Option("--token-auth", help="Ray with token authentication (KubeRay 1.5.1).")
    ] = False,
    retries: Annotated[
        int, typer.Option(min=0, help="New clusters after a failure; each resumes the job.")
    ] = 2,
    kubectl: Annotated[
        str, typer.Option(help="Image that has kubectl, with --cron-job.")
    ] = "registry.k8s.io/kubectl:v1.34.0",
    overrides: Overrides = None,
) -> None:
    r"""Write a RayJob, or with a schedule a RayCronJob or CronJob, and the job file's ConfigMap.

    Paths of the job are those in the pods: `s3://`, or on a mounted volume. Secrets are named,
    never written. `$(...)` in an override is left to the shell of each run, so that each night has
    an output of its own.

    For example:

        specbatch render kuberay job.yaml --image my/image:1 --secret s3-keys | kubectl apply -f -
        specbatch render kuberay job.yaml --image my/image:1 --schedule '0 2 * * *' \
            --set 'output=s3://b/out/$(date -u +%F)' > nightly.yaml
    """
    with explained():
        load_job(file, overrides or [])
        later = [override for override in overrides or [] if manifests.left_to_shell(override)]
        job = load_job(file, [override for override in overrides or [] if override not in later])
        volumes = tuple(manifests.parse_volume(text) for text in volume or [])
        manifests.check_paths(job, volumes)
        pods = Pods(
            image=image,
            secrets=tuple(secret or []),
            volumes=volumes,
            memory=memory,
            head_memory=head_memory,
            service_account=service_account,
            token_authentication=token_auth,
            retries=retries,
            overrides=tuple(later),
        )
        if schedule is None:
            if cron_job or time_zone:
                raise UserError("--cron-job and --time-zone go with --schedule")
            documents = manifests.ray_job(job, pods)
        elif cron_job:
            check_schedule(schedule)
            documents = manifests.cron_job(job, pods, schedule, time_zone, kubectl)
        else:
            check_schedule(schedule)
            documents = manifests.ray_cron_job(job, pods, schedule, time_zone)
        print(manifests.dump(documents), end="")


@app.command()
def cron(
    file: JobFile,
    schedule: Annotated[str, typer.Option(metavar="CRON", help="When to run.")] = "0 2 * * *",
    address: Address = None,
    paths_on_cluster: PathsOnCluster = False,
    overrides: Overrides = None,
) -> None:
    """Write a line for a crontab.

    A line begins nothing while the last one's job is still running, and what it prints is added to
    FILE.log. `$(...)` in an override is left to cron's shell.

    For example:

        specbatch render cron job.yaml -a http://head:8265 --set 'output=s3://b/out/$(date +%F)'
    """
    with explained():
        check_schedule(schedule)
        job = load_job(file, overrides or [])
        file = file.resolve()
        begun = _command(job, file, address, paths_on_cluster, overrides)
        command = [*manifests.program(), *begun]
        lock, log = file.with_suffix(".lock"), file.with_suffix(".log")
        print(manifests.crontab_line(command, schedule, Path.cwd(), lock, log), end="")


@app.command()
def airflow(
    file: JobFile,
    schedule: Annotated[
        str | None, typer.Option(metavar="CRON", help="When to run; without it, by hand.")
    ] = None,
    address: Address = None,
    paths_on_cluster: PathsOnCluster = False,
    overrides: Overrides = None,
) -> None:
    """Write an Airflow DAG of one task, which a retry resumes.

    Airflow fills in its templates in overrides, such as `{{ ds }}`, the date of the run. Its
    workers need `specbatch` on their PATH: they may be other machines than this one.

    For example:

        specbatch render airflow job.yaml --schedule '0 2 * * *' --set 'output=s3://b/out/{{ ds }}'
    """
    with explained():
        if schedule is not None:
            check_schedule(schedule)
        job = load_job(file, overrides or [])
        begun = _command(job, file.resolve(), address, paths_on_cluster, overrides)
        command = ["specbatch", *begun]
        print(airflow_dag(job, command, schedule, Path.cwd()), end="")


def _command(
    job: JobConfig,
    file: Path,
    address: str | None,
    paths_on_cluster: bool,
    overrides: list[str] | None,
) -> list[str]:
    """What is run each time: `submit --wait` on a cluster, or `run` here."""
    changes = [part for override in overrides or [] for part in ("--set", override)]
    if address is None:
        return ["run", str(file), "--quiet", *changes]
    url = find_address(address)
    submit = ["submit", str(file), "--address", url, "--wait"]
    if paths_on_cluster:
        return [*submit, "--paths-on-cluster", *changes]
    from jobs.cluster.local_paths import refuse_local_paths

    refuse_local_paths(job, url)
    return [*submit, *changes]


def check_schedule(schedule: str) -> None:
    """Refuse what cron does not take.

    Raises:
        UserError: it has not five fields of cron's characters, and is no word such as @daily.
    """
    word = re.fullmatch(r"@(hourly|daily|midnight|weekly|monthly|yearly|annually)", schedule)
    fields = schedule.split()
    cron = len(fields) == 5 and all(re.fullmatch(r"[\w*/,?-]+", field) for field in fields)
    if not word and not cron:
        raise UserError(
            f"--schedule {schedule!r}: write cron's five fields (minute hour day month weekday), "
            "such as '0 2 * * *' for two at night"
        )
