"""What `specbatch status` and `list` show: a job's own account of itself, and the cluster's."""

from __future__ import annotations

import os
import re
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from jobs.cluster.client import ClusterJob
from jobs.reports.cost import read_cost
from jobs.terminal.amounts import money
from jobs.terminal.display import duration
from pipeline import layout
from pipeline.commit import manifest
from pipeline.commit.stats import summarise
from pipeline.config.job import S3Config
from pipeline.errors import UserError
from pipeline.observe.status import JobStatus, read_status
from pipeline.storage.folder import is_local

_COLOURS = {
    "running": "green",
    "stopping": "yellow",
    "stopped": "yellow",
    "failed": "red",
    "pending": "cyan",
}
"""Of states; others are bold."""

_ERROR = re.compile(r"^(error|failed): .*", re.MULTILINE)
"""A line of a log in which `jobs.terminal.console` says why a command ended."""

_PROGRESS = re.compile(r"^.* · [\d,]+/[\d,]+ rows.*$", re.MULTILINE)
"""A line of a log in which a run says how far it is."""


@dataclass(frozen=True)
class View:
    """What is known of a job.

    Attributes:
        output: its folder.
        status: its driver's record; None before the first, or if the folder is out of sight.
        units: committed units; None if the folder is out of sight.
        finished: whether it is.
        spent: what it has cost so far, in `currency`; None if that is not known.
        on_cluster: the cluster's account, if it was asked.
        last_line: the last progress line or error in the job's log, if the record is out of sight.
    """

    output: str
    status: JobStatus | None = None
    units: int | None = None
    finished: bool = False
    spent: float | None = None
    currency: str = "USD"
    on_cluster: ClusterJob | None = None
    last_line: str | None = None

    @property
    def state(self) -> str:
        """The state in one word; the cluster knows whether the driver lives, the record more."""
        job, status = self.on_cluster, self.status
        if job is not None and job.over:
            if job.state == "failed" and status is not None and status.state == "stopped":
                # Not by Ray, which only sees that its driver ended with a code.
                return "stopped"
            return {"succeeded": "finished"}.get(job.state, job.state)
        if self.finished:
            return "finished"
        if status is not None and status.silent_seconds() is None:
            # A run of failed rows alone may end where others are missing.
            return "stopped" if status.state == "finished" else status.state
        if job is not None:
            return job.state
        return "lost" if status is not None else "not started"

    def to_json(self) -> dict[str, Any]:
        """One JSON object: state, what the record says, and what the cluster says."""
        record = asdict(self.status) if self.status else {}
        job = self.on_cluster
        return {
            **record,
            "state": self.state,
            "output": self.output,
            "finished": self.finished,
            "units": record.get("units") if self.units is None else self.units,
            "silent_seconds": self.status.silent_seconds() if self.status else None,
            "spent": self.spent,
            "currency": self.currency,
            "job": job and {"id": job.id, "state": job.state, "message": job.message},
        }


def view_of_output(url: str, s3: S3Config) -> View:
    """What the output folder says.

    Raises:
        UserError: there is no job in it, or it is out of reach.
    """
    output = manifest.open_output(url, s3)
    spent = read_cost(output, summarise([]), {})
    return View(
        output=url,
        status=read_status(output),
        units=len(manifest.committed_ids(output)),
        finished=output.read(layout.SUCCESS) is not None,
        spent=spent.total if spent else None,
        currency=spent.currency if spent else "USD",
    )


def view_of_job(job: ClusterJob, log: str) -> View:
    """What the cluster says, and the output folder too if it can be seen from here.

    Args:
        job: the cluster's account.
        log: what its driver has printed.
    """
    s3 = S3Config.model_validate(job.config.get("output_s3") or job.config.get("s3", {}))
    view = View(output=job.output)
    if not is_local(job.output) or os.path.isdir(job.output):
        # Not begun yet, or the cluster has credentials that are not here.
        with suppress(UserError):
            view = view_of_output(job.output, s3)
    lines = [m.group(0) for m in (*_PROGRESS.finditer(log), *_ERROR.finditer(log))]
    return replace(view, on_cluster=job, last_line=lines[-1] if lines else None)


def render(view: View) -> RenderableType:
    """The view as a table for the terminal."""
    table = Table(show_header=False, box=None, padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()
    state, status, job = view.state, view.status, view.on_cluster
    if job is not None:
        table.add_row("job", escape(job.id))
    stage = f": {status.stage}" if status and status.alive and status.stage != state else ""
    colour = _COLOURS.get(state, "bold")
    table.add_row("state", f"[{colour}]{state}[/]{escape(stage)}")
    if status is not None:
        _add_figures(table, status, view)
    elif view.units is not None:
        table.add_row("units", f"{view.units:,}")
    if view.spent is not None:
        table.add_row("spent so far", money(view.spent, view.currency))
    table.add_row("output", escape(view.output))
    return Group(table, *(f"\n{note}" for note in _notes(view)))


def _add_figures(table: Table, status: JobStatus, view: View) -> None:
    running = view.state in {"running", "stopping"}
    done = status.rows + status.errors
    if status.rows_total:
        share = f" ({done / status.rows_total:.0%})"
        table.add_row("rows", f"{done:,} of {status.rows_total:,}{share}")
    if status.errors:
        table.add_row("rows in errors", f"{status.errors:,}")
    units = status.units if view.units is None else view.units
    table.add_row("units committed", f"{units:,} of {status.units_total:,}")
    if status.tokens_per_second is not None:
        table.add_row("tokens/s", f"{status.tokens_per_second:,.1f}")
    if status.acceptance_rate is not None:
        table.add_row("acceptance rate", f"{status.acceptance_rate:.1%}")
    if running and status.seconds_left:
        table.add_row("time left", duration(status.seconds_left))
    began = datetime.fromtimestamp(status.started).astimezone()
    table.add_row("this run", f"since {began:%Y-%m-%d %H:%M:%S}, on {escape(status.host)}")
    table.add_row("news", f"{duration(max(0.0, time.time() - status.updated))} ago")


def _notes(view: View) -> list[str]:
    """What a user should know or do, one line each."""
    notes, job, status = [], view.on_cluster, view.status
    if view.status is None and view.last_line:
        notes.append(f"from its log: {escape(view.last_line)}")
    elif view.state == "failed":
        reason = view.last_line or (status and status.message) or (job and job.message) or ""
        notes.append(f"[red]{escape(reason)}[/]")
    elif view.state == "stopped" and status is not None and status.message:
        notes.append(f"[yellow]{escape(status.message)}[/]")
    if job is not None and view.state in {"failed", "stopped"}:
        notes.append(f"Committed units are kept: specbatch resume {escape(job.id)}")
    if view.state == "lost" and status is not None:
        silence = duration(status.silent_seconds() or 0.0)
        notes.append(
            f"[yellow]No news from its driver for {silence}: it was probably killed.[/] "
            "Run the job again to resume it."
        )
    return notes


def table_of_jobs(jobs: list[ClusterJob]) -> Table:
    """The jobs of a cluster, latest first."""
    table = Table(box=None, padding=(0, 2), header_style="bold")
    table.add_column("job", no_wrap=True)
    for name in ("state", "submitted", "took"):
        table.add_column(name)
    table.add_column("output", overflow="fold")
    for job in jobs:
        began = job.started and datetime.fromtimestamp(job.started).astimezone()
        took = (job.ended or time.time()) - job.started if job.started else None
        table.add_row(
            escape(job.id),
            f"[{_COLOURS.get(job.state, 'bold')}]{job.state}[/]",
            f"{began:%Y-%m-%d %H:%M}" if began else "–",
            duration(took) if took is not None else "–",
            escape(job.output),
        )
    return table
