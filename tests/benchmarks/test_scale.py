"""The engine double of `benchmarks/scale.py` is still what a job takes for an engine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/scale.py"


@pytest.mark.slow
def test_a_job_runs_through_the_double() -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "flow", "--rows", "200", "--unit-rows", "50", "--actors", "1"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "200 │     4" in done.stdout
