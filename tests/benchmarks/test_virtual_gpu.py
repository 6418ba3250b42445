"""`benchmarks/virtual_gpu.py` races policies over recorded traces."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from specdec.simulate.transcripts import save_transcripts
from tests.specdec.simulate.test_virtual import transcripts

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/virtual_gpu.py"


def test_a_race_names_the_best_and_what_goodput_makes_of_it(tmp_path: Path) -> None:
    traces = tmp_path / "traces.safetensors"
    save_transcripts(traces, transcripts(4, width=2), {})
    options = ["--live", "2", "--lengths", "1,2x2", "--repeats", "1", "--seconds", "0.2"]
    done = subprocess.run(
        [sys.executable, SCRIPT, traces, *options], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    cells = [line.split("│") for line in done.stdout.splitlines() if line.startswith("│ 2 ")]
    best, *others = [row[2].strip() for row in cells]
    assert best in ("none", "fixed 1")
    assert others == ["tree 2x2", "chains", "goodput"]
