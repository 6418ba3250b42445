"""Jobs in which something dies: real Ray, real (tiny) models, real signals."""

from __future__ import annotations

import os
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
import ray
import ray.cloudpickle

from pipeline.errors import JobStopped
from pipeline.generate.actor import GenerateActor
from pipeline.run import dataflow
from pipeline.run.dataflow import JobFailed
from specdec.request import Request
from tests.conftest import TinyModels
from tests.pipeline.small_jobs import alone, rows_of, run, started

pytestmark = pytest.mark.ray

# Workers cannot import a test module; they get its classes by value.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

ROWS = 24
POISON = 80
"""A prompt of more tokens than this is what the engines below die of."""


class FragileActor(GenerateActor):
    """Its engine fails in the round after a poisonous prompt was submitted."""

    def _make_engine(self) -> Any:
        engine = super()._make_engine()
        submit, step = engine.submit, engine.step
        eaten: list[Request] = []

        def submit_or_remember(request: Request) -> None:
            if len(request.prompt_ids) > POISON:
                eaten.append(request)
            submit(request)

        def step_or_fail() -> Any:
            if eaten:
                self.fail()
            return step()

        engine.submit, engine.step = submit_or_remember, step_or_fail
        return engine

    def fail(self) -> None:
        raise NotImplementedError


class DyingActor(FragileActor):
    def fail(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class RaisingActor(FragileActor):
    def fail(self) -> None:
        raise ValueError("no such kernel")


class HangingActor(FragileActor):
    def fail(self) -> None:
        time.sleep(10_000)


def settings(models: TinyModels, inputs: Path, output: Path, **actors: Any) -> dict[str, Any]:
    return {
        "input": {"paths": [str(inputs)], "prompt_column": "prompt"},
        "output": str(output),
        "models": {"target": models.target, "draft": models.draft},
        "sampling": {"max_new_tokens": 12, "temperature": 1.0, "seed": 3},
        "speculation": {"policy": "fixed", "k": 2, "verification": "coupled"},
        "actors": {"num_cpus": 2, "slots": 4, **actors},
        "unit_rows": 8,
    }


def texts(output: Path) -> dict[int, str]:
    return {row["id"]: row["completion"] for row in rows_of(output).values()}


def write(folder: Path, poison: set[int], rows: int = ROWS) -> Path:
    folder.mkdir()
    prompts = [f"count to {i}" + " and" * (30 if i in poison else 0) for i in range(rows)]
    pq.write_table(pa.table({"id": range(rows), "prompt": prompts}), folder / "p.parquet")
    return folder


@pytest.fixture(scope="module")
def undisturbed(
    tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, str]:
    """The texts of rows that nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    found = alone(settings(tiny_models, write(folder / "in", set()), folder / "out"))
    return dict(enumerate(found.values()))


@pytest.mark.parametrize(
    "actor",
    [
        RaisingActor,
        *(pytest.param(actor, marks=pytest.mark.slow) for actor in (DyingActor, HangingActor)),
    ],
)
def test_poisonous_rows_become_errors_and_nothing_else_does(
    actor: type[FragileActor],
    local_ray: None,
    undisturbed: dict[int, str],
    tiny_models: TinyModels,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dataflow, "GenerateActor", actor)
    poison = {5, 6} if actor is RaisingActor else {6}
    inputs = write(tmp_path / "in", poison)
    hang = 2 if actor is HangingActor else None
    result = run(settings(tiny_models, inputs, tmp_path / "out", hang_seconds=hang))
    assert (result.summary["rows"], result.summary["errors"]) == (ROWS - len(poison), len(poison))
    errors = rows_of(tmp_path / "out", "errors")
    assert {row["id"] for row in errors.values()} == poison
    for row in errors.values():
        assert row["error_class"] == "EngineDied"
        assert row["attempts"] >= 4
        assert ("no such kernel" in row["error_message"]) == (actor is RaisingActor)
    assert texts(tmp_path / "out") == {i: t for i, t in undisturbed.items() if i not in poison}


def test_an_engine_that_fails_on_every_row_fails_the_job(
    local_ray: None, tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataflow, "GenerateActor", RaisingActor)
    inputs = write(tmp_path / "in", set(range(16)), rows=16)
    values = {**settings(tiny_models, inputs, tmp_path / "out"), "unit_rows": 16}
    with pytest.raises(JobFailed, match=r"whatever row it works on.*no such kernel") as failed:
        run(values)
    assert not list((tmp_path / "out").glob("errors/*"))

    # What its actor held is free for the next job, even while somebody keeps the exception.
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU") != 2:
        assert time.monotonic() < deadline, f"an actor outlives its job: {failed.value}"
        time.sleep(0.1)


@pytest.mark.slow
def test_stopping_commits_what_is_in_flight_and_a_resume_does_the_rest(
    local_ray: None, tiny_models: TinyModels, tmp_path: Path
) -> None:
    inputs = write(tmp_path / "in", set(), rows=80)
    values = settings(tiny_models, inputs, tmp_path / "out", units_in_flight=1)
    stop = threading.Event()

    def stop_after_the_first(progress: Any) -> None:
        if progress.tally.rows:
            stop.set()

    with pytest.raises(JobStopped):
        run(values, progress=stop_after_the_first, stop=stop)
    done = len(rows_of(tmp_path / "out"))
    assert 8 <= done < 80
    assert done % 8 == 0
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    result = run(values)
    assert result.units_run == (80 - done) // 8
    assert len(rows_of(tmp_path / "out")) == result.summary["rows"] == 80


@pytest.mark.parametrize("twice", [pytest.param(False, marks=pytest.mark.slow), True])
def test_ctrl_c(local_ray: None, tiny_models: TinyModels, tmp_path: Path, twice: bool) -> None:
    """Sent to the whole process group, as a terminal does; once with a Ray in that group."""
    values = settings(tiny_models, write(tmp_path / "in", set(), rows=2000), tmp_path / "out")
    values["sampling"]["max_new_tokens"] = 40
    process = started(
        values,
        tmp_path / "job.yaml",
        address=ray.get_runtime_context().gcs_address if twice else None,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for _ in range(1 + twice):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.5)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    assert "stopping once the units in flight are committed" in printed
    assert "run the same command again to resume" in " ".join(printed.split())
    assert "Traceback" not in printed
    assert 2 <= len(rows_of(tmp_path / "out")) // 8 < 250


SLOW_START = """
import time
from ray._private import services
from pipeline.run.ray_session import connected

get_node, began = services.get_node, time.monotonic()

def late(*arguments, **options):
    if time.monotonic() - began < 32:
        raise RuntimeError("this node is not there yet")
    return get_node(*arguments, **options)

services.get_node = late
with connected():
    import ray
    print("nodes:", len(ray.nodes()))
"""


@pytest.mark.slow
def test_a_ray_that_starts_too_slowly_is_started_again() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SLOW_START], capture_output=True, text=True, timeout=300
    )
    assert done.stdout == "nodes: 1\n", done.stderr
