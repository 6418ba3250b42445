"""`specbatch validate`: check a job file, its models' names and its input paths."""

from __future__ import annotations

from typing import Any

from rich.markup import escape

from jobs.job_file import load_job
from jobs.terminal.console import explained, out
from jobs.terminal.options import JobFile, Overrides
from pipeline.config.job import JobConfig
from pipeline.errors import UserError


def validate(file: JobFile, overrides: Overrides = None) -> None:
    """Check a job file in seconds: its keys, models, input and output. Loads no model.

    Prints the job with its defaults filled in, or one line for each mistake. Starts nothing.

    For example:

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
        from pipeline.storage.folder import check_access, resolved

        s3 = resolved(job.s3, *job.input.paths, job.output)
        check_output(job.output, job.input.paths)
        check_access(s3, job.output)
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
