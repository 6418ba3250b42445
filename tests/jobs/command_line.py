"""The command line, called in this process."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from jobs.cli import app


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def one_error(result: Result) -> str:
    """The error message of a run that failed as it should: no traceback, code 2."""
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert result.stderr.startswith("error: ")
    return result.stderr.removeprefix("error: ").strip()
