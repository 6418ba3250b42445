"""What it costs when rows ask something of their logits: seconds of a round, side by side.

    python benchmarks/adjustments.py --rows 64 --tokens 48 --repeats 5

Three sides generate the same numbers of tokens from the same prompts, in turns in one run: `none`
of the rows asks for anything; `all` ask for the three penalties; `all, everything` ask for every
penalty and ban. The policy is `none`, whose rounds are the shortest, or another one. On a CPU the
seconds are those of the process, so that other work on the machine does not count.

Beside them stands what a round without any of it pays, in percent of that round: the seconds that
the step between logits and probabilities takes when no row asks, measured by themselves.

Prints seconds per round of each side and the ratio to `none`: median, smallest, largest. Some 5
minutes on two cores with the defaults.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from typing import Annotated, Any

import torch
import typer
from common import (
    DRAFT,
    PROMPTS,
    TARGET,
    Draft,
    Precision,
    Prompts,
    Repeats,
    Rows,
    Target,
    Threads,
    Tokens,
    console,
    load,
    prepare,
    read_prompts,
    requests_of,
    run,
    spread,
)
from rich.table import Table

from specdec.engine.engine import Engine
from specdec.engine.scheduler import LiveRow
from specdec.loading.pair import ModelPair
from specdec.policies.registry import make_policy
from specdec.request import Request

PENALTIES = {"repetition_penalty": 1.1, "presence_penalty": 0.3, "frequency_penalty": 0.2}
SIDES: dict[str, dict[str, Any]] = {
    "none": {},
    "all: penalties": PENALTIES,
    "all: everything": {
        **PENALTIES,
        "logit_bias": {100 + i: -1.0 for i in range(50)},
        "min_tokens": 8,
        "bad_words": tuple((200 + i, 300 + i) for i in range(20)),
        "allowed_token_ids": tuple(range(40_000)),
        "no_repeat_ngram_size": 3,
    },
}


def round_seconds(pair: ModelPair, policy: str, k: int, requests: list[Request]) -> float:
    """Mean seconds of a round, prompts and the rounds in which rows have ended left out."""
    engine = Engine(pair, policy=make_policy(policy, k=k), slots=len(requests))
    for request in requests:
        engine.submit(request)
    engine.step()
    while any(row.generated == 0 for row in engine.scheduler.rows):
        engine.step()
    clock = time.process_time if engine.device.type == "cpu" else time.perf_counter
    began, rounds = clock(), 0
    while engine.live == len(requests):
        engine.step()
        rounds += 1
    return (clock() - began) / rounds


def unused_seconds(pair: ModelPair, requests: list[Request]) -> float:
    """Seconds of a round in which rows are others than before, and none of them asks."""
    asked = Engine(pair, policy=make_policy("none"), slots=1)._asked
    rows = [LiveRow(r, r.sampling, list(r.prompt_ids), len(r.prompt_ids)) for r in requests]
    repeats = 1000
    began = time.perf_counter()
    for _ in range(repeats):
        asked.adjuster_of(rows)
    return (time.perf_counter() - began) / repeats


def main(
    target: Target = TARGET,
    draft: Draft = DRAFT,
    precision: Precision = "int8",
    prompts: Prompts = PROMPTS,
    rows: Rows = 64,
    tokens: Tokens = 32,
    policy: Annotated[str, typer.Option(help="stop policy")] = "none",
    k: Annotated[int, typer.Option(help="candidates of `fixed`")] = 4,
    repeats: Repeats = 5,
    threads: Threads = 0,
) -> None:
    """Run the sides in turns and print what a round of each takes."""
    prepare(threads)
    pair = load(target, draft if policy != "none" else None, precision)
    texts = read_prompts(pair.tokenizer, prompts, rows)
    texts = [texts[i % len(texts)] for i in range(rows)]
    plain = requests_of(texts, tokens)
    sides = {
        name: [replace(r, sampling=replace(r.sampling, **asked)) for r in plain]
        for name, asked in SIDES.items()
    }
    found: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats):
        for name, requests in sides.items():
            found[name].append(round_seconds(pair, policy, k, requests))
        console.log(f"{repeat + 1}/{repeats}")
    shown = Table(
        title=f"{rows} rows, policy {policy}, {precision}, {torch.get_num_threads()} threads"
    )
    for column in ("rows that ask", "ms a round", "against none"):
        shown.add_column(column, justify="right")
    for name, seconds in found.items():
        by_none = [a / b for a, b in zip(seconds, found["none"], strict=True)]
        shown.add_row(name, f"{1e3 * statistics.median(seconds):.2f}", spread(by_none, digits=3))
    console.print(shown)
    unused = unused_seconds(pair, plain)
    share = unused / statistics.median(found["none"])
    console.print(f"when none asks: {1e6 * unused:.1f} µs a round, {share:.4%} of it")


if __name__ == "__main__":
    run(__doc__, main)
