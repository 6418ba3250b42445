from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup

from jobs.cli import _GROUPS, app
from jobs.terminal.display import figures
from pipeline.observe.progress import JobProgress, Tally
from specdec.request import Counts
from tests.jobs.command_line import call


def test_version_and_help() -> None:
    assert call("--version").stdout.startswith("specbatch ")
    for command in ("run", "validate", "report", "explain"):
        result = call(command, "--help")
        assert result.exit_code == 0
        assert f"specbatch {command}" in result.stdout


def test_every_command_is_in_a_group_and_has_a_line_of_help() -> None:
    root = typer.main.get_command(app)
    assert isinstance(root, TyperGroup)
    for name, command in root.commands.items():
        assert command.rich_help_panel in _GROUPS | {"Every night": {}}, name
        assert command.help, name
        # Help is Markdown: Rich's own markup would be shown as it is.
        assert "[/]" not in command.help, name


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("jobs.cli", {"ray", "torch", "transformers", "scipy"}),
        # Each process that plans, reads, writes or keeps the account would load it, too.
        ("pipeline.run.run", {"torch", "transformers", "scipy"}),
    ],
)
def test_what_starts_often_loads_no_more_than_it_needs(module: str, unwanted: set[str]) -> None:
    code = f"import sys, {module}; print(sorted({unwanted} & set(sys.modules)))"
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert result.stdout.strip() == "[]"


def test_progress_figures() -> None:
    tally = Tally(rows=30, errors=10, counts=Counts(50, 40, 40, 10, 600))
    moment = JobProgress("generating", rows_total=200, rows_before=60, tally=tally, seconds=20)
    assert moment.rows_done == 100
    assert figures(moment) == "30 tokens/s · 25% accepted · 10 errors · 0:50 left"
    assert figures(JobProgress("starting", 200)) == ""
