"""Disks that are full, read-only or limited, for real: small file systems in a namespace."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.config.job import S3Config
from pipeline.errors import UserError
from pipeline.storage.folder import open_folder
from tests.conftest import TinyModels

ROOT = str(Path(__file__).parents[3])


def can_mount() -> bool:
    unshare = shutil.which("unshare")
    command = [str(unshare), "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]
    return unshare is not None and subprocess.run(command, capture_output=True).returncode == 0


needs_mount = pytest.mark.skipif(not can_mount(), reason="no user namespaces on this machine")


def in_namespace(script: str, **variables: str) -> str:
    """Run a shell script where it may mount. Returns what it printed, both streams."""
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-euc", script],
        env={**os.environ, "PYTHONPATH": ROOT, "PYTHON": sys.executable, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


FILL = """
import os, sys
from pathlib import Path
from pipeline.config.job import S3Config
from pipeline.errors import UserError
from pipeline.storage.folder import Folder, open_folder

out = Path(sys.argv[1])
folder = open_folder(str(out), S3Config())
for write in (folder.put_if_absent, folder.put):
    try:
        write("completions/large", os.urandom(300_000))
    except UserError as error:
        print(error)
print(folder.list("completions"), folder.read("completions/small"))
print(sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()))
"""


@needs_mount
def test_a_full_and_a_read_only_disk_leave_whole_files(tmp_path: Path) -> None:
    printed = in_namespace(
        """
        mount -t tmpfs -o size=100k none "$OUT"
        mkdir "$OUT/completions"; printf good > "$OUT/completions/small"
        "$PYTHON" -c "$FILL" "$OUT"
        mount -o remount,ro "$OUT"
        "$PYTHON" -c "$FILL" "$OUT"
        """,
        OUT=str(tmp_path),
        FILL=FILL,
    )
    kept = ["{'small': 4} b'good'", "['completions/small']"]
    resume = "what is committed is kept, and the same command resumes"
    full = f"{tmp_path}/completions/large: no space left on this disk; free some; {resume}"
    locked = (
        f"{tmp_path}/completions/large: this file system is read-only; mount it writable; {resume}"
    )
    assert printed.splitlines() == [full, full, *kept, locked, locked, *kept]


def test_a_limit_on_file_size(tmp_path: Path) -> None:
    folder = open_folder(str(tmp_path), S3Config())
    folder.put("x", b"first")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(UserError, match="x: the file is larger than this file system or"):
            folder.put("x", b"y" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["x"]
    assert folder.read("x") == b"first"


@pytest.mark.slow
@pytest.mark.ray
@needs_mount
def test_a_job_whose_disk_fills_up_is_resumed(
    tiny_models: TinyModels, write_rows: Callable[..., str], tmp_path: Path
) -> None:
    rows = [{"prompt": f"count to {i}", "ballast": os.urandom(3000).hex()} for i in range(40)]
    values = {
        "input": {"paths": [write_rows("in.parquet", rows)], "prompt_column": "prompt"},
        "output": str(tmp_path / "small" / "out"),
        "models": {"target": tiny_models.target},
        "sampling": {"max_new_tokens": 4, "temperature": 0.0},
        "speculation": {"policy": "none"},
        "actors": {"num_cpus": 1, "slots": 4},
        "unit_rows": 4,
    }
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump(values))
    (tmp_path / "small").mkdir()
    printed = in_namespace(
        """
        mount -t tmpfs -o size=150k none "$DIR/small"
        "$PYTHON" -m jobs.cli run "$DIR/job.yaml" --quiet || echo "exit $?"
        ls "$DIR/small/out" "$DIR/small/out/_specbatch"
        ls "$DIR/small/out/completions" | wc -l
        mount -o remount,size=10m "$DIR/small"
        "$PYTHON" -m jobs.cli run "$DIR/job.yaml" --quiet && echo resumed
        cp -r "$DIR/small/out" "$DIR/kept"
        """,
        DIR=str(tmp_path),
    )
    first, second = printed.split("exit 2\n")
    assert "no space left on this disk" in first
    assert "the same command resumes" in " ".join(first.split())
    assert "Traceback" not in printed
    assert "_SUCCESS" not in second
    assert "resumed" in second
    count = sum(pq.read_metadata(f).num_rows for f in (tmp_path / "kept/completions").iterdir())
    assert count == 40
    assert (tmp_path / "kept" / "_SUCCESS").exists()
