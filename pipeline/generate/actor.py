"""The actor that turns units of prompts into units of completions.

A call reads a bundle of units, makes requests of their rows, waits while the engine completes them,
and turns the outcomes into the units' files. Ray Data makes several calls at once, so that units in
flight share the one engine's slots.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from typing import Any

import pyarrow as pa
import ray

from pipeline.commit.files import unit_files
from pipeline.commit.record import Actor, Work
from pipeline.commit.schema import Failed, Outcome, Outcomes
from pipeline.config.job import JobConfig
from pipeline.config.prices import default_prices, price
from pipeline.errors import RowError, UserError
from pipeline.generate.engine_loop import EngineFailed, EngineLoop
from pipeline.generate.loading import lasting, load_acceptance_head, load_pair, make_engine
from pipeline.generate.pool import group_of
from pipeline.generate.reading import Reader
from pipeline.generate.turns import Turns
from pipeline.inputs.blocks import UnitFiles, UnitRows
from pipeline.inputs.requests import Row, RowRequests
from pipeline.inputs.row_sampling import SAMPLING_COLUMN
from pipeline.observe.attempts import History
from pipeline.observe.ledger import Run, Timesheet
from pipeline.observe.metrics import LiveMetrics, Reading
from pipeline.observe.progress import Tally
from pipeline.storage.folder import open_folder
from specdec.request import Completion, Request


class GenerateActor:
    """Holds one target and draft pair and runs one engine over all units it is given.

    Args:
        job: the job; paths in it are valid on this machine.
        optional: the optional columns of its outputs.
        digest: of the job's fingerprint, for the record.
        monitor: actor handle of the job's `Monitor`.
        run: the run of the job, for the ledger.

    Raises:
        UserError: the models do not fit together or cannot be used; the monitor is told first,
            since Ray wraps what an actor's constructor raises.
    """

    def __init__(
        self, job: JobConfig, optional: tuple[str, ...], digest: str, monitor: Any, run: Run
    ) -> None:
        self._timesheet = Timesheet(
            run, open_folder(job.output, job.s3_of_output), monitor.book.remote
        )
        self._spent: dict[str, dict[str, float]] = {}  # seconds by phase of each unit in flight
        began = time.monotonic()
        ray.get(monitor.start.remote())
        context = ray.get_runtime_context()
        self._monitor = monitor
        self._turns = Turns()
        self._group = group_of(context.get_actor_name())
        job = job.in_group(self._group)
        self._job, self._optional, self._digest = job, optional, digest
        self._actor, self._node = context.get_actor_id() or "local", context.get_node_id()
        try:
            # In a thread that ends: with OpenMP's threads of two others in one process, more than
            # there are cores, its kernels no longer wait actively, and rounds take a third longer.
            with lasting(), ThreadPoolExecutor(1) as loader:
                self._pair = loader.submit(load_pair, job).result()
                self._head = loader.submit(load_acceptance_head, job, self._pair).result()
            self._requests = RowRequests(
                job.input, job.sampling, self._pair.tokenizer, self._pair.context_length
            )
            self._reader = Reader(job, self._pair.tokenizer, self._requests)
        except UserError as error:
            ray.get(monitor.fail.remote(str(error)))
            raise
        self._failure: str | None = None
        self._loop = EngineLoop(
            self._make_engine,
            threads=max(1, int(job.actors.cores)),
            report=self._report,
            hang_seconds=job.actors.hang_seconds,
        )
        self._timesheet.loaded(self._loop.seconds, lambda: self._loop.busy)
        self._load_seconds = time.monotonic() - began
        hardware, prices = self._timesheet.account().hardware, job.prices or default_prices()
        LiveMetrics(job.name, self._actor, self._reading, price(hardware, prices).per_hour)

    def _reading(self) -> Reading:
        return replace(self._loop.reading(), seconds=self._timesheet.account().seconds)

    def _report(self, tally: Tally) -> None:
        # By process: an actor that is restarted keeps its id, and counts from the beginning.
        self._monitor.post.remote(self._timesheet.worker, tally)
        self._timesheet.nudge()

    def _make_engine(self) -> Any:
        return make_engine(self._job, self._pair, self._head)

    async def __call__(self, block: pa.Table) -> pa.Table:
        """Complete the units of a bundle, each by itself.

        Args:
            block: a `UnitRows` block.

        Returns:
            A `UnitFiles` block: what to commit.
        """
        # One that fails leaves the others to their end: Ray hands over the bundle again.
        units = [self._unit(rows) for rows in UnitRows.from_block(block)]
        done = await asyncio.gather(*units, return_exceptions=True)
        files = []
        for each in done:
            if isinstance(each, BaseException):
                raise each
            files.append(each)
        return UnitFiles.to_block(files)

    async def _unit(self, rows: UnitRows) -> UnitFiles:
        """Complete one unit."""
        started = time.time()
        outcomes = await self._outcomes(rows)
        if outcomes is None:
            return UnitFiles(rows.unit.id, ())
        files = await asyncio.to_thread(self._files, rows, outcomes, started)
        samples = [outcome for row in outcomes for outcome in row]
        failed = sum(isinstance(outcome, Failed) for outcome in samples)
        await self._tell("end", rows.unit.id, len(samples), failed)
        return files

    async def _outcomes(self, rows: UnitRows) -> Outcomes | None:
        """Outcomes of the unit's rows, in as many attempts as it takes.

        Returns:
            None if the job is stopping: the unit is left to another run.

        Raises:
            EngineFailed: the engine dies whatever row it works on.
        """
        unit, every = rows.unit.id, range(len(rows.unit.wanted))
        samples = len(every) * self._job.sampling.n
        while True:
            self._spent[unit] = {}  # what an attempt before this one took is lost
            history = await self._tell("begin", unit, samples)
            if history is None:
                return None
            if history.hopeless:
                raise EngineFailed(f"the engine dies whatever row it works on: {self._poison()}")
            try:
                if history.quarantined:
                    async with self._turns.alone():
                        return await self._in_quarantine(rows, history)
                async with self._turns.shared():
                    return await self._complete(rows, every)
            except EngineFailed as failure:
                # The engine was replaced, so this process can go on; the attempt counts as dead.
                self._failure = str(failure)

    async def _tell(self, what: str, *arguments: object) -> Any:
        """Call the monitor and wait for its answer."""
        return await asyncio.wrap_future(getattr(self._monitor, what).remote(*arguments).future())

    async def _in_quarantine(self, rows: UnitRows, history: History) -> Outcomes:
        """Complete a unit that has killed its engine; rows that killed it alone become errors."""
        outcomes: dict[int, Sequence[Outcome]] = {}
        every = range(len(rows.unit.wanted))
        for group in history.groups(every, self._job.actors.slots):
            if history.poisonous(group):
                poison = Failed(self._poison(), attempts=history.deaths)
                outcomes[group[0]] = [poison] * len(self._requests_of(rows, group[0]))
                continue
            await self._tell("trial", rows.unit.id, group)
            outcomes.update(zip(group, await self._complete(rows, group), strict=True))
            await self._tell("passed", rows.unit.id)
        return [outcomes[index] for index in every]

    def _poison(self) -> RowError:
        why = self._failure or "the process died; too little memory is the usual reason"
        return RowError("EngineDied", f"the engine died whenever it worked on this row: {why}")

    async def _complete(self, rows: UnitRows, indices: Sequence[int]) -> Outcomes:
        """Outcomes of some of a unit's rows."""
        prepared = await asyncio.to_thread(lambda: [self._requests_of(rows, i) for i in indices])
        requests = [each for row in prepared for each in row if isinstance(each, Request)]
        self._loop.note_errors(sum(map(len, prepared)) - len(requests))
        completions = await asyncio.wrap_future(
            self._loop.submit(requests, self._spent[rows.unit.id])
        )
        return await asyncio.to_thread(self._read, rows, indices, prepared, completions)

    def _read(
        self,
        rows: UnitRows,
        indices: Sequence[int],
        prepared: Sequence[Sequence[Request | Failed]],
        completions: Sequence[Completion],
    ) -> Outcomes:
        """Outcomes of some of a unit's rows, of which the engine has completed the requests."""
        remaining = iter(completions)
        outcomes: list[list[Outcome]] = []
        for index, samples in zip(indices, prepared, strict=True):
            # Of a row without any request there may be no values, which is why.
            asked = any(isinstance(each, Request) for each in samples)
            row = self._row(rows, index) if asked else {}
            outcomes.append(
                [
                    self._reader.outcome(row, each, next(remaining))
                    if isinstance(each, Request)
                    else each
                    for each in samples
                ]
            )
        return outcomes

    def _row(self, rows: UnitRows, index: int) -> Row:
        """A row's columns; none of a line that is no row."""
        return {} if index in rows.bad_lines else rows.row(index, self._requests.columns)

    def _requests_of(self, rows: UnitRows, index: int) -> list[Request | Failed]:
        """A request for each of a row's samples, or why there is none."""
        row: Row = {}
        try:
            if index in rows.bad_lines:
                raise rows.bad_lines[index].error
            row = self._row(rows, index)
            return [*self._requests.of(row, rows.row_id(index))]
        except RowError as error:
            return [Failed(error, attempts=1)] * self._requests.count(row)

    def _files(self, rows: UnitRows, tried: Outcomes, started: float) -> UnitFiles:
        """The unit's output files, and in them what its rows took."""
        usage = self._loop.take_usage()
        load, self._load_seconds = self._load_seconds, 0.0
        seconds, spent = {"load": load, **usage.phase_seconds}, self._spent.pop(rows.unit.id)
        seconds |= {phase: seconds.get(phase, 0.0) + spent[phase] for phase in spent}
        work = Work(
            started=started,
            finished=time.time(),
            engine=usage.engine,
            phase_seconds=seconds,
            peak_live=usage.peak_live,
            speedup=usage.speedup.to_json(),
            rounds=[(*outcome, n) for outcome, n in sorted(usage.outcomes.items())],
            nodes=[(*place, *counts) for place, counts in sorted(usage.nodes.items())],
            forward_seconds=usage.costs,
            fell_back=usage.fell_back,
        )
        return unit_files(
            rows,
            tried,
            job=self._digest,
            own_n=bool(self._job.input.format) or SAMPLING_COLUMN in rows.table.column_names,
            actor=Actor(self._actor, self._node, self._group or None, self._timesheet.worker),
            work=work,
            optional=self._optional,
            token_text=cache(self._reader.token_text),
            trace=self._job.speculation.trace,
        )
