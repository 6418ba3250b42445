"""What a job will do: its input, cut into units, and where it writes. Nothing is started yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pyarrow as pa

from pipeline import layout
from pipeline.commit import manifest, planned_inputs
from pipeline.commit.schema import check_reserved
from pipeline.config.job import JobConfig
from pipeline.config.model_defaults import Source, in_force, sources, with_model_defaults
from pipeline.config.model_identity import is_here
from pipeline.generate.corpus import corpus_folders
from pipeline.inputs.joining import plan_units
from pipeline.inputs.listing import InputFile, list_inputs
from pipeline.inputs.prompts import required_columns
from pipeline.inputs.units import FilePlan, Unit, check_columns, plan_files, table_of
from pipeline.run.preflight import check_output
from pipeline.storage.folder import Folder, check_access, open_folder, resolved


@dataclass(frozen=True)
class JobPlan:
    """A job and its input, looked at but not started.

    Attributes:
        job: with S3 endpoint and region filled in from this machine.
        output: its folder.
        files: what each input file holds.
        units: all of them, in input order.
        table: the columns of all of them together.
        left_out: input files that are new since the output was begun, and not part of the job.
        optional: the optional columns of its outputs.
        sampling_from: where the values of `sampling` are from, by key.
    """

    job: JobConfig
    output: Folder
    files: tuple[FilePlan, ...]
    units: tuple[Unit, ...]
    table: pa.Schema
    left_out: tuple[InputFile, ...] = ()
    optional: tuple[str, ...] = ()
    sampling_from: Mapping[str, Source] = field(default_factory=dict)

    @property
    def sampling_said(self) -> str:
        """The sampling that is in force, and where it is from, in a line."""
        if self.job.input.completion_column is not None:
            return "sampling: none, since completions are given"
        return f"sampling: {in_force(self.job.sampling.model_dump(), self.sampling_from)}"

    @property
    def takes_recommendations(self) -> bool:
        """Whether the target's own recommendation is part of the sampling."""
        return "model" in self.sampling_from.values()

    @property
    def rows(self) -> int:
        """Rows of the input."""
        return sum(file.rows for file in self.files)


def plan_job(job: JobConfig, *, extend: bool = False, ask_hub: bool = True) -> JobPlan:
    """Look at the input and the output folder; load no model and start nothing.

    Args:
        job: the job.
        extend: input files that are new since the output was begun become part of the job.
        ask_hub: whether the hub is asked what a target that is not here recommends.

    Raises:
        UserError: no such files, missing or reserved columns, S3 or disk out of reach.
    """
    job, recommended = with_model_defaults(_reachable(job), ask_hub=ask_hub)
    check_output(job.output, job.input.paths)
    check_access(job.s3_of_output, job.output)
    corpus_folders(job)
    output = open_folder(job.output, job.s3_of_output)
    listed = list_inputs(job.input.paths, job.s3_of_input, job.input.prefix)
    planned = planned_inputs.read_planned(output)
    new = planned_inputs.new_files(listed, planned) if planned else []
    begun = bool(output.list(layout.COMPLETIONS)) if new or not planned else True
    # New files are left out if there still are some from before.
    left_out = set(new) if begun and not extend and len(new) < len(listed) else set()
    files = plan_files(
        [f for f in listed if f not in left_out],
        job.s3_of_input,
        job.unit_rows,
        format=job.input.format,
        reserved=job.added_columns,
    )
    check_columns(files, required_columns(job.input))
    check_reserved(files, job.added_columns)
    files = planned_inputs.in_steps(files, planned, begun=begun)
    given = job.input.completion_column is not None
    return JobPlan(
        job,
        output,
        files=tuple(files),
        units=tuple(plan_units(files, job.unit_rows)),
        table=table_of(files),
        left_out=tuple(sorted(left_out, key=lambda file: file.name)),
        optional=job.optional_columns,
        sampling_from={} if given else sources(job.sampling, recommended),
    )


def check_begun(plan: JobPlan, *, ask_hub: bool = True) -> None:
    """Make sure that an output that was begun is this job's, as `run` does; write nothing.

    Args:
        plan: of the job.
        ask_hub: whether the hub is asked which models those of its names are; otherwise outputs of
            such jobs are not looked at.

    Raises:
        UserError: the output is another job's, or its input has changed.
    """
    models = filter(None, (plan.job.models.target, plan.job.models.draft))
    if plan.output.read(layout.JOB) is None or not (ask_hub or all(map(is_here, models))):
        return
    manifest.compare(plan.output, plan.files, manifest.fingerprint(plan.job, plan.files))


def _reachable(job: JobConfig) -> JobConfig:
    """The job with S3's endpoints and regions as this machine's AWS settings give them."""
    source = job.input.model_copy(update={"s3": resolved(job.s3_of_input, *job.input.paths)})
    output_s3 = resolved(job.s3_of_output, job.output)
    return job.model_copy(update={"input": source, "output_s3": output_s3})
