"""`specbatch report`: one job, two jobs side by side, or many over time; text, JSON or HTML."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperCommand

from jobs.job_file import load_prices, s3_options
from jobs.terminal.console import err, explained, out
from jobs.terminal.options import AsJson
from pipeline import layout
from pipeline.config.job import JobConfig, S3Config
from pipeline.config.prices import Prices
from pipeline.errors import JobStopped, TooManyErrors, UserError


class ReportCommand(TyperCommand):
    """A command whose option `--html` may stand without a value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give a bare `--html` the empty value. What follows it is a page if it ends so."""
        return super().parse_args(
            ctx,
            [
                "--html=" if arg == "--html" and not following.lower().endswith(_PAGES) else arg
                for arg, following in zip(args, [*args[1:], ""], strict=True)
            ],
        )


_PAGES = (".html", ".htm")


def report(
    outputs: Annotated[
        list[str],
        typer.Argument(
            metavar="OUT...", help="Output folders of jobs, local or s3://.", show_default=False
        ),
    ],
    as_json: AsJson = False,
    html: Annotated[
        str | None,
        typer.Option(
            metavar="[FILE.html]",
            help="Write one self-contained HTML page. Without a name: _specbatch/report.html in "
            "the job's output, compare.html or trend.html here.",
            show_default=False,
        ),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Two jobs side by side, with ratios.")
    ] = False,
    trend: Annotated[
        bool,
        typer.Option(
            "--trend", help="Many jobs by date. A folder stands for all jobs in or below it."
        ),
    ] = False,
    endpoint: Annotated[
        str | None, typer.Option(help="URL of an S3-compatible server.", show_default=False)
    ] = None,
    profile: Annotated[
        str | None, typer.Option(help="AWS profile to use.", show_default=False)
    ] = None,
    prices: Annotated[
        Path | None,
        typer.Option(help="A price table (YAML).", show_default="the one that the job ran with"),
    ] = None,
) -> None:
    """Say what a job did and cost, from the files that it has committed so far.

    `specbatch run` also writes a page for the browser at its end, to _specbatch/report.html.

    For example:

        specbatch report out/demo
        specbatch report out/demo --json | jq .tokens_per_second
        specbatch report out/demo --html demo.html
        specbatch report out/demo --prices our-prices.yaml
        specbatch report --compare out/demo out/plain
        specbatch report --trend out/nightly --html
    """
    with explained():
        s3, table = s3_options(endpoint, profile), load_prices(prices) if prices else None
        if compare and trend:
            raise UserError("--compare and --trend: give one of them")
        if as_json and html is not None:
            raise UserError("--json and --html: give one of them")
        if trend:
            _trend(outputs, s3, table, as_json, html)
        elif compare:
            _compare(outputs, s3, table, as_json, html)
        else:
            _report(outputs, s3, table, as_json, html)


@contextmanager
def page_at_the_end(job: JobConfig) -> Iterator[None]:
    """Write the job's page when it is done or was stopped. No job fails for its page."""
    try:
        yield
    except (JobStopped, TooManyErrors):
        _try_page(job)
        raise
    _try_page(job)


def page_of(job: JobConfig) -> str:
    """Where a job's page is."""
    return f"{job.output.rstrip('/')}/{layout.REPORT}"


def _try_page(job: JobConfig) -> None:
    from jobs.reports.page import write_page

    try:
        write_page(job.output, job.s3_of_output)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        err.print(f"[yellow]no report page:[/] {escape(message)}", highlight=False, soft_wrap=True)


def _report(
    outputs: list[str], s3: S3Config, prices: Prices | None, as_json: bool, html: str | None
) -> None:
    from jobs.reports.summary import has_failed, read_summary, render
    from pipeline.commit.manifest import open_output

    if len(outputs) > 1:
        raise UserError("one output at a time; --compare A B or --trend A B C take several")
    if html is not None:
        _write_job_page(outputs[0], s3, prices, html)
        return
    summary, finished = read_summary(outputs[0], s3, prices)
    if as_json:
        print(json.dumps({**summary, "finished": finished}))
        return
    if not finished and has_failed(open_output(outputs[0], s3), summary):
        out.print("[yellow]This job has ended with too many rows in errors (max_error_share).[/]")
    elif not finished:
        out.print("[yellow]This job is not finished; these are its committed units.[/]")
    out.print(render(summary))


def _write_job_page(url: str, s3: S3Config, prices: Prices | None, html: str) -> None:
    from jobs.reports.findings import gather
    from jobs.reports.page import job_page, write_page

    if html:
        _save(Path(html), job_page(gather(url, s3, prices)))
    else:
        _wrote(write_page(url, s3, prices))


def _compare(
    outputs: list[str], s3: S3Config, prices: Prices | None, as_json: bool, html: str | None
) -> None:
    from jobs.reports.compare import JobComparison, page, render
    from jobs.reports.history import read_job

    if len(outputs) != 2:
        raise UserError(f"--compare: give two outputs, got {len(outputs)}")
    comparison = JobComparison(*(read_job(url, s3, prices) for url in outputs))
    if html is not None:
        _save(Path(html or "compare.html"), page(comparison))
    elif as_json:
        print(json.dumps(comparison.to_json()))
    else:
        out.print(render(comparison))


def _trend(
    outputs: list[str], s3: S3Config, prices: Prices | None, as_json: bool, html: str | None
) -> None:
    from jobs.reports.history import find_jobs
    from jobs.reports.trend import page, render

    jobs = find_jobs(outputs, s3, prices)
    if html is not None:
        _save(Path(html or "trend.html"), page(jobs))
    elif as_json:
        print(json.dumps({"jobs": [job.to_json() for job in jobs]}))
    else:
        out.print(render(jobs))


def _save(path: Path, page: str) -> None:
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--html {path}: {error.strerror or error}") from None
    _wrote(str(path))


def _wrote(where: str) -> None:
    out.print(f"Wrote {escape(where)}", highlight=False, soft_wrap=True)
