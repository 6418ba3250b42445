"""Any stop policy on recorded traces, under this machine's costs or stated ones.

    python benchmarks/simulate.py record traces.safetensors             # GSM8K, temperature 1
    python benchmarks/simulate.py record warm.safetensors --skip 100    # to learn from first
    python benchmarks/simulate.py replay traces.safetensors --warm warm.safetensors --costs paper

Prints SpecDec++'s axes (arXiv 2405.19715: verification rate, discard rate) and tokens per second
for every policy, the share of the clairvoyant bound at live batch 1, and how much `head` and
`goodput` win over the best fixed length, with a 95% bootstrap interval over prompts. The fixed
length is chosen in hindsight, in its favour.

Costs (`--costs`):

paper     0.022 s a draft step and 0.108 s a verification of any length, Llama-2-chat 7B and 70B at
          batch 1 (arXiv 2405.19715, §4).
gpu       an 8B target and a 1B draft in bf16 on one H100 SXM, from its data sheet: a forward takes
          the longer of reading the weights (3.35 TB/s) and computing 2 FLOPs per weight and token
          (989 TFLOP/s), both at 60%, and 0.3 ms more for launches. Keys and values are left out.
measured  profiled here, with `--target` and `--draft`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import typer
from engine import (
    DRAFT,
    PROMPTS,
    TARGET,
    Batches,
    Draft,
    Prompts,
    Rows,
    Target,
    Threads,
    load,
    prepare,
    read_prompts,
)
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from specdec.costs import CostModel, CostTable
from specdec.engine import Engine
from specdec.heads import load_head
from specdec.policies import make_policy
from specdec.request import Request, SamplingParams
from specdec.simulate import (
    Replay,
    Trace,
    clairvoyant_seconds,
    load_traces,
    replay,
    save_traces,
)
from specdec.stopping import StopPolicy
from specdec.tracing import record as record_traces

app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_show_locals=False)
console = Console(width=120)

Head = Annotated[Path | None, typer.Option(help="folder of a trained acceptance head")]
Precision = Annotated[str, typer.Option(help="fp32, int8wo or int8")]
RESAMPLES = 2000


@app.command()
def record(
    out: Path,
    target: Target = TARGET,
    draft: Draft = DRAFT,
    prompts: Prompts = PROMPTS,
    rows: Rows = 64,
    skip: Annotated[int, typer.Option(help="prompts to leave out at the beginning")] = 0,
    tokens: Annotated[int, typer.Option(help="most new tokens per prompt")] = 128,
    temperature: Annotated[float, typer.Option(help="0: greedy")] = 1.0,
    head: Head = None,
    precision: Precision = "fp32",
    threads: Threads = 0,
) -> None:
    """Let the target write, and record what the draft proposes along its texts."""
    prepare(threads)
    pair = load(target, draft, precision)
    ids = read_prompts(pair, prompts, skip + rows)[skip:]
    sampling = [SamplingParams(tokens, temperature, seed=i) for i in range(rows)]
    requests = [Request(str(i), p, s) for i, (p, s) in enumerate(zip(ids, sampling, strict=True))]
    engine = Engine(pair, policy=make_policy("none"), slots=16)
    with console.status("the target writes"):
        done = engine.generate(requests)
    texts = [(prompt, each.output_ids) for prompt, each in zip(ids, done, strict=True)]
    trained = load_head(head, pair) if head else None
    traces = [
        record_traces(pair, [text], [params], head=trained)[0]
        for text, params in track(
            zip(texts, sampling, strict=True), "recording", len(texts), console=console
        )
    ]
    save_traces(out, traces)
    accepted = np.concatenate([trace.accepted for trace in traces])
    console.print(f"{len(accepted):,} positions, {accepted.mean():.3f} accepted: {out}")


@app.command(name="replay")
def replay_(
    traces: Path,
    warm: Annotated[Path | None, typer.Option(help="traces to learn from first")] = None,
    costs: Annotated[Literal["paper", "gpu", "measured"], typer.Option()] = "paper",
    batches: Batches = "1",
    with_head: Annotated[bool, typer.Option(help="the traces have a head's signals")] = False,
    plot: Annotated[Path | None, typer.Option(help="PNG of the Pareto plot")] = None,
    target: Target = TARGET,
    draft: Draft = DRAFT,
    precision: Precision = "fp32",
    threads: Threads = 0,
) -> None:
    """Replay every policy and compare."""
    prepare(threads)
    recorded = load_traces(traces)
    before = load_traces(warm) if warm else []
    for batch in map(int, batches.split(",")):
        model = cost_model(costs, batch, target, draft, precision)
        compare(recorded, before, model, batch, with_head, plot)


def cost_model(name: str, slots: int, target: str, draft: str, precision: str) -> CostModel:
    """The costs called `name`; see the module's head."""
    if name == "paper":
        # V is flat for a batch of one; this many tokens are never reached.
        return CostModel(CostTable([1, 1000], [0.022, 0.022]), CostTable([1, 1000], [0.108, 0.108]))
    if name == "gpu":
        return CostModel(_roofline(1.24e9), _roofline(8.03e9))
    pair = load(target, draft, precision)
    assert pair.draft is not None
    return CostModel.profile(pair.target, pair.draft, slots, seconds=6)


def _roofline(weights: float) -> CostTable:
    tokens = [1 << i for i in range(14)]
    reading = 2 * weights / (0.6 * 3.35e12)
    return CostTable(
        tokens, [0.0003 + max(reading, 2 * weights * n / (0.6 * 989e12)) for n in tokens]
    )


def every_policy(costs: CostModel, with_head: bool) -> dict[str, StopPolicy]:
    """What is compared, by name."""
    policies: dict[str, StopPolicy] = {"none": make_policy("none")}
    for k in range(1, 15):
        policies[f"fixed {k}"] = make_policy("fixed", k=k)
    policies["heuristic"] = make_policy("heuristic", k=2)
    for threshold in (0.2, 0.4, 0.6):
        policies[f"confidence {threshold}"] = make_policy("confidence", threshold=threshold)
    for threshold in (0.2, 0.4, 0.6):
        policies[f"entropy {threshold}"] = make_policy("entropy", threshold=threshold)
    for h in (0.1, 0.3, 0.5, 0.7, 0.9):
        for estimator in ("confidence", "head") if with_head else ("confidence",):
            policies[f"head {h} ({estimator})"] = make_policy(
                "head", threshold=h, k_min=1, estimator=estimator, head=_recorded(estimator)
            )
    for estimator in ("confidence", "entropy", "head") if with_head else ("confidence", "entropy"):
        policies[f"goodput ({estimator})"] = make_policy(
            "goodput", estimator=estimator, head=_recorded(estimator), costs=copy.deepcopy(costs)
        )
    return policies


def _recorded(estimator: str) -> torch.nn.Module | None:
    """The head's signals come from the traces; a module only stands for its being there."""
    from specdec.acceptance import AcceptanceHead

    return AcceptanceHead(1, 0) if estimator == "head" else None


def compare(
    traces: Sequence[Trace],
    warm: Sequence[Trace],
    costs: CostModel,
    batch: int,
    with_head: bool,
    plot: Path | None,
) -> None:
    """Replay all policies at one live batch and print what they did."""
    results: dict[str, Replay] = {}
    for name, policy in every_policy(costs, with_head).items():
        if warm:
            replay(warm, policy, costs, slots=batch)
        results[name] = replay(traces, policy, costs, slots=batch)
    none = results["none"].tokens_per_second
    bound = None
    if batch == 1:
        bound = np.array([clairvoyant_seconds(trace, costs) for trace in traces])
    table = Table(
        "policy",
        "tokens/s",
        "speedup",
        "verification rate",
        "discard rate",
        "block efficiency",
        *(["share of bound"] if bound is not None else []),
        title=f"live batch {batch}",
    )
    for name, result in results.items():
        cells = [
            name,
            f"{result.tokens_per_second:.1f}",
            f"{result.tokens_per_second / none:.3f}",
            f"{result.verification_rate:.3f}",
            f"{result.discard_rate:.3f}",
            f"{result.counts.block_efficiency:.2f}",
        ]
        if bound is not None:
            cells.append(f"{bound.sum() / result.seconds:.1%}")
        table.add_row(*cells)
    console.print(table)
    fixed = [name for name in results if name == "none" or name.startswith("fixed")]
    best = max(fixed, key=lambda name: results[name].tokens_per_second)
    if bound is not None:
        tokens = results["none"].counts.committed
        console.print(f"clairvoyant bound: {tokens / bound.sum() / none:.3f} over none")
    for kind in ("head", "goodput"):
        for name in (n for n in results if n.startswith(f"{kind} ")):
            gain = results[name].tokens_per_second / results[best].tokens_per_second
            line = f"{name} over {best}: {gain - 1:+.1%}"
            if batch == 1:
                low, high = interval(results[best].row_seconds, results[name].row_seconds)
                line += f" (95% {low - 1:+.1%} to {high - 1:+.1%})"
            console.print(line)
    if plot:
        draw(results, plot, batch)


def interval(base: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """95% bootstrap interval over prompts of the ratio of two sums of seconds."""
    pairs: NDArray[np.float64] = np.array([base, other])
    generator = np.random.default_rng(0)
    chosen = generator.integers(pairs.shape[1], size=(RESAMPLES, pairs.shape[1]))
    ratios = pairs[0, chosen].sum(1) / pairs[1, chosen].sum(1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(low), float(high)


def draw(results: dict[str, Replay], path: Path, batch: int) -> None:
    """The Pareto plot: discard rate against verification rate, one line per kind of policy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    kinds: dict[str, list[Replay]] = {}
    for name, result in results.items():
        kind = name.split()[0] + (name[name.index("(") - 1 :] if "(" in name else "")
        kinds.setdefault(kind, []).append(result)
    for kind, points in kinds.items():
        rates = [(p.discard_rate, p.verification_rate) for p in points]
        axes.plot(*zip(*rates, strict=True), marker="o", markersize=4, label=kind)
    axes.set(
        xlabel="discarded candidates per output token",
        ylabel="target forwards per output token",
        title=f"Stop policies, live batch {batch} (lower left is better)",
    )
    axes.legend()
    figure.savefig(path, dpi=150)
    console.print(f"plot: {path}")


if __name__ == "__main__":
    app()
