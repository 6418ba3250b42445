"""`specbatch run`: run a job, or what is missing of it."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.markup import escape

from jobs.job_file import load_job
from jobs.reports.command import page_at_the_end, page_of
from jobs.terminal.console import explained, note, out, stop_signals
from jobs.terminal.options import JobFile, Overrides, Quiet, TakeOver
from pipeline.config.job import JobConfig
from pipeline.errors import UserError


def run(
    file: JobFile,
    overrides: Overrides = None,
    only_failed: Annotated[
        bool, typer.Option("--only-failed", help="Try the rows in `errors/` again, and no others.")
    ] = False,
    extend: Annotated[
        bool,
        typer.Option("--extend", help="Take in input files that came since the job began."),
    ] = False,
    fork: Annotated[
        str | None,
        typer.Option(
            "--fork",
            metavar="OUT",
            help="Leave the job's output alone and start a new one in OUT, which reuses nothing.",
            show_default=False,
        ),
    ] = None,
    same_content: Annotated[
        bool,
        typer.Option(
            "--same-content",
            help="Accept input files that differ in their time of change only, as after a copy.",
        ),
    ] = False,
    take_over: TakeOver = False,
    quiet: Quiet = False,
) -> None:
    """Run a job, or what is missing of it.

    Uses the Ray cluster at `RAY_ADDRESS`, or starts a local one. The same command resumes a job
    that was stopped, and does nothing if the job is done. Ctrl-C (or SIGTERM) once: units in flight
    are completed and committed, then it stops. Twice: it stops at once.

    For example:

        specbatch run job.yaml
        specbatch run job.yaml --set output=out/greedy --set sampling.temperature=0
        specbatch run job.yaml --only-failed    # rows in errors/, once more
        specbatch run job.yaml --extend         # with prompts that came since
        specbatch run job.yaml --set sampling.seed=1 --fork out/another-seed
        specbatch run job.yaml --take-over      # from a run elsewhere that is to end
    """
    with explained("Committed rows are kept; run the same command again to resume."):
        job = load_job(file, overrides or [])
        if fork is not None:
            if only_failed or extend:
                raise UserError("--fork starts a new output; leave out --only-failed and --extend")
            original, job = job, load_job(file, [*(overrides or []), f"output={json.dumps(fork)}"])
            _check_fork(original, job)
        from pipeline.run.run import RunMode, run_job

        mode = RunMode(
            only_failed=only_failed,
            extend=extend,
            same_content=same_content,
            take_over=take_over,
            forked_from=original.output if fork is not None else None,
            job_folder=file.resolve().parent,
        )
        from jobs.reports.summary import read_summary, render
        from jobs.terminal.display import progress_bar

        with progress_bar(quiet=quiet) as show, stop_signals() as stop, page_at_the_end(job):
            result = run_job(job, mode=mode, progress=show.job, stop=stop, note=note)
        if quiet:
            return
        if not result.units_run:
            out.print(_nothing_to_do(only_failed))
        if result.missing:
            note(f"{result.missing:,} units are not generated yet; without --only-failed they are")
        out.print(render(read_summary(result.output, job.s3_of_output)[0]))
        out.print(f"\nOutputs: {escape(result.output)}", highlight=False, soft_wrap=True)
        out.print(f"Report:  {escape(page_of(job))}", highlight=False, soft_wrap=True)


def _nothing_to_do(only_failed: bool) -> str:
    if only_failed:
        return "No row is in errors: there is nothing to try again."
    return "Nothing was missing: this job is done."


def _check_fork(original: JobConfig, job: JobConfig) -> None:
    """Check that there is a job to fork from, and that it is left alone."""
    from pipeline.commit.manifest import open_output

    if original.output.rstrip("/") == job.output.rstrip("/"):
        raise UserError(f"--fork {job.output}: this is the job's own output; name another")
    open_output(original.output, original.s3_of_output)
