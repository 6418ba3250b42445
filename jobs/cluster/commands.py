"""Commands for jobs on a Ray cluster: `submit`, `list`, `status`, `logs`, `stop`, `resume`."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.live import Live
from rich.markup import escape

from jobs.cluster.client import Cluster, ClusterJob, Code, Submission, environment, find_address
from jobs.job_file import load_job, s3_options
from jobs.terminal.console import EXIT_CODES, FAILURE, INTERRUPTED, err, explained, out
from jobs.terminal.options import AsJson, Endpoint, JobFile, Overrides, Profile, TakeOver
from pipeline.config.job import JobConfig
from pipeline.errors import UserError

if TYPE_CHECKING:
    # It loads Ray and torch, which --help does without.
    from jobs.cluster.status_view import View

_POLL_SECONDS = 2.0
"""Between two looks at a job that is waited for. Lower shows news sooner and asks more often."""

JobId = Annotated[
    str, typer.Argument(metavar="JOB", help="Id that `submit` printed.", show_default=False)
]
Target = Annotated[
    str,
    typer.Argument(
        metavar="JOB|OUT",
        help="A job on a cluster, or a job's output folder, local or `s3://`.",
        show_default=False,
    ),
]
Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        "-a",
        metavar="URL",
        help="The cluster's dashboard, such as `http://HEAD:8265`; else `$RAY_API_SERVER_ADDRESS`.",
        show_default=False,
    ),
]
CodeOption = Annotated[
    Code,
    typer.Option(
        help="What code runs there: the specbatch that is installed on the cluster, or that of "
        "the working directory, a checkout, which is uploaded.",
    ),
]
Wait = Annotated[
    bool,
    typer.Option(
        "--wait", help="Return when the job is over, with the exit code that `run` had there."
    ),
]
Follow = Annotated[
    bool, typer.Option("--follow", "-f", help="Show what the job prints until it is over.")
]

PathsOnCluster = Annotated[
    bool,
    typer.Option(
        "--paths-on-cluster", help="Local paths of the job exist on the cluster's nodes too."
    ),
]


def submit(
    file: JobFile,
    address: Address = None,
    code: CodeOption = Code.installed,
    wait: Wait = False,
    follow: Follow = False,
    overrides: Overrides = None,
    env: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="A variable for the job's processes, such as `HF_HUB_OFFLINE=1`. No secrets: the "
            "dashboard shows it.",
            show_default=False,
        ),
    ] = None,
    python: Annotated[
        str, typer.Option(help="Python on the cluster's head, if not the one in Ray's PATH.")
    ] = "python",
    stop_seconds: Annotated[
        int,
        typer.Option(min=1, help="After a stop, how long units in flight may take to complete."),
    ] = 3600,
    paths_on_cluster: PathsOnCluster = False,
    take_over: TakeOver = False,
) -> None:
    """Have a Ray cluster run a job.

    The job file is read here; the paths in it are the cluster's: `s3://`, or a disk that all of its
    nodes mount. Credentials are never sent: S3's come from the environment of the cluster's nodes
    (AWS variables, a profile, a role). A Ray with token authentication is sent the token of
    `RAY_AUTH_TOKEN`, `RAY_AUTH_TOKEN_PATH` or `~/.ray/auth_token`.

    For example:

        specbatch submit job.yaml --address http://head:8265
        specbatch submit job.yaml --follow --set output=s3://bucket/out/monday
        specbatch submit job.yaml --code working-dir      # from a checkout, with its changes
    """
    with explained():
        job = load_job(file, overrides or [])
        url = find_address(address)
        if not paths_on_cluster:
            from jobs.cluster.local_paths import refuse_local_paths

            refuse_local_paths(job, url)
        how = Submission(code, python, environment(env or []), stop_seconds, take_over)
        _submit(Cluster(url), job, how, wait, follow)


def _submit(cluster: Cluster, job: JobConfig, how: Submission, wait: bool, follow: bool) -> None:
    job_id = cluster.submit(job, how)
    out.print(f"[green]submitted[/] {escape(job_id)}", highlight=False, soft_wrap=True)
    if wait or follow:
        _attend(cluster, job_id, follow)
        return
    for command in ("status", "logs --follow", "stop"):
        line = f"  specbatch {command} {job_id} --address {cluster.address}"
        out.print(line, highlight=False, markup=False, soft_wrap=True)


def _attend(cluster: Cluster, job_id: str, follow: bool) -> None:
    """Stay until the job is over, and exit with a code for its state; Ctrl-C leaves it running."""
    try:
        if follow:
            asyncio.run(_print_logs(cluster, job_id))
        job = _wait(cluster, job_id)
    except KeyboardInterrupt:
        err.print(
            f"\nThe job goes on. To stop it: specbatch stop {job_id} --address {cluster.address}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        raise typer.Exit(INTERRUPTED) from None
    if not follow:
        _show(cluster, job)
    if code := _exit_code(job):
        raise typer.Exit(code)


def _exit_code(job: ClusterJob) -> int:
    """The exit code of a job that is over: its driver's own, if it ended by itself."""
    if job.state == "succeeded":
        return 0
    if job.state == "stopped":
        return INTERRUPTED
    return job.exit_code if job.exit_code in EXIT_CODES else FAILURE


def _show(cluster: Cluster, job: ClusterJob) -> None:
    from jobs.cluster.status_view import render, view_of_job

    out.print(render(view_of_job(job, cluster.logs(job.id))))


async def _print_logs(cluster: Cluster, job_id: str) -> None:
    async for text in cluster.follow_logs(job_id):
        sys.stdout.write(text)
        sys.stdout.flush()


def _wait(cluster: Cluster, job_id: str) -> ClusterJob:
    """Return when the job is over; a terminal shows meanwhile how far it is."""
    from jobs.cluster.status_view import render, view_of_job

    with Live(console=err, transient=True, auto_refresh=False) as live:
        while not (job := cluster.job(job_id)).over:
            if err.is_terminal:
                live.update(render(view_of_job(job, cluster.logs(job_id))), refresh=True)
            time.sleep(_POLL_SECONDS)
    return job


def list_jobs(address: Address = None, as_json: AsJson = False) -> None:
    """List the jobs that a cluster runs and has run, latest first.

    For example:

        specbatch list --address http://head:8265
    """
    with explained():
        jobs = Cluster(find_address(address)).jobs()
        if as_json:
            rows = [
                {
                    "id": job.id,
                    "name": job.name,
                    "state": job.state,
                    "started": job.started,
                    "ended": job.ended,
                    "output": job.output,
                }
                for job in jobs
            ]
            print(json.dumps(rows))
        elif jobs:
            from jobs.cluster.status_view import table_of_jobs

            out.print(table_of_jobs(jobs))
        else:
            out.print("No jobs yet: specbatch submit job.yaml")


def status(
    target: Target,
    address: Address = None,
    as_json: AsJson = False,
    endpoint: Endpoint = None,
    profile: Profile = None,
) -> None:
    """Say how far a job is: rows, units, tokens/s, acceptance, time left, spent so far.

    A running job renews its account of itself in its output folder every few seconds, so that any
    machine that sees the folder can tell, without a dashboard.

    For example:

        specbatch status s3://bucket/out/monday
        specbatch status nightly-20261125-020000-1f3a --address http://head:8265
    """
    with explained():
        from jobs.cluster.status_view import render

        view = _view(target, address, endpoint, profile)
        if as_json:
            print(json.dumps(view.to_json()))
        else:
            out.print(render(view))


def _view(target: str, address: str | None, endpoint: str | None, profile: str | None) -> View:
    from jobs.cluster.status_view import view_of_job, view_of_output

    if is_folder(target):
        return view_of_output(target, s3_options(endpoint, profile))
    cluster = Cluster(find_address(address))
    job = cluster.job(target)
    return view_of_job(job, cluster.logs(target))


def is_folder(target: str) -> bool:
    """Whether this is an output folder rather than the id of a job, which has no slash."""
    return "/" in target or Path(target).is_dir()


def logs(
    job: JobId,
    address: Address = None,
    follow: Follow = False,
) -> None:
    """Show what a job's driver has printed.

    For example:

        specbatch logs nightly-20261125-020000-1f3a --follow --address http://head:8265
    """
    with explained():
        cluster = Cluster(find_address(address))
        if follow:
            asyncio.run(_print_logs(cluster, job))
        else:
            sys.stdout.write(cluster.logs(job))


def stop(
    target: Target,
    address: Address = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Return when the job is over, and show how far it came.")
    ] = False,
    endpoint: Endpoint = None,
    profile: Profile = None,
) -> None:
    """Stop a job cleanly: units in flight are completed and committed, no more are begun.

    With an output folder it stops whatever run works on it, `specbatch run` on another machine
    included: the run looks for the wish every few seconds.

    For example:

        specbatch stop nightly-20261125-020000-1f3a --address http://head:8265
        specbatch stop s3://bucket/out/monday
    """
    with explained():
        if is_folder(target):
            _stop_output(target, endpoint, profile, wait)
            return
        cluster = Cluster(find_address(address))
        job = cluster.job(target)
        if job.over or not cluster.stop(target):
            out.print(f"Nothing to stop: this job is {cluster.job(target).state}.")
            return
        _say_stopping()
        if wait:
            _show(cluster, _wait(cluster, target))


def _stop_output(url: str, endpoint: str | None, profile: str | None, wait: bool) -> None:
    from jobs.cluster.status_view import render, view_of_output
    from pipeline.commit.manifest import open_output
    from pipeline.observe.status import request_stop

    s3 = s3_options(endpoint, profile)
    view = view_of_output(url, s3)
    if view.state not in {"running", "stopping"}:
        out.print(f"Nothing to stop: this job is {view.state}.")
        return
    request_stop(open_output(url, s3))
    _say_stopping()
    if wait:
        while (view := view_of_output(url, s3)).state in {"running", "stopping"}:
            time.sleep(_POLL_SECONDS)
        out.print(render(view))


def _say_stopping() -> None:
    message = "[yellow]stopping[/] once the units in flight are committed"
    out.print(message, highlight=False, soft_wrap=True)


def resume(
    job: JobId,
    address: Address = None,
    code: Annotated[
        Code | None,
        typer.Option(help="What code runs there, if not what ran before.", show_default=False),
    ] = None,
    wait: Wait = False,
    follow: Follow = False,
) -> None:
    """Have a cluster run what is missing of a job that was stopped, failed or lost its machine.

    It is submitted again as it was, under a new id; committed units are not done again.

    For example:

        specbatch resume nightly-20261125-020000-1f3a --address http://head:8265 --follow
    """
    with explained():
        cluster = Cluster(find_address(address))
        before = cluster.job(job)
        if not before.over:
            raise UserError(f"{job}: still {before.state}; stop it first, or let it go on")
        if before.state == "succeeded":
            out.print("Nothing is missing: this job is done.")
            return
        how = before.submission
        how = Submission(code or how.code, how.python, how.environment, how.stop_seconds)
        _submit(cluster, JobConfig.model_validate(before.config), how, wait, follow)


COMMANDS: dict[str, Callable[..., None]] = {
    "submit": submit,
    "list": list_jobs,
    "status": status,
    "logs": logs,
    "stop": stop,
    "resume": resume,
}
"""By the names that users type."""
