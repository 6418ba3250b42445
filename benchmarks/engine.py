"""The engine against transformers, and each stop policy against decoding without speculation.

    python benchmarks/engine.py peers     # 64 prompts, fp32: our engine, generate, generate_batch
    python benchmarks/engine.py policies  # goodput / the best of none and fixed, live batch 1-16
    python benchmarks/engine.py speedup   # reported from control rounds, against two full runs
    python benchmarks/engine.py overhead  # what goodput's own work costs at 64 rows
    python benchmarks/engine.py prefixes  # 8 samples a prompt, a few-shot block: shared or not
    python benchmarks/engine.py quality   # what a precision costs in agreement with fp32

Each prints a table; each command's `--help` says of what, and how long it takes on two cores.

Sides are interleaved in one process, `--repeats` times over; a ratio is the median of the paired
ratios, with the smallest and largest beside it. Every side decodes greedily and generates the same
number of tokens from the same prompts (end of sequence ignored), so tokens per second compare
directly.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, get_args

import torch
import transformers
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
    interleave,
    load,
    prepare,
    ratios,
    read_prompts,
    run,
    run_engine,
    spread,
)
from policies import overhead, policies, speedup
from rich.table import Table
from sides import Outputs, Work, continuous_batch, static_batches

from specdec.engine.engine import Engine
from specdec.kernels.stored import DTYPES, KvDtype
from specdec.loading.conversion import model_folder
from specdec.loading.pair import ModelPair
from specdec.loading.sources import find_model
from specdec.model.linear import Quantization
from specdec.policies.profiling import profile_costs
from specdec.policies.registry import make_policy
from specdec.request import Completion


def plain_target(target: str) -> Any:
    """The target in fp32 as transformers loads it, with nothing of ours in it."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        model_folder(find_model(target), torch.float32), dtype=torch.float32
    ).eval()


def peers(
    target: Target = TARGET,
    draft: Draft = DRAFT,
    prompts: Prompts = PROMPTS,
    rows: Rows = 64,
    tokens: Tokens = 128,
    batch: Annotated[int, typer.Option(help="slots, and rows of a static batch")] = 16,
    repeats: Repeats = 2,
    threads: Threads = 0,
) -> None:
    """Our engine without speculation against transformers' generate and generate_batch, fp32.

    All in one process; `peers.py` compares more sides, in processes of their own. Prints each
    side's tokens per second, how much faster the engine is, and how many outputs are equal. Some
    10 minutes.
    """
    prepare(threads)
    pair = ModelPair.load(target, draft, dtype="float32")
    plain = plain_target(target)
    ids = read_prompts(pair.tokenizer, prompts, rows)
    work = Work(ids, [tokens] * len(ids), temperature=0.0)
    outputs: dict[str, list[tuple[int, ...]]] = {}

    def ours() -> Outputs:
        completions, _ = run_engine(pair, make_policy("none"), batch, ids, tokens)
        return [list(completion.output_ids) for completion in completions]

    def kept(name: str, side: Callable[[], Outputs]) -> None:
        outputs[name] = [tuple(row) for row in side()]

    ways = {
        "specbatch": ours,
        "generate": partial(static_batches, plain, work, batch),
        "generate_batch": partial(continuous_batch, plain, work),
    }
    times = interleave({name: partial(kept, name, side) for name, side in ways.items()}, repeats)
    table = Table("side", "tokens/s", "specbatch is faster by", "same outputs")
    for name, taken in times.items():
        made = sum(map(len, outputs[name]))
        rate = statistics.median(made / t for t in taken)
        same = sum(a == b for a, b in zip(outputs["specbatch"], outputs[name], strict=True))
        ratio = spread(ratios(taken, times["specbatch"]))
        table.add_row(name, f"{rate:.1f}", ratio, f"{same}/{len(ids)}")
    console.print(table)


def prefixes(
    target: Target = TARGET,
    draft: Draft = DRAFT,
    prompts: Prompts = PROMPTS,
    precision: Precision = "int8",
    tokens: Tokens = 32,
    slots: Annotated[int, typer.Option(help="rows in flight")] = 16,
    policy: Annotated[str, typer.Option(help="stop policy")] = "goodput",
    repeats: Repeats = 3,
    threads: Threads = 0,
) -> None:
    """Prompts that begin alike: their beginning computed once, against computed for every row.

    Prints for two kinds of prompts the seconds of both ways, how much faster sharing is, how many
    tokens were copied, and how many outputs are equal. Some 3 minutes.
    """
    prepare(threads)
    pair = load(target, draft, precision)
    questions = read_prompts(pair.tokenizer, prompts, 64)
    block = tuple(token for question in questions[32:] for token in question)
    work = {
        "4 prompts of 400 tokens x 8 samples": [
            block[start : start + 400] for start in range(0, 1600, 400) for _ in range(8)
        ],
        "32 prompts behind a block of 600": [(*block[:600], *q) for q in questions[:32]],
    }
    costs = profile_costs(pair.target, pair.draft, slots) if pair.draft else None
    table = Table("work", "shared, s", "not shared, s", "times faster", "tokens copied", "equal")
    for name, rows in work.items():
        found: dict[str, tuple[list[Completion], Engine]] = {}

        def side(key: str, rows: list[tuple[int, ...]], found: dict[str, Any]) -> None:
            made = make_policy(policy, costs=costs) if policy == "goodput" else make_policy(policy)
            found[key] = run_engine(
                pair, made, slots, rows, tokens, least_shared=10**9 if key == "apart" else 32
            )

        sides = {key: partial(side, key, rows, found) for key in ("apart", "shared")}
        times = interleave(sides, repeats)
        outputs = [[c.output_ids for c in found[key][0]] for key in sides]
        table.add_row(
            name,
            f"{statistics.median(times['shared']):.1f}",
            f"{statistics.median(times['apart']):.1f}",
            spread(ratios(times["apart"], times["shared"])),
            f"{found['shared'][1].stats.shared_tokens:,}",
            f"{sum(a == b for a, b in zip(*outputs, strict=True))} of {len(rows)}",
        )
    console.print(table)


def quality(
    target: Target = TARGET,
    prompts: Prompts = PROMPTS,
    rows: Rows = 32,
    tokens: Tokens = 128,
    threads: Threads = 0,
) -> None:
    """Agreement of each precision with fp32, teacher-forced on fp32's greedy outputs.

    The last two are fp32 but for their keys and values. Prints by precision how often the likeliest
    token is the same, the perplexity of fp32's output, and how much of the two distributions
    overlaps. Some 3 minutes.
    """
    prepare(threads)
    pair = ModelPair.load(target, dtype="float32")
    ids = read_prompts(pair.tokenizer, prompts, rows)
    completions, _ = run_engine(pair, make_policy("none"), 16, ids, tokens)
    texts = [(prompt, done.output_ids) for prompt, done in zip(ids, completions, strict=True)]
    table = Table(
        "precision", "greedy agreement", "perplexity of fp32's output", "mean sum min(p, p32)"
    )
    reference = [score(pair, *text) for text in texts]
    sides: list[tuple[str, KvDtype]] = [("fp32", "auto")]
    sides += [(quantization, "auto") for quantization in get_args(Quantization)]
    sides += [("fp32", kv_dtype) for kv_dtype in DTYPES]
    for precision, kv_dtype in sides:
        each = load(target, None, precision, kv_dtype)
        agree, log_likelihood, overlap, n = 0, 0.0, 0.0, 0
        for (prompt, output), expected in zip(texts, reference, strict=True):
            logits = score(each, prompt, output)
            chosen = torch.tensor(output)
            agree += int((logits.argmax(-1) == chosen).sum())
            log_probs = logits.log_softmax(-1)
            log_likelihood += log_probs.gather(1, chosen[:, None]).sum().item()
            overlap += torch.minimum(log_probs.exp(), expected.softmax(-1)).sum().item()
            n += len(output)
        perplexity = torch.tensor(-log_likelihood / n).exp().item()
        name = precision if kv_dtype == "auto" else f"{precision}, kv_dtype {kv_dtype}"
        table.add_row(name, f"{agree / n:.3f}", f"{perplexity:.3f}", f"{overlap / n:.3f}")
    console.print(table)


def score(pair: ModelPair, prompt: tuple[int, ...], output: tuple[int, ...]) -> torch.Tensor:
    """Logits [len(output), V] behind each output token."""
    tokens = torch.tensor([*prompt, *output[:-1]])
    cache = pair.target.new_cache(1, len(tokens))
    hidden = pair.target.forward(cache, [(0, len(tokens))], tokens)
    return pair.target.logits(hidden[len(prompt) - 1 :])


if __name__ == "__main__":
    run(__doc__, peers, policies, speedup, overhead, prefixes, quality)
