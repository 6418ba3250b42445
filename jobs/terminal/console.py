"""The terminal: where commands print, and how their errors end."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape

from pipeline.errors import BudgetReached, JobStopped, TooManyErrors, UserError

FAILURE, USER_ERROR, OVER_BUDGET, TOO_MANY_ERRORS, INTERRUPTED = 1, 2, 3, 4, 130
"""Exit codes: a mistake in what was asked is 2, a budget reached 3, more failed rows than the job
allows 4, a stop 130, and any other failure 1."""

EXIT_CODES = (FAILURE, USER_ERROR, OVER_BUDGET, TOO_MANY_ERRORS, INTERRUPTED)
"""All but that of success."""

HOPELESS = (USER_ERROR, OVER_BUDGET, TOO_MANY_ERRORS)
"""Those that the same command would have again, until somebody changes something."""

out = Console(emoji=False)
err = Console(stderr=True, emoji=False)


def note(line: str) -> None:
    """Print what the user should know, though nothing is wrong."""
    err.print(f"[yellow]note:[/] {escape(line)}", highlight=False, soft_wrap=True)


@contextmanager
def explained(resume: str | None = None) -> Iterator[None]:
    """Print errors in one or a few lines and exit with the code that fits.

    Args:
        resume: what to tell a user whose job has stopped.
    """
    try:
        yield
    except UserError as error:
        err.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(USER_ERROR) from None
    except BudgetReached as reached:
        message = f"{reached}. What was in flight is committed; to go on, raise the budget."
        err.print(f"\n[yellow]stopped[/] at {escape(message)}", highlight=False, soft_wrap=True)
        raise typer.Exit(OVER_BUDGET) from None
    except TooManyErrors as error:
        err.print(f"[bold red]failed:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(TOO_MANY_ERRORS) from None
    except (KeyboardInterrupt, JobStopped) as stop:
        why = str(stop) or resume or ""
        err.print(f"\n[yellow]stopped[/] {escape(why)}", highlight=False, soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        if os.environ.get("SPECBATCH_DEBUG"):
            raise
        message = f"{type(error).__name__}: {error}"
        err.print(f"[bold red]failed:[/] {escape(message)}", highlight=False, soft_wrap=True)
        for note in getattr(error, "__notes__", ()):
            err.print(escape(note), highlight=False, soft_wrap=True)
        err.print(f"{resume or ''} SPECBATCH_DEBUG=1 shows the traceback.".strip(), soft_wrap=True)
        raise typer.Exit(FAILURE) from None


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Take the first Ctrl-C, SIGTERM or SIGHUP as a wish to stop; the second stops at once.

    Where SIGHUP is ignored (`nohup`) it stays so. It never stops at once: of a terminal that is
    closed both the kernel and the shell tell.

    Yields:
        The event that the first signal sets.
    """
    stop = threading.Event()

    def wish(number: int, frame: object) -> None:
        if stop.is_set():
            if number == signal.SIGHUP:
                return
            raise KeyboardInterrupt
        stop.set()
        message = "[yellow]stopping[/] once the units in flight are committed; Ctrl-C: at once"
        err.print(f"\n{message}", highlight=False, soft_wrap=True)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, wish) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
