"""The command line: `specbatch run`, `validate`, `report`, `distill`, `train-head`, `profile`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from jobs.console import err, explained, out, stop_signals
from jobs.explain import explain
from jobs.nightly.cli import nightly
from jobs.profile import profile as profile_command
from jobs.spec import load_job, s3_options
from jobs.train_head import train_head
from jobs.training import distill
from pipeline.config import JobConfig
from pipeline.errors import UserError

app = typer.Typer(
    name="specbatch",
    help="Complete shards of prompts with a language model on Ray, accelerated by lossless "
    "speculative decoding.",
    epilog="Start with: specbatch validate job.yaml, then specbatch run job.yaml",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

JobFile = Annotated[
    Path, typer.Argument(metavar="FILE", help="The job file (YAML).", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a key of the job file, as often as needed: --set sampling.temperature=0",
        show_default=False,
    ),
]


@app.command()
def run(
    file: JobFile,
    overrides: Overrides = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No progress bar and no table.")
    ] = False,
) -> None:
    """Run a job, or what is missing of it.

    Uses the Ray cluster at RAY_ADDRESS, or starts a local one. The same command resumes a job that
    was stopped, and does nothing if the job is done. Ctrl-C (or SIGTERM) once: units in flight are
    completed and committed, then it stops. Twice: it stops at once.

    [bold]Examples[/]

      specbatch run job.yaml

      specbatch run job.yaml --set output=out/greedy --set sampling.temperature=0
    """
    with explained("Committed rows are kept; run the same command again to resume."):
        job = load_job(file, overrides or [])
        from pipeline.run import run_job

        if quiet:
            with stop_signals() as stop:
                run_job(job, stop=stop)
            return
        from jobs.display import progress_bar
        from jobs.report import render

        with progress_bar(err) as show, stop_signals() as stop:
            result = run_job(job, progress=show, stop=stop)
        if not result.units_run:
            out.print("Nothing was missing: this job is done.")
        out.print(render(result.summary))
        out.print(f"\nOutputs: {escape(result.output)}", highlight=False, soft_wrap=True)


@app.command()
def validate(file: JobFile, overrides: Overrides = None) -> None:
    """Check a job file, its models' names and its input paths; load no model, start nothing.

    [bold]Example[/]

      specbatch validate job.yaml --set speculation.policy=none
    """
    with explained():
        job = load_job(file, overrides or [])
        for name in filter(None, (job.models.target, job.models.draft)):
            _check_model(name)
        if job.speculation.head is not None:
            from pipeline.models import head_identity

            head_identity(job.speculation.head)
        from pipeline.listing import list_inputs
        from pipeline.storage import check_access, is_s3, resolved

        s3 = resolved(job.s3, used=any(map(is_s3, (*job.input.paths, job.output))))
        check_access(job.output, s3)
        files = list_inputs(job.input.paths, s3)
        out.print(f"[green]valid[/]: {escape(str(file))}", highlight=False, soft_wrap=True)
        size = sum(f.size for f in files) / 1e6
        out.print(f"input files: {len(files):,} ({size:,.1f} MB)", highlight=False)
        out.print_json(data=_described(job))


def _check_model(name: str) -> None:
    from specdec.pair import PairError, check_model_name

    try:
        check_model_name(name)
    except PairError as error:
        raise UserError(str(error)) from None


def _described(job: JobConfig) -> dict[str, Any]:
    return job.model_dump(mode="json", exclude_none=True)


@app.command()
def report(
    output: Annotated[
        str, typer.Argument(metavar="OUT", help="A job's output folder, local or s3://.")
    ],
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object instead of a table.")
    ] = False,
    endpoint: Annotated[
        str | None, typer.Option(help="URL of an S3-compatible server.", show_default=False)
    ] = None,
    profile: Annotated[
        str | None, typer.Option(help="AWS profile to use.", show_default=False)
    ] = None,
) -> None:
    """Say what a job did, from the files that it has committed so far.

    [bold]Examples[/]

      specbatch report out/demo

      specbatch report out/demo --json | jq .tokens_per_second
    """
    with explained():
        from jobs.report import read_summary, render

        summary, finished = read_summary(output, s3_options(endpoint, profile))
        if as_json:
            print(json.dumps({**summary, "finished": finished}))
            return
        if not finished:
            out.print("[yellow]This job is not finished; these are its committed units.[/]")
        out.print(render(summary))


app.command()(explain)
app.command()(distill)
app.command()(train_head)
app.command()(profile_command)
app.add_typer(nightly)


def _version(value: bool) -> None:
    if value:
        from pipeline.manifest import versions

        print(f"specbatch {versions()['specbatch']}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_version, is_eager=True),
    ] = False,
) -> None:
    pass


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
