"""What becomes of a command whose terminal or pipe is not what it was."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        ("schema | true; exit ${PIPESTATUS[0]}", 0, ""),
        ("schema >&-", 0, ""),
        ("schema >&- 2>&-", 0, ""),
        ("schema > /dev/full", 1, "failed: standard output: No space left on device\n"),
        ("report /nowhere 2> /dev/full", 2, ""),
    ],
)
def test_output_that_nobody_reads_is_no_traceback(command: str, code: int, said: str) -> None:
    line = f"{sys.executable} -m jobs.cli {command}"
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, said)


def test_what_an_encoding_lacks_is_escaped() -> None:
    code = "from jobs.terminal.streams import lasting\nwith lasting(): print('≤ 1')"
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=ascii_only, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("\\u2264 1\n", "")
