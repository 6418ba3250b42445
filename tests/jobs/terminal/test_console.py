from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import typer

from jobs.terminal.console import explained, stop_signals
from pipeline.errors import UserError


@pytest.fixture(autouse=True)
def kept_handlers() -> Iterator[None]:
    """As in a terminal, though the tests may run under nohup; afterwards as before."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_closes_is_a_clean_stop_however_often_it_tells() -> None:
    with stop_signals() as stop:
        for _ in range(3):  # the kernel's, and the shell's
            os.kill(os.getpid(), signal.SIGHUP)
        assert stop.is_set()
    with pytest.raises(KeyboardInterrupt), stop_signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.is_set()
        os.kill(os.getpid(), signal.SIGTERM)


def test_nohup_stays() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stop_signals() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.is_set()


def test_what_is_said_has_no_pictures_put_into_it(capsys: pytest.CaptureFixture[str]) -> None:
    """`:b:` in a job file, or in what a model wrote, is text."""
    with pytest.raises(typer.Exit), explained():
        raise UserError("regex:b: unknown key :smile:")
    assert "regex:b: unknown key :smile:" in capsys.readouterr().err
