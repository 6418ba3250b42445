"""Secrets that a job uses are in nothing that it writes, prints or shows."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests.conftest import ACCESS_KEY, SECRET_KEY, S3Server, TinyModels

PLANTED = {
    "AWS_ACCESS_KEY_ID": ACCESS_KEY,
    "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
    "HF_TOKEN": "hf_planted-token",
    "DATABASE_URL": "postgres://me:planted-password@host/db",
}
SECRETS = [ACCESS_KEY, SECRET_KEY, "hf_planted-token", "planted-password"]


def command(job: Path, ray_folder: str, **environment: str) -> subprocess.Popen[str]:
    root = str(Path(__file__).parents[2])
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", "run", str(job)],
        env={
            **os.environ,
            "PYTHONPATH": root,
            "RAY_TMPDIR": ray_folder,
            "AWS_DEFAULT_REGION": "us-east-1",
            **PLANTED,
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def unpacked(data: bytes) -> bytes:
    """A Parquet file's rows and metadata as text: its pages are compressed."""
    table = pq.read_table(pa.BufferReader(data))
    metadata = pq.read_metadata(pa.BufferReader(data)).metadata
    return repr([table.to_pylist(), metadata]).encode()


@contextmanager
def titles(started: subprocess.Popen[str]) -> Iterator[set[str]]:
    """What `ps` shows of a process and all below it while the block runs."""
    seen: set[str] = set()
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.2):
            with suppress(psutil.NoSuchProcess):
                top = psutil.Process(started.pid)
                for process in [top, *top.children(recursive=True)]:
                    with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                        seen.add(" ".join([process.name(), *process.cmdline()]))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


@pytest.mark.ray
@pytest.mark.s3
def test_secrets_are_nowhere(s3_server: S3Server, tiny_models: TinyModels, tmp_path: Path) -> None:
    client = s3_server.client()
    client.create_bucket(Bucket="secrets")
    lines = b'{"prompt": "x"}\n{"prompt": null}\n{"prompt": "y", "sampling_params": 7}\nnot json\n'
    client.put_object(Bucket="secrets", Key="in/a.jsonl", Body=lines)
    values: dict[str, Any] = {
        "input": {"paths": "s3://secrets/in/", "prompt_column": "prompt"},
        "output": "s3://secrets/out",
        "s3": {"endpoint": s3_server.endpoint},
        "models": {"target": tiny_models.target, "draft": tiny_models.draft},
        "sampling": {"max_new_tokens": 4},
        "speculation": {"trace": True},
        "max_error_share": 1.0,  # as each kind of output is to be there
    }
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump(values))
    # The path of a Ray session must be short: it holds sockets.
    ray_folder = tempfile.mkdtemp(prefix="r")
    try:
        process = command(job, ray_folder)
        with titles(process) as seen:
            printed, _ = process.communicate(timeout=300)
        assert process.returncode == 0, printed
        assert sum("GenerateActor" in title for title in seen)
        texts = {"the terminal": printed.encode(), "process titles": "\n".join(seen).encode()}
        logs = [f for f in Path(ray_folder).rglob("*") if f.is_file() and not f.is_symlink()]
        assert any("raylet" in file.name for file in logs)
        texts |= {str(file): file.read_bytes() for file in logs}
        listed = client.list_objects_v2(Bucket="secrets", Prefix="out/")["Contents"]
        names = [entry["Key"] for entry in listed]
        kinds = {name.split("/")[1] for name in names}
        assert {"completions", "errors", "stats", "trace", "_specbatch", "_SUCCESS"} <= kinds
        for name in names:
            data = client.get_object(Bucket="secrets", Key=name)["Body"].read()
            texts[name] = unpacked(data) if name.endswith(".parquet") else data

        # Refused credentials are not repeated either.
        process = command(job, ray_folder, AWS_SECRET_ACCESS_KEY="planted-password")
        printed, _ = process.communicate(timeout=60)
        assert process.returncode == 2
        assert "refused these credentials" in printed
        texts["the refusal"] = printed.encode()
    finally:
        shutil.rmtree(ray_folder, ignore_errors=True)
    # What is not secret is found, so the search is one.
    assert b"s3://secrets/out" in texts["out/_specbatch/job.json"]
    found = [
        (where, secret)
        for where, text in texts.items()
        for secret in SECRETS
        if secret.encode() in text
    ]
    assert not found
