"""A job from end to end: check, plan, claim the output, run what is missing, reconcile."""

from __future__ import annotations

import _thread
import json
import logging
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.util.annotations import RayDeprecationWarning
from tenacity import Retrying, retry_if_exception_message, stop_after_attempt

from pipeline import layout
from pipeline.commit import manifest, planned_inputs
from pipeline.commit.finish import finish
from pipeline.commit.footer import read_records
from pipeline.commit.retry import RetrySink, failed_units
from pipeline.commit.schema import RESERVED, check_reserved
from pipeline.commit.sink import CommitSink
from pipeline.commit.stats import summarise
from pipeline.config.job import ActorsConfig, JobConfig
from pipeline.config.model_identity import check_models, digest
from pipeline.errors import JobStopped, UserError
from pipeline.generate.actor import GenerateActor
from pipeline.generate.pool import actor_options, check_resources, check_workers, give_back
from pipeline.inputs.listing import InputFile, list_inputs
from pipeline.inputs.prompts import required_columns
from pipeline.inputs.source import UnitDatasource
from pipeline.inputs.units import FilePlan, Unit, check_columns, plan_files, request_lines
from pipeline.observe.budget import Books
from pipeline.observe.progress import JobProgress, OnProgress, Tally, start_monitor
from pipeline.observe.status import Beacon
from pipeline.run.preflight import check_output
from pipeline.storage.folder import Folder, check_access, is_s3, resolved

_POLL_SECONDS = 0.5
_UNIT_RETRIES = 2
# Far more than a unit needs until its poisonous rows are found (`pipeline.observe.attempts`); only
# so that nothing goes on for ever.
_ACTOR_TASK_RETRIES = 200
_ACTOR_INIT_DEATHS = 3
# Share of the units that its actors can hold above which a pool grows.
_FULL = 0.75


# While actors hold all cores, Ray ends the processes that read and write after a second of idleness
# and then starts new ones, which takes seconds of the cores that the engine should have.
LOCAL_RAY = {"idle_worker_killing_time_threshold_ms": 600_000}


class JobFailed(RuntimeError):
    """The job stopped for a reason that is no mistake of the user's. What is committed stays."""


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
    on_s3 = any(map(is_s3, (*job.input.paths, job.output)))
    job = job.model_copy(update={"s3": resolved(job.s3, used=on_s3)})
    check_output(job.output, job.input.paths)
    check_access(job.output, job.s3)
    output = Folder(job.output, job.s3)
    listed = list_inputs(job.input.paths, job.s3)
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
    return new if len(new) < len(listed) and new and output.list(layout.COMPLETIONS) else []


@dataclass(frozen=True)
class Mode:
    """What a run is to do, other than what is missing.

    Attributes:
        only_failed: try failed rows again, and nothing else.
        extend: input files that are new since the output was begun become part of the job.
        same_content: input files of which only the time of change differs have not changed.
        forked_from: output of the job that this one was made from.
        job_folder: where the job file is; its commit goes into the manifest.
    """

    only_failed: bool = False
    extend: bool = False
    same_content: bool = False
    forked_from: str | None = None
    job_folder: Path | None = None


def run_job(
    job: JobConfig,
    *,
    mode: Mode | None = None,
    progress: OnProgress | None = None,
    stop: threading.Event | None = None,
    note: Callable[[str], object] = lambda _: None,
) -> JobResult:
    """Run a job, or what is missing of it. On return the output folder has `_SUCCESS`.

    Args:
        job: the job; its paths are absolute or relative to the working directory.
        mode: what to do other than that.
        progress: told about twice a second how far the job is.
        stop: once it is set, no more units are begun; those in flight are completed and committed.
        note: told what the user should know, in one line each.

    Raises:
        UserError: something the user can fix.
        JobStopped: it was asked to stop before all was done, or its budget is spent
            (`BudgetReached`).
        JobFailed: anything else; the same call resumes the job.
    """
    mode = mode or Mode()
    plan = plan_job(job, extend=mode.extend)
    job, output, units = plan.job, plan.output, plan.units
    mark = manifest.fingerprint(job, plan.files)
    check_models(job)
    manifest.claim(
        output,
        job,
        plan.files,
        mark,
        extend=mode.extend,
        same_content=mode.same_content,
        forked_from=Folder(mode.forked_from, job.s3) if mode.forked_from else None,
    )
    if plan.left_out:
        note(_left_out(plan.left_out))
    done = manifest.committed(output, units)
    missing = [unit for unit in units if unit.id not in done]
    pending = missing
    if mode.only_failed:
        pending = failed_units(output, [unit for unit in units if unit.id in done])
    if not pending and not missing and (recorded := _finished(output)):
        return JobResult(job.output, recorded["summary"], units_run=0)

    checksums: dict[str, str] = {}
    beacon = Beacon(output, job.name, len(units), len(done), progress, stop)
    with beacon.running():
        if pending:
            books = Books(output, job, beacon.stop)
            with connected():
                job = job.model_copy(update={"actors": _placed(job.actors)})
                output.delete(layout.SUCCESS)
                with books.open():
                    checksums = _generate(
                        replace(plan, job=job),
                        pending,
                        digest(mark),
                        mode.only_failed,
                        books,
                        beacon.tell,
                    )
        if mode.only_failed and missing:
            summary = summarise(read_records(output, done))
            return JobResult(job.output, summary, len(pending), missing=len(missing))
        summary = finish(output, job, units, mark, checksums, mode.job_folder)
    return JobResult(job.output, summary, units_run=len(pending))


def _finished(output: Folder) -> dict[str, Any] | None:
    """The manifest of a job that is finished."""
    recorded = output.read(layout.MANIFEST)
    if recorded is None or output.read(layout.SUCCESS) is None:
        return None
    found: dict[str, Any] = json.loads(recorded)
    return found


def _left_out(files: Sequence[InputFile]) -> str:
    names = ", ".join(file.name for file in files[:3])
    more = f" and {len(files) - 3:,} more" if len(files) > 3 else ""
    what = "input file is" if len(files) == 1 else "input files are"
    return f"{len(files):,} new {what} not part of this job; --extend adds: {names}{more}"


# ------------------------------------------------------------------ the cluster


@contextmanager
def connected() -> Iterator[None]:
    """A Ray to run on: the one this process is connected to, RAY_ADDRESS, or a local one."""
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    # On a machine that is busy, a Ray may miss the half minute that it gives itself to start.
    start = Retrying(
        stop=stop_after_attempt(3),
        retry=retry_if_exception_message(match=".*timed out during startup"),
        reraise=True,
    )
    # Ray's own log lines would be torn into the progress bar; logs stay in files.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        with _silent_stderr(), _kept_sigterm():
            start(
                ray.init,
                address=address or "local",
                include_dashboard=None if address else False,
                _system_config=None if address else LOCAL_RAY,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except ConnectionError as error:
        raise UserError(f"RAY_ADDRESS: no Ray cluster at {address}: {error}") from None
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _kept_sigterm() -> Iterator[None]:
    """Keep what SIGTERM means; Ray puts handlers of its own there, which end the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if handler is not None:
            signal.signal(signal.SIGTERM, handler)


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Keep Ray's C++ from announcing its log level; what goes wrong comes as an exception."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _placed(actors: ActorsConfig) -> ActorsConfig:
    """The pool as this cluster can hold it, once that is checked."""
    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    actors = actors.on([node["Resources"].get("CPU", 0.0) for node in nodes])
    check_resources(actors, [node["Resources"] for node in nodes])
    check_workers([node["NodeID"] for node in nodes])
    return actors


# ------------------------------------------------------------------- generation


def _generate(
    plan: JobPlan,
    pending: list[Unit],
    digest: str,
    retry: bool,
    books: Books,
    progress: OnProgress,
) -> dict[str, str]:
    """Generate and commit the pending units. Returns checksums of the files written."""
    job = plan.job
    rows_before = plan.rows - sum(len(unit.wanted) for unit in pending)
    monitor = start_monitor(job.actors.max_actors)
    schemas = {f.file.name: f.schema for f in plan.files if f.file.format == "jsonl"}
    source = UnitDatasource(pending, schemas, job.s3, RESERVED)
    sink = (RetrySink if retry else CommitSink)(plan.output, monitor)
    # Reading and writing are mostly waiting. They ask for no CPU, so that actors may hold all of
    # them and the job still moves; instead they are few.
    few = 2 + job.actors.max_actors
    n = job.sampling.n
    watch = _Watch(monitor, plan.rows * n, rows_before * n, progress, books.stop)
    books.keep(monitor)
    with _data_context(), watch.running():
        try:
            ray.data.read_datasource(
                source, num_cpus=0, concurrency=few, override_num_blocks=source.read_tasks
            ).map_batches(
                GenerateActor,
                batch_size=None,
                batch_format="pyarrow",
                compute=ActorPoolStrategy(
                    min_size=job.actors.min_actors,
                    max_size=job.actors.max_actors,
                    max_tasks_in_flight_per_actor=job.units_in_flight,
                    max_concurrent_calls_per_actor=job.units_in_flight,
                ),
                fn_constructor_args=(job, digest, monitor, books.run),
                **actor_options(job.actors),
                # Ray's default is to retry for ever a unit that kills its actor.
                max_task_retries=_ACTOR_TASK_RETRIES,
            ).write_datasink(sink, ray_remote_args={"num_cpus": 0}, concurrency=few)
        except BaseException as error:
            give_back(error)
            if isinstance(error, Exception):
                raise _explained(error, monitor) from error
            if isinstance(error, KeyboardInterrupt) and watch.drained:
                raise JobStopped from None
            raise
        finally:
            books.last_look()
            watch.last_look()
            ray.kill(monitor)
    if watch.stopping:
        raise JobStopped
    return sink.checksums


@contextmanager
def _data_context() -> Iterator[None]:
    """Ray Data's settings for this job: a block is a unit, failed units are retried, silence."""
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        # Few tasks are meant to be few; max_task_retries has no other name in this Ray; copying a
        # context touches its deprecated fields.
        warnings.filterwarnings("ignore", "The maximum number of concurrent tasks", UserWarning)
        warnings.filterwarnings("ignore", category=RayDeprecationWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="ray")
        context = DataContext.get_current().copy()
        # Blocks smaller than this are joined: with one row per unit, every unit stays by itself.
        context.target_max_block_size = 1
        # What storage says in the end it says after minutes of patience, and all that is the
        # user's to mend stays as it is: neither is tried again.
        context.retried_map_errors = [r"(?s)^(?!.*\bUserError\b)"]
        context.max_map_retries = _UNIT_RETRIES
        # An actor whose constructor raised is replaced; one bad node is not the job's end.
        context.max_consecutive_actor_init_deaths = _ACTOR_INIT_DEATHS
        # Ray Data's own threshold is one that actors which queue nothing never reach.
        context.autoscaling_config = replace(
            context.autoscaling_config, actor_pool_util_upscaling_threshold=_FULL
        )
        context.raise_original_map_exception = True
        # A unit may take hours, and a cluster may take long to bring a node.
        context.execution_no_progress_timeout_s = -1
        context.default_map_logical_memory_enabled = False
        context.enable_progress_bars = False
        with DataContext.current(context):
            yield


class _Watch:
    """A thread beside the job that reports its progress and passes on the wish to stop.

    Attributes:
        stopping: whether the job was told to begin no more units.
        drained: whether it was then interrupted, because nothing was in flight any more.
    """

    def __init__(
        self,
        monitor: Any,
        rows_total: int,
        rows_before: int,
        progress: OnProgress,
        stop: threading.Event,
    ) -> None:
        self._monitor, self._tell, self._stop = monitor, progress, stop
        self._rows_total, self._rows_before = rows_total, rows_before
        self._over = threading.Event()
        self._began: float | None = None
        self._tally, self._seconds = Tally(), 0.0
        self.stopping = self.drained = False

    @contextmanager
    def running(self) -> Iterator[None]:
        """Watch until the block ends."""
        thread = threading.Thread(target=self._run, name="watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()
        if not self.stopping:
            # The last reports may have been lost.
            rows = self._rows_total - self._rows_before
            self._tally = replace(self._tally, rows=rows - self._tally.errors)
            self._tell(self._moment("checking"))

    def last_look(self) -> None:
        """Take in what actors reported after the thread's last look."""
        with suppress(ray.exceptions.RayError):
            self._look()

    def _moment(self, stage: str) -> JobProgress:
        return JobProgress(stage, self._rows_total, self._rows_before, self._tally, self._seconds)

    def _look(self) -> None:
        tally, _ = ray.get(self._monitor.read.remote(), timeout=5)
        if tally is not None:
            self._began = self._began or time.monotonic()
            self._tally, self._seconds = tally, time.monotonic() - self._began
            stage = "finishing units in flight" if self.stopping else "generating"
            self._tell(self._moment(stage))

    def _run(self) -> None:
        in_flight = 0
        self._tell(self._moment("starting actors"))
        while not self._over.wait(_POLL_SECONDS):
            try:
                if self._stop.is_set():
                    self.stopping = True
                    in_flight = ray.get(self._monitor.stop.remote(), timeout=5)
                self._look()
            except ray.exceptions.RayError:
                continue
            if self.stopping and not in_flight:
                break
        if self.stopping and not self._over.is_set():
            # All that is left to Ray Data is to pass on units that no actor takes any more.
            self.drained = True
            _thread.interrupt_main()


def _explained(error: Exception, monitor: Any) -> Exception:
    """The user's mistake behind what Ray raised, or a `JobFailed` with its innermost cause."""
    try:
        _, message = ray.get(monitor.read.remote(), timeout=10)
    except ray.exceptions.RayError:
        message = None
    if message:
        return UserError(message)
    causes = _causes(error)
    for cause in causes:
        if type(cause) is UserError:
            return UserError(_own_words(cause))
    # Ray Data marks what is not the user's code by an error without words at the end.
    telling = [cause for cause in causes if str(cause)] or causes
    return JobFailed(f"{type(telling[-1]).__name__}: {_own_words(telling[-1])}")


def _own_words(error: BaseException) -> str:
    """An error's message without tracebacks and what Ray Data adds after retries."""
    text = str(error).split("\nFailed to apply UDF transform")[0].strip()
    if "raceback (most recent call last)" in text:
        first, last = text.splitlines()[0], text.splitlines()[-1]
        text = f"{first} … {last}"
    return text or "no message"


def _causes(error: BaseException) -> list[BaseException]:
    """The error and what it wraps, outermost first; Ray keeps a task's error in `cause`."""
    found: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in found:
        found.append(current)
        inner = getattr(current, "cause", None)
        current = inner if isinstance(inner, BaseException) else current.__cause__
    return found
