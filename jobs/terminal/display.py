"""The progress bar: rows, tokens/s, acceptance rate, time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from jobs.terminal.console import err
from pipeline.observe.progress import JobProgress, OnProgress

_LOG_SECONDS = 30

Show = Callable[[str, float], None]
"""Told a stage of a command, and how far it is, from 0 to 1."""


@contextmanager
def progress_bar(console: Console) -> Iterator[OnProgress]:
    """Yields the function to call with each moment of the job.

    On a terminal it moves a live bar; in a log file it prints a line twice a minute.
    """
    if not console.is_terminal:
        yield _log_lines(console)
        return
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} rows"),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
    with bar:
        task = bar.add_task("looking at the input", total=0, figures="")

        def show(progress: JobProgress) -> None:
            bar.update(
                task,
                description=progress.stage,
                total=progress.rows_total,
                completed=progress.rows_done,
                figures=figures(progress),
            )

        yield show


def _log_lines(console: Console) -> OnProgress:
    printed = time.monotonic()

    def show(progress: JobProgress) -> None:
        nonlocal printed
        if time.monotonic() - printed >= _LOG_SECONDS:
            printed = time.monotonic()
            rows = f"{progress.rows_done:,}/{progress.rows_total:,} rows"
            parts = filter(None, (progress.stage, rows, figures(progress)))
            console.print(" · ".join(parts), highlight=False, soft_wrap=True)

    return show


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


@contextmanager
def stages() -> Iterator[Show]:
    """Yields what to call with a stage and how far it is, from 0 to 1.

    A live bar on a terminal; in a log file, a line for each new stage.
    """
    if not err.is_terminal:
        seen: set[str] = set()

        def line(stage: str, done: float) -> None:
            if stage not in seen:
                seen.add(stage)
                err.print(stage, highlight=False, soft_wrap=True)

        yield line
        return
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        console=err,
        transient=True,
    )
    with bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda stage, done: bar.update(task, description=stage, completed=done)
