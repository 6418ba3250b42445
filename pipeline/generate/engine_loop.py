"""One thread that owns the engine and never lets it wait while any unit has rows to offer."""

from __future__ import annotations

import faulthandler
import itertools
import os
import queue
import threading
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from pipeline.observe.metrics import Reading
from pipeline.observe.progress import Tally
from specdec.measure.speedup import SpeedupMeter
from specdec.request import Completion, Request

if TYPE_CHECKING:
    from specdec.engine.engine import Engine

_REPORT_SECONDS = 0.5
"""Between two reports of a loop: as often as the driver looks at them."""

_ENGINE_COUNTS = (
    "target_forwards",
    "draft_forwards",
    "target_tokens",
    "draft_tokens",
    "shared_tokens",
    "preempted",
    "verified_forced",
    "accepted_forced",
    "verified_in_prompt",
    "accepted_in_prompt",
    "verified_in_rows",
    "accepted_in_rows",
    "verified_in_corpus",
    "accepted_in_corpus",
)
"""The engine's statistics that are kept with each unit."""


@dataclass
class Usage:
    """What an engine spent.

    Attributes:
        engine: forwards and tokens through each model.
        phase_seconds: seconds by phase that were spent on no unit: `idle` (no row to work on),
            `profile`; the rest is charged to the units (`EngineLoop.submit`).
        peak_live: most rows in slots at once.
        speedup: rounds with speculation and control rounds.
        outcomes: rounds of rows by (candidates verified, accepted).
        nodes: candidates that branch by (depth, rank): drafted, verified, judged, accepted.
        costs: the policy's cost tables as they are now, if it has any.
        fell_back: whether the policy has given up its acceptance head for an online estimator.
    """

    engine: dict[str, int] = field(default_factory=dict)
    phase_seconds: dict[str, float] = field(default_factory=dict)
    peak_live: int = 0
    speedup: SpeedupMeter = field(default_factory=SpeedupMeter)
    outcomes: Counter[tuple[int, int]] = field(default_factory=Counter)
    nodes: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    costs: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    fell_back: bool = False

    def minus(self, other: Usage) -> Usage:
        """What was spent since `other`; what is not a sum stays as it is."""
        return Usage(
            {k: v - other.engine.get(k, 0) for k, v in self.engine.items()},
            {k: v - other.phase_seconds.get(k, 0.0) for k, v in self.phase_seconds.items()},
            self.peak_live,
            self.speedup.minus(other.speedup),
            self.outcomes - other.outcomes,
            {
                place: [a - b for a, b in zip(now, other.nodes.get(place, [0] * 4), strict=True)]
                for place, now in self.nodes.items()
            },
            self.costs,
            self.fell_back,
        )


class EngineFailed(RuntimeError):
    """A round raised; what it was working on is lost, and the engine has been replaced."""


class _Batch:
    """The requests of one unit, and the future that gets all their completions at once."""

    def __init__(self, requests: Sequence[Request], spent: dict[str, float]) -> None:
        self.requests, self.spent = requests, spent
        self.done: dict[int, Completion] = {}
        self.future: Future[list[Completion]] = Future()


class EngineLoop:
    """Runs an engine for several units at once.

    Units hand their requests over with `submit` from any thread; the engine's slots are refilled
    from all of them, so there is no drain at the end of each unit.

    Args:
        make_engine: makes the engine; called again if a round raises, since the old one's state is
            then unknown.
        threads: torch threads of the engine's thread.
        report: called about twice a second, and whenever a unit ends, with the totals so far.
        hang_seconds: a round that takes longer ends the process: what hangs cannot be interrupted,
            and another process can go on. None: never.
    """

    def __init__(
        self,
        make_engine: Callable[[], Engine],
        threads: int,
        report: Callable[[Tally], None],
        hang_seconds: float | None = None,
    ) -> None:
        self._make_engine = make_engine
        self._threads = threads
        self._report = report
        self._hang_seconds = hang_seconds
        self._inbox: queue.Queue[_Batch] = queue.Queue()
        self._ids = map(str, itertools.count())
        self._waiting: dict[str, tuple[_Batch, int]] = {}
        self._tally = Tally()  # its counts are those of engines that were replaced
        self._reported = 0.0
        self._peak = 0
        self._lock = threading.Lock()
        self._taken = Usage()
        self._engine = make_engine()
        self._spent = _spending(self._engine)
        # Every second of the engine's thread, by phase; those on no unit; and those since `_mark`,
        # which will be known when the step or the wait ends.
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._unclaimed: defaultdict[str, float] = defaultdict(float)
        self._mark, self._doing = time.monotonic(), "idle"
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    def submit(
        self, requests: Sequence[Request], spent: dict[str, float] | None = None
    ) -> Future[list[Completion]]:
        """Queue a unit's requests. Their ids need not be unique.

        Args:
            requests: the requests.
            spent: the unit's share of each round's seconds is added to it, by phase.

        Returns:
            A future of their completions, in order. It raises `EngineFailed` if a round raised.
        """
        batch = _Batch(requests, {} if spent is None else spent)
        if requests:
            self._inbox.put(batch)
        else:
            batch.future.set_result([])
        return batch.future

    def note_errors(self, rows: int) -> None:
        """Count rows that failed before they became requests."""
        with self._lock:
            self._tally.errors += rows

    def reading(self) -> Reading:
        """Running totals but for seconds, as of about now; may be called from any thread."""
        with self._lock:
            stats = self._engine.stats
            return Reading(
                replace(self._tally, counts=replace(stats.counts)),
                stats.rounds,
                stats.live_rows,
            )

    def seconds(self) -> dict[str, float]:
        """Every second since the loop was made, by phase, up to now."""
        with self._lock:
            now = self._seconds.copy()
            now[self._doing] += time.monotonic() - self._mark
            return dict(now)

    @property
    def busy(self) -> bool:
        """Whether any unit is in flight."""
        return bool(self._waiting) or not self._inbox.empty()

    def take_usage(self) -> Usage:
        """What the engine spent up to the last unit's end, since the last call.

        Each second is handed out once.
        """
        with self._lock:
            unclaimed = {"idle": 0.0, **self._unclaimed}
            now = replace(self._spent, phase_seconds=unclaimed, peak_live=self._peak)
            spent, self._taken, self._peak = now.minus(self._taken), now, self._engine.live
            return spent

    # ------------------------------------------------------- the engine's thread

    def _run(self) -> None:
        import torch

        # The setting belongs to the thread that runs the kernels.
        torch.set_num_threads(self._threads)
        try:
            while True:
                self._admit()
                self._step()
        except BaseException:
            # Without this thread all units would wait for ever. Ray starts another actor instead.
            traceback.print_exc()
            os._exit(1)

    def _step(self) -> None:
        """Run one round and hand out what it finished."""
        if self._hang_seconds is not None:
            # A watchdog of its own thread that needs no GIL; it also prints where the round hangs.
            faulthandler.dump_traceback_later(self._hang_seconds, exit=True)
        before = dict(self._engine.stats.seconds)
        try:
            completions = self._engine.step()
        except Exception as error:  # whatever it was, the units must hear of it
            import torch

            if isinstance(error, torch.AcceleratorError):
                raise  # after this the device refuses everything else in this process, too
            traceback.print_exc()
            self._charge({}, list(self._waiting))
            self._replace_engine()
            self._fail_all(EngineFailed(f"{type(error).__name__}: {error}"))
            return
        finally:
            faulthandler.cancel_dump_traceback_later()
        phases = self._engine.stats.seconds
        worked = {name: phases[name] - before.get(name, 0.0) for name in phases}
        self._charge(worked, [*self._engine.live_ids, *(c.id for c in completions)])
        with self._lock:
            self._peak = max(self._peak, self._engine.live + len(completions))
        for completion in completions:
            self._deliver(completion)
        if time.monotonic() - self._reported > _REPORT_SECONDS:
            self._post()

    def _admit(self) -> None:
        """Take over all units that arrived; with nothing to do, wait for one."""
        while True:
            with self._lock:
                self._doing = "host" if self._engine.has_work else "idle"
            try:
                batch = self._inbox.get(block=not self._engine.has_work)
            except queue.Empty:
                return
            if self._doing == "idle":
                self._charge({}, [])
            for index, request in enumerate(batch.requests):
                name = next(self._ids)
                self._waiting[name] = (batch, index)
                self._engine.submit(replace(request, id=name))

    def _charge(self, phases: Mapping[str, float], rows: Sequence[str]) -> None:
        """Charge the time since the last call to phases as far as known, and to the rows' units."""
        with self._lock:
            now = time.monotonic()
            rest = now - self._mark - sum(phases.values())
            lap = {**phases, self._doing: phases.get(self._doing, 0.0) + rest}
            self._mark, self._doing = now, "host"
            batches = Counter(self._waiting[row][0] for row in rows if row in self._waiting)
            for phase, seconds in lap.items():
                self._seconds[phase] += seconds
                if phase in ("idle", "profile", "warmup") or not batches:
                    self._unclaimed[phase] += seconds
                    continue
                for batch, count in batches.items():
                    share = seconds * count / batches.total()
                    batch.spent[phase] = batch.spent.get(phase, 0.0) + share

    def _deliver(self, completion: Completion) -> None:
        batch, index = self._waiting.pop(completion.id)
        batch.done[index] = replace(completion, id=batch.requests[index].id)
        with self._lock:
            if completion.finish_reason == "error":
                self._tally.errors += 1
            else:
                self._tally.rows += 1
                self._tally.finished += completion.counts.committed
        if len(batch.done) == len(batch.requests):
            with self._lock:
                self._spent = _spending(self._engine)
            self._post()
            batch.future.set_result([batch.done[i] for i in range(len(batch.requests))])

    def _post(self) -> None:
        self._reported = time.monotonic()
        with self._lock:
            counts = replace(self._tally.counts)
            counts.add(self._engine.stats.counts)
            self._report(replace(self._tally, counts=counts))

    def _fail_all(self, error: Exception) -> None:
        batches = {id(batch): batch for batch, _ in self._waiting.values()}
        self._waiting.clear()
        for batch in batches.values():
            batch.future.set_exception(error)

    def _replace_engine(self) -> None:
        with self._lock:
            self._tally.counts.add(self._engine.stats.counts)
            # Free the broken engine's memory before a new one asks for its own.
            del self._engine
            self._engine = self._make_engine()
            self._spent = _spending(self._engine)
            self._taken = Usage(phase_seconds=self._taken.phase_seconds)


def _spending(engine: Engine) -> Usage:
    """A copy of what the engine has spent and measured.

    The engine's thread makes it when a unit ends. Other threads may not look at a cost table, which
    may grow in a round. In every round it would cost more than all other accounting together.
    """
    stats = engine.stats
    return Usage(
        {name: getattr(stats, name) for name in _ENGINE_COUNTS},
        speedup=stats.speedup.copy(),
        outcomes=stats.outcomes.copy(),
        nodes={place: counts.copy() for place, counts in stats.nodes.items()},
        costs=engine.policy.costs_table(),
        fell_back=engine.policy.fell_back,
    )
