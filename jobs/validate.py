"""`specbatch validate`: check a job file, its models' names and its input paths."""

from __future__ import annotations

from typing import Any

from rich.markup import escape

from jobs.job_file import load_job
from jobs.terminal.console import explained, note, out
from jobs.terminal.options import JobFile, Overrides
from pipeline.config.job import JobConfig
from pipeline.errors import UserError


def validate(file: JobFile, overrides: Overrides = None) -> None:
    """Check a job file, its models, input and output, as `run` does before it starts anything.

    Prints the job with its defaults filled in, or one line for each mistake. It takes seconds,
    unless there are many gigabytes of JSONL, whose lines are counted. No model is loaded, and the
    hub is not asked: whether a model's family runs is told from its config alone.

    For example:

        specbatch validate job.yaml --set speculation.policy=none
    """
    with explained():
        job = load_job(file, overrides or [])
        for name in filter(None, (job.models.target, job.models.draft)):
            _check_model(name)
        from pipeline.config.model_identity import check_models
        from pipeline.run.plan import check_begun, plan_job

        check_models(job, ask_hub=False)
        plan = plan_job(job, ask_hub=False)
        check_begun(plan, ask_hub=False)
        size = sum(each.file.size for each in plan.files) / 1e6
        out.print(f"[green]valid[/]: {escape(str(file))}", highlight=False, soft_wrap=True)
        out.print(
            f"input files: {len(plan.files):,} ({size:,.1f} MB), {plan.rows:,} rows in "
            f"{len(plan.units):,} units",
            highlight=False,
            soft_wrap=True,
        )
        out.print(plan.sampling_said, highlight=False, soft_wrap=True)
        _tell_families(job)
        _tell_trees(job)
        out.print_json(data=_described(plan.job))


def _check_model(name: str) -> None:
    from specdec.loading.sources import PairError, check_model_name

    try:
        check_model_name(name)
    except PairError as error:
        raise UserError(str(error)) from None


def _tell_families(job: JobConfig) -> None:
    """Say what is known of the models' families; only loading decides."""
    from pipeline.config.model_family import expected

    for role, name in (("target", job.models.target), ("draft", job.models.draft)):
        line, good = expected(name) if name is not None else ("", True)
        if line and good:
            out.print(f"models.{role}: {escape(line)}", highlight=False, soft_wrap=True)
        elif line:
            note(f"models.{role}: {line}")


def _tell_trees(job: JobConfig) -> None:
    """Say where a width that the job asks for has no effect, as far as configs tell."""
    from pipeline.config.model_family import without_trees

    width = job.speculation.width or 1
    if width > 1 and (why := without_trees(job.models.target, job.models.draft)):
        note(f"speculation.width: {width} has no effect, since {why}; candidates are chains")


def _described(job: JobConfig) -> dict[str, Any]:
    return job.model_dump(mode="json", exclude_none=True)
