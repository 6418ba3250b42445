"""`engine.py policies`, `speedup` and `overhead`: what stop policies yield, report and cost."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from common import (
    DRAFT,
    PROMPTS,
    TARGET,
    Batches,
    Draft,
    MeanTokens,
    Prompts,
    Repeats,
    Rows,
    Target,
    Threads,
    Tokens,
    console,
    load,
    prepare,
    race,
    ragged_lengths,
    ratios,
    read_prompts,
    requests_of,
    run_engine,
    seconds,
    spread,
)
from rich.table import Table

from specdec.engine.engine import Engine
from specdec.loading.head_files import load_head
from specdec.loading.pair import ModelPair
from specdec.measure.speedup import Speedup
from specdec.policies.base import StopPolicy
from specdec.policies.costs import CostModel, CostTable
from specdec.policies.registry import make_policy
from specdec.request import Request

OTHERS = ("heuristic", "confidence", "entropy", "suffix", "goodput")
"""Policies that `policies` runs beside `none` and the fixed lengths."""


def turns(
    pair: ModelPair, policies: dict[str, StopPolicy], slots: int, requests: Sequence[Request]
) -> tuple[dict[str, float], dict[str, Engine]]:
    """Seconds a token of each policy's engine, all engines in turn."""
    engines = {name: Engine(pair, policy=policies[name], slots=slots) for name in policies}
    return race(engines, requests), engines


def fixed(size: str) -> StopPolicy:
    """The policy `fixed` of a size such as 4, or 4x2 for trees of width 2."""
    k, _, width = size.partition("x")
    return make_policy("fixed", k=int(k), width=int(width or 1))


def policies(
    target: Target = TARGET,
    draft: Draft = DRAFT,
    prompts: Prompts = PROMPTS,
    tokens: MeanTokens = 48,
    batches: Batches = "1,2,4,8,16",
    precisions: Annotated[str, typer.Option(help="fp32, int8wo, int8; +det")] = "fp32,int8",
    lengths: Annotated[str, typer.Option(help="candidates of fixed; 4x2: width 2")] = "1,2,3,4,6,8",
    head: Annotated[Path | None, typer.Option(help="a trained acceptance head")] = None,
    rounds: Annotated[int, typer.Option(help="prompts per slot")] = 2,
    repeats: Repeats = 4,
    threads: Threads = 0,
) -> None:
    """goodput against the best of none, fixed lengths and suffix, by precision and live batch.

    All sides run once; then none, the best of the others and goodput run `--repeats` times more,
    and only these runs are compared. The sides of a run take some steps each in turn. goodput
    keeps what it learned from run to run, as in a job. Prints each side's speed over none, and
    goodput's over the best and over none, with its tokens per row and round. Some 20 minutes.
    """
    prepare(threads)
    every, duel = Table("precision", "live batch"), Table("precision", "live batch")
    names = ["none", *(f"fixed {k}" for k in lengths.split(",")), *OTHERS]
    for name in names:
        every.add_column(name, justify="right")
    for name in ("none, tokens/s", "best", "goodput / best", "goodput / none", "per round"):
        duel.add_column(name, justify="right")
    for precision in precisions.split(","):
        pair = load(target, draft, precision)
        trained = load_head(head, pair) if head else None
        for batch in map(int, batches.split(",")):
            ids = read_prompts(pair.tokenizer, prompts, max(4, batch * rounds))
            requests = requests_of(ids, ragged_lengths(len(ids), tokens))
            instances = {
                name: fixed(name.split()[-1])
                if name.startswith("fixed")
                else make_policy(name, head=trained if name == "goodput" else None, k_max=16)
                for name in names
            }
            few = {name: instances[name] for name in ("none", "goodput")}
            turns(pair, few, batch, requests)  # the first run of a pair is slower than the rest
            once, _ = turns(pair, instances, batch, requests)
            every.add_row(precision, str(batch), *(f"{once['none'] / once[n]:.2f}" for n in names))
            rivals = [name for name in names if name.split()[0] in ("fixed", "suffix")]
            first = min(rivals, key=once.__getitem__)
            few = {name: instances[name] for name in ("none", first, "goodput")}
            again: dict[str, list[float]] = {name: [] for name in few}
            for turn in range(repeats):
                taken, engines = turns(pair, few, batch, requests)
                for name in few:
                    again[name].append(taken[name])
                console.log(f"{precision}, batch {batch}, {turn + 1}/{repeats}: {taken}")
            best = min(("none", first), key=lambda n: sum(again[n]))
            duel.add_row(
                precision,
                str(batch),
                f"{statistics.median(1 / t for t in again['none']):.1f}",
                best,
                spread(ratios(again[best], again["goodput"])),
                spread(ratios(again["none"], again["goodput"])),
                f"{engines['goodput'].stats.counts.block_efficiency:.2f}",
            )
    console.print("Speedup over none, one run each:", every, "Runs to compare:", duel)


def speedup(
    target: Target = TARGET,
    draft: Draft = DRAFT,
    prompts: Prompts = PROMPTS,
    rows: Rows = 24,
    tokens: Tokens = 48,
    batch: Annotated[int, typer.Option(help="slots")] = 4,
    policy: Annotated[str, typer.Option(help="one of the policies")] = "goodput",
    k: Annotated[int, typer.Option(help="candidates of fixed")] = 2,
    share: Annotated[float, typer.Option(help="share of control rounds")] = 0.1,
    repeats: Repeats = 10,
    threads: Threads = 0,
) -> None:
    """The speedup that a job reports from its control rounds against that of full runs.

    Rows have lengths of their own, as in a job: rows of one length would end in lockstep without
    speculation and only there. Each repetition has two full runs with and two without speculation,
    in the order without, with, with, without, so that a drift of the machine cancels. What they say
    is itself uncertain, as the table shows by how it varies; all of them together say it better.
    Prints both for each repetition, and how often the reported interval covers. Some 15 minutes.
    """
    prepare(threads)
    pair = load(target, draft, "fp32")
    ids = read_prompts(pair.tokenizer, prompts, rows)
    lengths = [int(n) for n in np.random.default_rng(0).integers(tokens // 2, tokens * 2, rows)]
    instance, plain = make_policy(policy, k=k, k_max=16), make_policy("none")

    def run(policy: StopPolicy) -> float:
        return seconds(partial(run_engine, pair, policy, batch, ids, lengths))

    run(plain), run(instance)  # what the first run of each allocates and learns
    table = Table("repetition", "reported", "95% interval", "controls", "full runs", "covered")
    reported: list[Speedup] = []
    with_, without, covered = 0.0, 0.0, 0
    for repetition in range(repeats):
        before, first = run(plain), run(instance)
        _, engine = run_engine(pair, instance, batch, ids, lengths, control_share=share)
        second, after = run(instance), run(plain)
        found = engine.stats.speedup.estimate()
        if found is None:
            raise typer.BadParameter("too few control rounds: raise --share, --rows or --tokens")
        reported.append(found)
        with_, without = with_ + first + second, without + before + after
        truth = (before + after) / (first + second)
        inside = found.low <= truth <= found.high
        covered += inside
        console.log(f"{found.low:.3f}-{found.high:.3f}, full runs {truth:.3f}")
        table.add_row(
            str(repetition + 1),
            f"{found.value:.3f}",
            f"{found.low:.3f}-{found.high:.3f}",
            str(found.controls),
            f"{truth:.3f}",
            "yes" if inside else "no",
        )
    whole = without / with_
    by_all = sum(each.low <= whole <= each.high for each in reported)
    console.print(
        table,
        f"reported, mean: {statistics.mean(r.value for r in reported):.3f}; "
        f"all {4 * repeats} full runs together: {whole:.3f}",
        f"covered: {covered} of {repeats} by each repetition's runs, {by_all} of {repeats} by all",
        sep="\n",
    )


def overhead(
    target: Target = TARGET,
    draft: Draft = DRAFT,
    prompts: Prompts = PROMPTS,
    tokens: Tokens = 24,
    batch: Annotated[int, typer.Option(help="slots")] = 64,
    threads: Threads = 0,
) -> None:
    """What goodput's own work costs, as a share of round time, when it speculates in every round.

    Drafting is stated to cost next to nothing, so that the policy has as much to decide as it can.
    Prints the share and the milliseconds per round of each of the policy's methods. A minute.
    """
    prepare(threads)
    pair = load(target, draft, "fp32")
    ids = read_prompts(pair.tokenizer, prompts, batch)
    costs = CostModel(CostTable([1], [1e-5]), CostTable([1, 8 * batch], [0.05, 0.06]))
    costs.draft.observe = costs.verify.observe = lambda *_: None  # type: ignore[method-assign]
    policy = make_policy("goodput", costs=costs, k_max=8)
    spent: dict[str, float] = {}
    for name in ("budget", "go_on", "submit", "observe"):
        setattr(policy, name, timed(getattr(policy, name), name, spent))
    run_engine(pair, policy, batch, ids, 4)
    spent.clear()
    start = time.perf_counter()
    _, engine = run_engine(pair, policy, batch, ids, tokens)
    whole = time.perf_counter() - start
    spent["signals"] = engine.stats.seconds["decide"] - spent["go_on"]
    table = Table("part", "share of all time", "ms per round")
    for name, seconds_ in spent.items():
        table.add_row(
            name, f"{seconds_ / whole:.2%}", f"{1000 * seconds_ / engine.stats.rounds:.2f}"
        )
    counts = engine.stats.counts
    console.print(
        table,
        f"{engine.stats.rounds} rounds, {whole / engine.stats.rounds:.3f} s each, "
        f"{counts.drafted / counts.rounds:.1f} candidates a row and round",
    )


def timed(function: Callable[..., Any], name: str, spent: dict[str, float]) -> Callable[..., Any]:
    """`function`, with the seconds it takes added to spent[name]."""

    def wrapper(*args: Any) -> Any:
        start = time.perf_counter()
        result = function(*args)
        spent[name] = spent.get(name, 0.0) + time.perf_counter() - start
        return result

    return wrapper
