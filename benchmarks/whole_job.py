"""A whole job, prompts in Parquet to completions in Parquet, against Ray Data with vLLM.

    python benchmarks/whole_job.py --vllm /tmp/vllm/bin/python --prompts gsm8k_test.parquet

Both sides start from nothing in each turn: a process, Ray, an actor, the model; then they read the
same prompts, generate the same number of tokens from each (greedy, end of sequence ignored) and
write Parquet. `wall` is all of it. `working` is from the first prompt to the last completion, which
is what counts in a job of hours. With `--dtype auto` each side takes the dtype that it takes by
itself for models as they are stored; both models must be folders of safetensors then. The peer is
benchmarks/ray_vllm.py; see `peers.py` for its virtual environment, in which it also wants `pip
install "ray[data]"`.

Prints tokens per second of both, and how many times longer than ours theirs took. A turn takes some
6 minutes on two cores, three of them by default.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import pyarrow.parquet as pq
import typer
from common import (
    CORES,
    DRAFT,
    ROOT,
    TARGET,
    Draft,
    Rows,
    Target,
    Temperature,
    Tokens,
    console,
    ratios,
    run,
    spread,
)
from peers import Threads, export
from rich.table import Table

Taken = dict[str, float]
"""`tokens`, and seconds: `wall` and `working`."""


def ours(job: dict[str, Any], policy: str) -> Taken:
    """`specbatch run`, as a user calls it."""
    settings = {
        "input.paths": job["prompts"],
        "input.prompt_column": "prompt",
        "input.messages_column": "null",
        "output": job["out"],
        "models.target": job["model"],
        "models.draft": job["draft"] if policy != "none" else "null",
        "models.dtype": job["dtype"],
        "models.deterministic": "false",  # the peer is not either
        "sampling.max_new_tokens": job["tokens"],
        "sampling.temperature": job["temperature"],
        "sampling.ignore_eos": "true",
        "speculation.policy": policy,
        "actors.num_cpus": job["threads"],
        "actors.slots": job["batch"],
        "unit_rows": job["unit_rows"],
    }
    sets = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "jobs.cli", "run", str(ROOT / "examples/demo/job.yaml"), *sets]
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    wall = time.perf_counter() - began
    command = [sys.executable, "-m", "jobs.cli", "report", job["out"], "--json"]
    report = json.loads(subprocess.run(command, check=True, capture_output=True, cwd=ROOT).stdout)
    tokens = report["output_tokens"]
    return {"tokens": tokens, "wall": wall, "working": tokens / report["tokens_per_second"]}


def theirs(job: dict[str, Any], python: str) -> Taken:
    """Ray Data with vLLM."""
    script = str(Path(__file__).with_name("ray_vllm.py"))
    environment = {**os.environ, "OMP_NUM_THREADS": str(job["threads"])}
    began = time.perf_counter()
    done = subprocess.run(
        [python, script, json.dumps(job)], check=True, capture_output=True, env=environment
    )
    wall = time.perf_counter() - began
    answer: Taken = json.loads(done.stdout.splitlines()[-1])
    return answer | {"wall": wall}


def main(
    vllm: Annotated[str, typer.Option(help="a Python that has vLLM and Ray Data")],
    prompts: Annotated[Path, typer.Option(help="Parquet with a column `prompt`")],
    target: Target = TARGET,
    draft: Draft = DRAFT,
    rows: Rows = 256,
    tokens: Tokens = 64,
    temperature: Temperature = 0.0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or auto")] = "float32",
    batch: Annotated[int, typer.Option(help="rows in flight")] = 64,
    unit_rows: Annotated[int, typer.Option(help="rows of a unit, or of a batch of Ray's")] = 128,
    policy: Annotated[str, typer.Option(help="our stop policy")] = "goodput",
    repeats: Annotated[int, typer.Option(help="turns")] = 3,
    threads: Threads = CORES,
) -> None:
    """Run both sides in turns and print their rates and ratios."""
    work = Path(tempfile.mkdtemp(prefix="whole-job-"))
    folders = (target, draft) if dtype == "auto" else export(target, draft, work)
    pq.write_table(pq.read_table(prompts, columns=["prompt"])[:rows], work / "prompts.parquet")
    job = {
        "model": str(folders[0]), "draft": str(folders[1]), "dtype": dtype,
        "prompts": str(work / "prompts.parquet"), "tokens": tokens, "temperature": temperature,
        "batch": batch, "unit_rows": unit_rows, "threads": threads,
    }  # fmt: skip
    found: dict[str, list[Taken]] = {"specbatch": [], "Ray Data + vLLM": []}
    for turn in range(repeats):
        for name, takens in found.items():
            here = {**job, "out": str(work / f"{name[:3]}-{turn}")}
            takens.append(ours(here, policy) if name == "specbatch" else theirs(here, vllm))
            assert takens[-1]["tokens"] == rows * tokens, takens[-1]
            console.log(f"{turn + 1}/{repeats} {name}: {takens[-1]}")
    table = Table("side", "tokens/s, wall", "tokens/s, working", "wall, times", "working, times")
    for name, takens in found.items():
        rates = [
            f"{statistics.median(each['tokens'] / each[key] for each in takens):.1f}"
            for key in ("wall", "working")
        ]
        times = [
            spread(ratios([t[key] for t in takens], [t[key] for t in found["specbatch"]]))
            for key in ("wall", "working")
        ]
        table.add_row(name, *rates, *(times if name != "specbatch" else ("", "")))
    console.print("How many times longer than specbatch a side took:", table)


if __name__ == "__main__":
    run(__doc__, main)
