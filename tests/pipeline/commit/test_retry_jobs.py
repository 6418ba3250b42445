"""Whole jobs whose failed rows are tried again, with `--only-failed`."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.cloudpickle

from pipeline.commit import manifest
from pipeline.commit.footer import read_records
from pipeline.config.job import S3Config
from pipeline.errors import JobStopped, RowError
from pipeline.generate.actor import GenerateActor
from pipeline.inputs.units import RowRange, unit_id
from pipeline.outputs.verify import verify
from pipeline.run import dataflow
from pipeline.run.run import RunMode
from pipeline.storage.folder import open_folder
from specdec.request import Request
from tests.conftest import S3Server, TinyModels
from tests.pipeline.small_jobs import alone, rows_of, run, started

# Workers cannot import a test module; they get its classes by value.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


class UnluckyActor(GenerateActor):
    """Some rows fail today."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        of = self._requests.of

        def of_or_not(row: Any, row_id: str) -> list[Request]:
            if row_id in ("p.jsonl:1:0", "p.jsonl:2:0", "p.jsonl:9:0"):
                raise RowError("Unlucky", "a bad day")
            return of(row, row_id)

        self._requests.of = of_or_not  # type: ignore[method-assign]


def settings(models: TinyModels, inputs: str, output: Path | str, **more: Any) -> dict[str, Any]:
    return {
        "input": {"paths": [inputs], "prompt_column": "prompt"},
        "output": str(output),
        "models": {"target": models.target, "draft": models.draft},
        "sampling": {"max_new_tokens": 12, "temperature": 1.0, "seed": 3},
        "speculation": {
            "policy": "fixed",
            "k": 2,
            "verification": "coupled",
            "control_share": 0,
            "trace": True,
        },
        "actors": {"num_cpus": 2, "slots": 4},
        "unit_rows": 4,
        **more,
    }


def prompts(path: Path, rows: int = 12) -> list[dict[str, Any]]:
    values = [
        {"id": i, "prompt": f"count to {i}", "tag": None if i % 3 else "x"} for i in range(rows)
    ]
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return values


def texts(output: Path) -> dict[str, str]:
    return {name: row["completion"] for name, row in rows_of(output).items()}


class Reader(threading.Thread):
    """Reads completions/ again and again, as someone who does not wait for the end would."""

    def __init__(self, output: Path) -> None:
        super().__init__(daemon=True)
        self._output, self._over = output, threading.Event()
        self._last = texts(output)
        self.reads, self.wrong = 0, ""

    def run(self) -> None:
        while not self._over.is_set() and not self.wrong:
            try:
                now = texts(self._output)
                if not self._last.items() <= now.items():
                    self.wrong = f"rows are gone: {self._last.keys() - now.keys()}"
                self._last = now
                self.reads += 1
            except Exception as error:
                self.wrong = f"{type(error).__name__}: {error}"
            time.sleep(0.02)

    def __enter__(self) -> Reader:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()


@pytest.mark.ray
def test_only_failed_rows_are_tried_again(
    local_ray: None, tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts(tmp_path / "p.jsonl")
    output = tmp_path / "out"
    values = settings(tiny_models, str(tmp_path / "p.jsonl"), output)
    monkeypatch.setattr(dataflow, "GenerateActor", UnluckyActor)
    assert run(values).summary["errors_by_class"] == {"Unlucky": 3}
    first = texts(output)
    untouched = output / "completions" / f"{unit_id(RowRange('p.jsonl', 4, 4))}.parquet"
    written = untouched.stat().st_mtime_ns

    monkeypatch.setattr(dataflow, "GenerateActor", GenerateActor)
    with Reader(output) as reader:
        second = run(values, mode=RunMode(only_failed=True))
    assert not reader.wrong, reader.wrong
    assert reader.reads > 5
    assert second.units_run == 2
    assert (second.summary["rows"], second.summary["errors"]) == (12, 0)
    assert untouched.stat().st_mtime_ns == written
    assert not list((output / "errors").iterdir())
    history = [pq.read_table(file) for file in (output / "_specbatch/history").iterdir()]
    before = [(row["id"], row["attempts"]) for table in history for row in table.to_pylist()]
    assert sorted(before) == [(1, 1), (2, 1), (9, 1)]
    assert first.items() <= texts(output).items()
    listed = json.loads((output / "_specbatch/manifest.json").read_text())
    assert (listed["rows_in"], listed["rows_out"], listed["rows_in_errors"]) == (12, 12, 0)
    assert len(listed["history"]) == 2
    assert verify(str(output), S3Config()).problems == []
    # All the same as if no row had failed.
    assert texts(output) == alone(values)

    again = run(values, mode=RunMode(only_failed=True))
    assert again.units_run == 0
    assert again.summary == second.summary


@pytest.mark.slow
@pytest.mark.ray
def test_missing_units_are_left_to_another_run(
    local_ray: None, tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts(tmp_path / "p.jsonl")
    output = tmp_path / "out"
    values = settings(tiny_models, str(tmp_path / "p.jsonl"), output)
    monkeypatch.setattr(dataflow, "GenerateActor", UnluckyActor)
    run(values)
    gone = output / "completions" / f"{unit_id(RowRange('p.jsonl', 4, 4))}.parquet"
    gone.unlink()
    monkeypatch.setattr(dataflow, "GenerateActor", GenerateActor)
    result = run(values, mode=RunMode(only_failed=True))
    assert (result.units_run, result.missing) == (2, 1)
    assert (result.summary["rows"], result.summary["errors"]) == (8, 0)
    assert not gone.exists()
    assert not (output / "_SUCCESS").exists()
    assert run(values).units_run == 1
    assert len(rows_of(output)) == 12
    assert verify(str(output), S3Config()).problems == []


@pytest.mark.slow
@pytest.mark.ray
def test_a_retry_that_is_killed_leaves_every_row_where_it_was_or_is(
    local_ray: None, tiny_models: TinyModels, tmp_path: Path
) -> None:
    """Rows that fail for ever, in many units; SIGKILL once the retry has replaced some of them."""
    rows = [{"id": i, "prompt": None if i % 4 == 0 else f"count to {i}"} for i in range(120)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "out"
    values = settings(tiny_models, str(tmp_path / "p.jsonl"), output)
    values["sampling"]["max_new_tokens"] = 2
    run(values)
    before = texts(output)
    files = len(list((output / "completions").iterdir()))
    process = started(
        values, tmp_path / "job.yaml", "--only-failed", "--quiet", stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if len(list((output / "_specbatch").glob("history/*"))) >= 2:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (output / "_SUCCESS").exists()
    assert texts(output) == before
    folder = open_folder(str(output), S3Config())
    records = read_records(folder, manifest.committed_ids(folder))
    assert len(records) == files
    retried = [record for record in records if record.retries.generation]
    assert retried
    for record in records:
        data = folder.read(record.files.errors.name)
        failed = pq.read_table(pa.BufferReader(data)).to_pylist()
        assert {row["attempts"] for row in failed} == {record.retries.generation + 1}
    # Any later run puts it in order.
    assert run(values).units_run == 0
    assert texts(output) == before
    assert len(rows_of(output, "errors")) == 30
    assert verify(str(output), S3Config()).problems == []


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.s3
def test_failed_rows_are_tried_again_on_s3(
    local_ray: None,
    tiny_models: TinyModels,
    s3_env: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    s3_env.client().create_bucket(Bucket="retries")
    prompts(tmp_path / "p.jsonl")
    values = settings(tiny_models, str(tmp_path / "p.jsonl"), "s3://retries/out")
    values["s3"] = {"endpoint": s3_env.endpoint}
    monkeypatch.setattr(dataflow, "GenerateActor", UnluckyActor)
    assert run(values).summary["errors"] == 3
    monkeypatch.setattr(dataflow, "GenerateActor", GenerateActor)
    result = run(values, mode=RunMode(only_failed=True))
    assert (result.units_run, result.summary["rows"], result.summary["errors"]) == (2, 12, 0)
    found = verify("s3://retries/out", S3Config(endpoint=s3_env.endpoint))
    assert found.problems == []
    assert (found.rows_in, found.rows_out, found.units) == (12, 12, 3)


@pytest.mark.slow
@pytest.mark.ray
def test_a_retry_that_is_asked_to_stop_keeps_what_it_has(
    local_ray: None, tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts(tmp_path / "p.jsonl")
    values = settings(tiny_models, str(tmp_path / "p.jsonl"), tmp_path / "out")
    monkeypatch.setattr(dataflow, "GenerateActor", UnluckyActor)
    run(values)
    before = texts(tmp_path / "out")
    stop = threading.Event()
    stop.set()
    with pytest.raises(JobStopped):
        run(values, mode=RunMode(only_failed=True), stop=stop)
    assert before.items() <= texts(tmp_path / "out").items()
    assert run(values).summary["rows"] >= 9
