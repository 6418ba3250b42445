"""`benchmarks/lookups.py` gives recorded texts to the engine at a GPU's costs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.specdec.simulate.test_written import texts

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/lookups.py"


@pytest.mark.parametrize("night", [False, True])
def test_samples_that_repeat_are_written_faster(tmp_path: Path, night: bool) -> None:
    path, made = tmp_path / "texts.json", texts()
    earlier = [output for _, output in made] if night else []
    about = {"work": "night" if night else "samples"}
    path.write_text(json.dumps({"about": about, "texts": made, "earlier": earlier}))
    command = [sys.executable, SCRIPT, "replay", path, "--live", "2", "--repeats", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    cells = [line.split("│") for line in done.stdout.splitlines() if line.startswith("│ 2 ")]
    faster = {row[3].strip(): float(row[5].split()[0]) for row in cells}
    suffix, goodput = ("suffix + corpus", "goodput + corpus") if night else ("suffix", "goodput")
    assert list(faster)[-1] == goodput and faster["none"] == 1
    assert faster[suffix] > 1.2
    assert faster[goodput] > 1.2
