"""`specbatch run-batch`: a request file of OpenAI's batch API in, its output file out.

Underneath it is a job like any other, in a folder beside the output file; so it is resumed by the
same command, and no request is answered twice. When the job is done its units become the file.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from jobs.job_file import build_job, s3_options
from jobs.terminal.console import explained, note, out, stop_signals
from jobs.terminal.options import Endpoint, Profile, Quiet, TakeOver
from pipeline.config.job import JobConfig
from pipeline.errors import TooManyErrors, UserError

if TYPE_CHECKING:
    from pipeline.outputs.openai_responses import Written
    from pipeline.run.plan import JobPlan

FOLDER_SUFFIX = ".specbatch"
"""What the output file's name is followed by in the name of the job's folder beside it."""


def run_batch(
    requests: Annotated[
        str,
        typer.Option("--input-file", "-i", help="The request file (JSONL), local or `s3://`."),
    ],
    responses: Annotated[
        str,
        typer.Option("--output-file", "-o", help="Where responses go, local or `s3://`."),
    ],
    model: Annotated[
        str,
        typer.Option(
            "--model",
            help="The target: hub name, folder, `*.gguf`, or `pkg:PACKAGE/FILE.gguf`.",
        ),
    ],
    draft: Annotated[
        str | None,
        typer.Option("--draft", help="The draft, in the same forms.", show_default="none"),
    ] = None,
    errors: Annotated[
        str | None,
        typer.Option(
            "--error-file", "-e", help="Where errors go.", show_default="OUT.errors.jsonl"
        ),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(help="Most tokens of a chat response whose request does not say.")
    ] = 1024,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Any key of a job file, as often as needed: `--set actors.num_gpus=1`.",
            show_default=False,
        ),
    ] = None,
    endpoint: Endpoint = None,
    profile: Profile = None,
    take_over: TakeOver = False,
    quiet: Quiet = False,
) -> None:
    r"""Answer a request file of OpenAI's batch API.

    Takes `/v1/chat/completions`, `/v1/completions` and `/v1/responses` with text, tools, structured
    outputs and log-probabilities. Responses have the API's form, one line each in the order of the
    requests. A request that cannot be served becomes a line of the error file and stops nothing.
    The model given here answers all, whatever a request's `model`.

    The same command resumes what was stopped. What it has committed is in `OUT.specbatch`, a job
    folder like any other: `specbatch report OUT.specbatch`.

    For example:

        specbatch run-batch -i in.jsonl -o out.jsonl \
            --model Qwen/Qwen2.5-7B-Instruct --draft Qwen/Qwen2.5-0.5B-Instruct
        specbatch run-batch -i s3://bucket/in.jsonl -o s3://bucket/out.jsonl --model ./model
    """
    with explained("What is answered is kept; run the same command again to resume."):
        from pipeline.storage.folder import plain_url

        requests, responses = plain_url(requests), plain_url(responses)
        failed = plain_url(errors or f"{responses.removesuffix('.jsonl')}.errors.jsonl")
        _check_files(requests, responses, failed)
        values: dict[str, Any] = {
            "name": "run-batch",
            "input": {"paths": [requests], "format": "openai"},
            "output": responses + FOLDER_SUFFIX,
            "models": {"target": model, "draft": draft},
            "sampling": {"max_new_tokens": max_tokens},
            "speculation": {} if draft else {"policy": "none"},
            "actors": _this_machine(),
            "s3": s3_options(endpoint, profile).model_dump(),
        }
        job = build_job(values, Path.cwd(), overrides or [], "run-batch")
        _run(job, responses, failed, model, take_over, quiet)


def _check_files(requests: str, responses: str, errors: str) -> None:
    """Check that what is written are files, and that none takes another's place."""
    for option, file in (("--output-file", responses), ("--error-file", errors)):
        if file.endswith("/") or os.path.isdir(file):
            raise UserError(f"{option}: {file} is a folder; give a file")
    if len({os.path.realpath(file) for file in (requests, responses, errors)}) < 3:
        raise UserError(
            f"--output-file {responses} and --error-file {errors} would be written over each other "
            f"or over --input-file {requests}; give three names"
        )


def _this_machine() -> dict[str, Any]:
    """One actor on this machine's GPU, if it has one; otherwise the job file's defaults."""
    if os.environ.get("RAY_ADDRESS"):
        return {}
    import torch

    if torch.cuda.is_available():
        return {"num_gpus": 1}
    return {}


def _run(
    job: JobConfig, responses: str, errors: str, model: str, take_over: bool, quiet: bool
) -> None:
    from jobs.reports.summary import render
    from jobs.terminal.display import progress_bar
    from pipeline.run.plan import plan_job
    from pipeline.run.run import RunMode, run_job

    try:
        with progress_bar(quiet=quiet) as show, stop_signals() as stop:
            mode = RunMode(take_over=take_over)
            result = run_job(job, mode=mode, progress=show.job, stop=stop, note=note)
    except TooManyErrors as error:
        if not error.missing:  # every request has its answer or its error
            _write(plan_job(job), responses, errors, model)
        raise
    written = _write(plan_job(job), responses, errors, model)
    if quiet:
        return
    out.print(render(result.summary))
    out.print(f"\n{written.responses:,} responses: {escape(responses)}", soft_wrap=True)
    if written.errors:
        out.print(f"[yellow]{written.errors:,} errors[/]: {escape(errors)}", soft_wrap=True)


def _write(plan: JobPlan, responses: str, errors: str, model: str) -> Written:
    """The output files, each replaced in one step; no error file if there are no errors."""
    from pipeline.outputs.openai_responses import write_responses
    from pipeline.storage.folder import locate

    s3 = plan.job.s3_of_output
    with tempfile.TemporaryDirectory() as scratch:
        files = Path(scratch, "responses"), Path(scratch, "errors")
        with files[0].open("w") as good, files[1].open("w") as bad:
            written = write_responses(plan.output, plan.units, model, good, bad)
        folder, name = locate(responses, s3)
        folder.upload(name, files[0])
        folder, name = locate(errors, s3)
        if written.errors:
            folder.upload(name, files[1])
        else:
            folder.delete(name)
    return written
