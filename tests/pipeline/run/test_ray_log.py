from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.run.ray_log import ray_log

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the logs."""
    monkeypatch.setenv("SPECBATCH_CACHE", str(tmp_path))
    return tmp_path / "logs"


def test_a_log_is_named_by_the_error_and_read_by_its_user_only(folder: Path) -> None:
    error = RuntimeError("all is lost")
    with ray_log() as log:
        logging.getLogger("ray.somewhere").error("a process died")
        with log.taking_stderr():
            os.write(2, b"from C++\n")
        log.explain(error)
    [file] = folder.iterdir()
    assert error.__notes__ == [f"What Ray says of it: {file}"]
    for line in ("a process died", "from C++", "RuntimeError: all is lost"):
        assert line in file.read_text()
    assert file.stat().st_mode & 0o077 == 0
    with ray_log():
        pass
    assert [*folder.iterdir()] == [file], "nothing was said, and a file is left"


def test_logs_are_few_and_short(folder: Path) -> None:
    for _ in range(23):
        with ray_log() as log:
            log.add("x" * 1_100_000)
    sizes = [file.stat().st_size for file in folder.iterdir()]
    assert sizes == [1_000_000] * 20


def test_a_cache_that_cannot_be_written_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("SPECBATCH_CACHE", "/proc/none")
    with ray_log() as log:
        log.add("still")
    assert log.path.is_relative_to(tmp_path / "scratch")
    assert log.path.read_text() == "still\n"


def test_the_command_line_keeps_its_stderr_while_ray_writes() -> None:
    code = (
        "import os, sys; from jobs.terminal.streams import lasting\n"
        "from pipeline.run.ray_log import ray_log\n"
        "with lasting(), ray_log(): os.write(2, b'C++'); print('Python', file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == "Python\n"
