"""A job from end to end: check, plan, claim the output, run what is missing, reconcile."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline import layout
from pipeline.commit import manifest
from pipeline.commit.failed_rows import check_failed_rows
from pipeline.commit.finish import finish
from pipeline.commit.footer import read_records
from pipeline.commit.record import UnitRecord
from pipeline.commit.retry import failed_units
from pipeline.commit.stats import summarise
from pipeline.config.job import JobConfig
from pipeline.config.model_identity import check_models, digest
from pipeline.errors import TooManyErrors
from pipeline.inputs.listing import InputFile
from pipeline.inputs.units import Unit
from pipeline.observe.budget import Budget
from pipeline.observe.error_share import ErrorShare, too_many
from pipeline.observe.monitor import Observer, ObserverLoop
from pipeline.observe.other_run import refuse_second_run
from pipeline.observe.progress import OnProgress
from pipeline.observe.run_ledger import RunLedger
from pipeline.observe.status import StatusFile
from pipeline.run.dataflow import generate
from pipeline.run.lifeline import last_word
from pipeline.run.plan import JobPlan, plan_job
from pipeline.run.ray_session import connected, placed
from pipeline.run.watch import Progress, Watch
from pipeline.storage.folder import Folder, open_folder


@dataclass(frozen=True)
class JobResult:
    """A finished job, or with `missing` units one whose failed rows alone were tried again.

    Attributes:
        output: its folder.
        summary: the job in numbers (`stats.summarise`).
        units_run: units that this run generated; 0 if nothing was missing.
        missing: units that are not generated yet.
    """

    output: str
    summary: dict[str, Any]
    units_run: int
    missing: int = 0


@dataclass(frozen=True)
class RunMode:
    """What a run is to do, other than what is missing.

    Attributes:
        only_failed: try failed rows again, and nothing else.
        extend: input files that are new since the output was begun become part of the job.
        same_content: input files of which only the time of change differs have not changed.
        any_errors: however many rows fail, the job ends well: the caller judges them.
        take_over: begin even if another run is at work on the output; that one then stops.
        forked_from: output of the job that this one was made from.
        job_folder: where the job file is; its commit goes into the manifest.
    """

    only_failed: bool = False
    extend: bool = False
    same_content: bool = False
    any_errors: bool = False
    take_over: bool = False
    forked_from: str | None = None
    job_folder: Path | None = None


def run_job(
    job: JobConfig,
    *,
    mode: RunMode | None = None,
    progress: OnProgress | None = None,
    stop: threading.Event | None = None,
    note: Callable[[str], object] = lambda _: None,
) -> JobResult:
    """Run a job, or what is missing of it. On return the output folder has `_SUCCESS`.

    With more failed rows than the job allows all else is there, and `TooManyErrors` says so.

    Args:
        job: the job; its paths are absolute or relative to the working directory.
        mode: what to do other than that.
        progress: told about twice a second how far the job is.
        stop: once it is set, no more units are begun; those in flight are completed and committed.
        note: told what the user should know, in one line each.

    Raises:
        UserError: something the user can fix, such as another run that is at work on the output.
        JobStopped: it was asked to stop before all was done, was taken over, or its budget is
            spent (`BudgetReached`).
        TooManyErrors: more rows failed than the job allows.
        JobFailed: anything else; the same call resumes the job.
    """
    mode, stop = mode or RunMode(), stop or threading.Event()
    # 1. Look at the input and at what there is of the output, and claim that.
    plan = plan_job(job, extend=mode.extend)
    job, output, units = plan.job, plan.output, plan.units
    mark = manifest.fingerprint(job, plan.files)
    check_models(job)
    # Not before it is known that no other run is at work, whose record claiming it would replace.
    how = {"extend": mode.extend, "same_content": mode.same_content}
    manifest.compare(output, plan.files, mark, **how)
    done = manifest.committed(output, units)
    missing = [unit for unit in units if unit.id not in done]
    if (missing or mode.only_failed) and not mode.take_over:
        refuse_second_run(output, note)
    table = manifest.claim(
        output,
        job,
        plan.files,
        mark,
        **how,
        sampling_from=plan.sampling_from,
        forked_from=open_folder(mode.forked_from, job.s3_of_output) if mode.forked_from else None,
    )
    record = json.loads(output.read(layout.JOB) or b"{}")
    optional = manifest.optional_columns(output, record, plan.optional)
    plan = replace(plan, table=table, optional=optional)
    if plan.left_out:
        note(_left_out(plan.left_out))
    if plan.takes_recommendations:
        note(plan.sampling_said)
    # 2. Find what is to be generated: units that are missing, or failed rows of those that are not.
    pending = missing
    if mode.only_failed:
        pending = failed_units(output, [unit for unit in units if unit.id in done])
    most_errors = None if mode.any_errors else job.max_error_share
    if not pending and not missing and (recorded := _finished(output, most_errors)):
        return JobResult(job.output, recorded["summary"], units_run=0)
    # 3. Generate it. Everything that is committed stays, whatever happens from here on.
    checksums: dict[str, str] = {}
    status = StatusFile(output, job.name, len(units), len(done), progress, stop)
    loop = ObserverLoop(stop)
    with status.kept(), loop.running(status):
        if pending:
            ledger = RunLedger(output, job)
            watchers: list[Observer] = [ledger, Budget(job, ledger, stop)]
            if most_errors is not None and not mode.only_failed:
                _check_earlier_errors(plan, ledger, done, most_errors)
                watchers.append(ErrorShare(most_errors, ledger, stop))
            shown = _progress(plan, pending, status.tell)
            shown.connecting()
            with last_word() as tell_lost, connected():
                watch = Watch(loop, stop, tell_lost, shown, *watchers)
                plan = replace(plan, job=job.model_copy(update={"actors": placed(job.actors)}))
                output.delete(layout.SUCCESS)
                try:
                    with ledger.open():
                        checksums = generate(
                            plan, pending, digest(mark), ledger.run, watch, retry=mode.only_failed
                        )
                except TooManyErrors:
                    _check_committed(plan, manifest.committed(output, units), job.max_error_share)
                    raise
        if mode.only_failed and missing:
            records = _check_committed(plan, done, most_errors)
            return JobResult(job.output, summarise(records), len(pending), missing=len(missing))
        # 4. Count that every row is there once, and say so.
        summary = finish(output, plan.job, units, mark, checksums, most_errors, mode.job_folder)
    return JobResult(job.output, summary, units_run=len(pending))


def _check_earlier_errors(plan: JobPlan, ledger: RunLedger, done: set[str], most: float) -> None:
    """Do not begin again what an earlier run was stopped for, unless it is mended or allowed."""
    if any(run.end == "errors" for run in ledger.earlier):
        _check_committed(plan, done, most)


def _check_committed(plan: JobPlan, done: set[str], most: float | None) -> list[UnitRecord]:
    """The records of the units that are committed, once their failed rows are not too many."""
    records = read_records(plan.output, done)
    if most is not None:
        check_failed_rows(plan.output, records, most, missing=len(plan.units) - len(done))
    return records


def _progress(plan: JobPlan, pending: Sequence[Unit], tell: OnProgress) -> Progress:
    samples = plan.job.sampling.n
    before = plan.rows - sum(len(unit.wanted) for unit in pending)
    return Progress(plan.rows * samples, before * samples, tell)


def _finished(output: Folder, most_errors: float | None) -> dict[str, Any] | None:
    """The manifest of a job that is finished; None if now it allows fewer errors than it has."""
    recorded = output.read(layout.MANIFEST)
    if recorded is None or output.read(layout.SUCCESS) is None:
        return None
    found: dict[str, Any] = json.loads(recorded)
    failed, completed = found["summary"]["errors"], found["summary"]["rows"]
    if most_errors is not None and too_many(failed, completed, most_errors):
        return None
    return found


def _left_out(files: Sequence[InputFile]) -> str:
    names = ", ".join(file.name for file in files[:3])
    more = f" and {len(files) - 3:,} more" if len(files) > 3 else ""
    what = "input file is" if len(files) == 1 else "input files are"
    return f"{len(files):,} new {what} not part of this job; --extend adds: {names}{more}"
