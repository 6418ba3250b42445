"""The lock, on a local disk and on S3."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from jobs.nightly.lock import LockLost, locked
from pipeline.config.job import S3Config
from pipeline.errors import UserError
from pipeline.storage.folder import Folder, open_folder

if TYPE_CHECKING:
    from tests.conftest import S3Server


def holders(folder: Folder) -> list[dict[str, object]]:
    return [
        json.loads(folder.read(f"_nightly/lock/{name}") or b"")
        for name in sorted(folder.list("_nightly/lock"))
    ]


def check(folder: Folder) -> None:
    """One holder at a time; a lock that has expired is taken, and its holder notices."""
    with locked(folder, 60) as lock:
        lock.check()
        with pytest.raises(UserError, match="another run is at work"), locked(folder, 60):
            pass
        lock.check()
    with locked(folder, 60):
        pass
    assert [h["released"] for h in holders(folder)] == [True]

    with pytest.raises(LockLost), locked(folder, 1000) as lock:
        # As if it had not renewed in time; the renewals are far apart.
        lock.renew(-1)
        with locked(folder, 60):
            lock.check()
    with locked(folder, 60) as lock:
        lock.check()

    won, refused, start = [], threading.Semaphore(0), threading.Barrier(4)

    def take() -> None:
        start.wait()
        try:
            with locked(folder, 60):
                won.append(1)
                for _ in range(3):  # a thread that comes late must find it held
                    refused.acquire(timeout=20)
        except UserError:
            refused.release()

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1


def test_on_disk(tmp_path: Path) -> None:
    check(open_folder(str(tmp_path), S3Config()))


@pytest.mark.s3
def test_on_s3(s3_env: S3Server) -> None:
    s3_env.client().create_bucket(Bucket="locks")
    check(open_folder("s3://locks/dataset", S3Config(endpoint=s3_env.endpoint)))


def test_a_lock_is_renewed(tmp_path: Path) -> None:
    folder = open_folder(str(tmp_path), S3Config())
    with locked(folder, 0.8):
        time.sleep(1.2)
        with pytest.raises(UserError, match="another run"), locked(folder, 60):
            pass


def test_a_dead_process_holds_nothing(tmp_path: Path) -> None:
    script = (
        "import os\nfrom pipeline.config.job import S3Config\n"
        "from pipeline.storage.folder import open_folder\n"
        "from jobs.nightly.lock import locked\n"
        f"lock = locked(open_folder({str(tmp_path)!r}, S3Config()), 3600); lock.__enter__()\n"
        "os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[3])
    folder = open_folder(str(tmp_path), S3Config())
    assert [h["released"] for h in holders(folder)] == [False]
    with locked(folder, 60):
        pass
