"""The command line: `specbatch run`, `validate`, `report`, `distill`, `train-head`, `profile`."""

from __future__ import annotations

import atexit
import gc
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from jobs.cluster import commands
from jobs.cluster import render as render_commands
from jobs.explain import explain
from jobs.job_file import load_job
from jobs.nightly.cli import nightly
from jobs.plan import plan
from jobs.reports.command import ReportCommand, page_at_the_end, page_of, report
from jobs.reports.grafana import grafana
from jobs.run_batch import run_batch
from jobs.terminal.console import err, explained, out, stop_signals
from jobs.tuning.distill import distill
from jobs.tuning.profile import profile as profile_command
from jobs.tuning.train_head import train_head
from jobs.verify import verify
from pipeline.config.job import JobConfig
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
    only_failed: Annotated[
        bool, typer.Option("--only-failed", help="Try the rows in errors/ again, and no others.")
    ] = False,
    extend: Annotated[
        bool,
        typer.Option("--extend", help="Input files that are new become part of the job."),
    ] = False,
    fork: Annotated[
        str | None,
        typer.Option(
            "--fork",
            metavar="OUT",
            help="Leave the job's output alone and start a new one, which reuses nothing.",
            show_default=False,
        ),
    ] = None,
    same_content: Annotated[
        bool,
        typer.Option(
            "--same-content",
            help="Take input files whose time of change alone differs for unchanged.",
        ),
    ] = False,
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

      specbatch run job.yaml --only-failed                        # rows in errors/, once more

      specbatch run job.yaml --extend                             # with prompts that came since

      specbatch run job.yaml --set sampling.seed=1 --fork out/b   # another job beside this one
    """
    with explained("Committed rows are kept; run the same command again to resume."):
        job = load_job(file, overrides or [])
        if fork is not None:
            if only_failed or extend:
                raise UserError("--fork starts a new output; leave out --only-failed and --extend")
            original, job = job, load_job(file, [*(overrides or []), f"output={json.dumps(fork)}"])
            _check_fork(original, job)
        from pipeline.run.run import Mode, run_job

        mode = Mode(
            only_failed=only_failed,
            extend=extend,
            same_content=same_content,
            forked_from=original.output if fork is not None else None,
            job_folder=file.resolve().parent,
        )
        if quiet:
            with stop_signals() as stop, page_at_the_end(job):
                run_job(job, mode=mode, stop=stop, note=_note)
            return
        from jobs.reports.summary import read_summary, render
        from jobs.terminal.display import progress_bar

        with progress_bar() as show, stop_signals() as stop, page_at_the_end(job):
            result = run_job(job, mode=mode, progress=show.job, stop=stop, note=_note)
        if not result.units_run:
            out.print(_nothing_to_do(only_failed))
        if result.missing:
            _note(f"{result.missing:,} units are not generated yet; without --only-failed they are")
        out.print(render(read_summary(result.output, job.s3)[0]))
        out.print(f"\nOutputs: {escape(result.output)}", highlight=False, soft_wrap=True)
        out.print(f"Report:  {escape(page_of(job))}", highlight=False, soft_wrap=True)


def _note(line: str) -> None:
    err.print(f"[yellow]note:[/] {escape(line)}", highlight=False, soft_wrap=True)


def _nothing_to_do(only_failed: bool) -> str:
    if only_failed:
        return "No row is in errors: there is nothing to try again."
    return "Nothing was missing: this job is done."


def _check_fork(original: JobConfig, job: JobConfig) -> None:
    """Check that there is a job to fork from, and that it is left alone."""
    from pipeline.commit.manifest import open_output

    if original.output.rstrip("/") == job.output.rstrip("/"):
        raise UserError(f"--fork {job.output}: this is the job's own output; name another")
    open_output(original.output, original.s3)


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
        if job.speculation.policy != "none":
            from pipeline.config.model_identity import check_tokenizers

            check_tokenizers(job.models)
        if job.speculation.head is not None:
            from pipeline.config.model_identity import head_identity

            head_identity(job.speculation.head)
        from pipeline.inputs.listing import list_inputs
        from pipeline.run.preflight import check_output
        from pipeline.storage.folder import check_access, is_s3, resolved

        s3 = resolved(job.s3, used=any(map(is_s3, (*job.input.paths, job.output))))
        check_output(job.output, job.input.paths)
        check_access(job.output, s3)
        files = list_inputs(job.input.paths, s3)
        out.print(f"[green]valid[/]: {escape(str(file))}", highlight=False, soft_wrap=True)
        size = sum(f.size for f in files) / 1e6
        out.print(f"input files: {len(files):,} ({size:,.1f} MB)", highlight=False)
        out.print_json(data=_described(job))


def _check_model(name: str) -> None:
    from specdec.loading.sources import PairError, check_model_name

    try:
        check_model_name(name)
    except PairError as error:
        raise UserError(str(error)) from None


def _described(job: JobConfig) -> dict[str, Any]:
    return job.model_dump(mode="json", exclude_none=True)


app.command(cls=ReportCommand)(report)
for name, command in commands.COMMANDS.items():
    app.command(name)(command)
app.add_typer(render_commands.app, name="render")
app.command()(verify)
app.command()(run_batch)
app.command()(plan)
app.command()(explain)
app.command()(distill)
app.command()(grafana)
app.command()(train_head)
app.command()(profile_command)
app.add_typer(nightly)


def _version(value: bool) -> None:
    if value:
        from pipeline.commit.manifest import versions

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
    # Python goes through all objects twice when it ends: a second, with Ray's, for nothing.
    atexit.register(gc.freeze)
    app()


if __name__ == "__main__":
    main()
