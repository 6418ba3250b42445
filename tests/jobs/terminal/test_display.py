from __future__ import annotations

import io
import time
from collections.abc import Callable

import pytest
from rich.console import Console

from jobs.terminal.display import Show, progress_bar
from pipeline.observe.progress import JobProgress, Tally


def lines_of(command: Callable[[Show], object], **options: object) -> list[str]:
    """What a command's progress prints where there is no terminal."""
    log = io.StringIO()
    with progress_bar(console=Console(file=log), **options) as show:  # type: ignore[arg-type]
        command(show)
    return log.getvalue().splitlines()


def stages(show: Show) -> None:
    show("loading models")
    for number in range(1, 4):
        show("training", number / 3, f"loss {4 - number}")


def test_a_line_when_a_stage_begins_and_one_when_it_ends() -> None:
    assert lines_of(stages) == [
        "loading models",
        "loading models · done in 0:00",
        "training",
        "training 100% · loss 1 · done in 0:00",
    ]


def test_lines_come_while_a_stage_says_nothing() -> None:
    def silent(show: Show) -> None:
        show("collecting", 0.25, "[b]10 rows[/b]")
        time.sleep(0.5)

    first, *between, last = lines_of(silent, seconds=0.05)
    assert first == "collecting"
    assert len(between) >= 3
    assert set(between) <= {f"collecting 25% · [b]10 rows[/b] · 0:0{s}" for s in range(10)}
    assert last.startswith("collecting 25% · [b]10 rows[/b] · done in 0:0")


def test_what_comes_before_the_first_stage_is_named_only_if_it_takes_long() -> None:
    assert lines_of(lambda show: None) == []
    first, *_, last = lines_of(lambda show: time.sleep(0.2), seconds=0.05)
    assert first == "starting · 0:00"
    assert last == "starting · done in 0:00"


def test_nothing_more_is_said_after_an_error() -> None:
    log = io.StringIO()
    with (
        pytest.raises(KeyboardInterrupt),
        progress_bar(console=Console(file=log), seconds=0.01) as show,
    ):
        show("loading models")
        raise KeyboardInterrupt
    lines = log.getvalue().splitlines()
    assert lines[0] == "loading models"
    assert not any("done in" in line for line in lines)
    time.sleep(0.05)
    assert log.getvalue().splitlines() == lines


@pytest.mark.parametrize("terminal", [False, True])
def test_quiet_is_quiet(terminal: bool) -> None:
    log = io.StringIO()
    console = Console(file=log, force_terminal=terminal)
    with progress_bar(quiet=True, console=console, seconds=0.01) as show:
        stages(show)
        show.job(JobProgress("generating", 10))
        time.sleep(0.05)
    assert log.getvalue() == ""


def test_a_job_shows_its_rows_and_their_speed() -> None:
    def job(show: Show) -> None:
        show.job(JobProgress("checking", 0))
        show.job(JobProgress("generating", 400, rows_before=100, tally=Tally(rows=100, errors=20)))

    assert lines_of(job)[-1] == "generating 55% · 220/400 rows · 20 errors · done in 0:00"


def test_a_terminal_has_a_live_bar() -> None:
    log = io.StringIO()
    console = Console(file=log, force_terminal=True, width=100, legacy_windows=False)
    with progress_bar(console=console) as show:
        show("training", 0.5, "loss 2 [b]")
        time.sleep(0.3)
    shown = log.getvalue()
    assert "training" in shown and "50% loss 2 [b]" in shown
    assert "done in" not in shown
