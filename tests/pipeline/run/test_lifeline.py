from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.run.interrupt import Interrupt
from pipeline.run.lifeline import Lifeline

ROOT = Path(__file__).parents[3]


@pytest.mark.ray
def test_a_ray_that_died_says_how_and_where_its_logs_are(local_ray: None, tmp_path: Path) -> None:
    shutil.copy("/bin/sh", tmp_path / "raylet")
    (tmp_path / "raylet.err").write_text("first\n\nno more memory\n")
    command = [str(tmp_path / "raylet"), "-c", "read _", f"--log_dir={tmp_path}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as raylet:
        stop, interrupted = threading.Event(), threading.Event()
        told: list[str] = []
        lifeline = Lifeline(stop, interrupted.set, told.append)  # type: ignore[arg-type]
        lifeline.look(None)
        assert lifeline.lost() is None
        assert not stop.is_set()
        raylet.kill()
        while (lost := lifeline.lost()) is None:
            time.sleep(0.01)
        lifeline.look(None)
    assert lost.startswith("the local Ray died: raylet was killed by SIGKILL, as the system does")
    assert lost.endswith(f"; its logs are in {tmp_path}, and end: first … no more memory")
    assert told == [lost]
    assert stop.is_set()
    assert interrupted.is_set()


STUCK = """
import time
from pipeline.run import lifeline

lifeline._END_SECONDS = 0.1
with lifeline.last_word() as tell:
    tell("not yet")
time.sleep(0.3)
with lifeline.last_word() as tell:
    tell("the local Ray died")
    time.sleep(60)
"""


def test_a_job_that_waits_for_a_dead_ray_ends_with_the_reason() -> None:
    done = subprocess.run(
        [sys.executable, "-c", STUCK], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    said = "\nfailed: the local Ray died\nRun the same job again to resume it.\n"
    assert done.stderr == said


@pytest.mark.parametrize("heard", [signal.default_int_handler, signal.SIG_IGN])
@pytest.mark.parametrize("main", [True, False])
def test_a_job_is_interrupted_in_its_own_thread(main: bool, heard: Any) -> None:
    """Also where SIGINT is ignored, as in what a script begins in the background."""
    seen: list[str] = []

    def job() -> None:
        interrupt = Interrupt()
        try:
            threading.Timer(0.1, interrupt).start()
            for _ in range(1000):
                time.sleep(0.01)
        except KeyboardInterrupt:
            seen.append(threading.current_thread().name)

    before = signal.signal(signal.SIGINT, heard)
    if main:
        job()
    else:
        thread = threading.Thread(target=job, name="notebook")
        thread.start()
        thread.join()
    signal.signal(signal.SIGINT, before)
    assert seen == ["MainThread" if main else "notebook"]
