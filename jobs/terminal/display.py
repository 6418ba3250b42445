"""The progress bar of all long commands.

On a terminal it is a live bar. Elsewhere (cron, nohup, a log file) it is lines: one when a stage
begins, one every half minute, and one when it ends.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from jobs.terminal.console import err
from pipeline.observe.progress import JobProgress

LOG_SECONDS = 30.0
"""Between two lines where there is no terminal. Longer makes shorter logs, and longer silence."""


class Show:
    """Called with how far a command is. This one shows nothing: it is that of `--quiet`."""

    def __call__(self, stage: str, done: float | None = None, figures: str = "") -> None:
        """Show a moment.

        Args:
            stage: what is being done, in a few words; another one ends the one before.
            done: how much of the stage is done, from 0 to 1; None: not known.
            figures: what else is known, such as a speed.
        """

    def job(self, progress: JobProgress) -> None:
        """Show a moment of a running job; what `run_job` is given as `progress`."""
        total = progress.rows_total
        rows = f"{progress.rows_done:,}/{total:,} rows" if total else ""
        known = " · ".join(filter(None, (rows, figures(progress))))
        self(progress.stage, progress.rows_done / total if total else None, known)


@contextmanager
def progress_bar(
    *, quiet: bool = False, console: Console = err, seconds: float = LOG_SECONDS
) -> Iterator[Show]:
    """Yields what to call with how far a command is.

    Args:
        quiet: show nothing.
        console: where to show it.
        seconds: between two lines where there is no terminal.
    """
    if quiet:
        yield Show()
    elif console.is_terminal:
        with _bar(console) as bar:
            yield bar
    else:
        with _lines(console, seconds) as lines:
            yield lines


# ------------------------------------------------------------------- on a terminal


class _Bar(Show):
    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._task = bar.add_task("starting", total=None, figures="")

    def __call__(self, stage: str, done: float | None = None, figures: str = "") -> None:
        words = " ".join(filter(None, ("" if done is None else f"{done:4.0%}", figures)))
        self._bar.update(
            self._task,
            description=stage,
            total=None if done is None else 1.0,
            completed=done or 0.0,
            figures=words,
        )


@contextmanager
def _bar(console: Console) -> Iterator[Show]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn())
    figures = TextColumn("{task.fields[figures]}", markup=False)
    bar = Progress(*columns, figures, TimeElapsedColumn(), console=console, transient=True)
    with bar:
        yield _Bar(bar)


# ---------------------------------------------------------------------- as lines


@dataclass
class _Stage:
    """A stage as it was told last.

    Attributes:
        name, done, figures: as of `Show`.
        began: monotonic time.
        shown: whether a line has named it.
    """

    name: str
    done: float | None = None
    figures: str = ""
    began: float = field(default_factory=time.monotonic)
    shown: bool = False

    def line(self, words: str = "") -> str:
        """One line, with the time since its begin at the end."""
        name = self.name if self.done is None else f"{self.name} {self.done:.0%}"
        took = words + duration(time.monotonic() - self.began)
        return " · ".join(filter(None, (name, self.figures, took)))


class _Lines(Show):
    def __init__(self, console: Console) -> None:
        self._console = console
        self._lock = threading.Lock()
        # What a command does before it names a stage is named only if it takes long.
        self._stage = _Stage("starting")

    def __call__(self, stage: str, done: float | None = None, figures: str = "") -> None:
        with self._lock:
            if self._stage.name != stage:
                self._end()
                self._stage = _Stage(stage)
                self._print(stage)
            self._stage.done, self._stage.figures = done, figures

    def tick(self) -> None:
        """Print where the stage is."""
        with self._lock:
            self._print(self._stage.line())

    def end(self) -> None:
        """Print that the last stage is done."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        if self._stage.shown:
            self._print(self._stage.line("done in "))

    def _print(self, line: str) -> None:
        self._stage.shown = True
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def _lines(console: Console, seconds: float) -> Iterator[Show]:
    lines, over = _Lines(console), threading.Event()

    def tick() -> None:
        while not over.wait(seconds):
            lines.tick()

    # A thread of its own: a stage may be one call that says nothing for an hour.
    clock = threading.Thread(target=tick, name="progress", daemon=True)
    clock.start()
    try:
        yield lines
    finally:
        over.set()
        clock.join()
    lines.end()  # not after an error: then the stage was not done


# ------------------------------------------------------------------------ figures


def figures(progress: JobProgress) -> str:
    """Speed, acceptance rate, errors and time left, as far as they are known."""
    tally, parts = progress.tally, []
    if (speed := progress.tokens_per_second) is not None:
        parts.append(f"{speed:,.0f} tokens/s")
    if (rate := tally.counts.acceptance_rate) is not None:
        parts.append(f"{rate:.0%} accepted")
    if tally.errors:
        parts.append(f"{tally.errors:,} errors")
    if left := progress.seconds_left:
        parts.append(f"{duration(left)} left")
    return " · ".join(parts)


def duration(seconds: float) -> str:
    """Minutes and seconds, and hours if there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
