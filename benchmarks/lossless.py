"""Greedy output of every policy and live batch against transformers' own `generate` of the target.

    python benchmarks/lossless.py                      # 64 of the demo's prompts, fp32

Prints, per policy and live batch, how many outputs are equal token for token. For each that is not,
the gap between the target's two likeliest tokens where they part, in logits: floating-point sums
taken in another order can only swap tokens whose logits nearly tie. Exits with 1 if any difference
is no near-tie. Some 15 minutes on two cores.
"""

from __future__ import annotations

import torch
import typer
from common import (
    DRAFT,
    PROMPTS,
    TARGET,
    Batches,
    Draft,
    Prompts,
    Rows,
    Target,
    Threads,
    Tokens,
    console,
    prepare,
    read_prompts,
    run,
)
from engine import plain_target, score
from rich.table import Table

from specdec.engine.engine import Engine
from specdec.loading.pair import ModelPair
from specdec.model.sharing import common_prefix
from specdec.policies.registry import POLICIES, make_policy
from specdec.request import Request, SamplingParams

NEAR_TIE = 1e-3
"""Logit gap below which fp32 rounding (about 1e-4 here) may decide."""


def main(
    target: Target = TARGET,
    draft: Draft = DRAFT,
    prompts: Prompts = PROMPTS,
    rows: Rows = 64,
    tokens: Tokens = 32,
    batches: Batches = "1,4,16",
    threads: Threads = 0,
) -> None:
    """Compare every policy at every live batch."""
    prepare(threads)
    pair = ModelPair.load(target, draft, dtype="float32")
    reference = plain_target(target)
    ids = read_prompts(pair.tokenizer, prompts, rows)
    expected = [
        tuple(
            reference.generate(torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False)[
                0, len(prompt) :
            ].tolist()
        )
        for prompt in ids
    ]
    table = Table(
        "policy", "live batch", "equal", "near-ties", "other differences", "block efficiency"
    )
    wrong = 0
    for batch in map(int, batches.split(",")):
        for policy in POLICIES:
            side = make_policy(policy, k=3, k_max=6, estimator="confidence")
            engine = Engine(pair, policy=side, slots=batch)
            sampling = SamplingParams(max_new_tokens=tokens, temperature=0)
            done = engine.generate([Request(str(i), p, sampling) for i, p in enumerate(ids)])
            gaps = []
            for prompt, completion, output in zip(ids, done, expected, strict=True):
                if completion.output_ids != output:
                    at = common_prefix(completion.output_ids, output)
                    top = score(pair, prompt, output[: at + 1])[-1].topk(2).values
                    gaps.append((top[0] - top[1]).item())
                    console.print(f"{policy}, live batch {batch}: logit gap {gaps[-1]:.2g} at {at}")
            other = sum(gap > NEAR_TIE for gap in gaps)
            wrong += other
            table.add_row(
                policy,
                str(batch),
                f"{rows - len(gaps)}/{rows}",
                str(len(gaps) - other),
                str(other),
                f"{engine.stats.counts.block_efficiency:.2f}",
            )
            console.print(f"{policy}, live batch {batch}: {rows - len(gaps)}/{rows} equal")
    console.print(table)
    raise typer.Exit(1 if wrong else 0)


if __name__ == "__main__":
    run(__doc__, main)
