"""What it costs when rows ask something of their logits: seconds of a round, side by side.

    python benchmarks/adjustments.py --rows 64 --tokens 96

Four sides generate the same numbers of tokens from the same prompts, round by round in turns:
`none` of the rows asks for anything; `all: penalties` asks for the three penalties,
`all: everything` for every penalty and ban, `all: a schema` for a long JSON array of objects.
The policy is `none`, whose rounds are the shortest, or another one.

Beside them stands what a round without any of it pays, in percent of that round: the seconds that
the step between logits and probabilities takes when no row asks, measured by themselves.

Prints the median milliseconds of a round of each side, and the ratio to the round of `none` beside
it: its median over all rounds, and that median's 95% interval by the bootstrap. Some 2 minutes on
two cores with the defaults.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import torch
import typer
from common import (
    DRAFT,
    PROMPTS,
    TARGET,
    Draft,
    Precision,
    Prompts,
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
)
from numpy.typing import NDArray
from rich.table import Table

from pipeline.config.structured_outputs import StructuredOutputs
from specdec.engine.engine import Engine
from specdec.engine.scheduler import LiveRow
from specdec.loading.grammars import ModelGrammars
from specdec.loading.pair import ModelPair
from specdec.policies.registry import make_policy
from specdec.request import Request

PENALTIES = {"repetition_penalty": 1.1, "presence_penalty": 0.3, "frequency_penalty": 0.2}
PEOPLE = {
    "type": "array",
    "minItems": 20,  # no row may end before the others
    "items": {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    },
}
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
    "all: a schema": {"grammar": StructuredOutputs(json_schema=PEOPLE).text()},
}


def begun(pair: ModelPair, policy: str, k: int, requests: list[Request]) -> Engine:
    """An engine in which all rows have their first token: from here on rounds are alike."""
    grammars = ModelGrammars(pair.tokenizer, pair.vocab_size, pair.eos_token_ids)
    chosen = make_policy(policy, k=k)
    engine = Engine(pair, policy=chosen, slots=len(requests), grammars=grammars)
    for request in requests:
        engine.submit(request)
    while not engine.live or any(row.generated == 0 for row in engine.scheduler.rows):
        if ended := engine.step():
            raise typer.BadParameter(f"row {ended[0].id} ended before the others began")
    return engine


def rounds(engines: dict[str, Engine], rows: int) -> Iterator[dict[str, float]]:
    """Seconds of a round of each side, one side after the other, until a row ends.

    The machine's speed drifts over seconds; rounds that are neighbours are compared instead.
    """
    names = [*engines]
    while all(engine.live == rows for engine in engines.values()):
        seconds = {}
        for name in names:
            began = time.perf_counter()
            engines[name].step()
            seconds[name] = time.perf_counter() - began
        yield seconds
        names = [*names[1:], names[0]]  # no side is always behind the same one


def unused_seconds(pair: ModelPair, requests: list[Request]) -> float:
    """Seconds of a round in which rows are others than before, and none of them asks."""
    asked = Engine(pair, policy=make_policy("none"), slots=1)._asked
    rows = [LiveRow(r, r.sampling, list(r.prompt_ids), len(r.prompt_ids)) for r in requests]
    repeats = 1000
    began = time.perf_counter()
    for _ in range(repeats):
        asked.adjuster_of(rows)
    return (time.perf_counter() - began) / repeats


def _median(ratios: NDArray[np.float64]) -> tuple[float, float, float]:
    """The median, and its 95% interval."""
    drawn = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return float(np.median(ratios)), float(low), float(high)


def main(
    target: Target = TARGET,
    draft: Draft = DRAFT,
    precision: Precision = "int8",
    prompts: Prompts = PROMPTS,
    rows: Rows = 64,
    tokens: Tokens = 96,
    policy: Annotated[str, typer.Option(help="stop policy")] = "none",
    k: Annotated[int, typer.Option(help="candidates of `fixed`")] = 4,
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
    engines = {name: begun(pair, policy, k, requests) for name, requests in sides.items()}
    found = list(rounds(engines, rows))
    shown = Table(
        title=f"{rows} rows, policy {policy}, {precision}, {torch.get_num_threads()} threads, "
        f"{len(found)} rounds"
    )
    for column in ("rows that ask", "ms a round", "against none"):
        shown.add_column(column, justify="right")
    plain_seconds = np.array([each["none"] for each in found])
    for name in sides:
        seconds = np.array([each[name] for each in found])
        median, low, high = _median(seconds / plain_seconds)
        against = f"{median:.3f} ({low:.3f}–{high:.3f})"
        shown.add_row(name, f"{1e3 * np.median(seconds):.2f}", against)
    console.print(shown)
    unused = unused_seconds(pair, plain)
    share = unused / float(np.median(plain_seconds))
    console.print(f"when none asks: {1e6 * unused:.1f} µs a round, {share:.4%} of it")


if __name__ == "__main__":
    run(__doc__, main)
