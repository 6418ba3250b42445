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

from pipeline.errors import BudgetReached, JobStopped, UserError

USER_ERROR, FAILURE, OVER_BUDGET, INTERRUPTED = 2, 1, 3, 130
"""Exit codes: a mistake in what was asked, any other failure, a budget reached, a signal."""

out = Console()
err = Console(stderr=True)


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
    except (KeyboardInterrupt, JobStopped):
        err.print(f"\n[yellow]stopped[/] {escape(resume or '')}", highlight=False, soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        if os.environ.get("SPECBATCH_DEBUG"):
            raise
        message = f"{type(error).__name__}: {error}"
        err.print(f"[bold red]failed:[/] {escape(message)}", highlight=False, soft_wrap=True)
        err.print(f"{resume or ''} SPECBATCH_DEBUG=1 shows the traceback.".strip(), soft_wrap=True)
        raise typer.Exit(FAILURE) from None


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Take the first Ctrl-C or SIGTERM as a wish to stop; the second stops at once.

    Yields:
        The event that the first signal sets.
    """
    stop = threading.Event()

    def wish(number: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        message = "[yellow]stopping[/] once the units in flight are committed; Ctrl-C: at once"
        err.print(f"\n{message}", highlight=False, soft_wrap=True)

    before = {number: signal.signal(number, wish) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
