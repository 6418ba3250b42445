"""What the pipeline costs: tokens per second of a whole job against the bare engine, same rows.

    python benchmarks/overhead.py --rows 96 --tokens 64 --repeats 3

Both sides load the demo's pair with the demo's settings and generate the same number of tokens
from the same prompts (end of sequence ignored), in turns in one run. The bare engine is
`Engine.generate` on all rows at once. The job's rate is what its report says: output tokens per
second in which units were in work, so from the first unit's start to the last one's end, without
the models' loading; `wall` is the rate with loading and everything else, which matters less the
longer a job is. A ratio is the median of the paired ratios, with the smallest and largest beside.

Prints the tokens per second of both and the job's share of the engine's. Some 4 minutes on two
cores with the defaults.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import pyarrow.dataset as ds
import pyarrow.parquet as pq
import torch
import typer
from common import ROOT, console, run, spread
from rich.table import Table

from jobs.job_file import load_job
from pipeline.config.job import JobConfig
from pipeline.generate.loading import load_pair, make_engine
from pipeline.inputs.prompts import PromptRenderer
from pipeline.inputs.row_sampling import row_sampling
from pipeline.run.ray_session import connected
from pipeline.run.run import run_job
from specdec.loading.pair import ModelPair
from specdec.request import Request


def bare(job: JobConfig, pair: ModelPair, requests: list[Request]) -> float:
    """Tokens per second of the engine alone."""
    engine = make_engine(job, pair, None)
    began = time.perf_counter()
    completions = engine.generate(requests)
    return sum(len(c.output_ids) for c in completions) / (time.perf_counter() - began)


def main(
    rows: Annotated[int, typer.Option(help="prompts")] = 64,
    tokens: Annotated[int, typer.Option(help="new tokens of each")] = 48,
    repeats: Annotated[int, typer.Option(help="how often each side runs")] = 3,
    policy: Annotated[str, typer.Option(help="stop policy of both sides")] = "none",
) -> None:
    """Run both sides in turns and print their rates and ratios."""
    work = Path(tempfile.mkdtemp(prefix="overhead-"))
    table = ds.dataset(ROOT / "examples/demo/prompts").head(rows)
    pq.write_table(table, work / "prompts.parquet")
    overrides = [
        f"input.paths={work}/prompts.parquet",
        f"sampling.max_new_tokens={tokens}",
        "sampling.ignore_eos=true",
        "sampling.temperature=0",
        f"speculation.policy={policy}",
    ]
    job = load_job(ROOT / "examples/demo/job.yaml", [*overrides, f"output={work}/out"])
    torch.set_num_threads(max(1, int(job.actors.num_cpus)))
    pair = load_pair(job)
    renderer = PromptRenderer(job.input, pair.tokenizer)
    requests = [
        Request(str(i), renderer.prompt_ids(row), row_sampling(job.sampling, None, str(i)))
        for i, row in enumerate(table.to_pylist())
    ]
    found: list[tuple[float, float, float]] = []
    with connected():
        for repeat in range(repeats):
            alone = bare(job, pair, requests)
            here = job.model_copy(update={"output": f"{work}/out-{repeat}"})
            began = time.perf_counter()
            summary = run_job(here).summary
            seconds = time.perf_counter() - began
            assert summary["output_tokens"] == len(requests) * tokens
            found.append((alone, summary["tokens_per_second"], summary["output_tokens"] / seconds))
            console.print(f"repeat {repeat}: engine {alone:.1f}, job {found[-1][1]:.1f} tokens/s")
    shown = Table(title=f"{len(requests)} prompts of {tokens} new tokens, policy {policy}")
    for column in ("side", "tokens/s", "against the engine"):
        shown.add_column(column, justify="right")
    for index, side in enumerate(("bare engine", "job", "job, wall")):
        rate = statistics.median(each[index] for each in found)
        shares = [each[index] / each[0] for each in found]
        shown.add_row(side, f"{rate:.1f}", spread(shares, digits=3))
    console.print(shown)


if __name__ == "__main__":
    run(__doc__, main)
