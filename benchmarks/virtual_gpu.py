"""The real Engine on a GPU's clock, without a GPU: the fastest policy, and what the host costs.

    python benchmarks/simulate.py record --out traces.safetensors
    python benchmarks/virtual_gpu.py traces.safetensors --machine h200-8b --live 1,4,16,64

Forwards take what a table says, on a clock beside the host (specdec/simulate/virtual.py).
Scheduler, sampling and policies are the real ones and take what they take here, which on a busy
machine is too much. The traces say what is accepted. Counted are rounds with a row in each slot,
from the first in which all rows decode: those that feed prompts of rows that join are among them.

    best       the fastest of no speculation and fixed lengths, by its median
    tree       the fastest fixed tree, where traces know siblings
    goodput    tokens/s against `best`, and the same by the simulator, in which the host takes no
               time and no row joins
    idle       share of a round in which the device waits for the host

`goodput` may grow trees as wide as the traces know; `chains` is it with `width: 1`.

Machines (bf16; seconds of a forward of n tokens, and of each cached position that it reads):

h200-8b   Llama 3.1 8B and 3.2 1B on an H200. Measured for the 8B (docs/benchmarks.md): 4.6 ms for
          one token, 6.9 for 64 rows, 9.2 for 64 rows of 4 tokens. The 1B by the roofline below.
h100-8b   the same pair on an H100 SXM: roofline of 3.35 TB/s and 989 TFLOP/s, of which it is taken
          to reach 80% and 70%, and 0.1 ms a forward.
h100-70b  Llama 3.1 70B and 8B on four of them, as if their memory and their rates added up.

Prints some rows a live batch, in three minutes each.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from common import Repeats, console, prepare, run, spread
from rich.table import Table

from pipeline.generate.loading import lasting
from specdec.policies.base import StopPolicy
from specdec.policies.costs import CostModel, CostTable
from specdec.policies.registry import make_policy
from specdec.simulate.replay import replay
from specdec.simulate.script import Script
from specdec.simulate.transcripts import Transcript, load_transcripts
from specdec.simulate.virtual import ForwardCosts, Steady, VirtualEngine

SIZES = sorted({round(1.15**i) for i in range(56)} | set(range(1, 65)))
"""Packed tokens of a table."""

LAPS = 60
"""Rows a slot at most, so that runs take the seconds that they may."""


class Machine(StrEnum):
    """A pair on a GPU; see above."""

    H200_8B = "h200-8b"
    H100_8B = "h100-8b"
    H100_70B = "h100-70b"


def roofline(
    parameters: float, position_bytes: float, bandwidth: float, peak: float = 989e12, gpus: int = 1
) -> ForwardCosts:
    """Costs of a bf16 model, by its parameters and the bytes of a cached position."""
    moved, done = 0.8 * gpus * bandwidth, 0.7 * gpus * peak
    seconds = [max(2 * parameters / moved, 2 * parameters * n / done) + 1e-4 for n in SIZES]
    return ForwardCosts(CostTable(SIZES, seconds), position_bytes / moved)


def costs_of(machine: Machine) -> tuple[ForwardCosts, ForwardCosts]:
    """Draft's and target's."""
    if machine is Machine.H100_70B:
        return (
            roofline(8.03e9, 131_072, 3.35e12, gpus=4),
            roofline(70.6e9, 327_680, 3.35e12, gpus=4),
        )
    if machine is Machine.H100_8B:
        return roofline(1.24e9, 32_768, 3.35e12), roofline(8.03e9, 131_072, 3.35e12)
    # Measured at 512 positions a row, which are in the figures for 64 rows: about 1.1 ms.
    tokens, seconds = [1, 64, 256, 1024], [4.6e-3, 5.8e-3, 8.1e-3, 25e-3]
    target = CostTable(SIZES, np.interp(SIZES, tokens, seconds).tolist())
    return roofline(1.24e9, 32_768, 4.2e12), ForwardCosts(target, 131_072 / 4e12)


def contenders(
    lengths: Sequence[str], width: int, make: Callable[[], CostModel]
) -> dict[str, Callable[[], StopPolicy]]:
    """Policies by name.

    Args:
        lengths: of `fixed`: `4`, or `4x2` for trees of that depth and width.
        width: choices that the traces know at each place.
        make: costs, for each `goodput` its own.
    """
    named: dict[str, Callable[[], StopPolicy]] = {"none": lambda: make_policy("none")}
    for length in lengths:
        k, _, w = length.partition("x")
        name = f"tree {length}" if w else f"fixed {k}"
        named[name] = lambda k=int(k), w=int(w or 1): make_policy("fixed", k=k, width=w)
    if width > 1:
        named["chains"] = lambda: make_policy("goodput", costs=make(), width=1)
    return named | {"goodput": lambda: make_policy("goodput", costs=make(), width=width)}


def virtual_gpu(
    traces: Annotated[Path, typer.Argument(help="traces that `simulate.py record` wrote")],
    machine: Annotated[Machine, typer.Option(help="whose costs; see above")] = Machine.H200_8B,
    live: Annotated[str, typer.Option(help="live batches, separated by commas")] = "1,4,16,64",
    lengths: Annotated[
        str, typer.Option(help="of `fixed`; 4x2: trees of that depth and width")
    ] = "1,2,3,4,5,6,8,3x2,4x2,6x2,4x3",
    repeats: Repeats = 3,
    seconds: Annotated[float, typer.Option(help="of the clock, for each run at most")] = 5.0,
) -> None:
    """Tokens per second of policies on a virtual GPU."""
    prepare(threads=1)
    transcripts, _ = load_transcripts(traces)
    width = transcripts[0].width
    asked = [each for each in lengths.split(",") if width > 1 or "x" not in each]
    table = Table("live", "policy", title=f"{machine}, {len(transcripts)} rows, {repeats} runs")
    for column in ("tokens/s", "/ best", "simulated", "idle"):
        table.add_column(column, justify="right")
    for rows in map(int, live.split(",")):
        known = partial(seen_by_policy, *costs_of(machine), transcripts, rows)
        policies = contenders(asked, width, known)
        ideal = {
            name: replay(transcripts, make(), known(), rows, steady=rows > 1).tokens_per_second
            for name, make in policies.items()
        }
        runs = race(transcripts, machine, policies, rows, repeats, seconds)
        rates = {name: statistics.median(r.tokens_per_second for r in runs[name]) for name in runs}
        best, tree = (
            max((name for name in runs if name.split()[0] in kinds), key=rates.get, default=None)
            for kinds in (("none", "fixed"), ("tree",))
        )
        assert best is not None, "`none` always runs"
        simulated = max(ideal[name] for name in ideal if name.split()[0] in ("none", "fixed"))
        for name in dict.fromkeys([best, tree, *(set(runs) & {"chains"}), "goodput"]):
            if name is None:
                continue
            each = zip(runs[name], runs[best], strict=True)
            table.add_row(
                str(rows),
                name,
                f"{rates[name]:.0f}",
                spread([r.tokens_per_second / b.tokens_per_second for r, b in each], digits=3),
                f"{ideal[name] / simulated:.3f}",
                f"{statistics.median(r.idle for r in runs[name]):.1%}",
            )
    console.print(table)


def race(
    transcripts: list[Transcript],
    machine: Machine,
    policies: dict[str, Callable[[], StopPolicy]],
    rows: int,
    repeats: int,
    seconds: float,
) -> dict[str, list[Steady]]:
    """Each policy's runs, in turns, on new engines."""
    script = Script(transcripts)
    runs: dict[str, list[Steady]] = {name: [] for name in policies}
    for turn in range(repeats):
        for name, make in policies.items():
            with lasting():  # as in an actor
                engine = VirtualEngine(script, *costs_of(machine), make(), rows)
                requests = script.requests(max(LAPS * rows, len(transcripts)))
            runs[name].append(engine.steady(requests, seconds))
            console.log(f"{turn + 1}/{repeats} {rows} live, {name}: {runs[name][-1]}")
    return runs


def seen_by_policy(
    draft: ForwardCosts, target: ForwardCosts, transcripts: list[Transcript], rows: int
) -> CostModel:
    """The device's costs at the transcripts' mean context, as a profile would find them."""
    context = sum(t.prompt_tokens + len(t.accepted) / 2 for t in transcripts) / len(transcripts)

    def table(costs: ForwardCosts) -> CostTable:
        seconds = [costs(n, round(context * rows)) for n in SIZES]
        return CostTable(SIZES, seconds)

    return CostModel(table(draft), table(target))


if __name__ == "__main__":
    run(__doc__, virtual_gpu)
