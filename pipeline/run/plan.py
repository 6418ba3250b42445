"""What a job will do: its input, cut into units, and where it writes. Nothing is started yet."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.commit import planned_inputs
from pipeline.commit.schema import check_reserved
from pipeline.config.job import JobConfig
from pipeline.inputs.listing import InputFile, list_inputs
from pipeline.inputs.prompts import required_columns
from pipeline.inputs.units import FilePlan, Unit, check_columns, plan_files, request_lines
from pipeline.run.preflight import check_output
from pipeline.storage.folder import Folder, check_access, open_folder, resolved


@dataclass(frozen=True)
class JobPlan:
    """A job and its input, looked at but not started.

    Attributes:
        job: with S3 endpoint and region filled in from this machine.
        output: its folder.
        files: what each input file holds.
        left_out: input files that are new since the output was begun, and not part of the job.
    """

    job: JobConfig
    output: Folder
    files: tuple[FilePlan, ...]
    left_out: tuple[InputFile, ...] = ()

    @property
    def units(self) -> list[Unit]:
        """All units, in input order."""
        return [unit for file in self.files for unit in file.units]

    @property
    def rows(self) -> int:
        """Rows of the input."""
        return sum(file.rows for file in self.files)


def plan_job(job: JobConfig, *, extend: bool = False) -> JobPlan:
    """Look at the input and the output folder; load no model and start nothing.

    Args:
        job: the job.
        extend: input files that are new since the output was begun become part of the job.

    Raises:
        UserError: no such files, missing or reserved columns, S3 or disk out of reach.
    """
    job = job.model_copy(update={"s3": resolved(job.s3, *job.input.paths, job.output)})
    check_output(job.output, job.input.paths)
    check_access(job.s3, job.output)
    output = open_folder(job.output, job.s3)
    listed = list_inputs(job.input.paths, job.s3, job.input.prefix)
    left_out = set() if extend else set(_new_files(output, listed))
    files = plan_files([f for f in listed if f not in left_out], job.s3, job.unit_rows)
    if job.input.format is not None:
        files = [request_lines(file) for file in files]
    check_columns(files, required_columns(job.input))
    check_reserved(files)
    return JobPlan(job, output, tuple(files), tuple(sorted(left_out, key=lambda f: f.name)))


def _new_files(output: Folder, listed: list[InputFile]) -> list[InputFile]:
    """Input files that came after the output was begun, if there still are some from before."""
    planned = planned_inputs.read_planned(output)
    new = planned_inputs.new_files(listed, planned) if planned else []
    return new if len(new) < len(listed) and new and output.list("completions") else []
