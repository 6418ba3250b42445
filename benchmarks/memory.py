"""Rows in flight by the memory for keys and values: this commit in turns with an earlier one.

    git worktree add /tmp/before COMMIT
    python benchmarks/memory.py --before /tmp/before

`short`: prompts of 20 to 800 tokens whose outputs end by themselves after 20 to 300, where they
may have 1,024, in memory for four rows of that length. `plenty`: memory for all, by live batch.
`samples`: what eight samples of a prompt of 1,000 tokens hold.

A random Llama in float32: what tokens it draws does not matter here, and what its weights take to
read is a share of a round as in larger ones. The target decodes alone. Each side has a process.
Prints rows in flight, tokens/s, their ratio, and how many tokens were computed, in some 15 minutes.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import ROOT, Repeats, console, ratios, run, spread
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from specdec.engine.engine import Engine
from specdec.model.decoder import PackedDecoder
from specdec.policies.registry import make_policy
from specdec.request import Request, SamplingParams

LONGEST = 800 + 1024
"""Positions that the longest row may need."""


class Alone:
    """A pair without a draft: a random target."""

    def __init__(self, layers: int, hidden: int) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=4096, hidden_size=hidden, intermediate_size=8 * hidden // 3,
            num_hidden_layers=layers, num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 192, max_position_embeddings=4096,
            bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        self.target = PackedDecoder(LlamaForCausalLM(config).eval(), fuse=True)
        self.draft: PackedDecoder | None = None
        self.vocab_size, self.context_length, self.draft_context_length = 4096, 4096, 0
        self.eos_token_ids: frozenset[int] = frozenset()


def requests_of(shapes: Sequence[tuple[int, int]], most: int, alike: bool) -> list[Request]:
    """Requests with prompts of some lengths, whose outputs end by a stop string after some more.

    Args:
        shapes: tokens of prompt and output.
        most: max_new_tokens.
        alike: whether they have one prompt, as samples do.
    """
    found = []
    for i, (prompt, output) in enumerate(shapes):
        draw = random.Random(0 if alike else i)
        ids = tuple(draw.randrange(4096) for _ in range(prompt))
        sampling = SamplingParams(max_new_tokens=most, stop=("x" * output,))
        found.append(Request(str(i), ids, sampling))
    return found


def side() -> None:
    """Answer one line of JSON on stdin after the other: a job to run."""
    torch.set_num_threads(1)
    pair, line = Alone(*json.loads(sys.stdin.readline())), sys.stdin.readline()
    while line:
        job: dict[str, Any] = json.loads(line)
        memory = job["positions"] * pair.target.new_cache(0, 0).bytes_per_position
        engine = Engine(
            pair, policy=make_policy("none"), slots=job["slots"], kv_memory_bytes=memory,
            decode=lambda ids: "x" * len(ids),
        )  # fmt: skip
        for request in requests_of(job["shapes"], job["most"], job["alike"]):
            engine.submit(request)
        began = time.perf_counter()
        while engine.has_work:
            engine.step()
        stats = engine.stats
        answer = {
            "seconds": time.perf_counter() - began,
            "live": stats.live_rows / stats.rounds,
            "tokens": stats.counts.committed,
            "computed": stats.target_tokens,
            "preempted": getattr(stats, "preempted", 0),
        }
        print(json.dumps(answer), flush=True)
        line = sys.stdin.readline()


def memory(
    before: Annotated[Path, typer.Option(help="a checkout of the commit to compare with")],
    prompts: Annotated[int, typer.Option(help="of `short`")] = 256,
    repeats: Repeats = 3,
    layers: Annotated[int, typer.Option(help="of the model")] = 6,
    hidden: Annotated[int, typer.Option(help="its width, a multiple of 192")] = 576,
    only: Annotated[str, typer.Option(help="some of them, by commas")] = "short,plenty,samples",
) -> None:
    """Mean live batch and tokens per second of both sides."""
    sides = {"before": open_side(before), "now": open_side(ROOT)}
    for process in sides.values():
        tell(process, (layers, hidden))
    draw = random.Random(0)
    short = [(draw.randint(20, 800), draw.randint(20, 300)) for _ in range(prompts)]
    jobs = {
        f"short, {prompts} prompts": {
            "slots": 64, "positions": 4 * 1920, "most": 1024, "alike": False, "shapes": short,
        },
        **{
            f"plenty, {live} live": {
                "slots": live, "positions": 2 * live * LONGEST, "most": 256, "alike": False,
                "shapes": [(64, max(16, 128 // live))] * 2 * live,
            }
            for live in (1, 16, 64)
        },
        "samples, 8 of 1,000 tokens": {
            "slots": 8, "positions": 8 * LONGEST, "most": 64, "alike": True,
            "shapes": [(1000, 32)] * 8,
        },
    }  # fmt: skip
    table = Table("", "side", "live", "tokens/s", "computed", "sent back")
    for name, job in jobs.items():
        if name.split(",")[0] not in only.split(","):
            continue
        rates: dict[str, list[float]] = {"before": [], "now": []}
        for _ in range(1 if name.startswith("short") else repeats):
            for each, process in sides.items():
                found = ask(process, job)
                rates[each].append(found["tokens"] / found["seconds"])
                table.add_row(
                    name, each, f"{found['live']:.1f}", f"{rates[each][-1]:.0f}",
                    f"{found['computed']:,}", str(found["preempted"]),
                )  # fmt: skip
        table.add_row(name, "now / before", "", spread(ratios(rates["now"], rates["before"])))
    console.print(table)


def open_side(folder: Path) -> subprocess.Popen[str]:
    """A process that runs jobs with the engine in a folder."""
    return subprocess.Popen(
        [sys.executable, __file__, "side"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(folder)},
    )  # fmt: skip


def tell(process: subprocess.Popen[str], job: object) -> None:
    """Hand a side a job, or first of all the size of its model."""
    assert process.stdin is not None
    print(json.dumps(job), file=process.stdin, flush=True)


def ask(process: subprocess.Popen[str], job: dict[str, Any]) -> dict[str, Any]:
    """What a side says of a job."""
    tell(process, job)
    assert process.stdout is not None
    answer: dict[str, Any] = json.loads(process.stdout.readline())
    return answer


if __name__ == "__main__":
    if sys.argv[1:] == ["side"]:
        side()
    else:
        run(__doc__, memory)
