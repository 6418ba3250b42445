"""Running small jobs, in this process or as a command, and reading what they wrote."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from pipeline.config.job import JobConfig
from pipeline.generate.loading import load_models
from pipeline.inputs.requests import RowRequests
from pipeline.inputs.source import read_units
from pipeline.run.plan import plan_job
from pipeline.run.run import JobResult, run_job
from pipeline.texts import Texts
from specdec import Engine, make_policy
from tests.conftest import TinyModels


def run(values: dict[str, Any], **options: Any) -> JobResult:
    """Run the job that a job file with these values describes."""
    return run_job(JobConfig.model_validate(values), **options)


def settings(models: TinyModels, inputs: str, output: Path | str, **more: Any) -> dict[str, Any]:
    """A job that takes every core of the test's Ray, with small units and room for several."""
    return {
        "input": {"paths": [inputs], "messages_column": "messages"},
        "output": str(output),
        "models": {"target": models.target, "draft": models.draft},
        "sampling": {"max_new_tokens": 16, "temperature": 1.0, "seed": 7},
        "speculation": {"policy": "heuristic", "verification": "coupled"},
        "actors": {"num_cpus": 2, "slots": 16},
        "unit_rows": 4,
        **more,
    }


def alone(values: dict[str, Any]) -> dict[str, str]:
    """The texts of a job's rows by row id, made by the target alone in this process, without Ray.

    Under `coupled` verification, and of greedy rows, the job's are the same.
    """
    job = JobConfig.model_validate(values)
    plan = plan_job(job)
    pair = load_models(job.models, "cpu", draft=False)
    asked = RowRequests(job.input, job.sampling, pair.tokenizer, pair.context_length)
    texts = Texts(pair.tokenizer)
    verification = job.speculation.verification
    engine = Engine(
        pair, policy=make_policy("none"), verification=verification, decode=texts.decode
    )
    requests = [
        request
        for unit in read_units(plan.units, plan.table, job.s3)
        for index in range(unit.table.num_rows)
        for request in asked.of(unit.row(index, asked.columns), unit.row_id(index))
    ]
    completions = engine.generate(requests)
    return {
        request.id: texts.completion(request, completion)
        for request, completion in zip(requests, completions, strict=True)
    }


def rows_of(output: Path, kind: str = "completions") -> dict[str, dict[str, Any]]:
    """All rows of one kind of file by row id; no id may be there twice."""
    rows: list[dict[str, Any]] = []
    for file in sorted((output / kind).glob("*.parquet")):
        # `pq.read_table(path)` opens a file twice, and a retry may replace it in between.
        rows += pq.read_table(pa.BufferReader(file.read_bytes())).to_pylist()
    assert len({row["row_id"] for row in rows}) == len(rows)
    return {row["row_id"]: row for row in rows}


def launched(
    values: dict[str, Any], job: Path, *options: str, address: str | None = None, **popen: Any
) -> subprocess.Popen[Any]:
    """`specbatch run` in a process of its own.

    Args:
        values: the job.
        job: where its job file is written.
        options: of the command.
        address: of the Ray cluster that it runs on; None: one of its own.
        popen: of `subprocess.Popen`.
    """
    job.write_text(yaml.safe_dump(values))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", "run", str(job), *options],
        env=environment | ({"RAY_ADDRESS": address} if address else {}),
        **popen,
    )


def started(values: dict[str, Any], job: Path, *options: str, **more: Any) -> subprocess.Popen[Any]:
    """A `launched` job, once at least two units are committed."""
    process = launched(values, job, *options, **more)
    # Beside the chaos test, on two cores, a Ray of its own takes minutes to get so far.
    deadline = time.monotonic() + 360
    while len(list(Path(values["output"]).glob("completions/*"))) < 2 and process.poll() is None:
        if time.monotonic() > deadline:
            process.kill()
            raise TimeoutError("the job has not committed two units in six minutes")
        time.sleep(0.01)
    return process
