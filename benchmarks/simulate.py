"""Stop policies over recorded acceptance, under costs that are measured or stated.

    python benchmarks/simulate.py record --out traces.safetensors         # both models, minutes
    python benchmarks/simulate.py record --out warm.safetensors --prompts .../gsm8k_train.parquet
    python benchmarks/simulate.py replay traces.safetensors --warm warm.safetensors --plot p.png
    python benchmarks/simulate.py replay traces.safetensors --costs gpu --live 64

The axes are those of SpecDec++ (arXiv 2405.19715, figure 1): verification rate, target forwards per
output token; discard rate, candidates drafted in vain per output token; tokens per second. The
bound is a clairvoyant policy's, which drafts what will be accepted and nothing else
(specdec/simulate/bound.py); with more than one live row it ignores that rows wait for each other.
Where traces know a draft's further choices, trees are replayed as well: `tree 4x2` is the policy
`fixed` with k 4 and width 2, and the bound is one with trees. "/ fixed" compares with chains.
Intervals are 95%, over prompts, paired (specdec/simulate/replay.py). The best fixed length is
chosen on the same prompts, which is in its favour.

Traces also know what would be looked up at each place (specdec/simulate/lookups.py), but for those
of EAGLE-3 drafts, which do not go on behind it. So `suffix` and `goodput` are replayed with that
source: without a draft ("no draft"), and with one behind it ("look-ups"). A second table has what
they took from where. What a look-up takes the host is left out, as is all that a policy takes; the
bound and the best fixed length know drafts only.

`record` writes traces, `replay` prints a table; each command's `--help` says how long it takes.

Cost models (`--costs`):

paper     0.022 s a draft step and 0.108 s a target forward, however many tokens: Llama-2-chat 7B
          and 70B at batch 1 (arXiv 2405.19715). No more is known of them, so `--live 1` only.
          `--step 0.05` has draft steps of a twentieth of a forward in place of theirs.
gpu       a stated roofline, no measurement: Llama 3.1 8B (8.03e9 parameters) with Llama 3.2 1B
          (1.24e9), bf16, on one H100 SXM with 3.35 TB/s and 989 dense TFLOP/s (its datasheet).
          seconds(n) = max(2 bytes x parameters / bandwidth, 2 FLOP x parameters x n / peak)
                       + live x 512 positions x key/value bytes a position / bandwidth + 0.3 ms,
          with 131,072 and 32,768 bytes a position (2 x layers x 8 heads x 128 or 64 numbers, bf16)
          and the 0.3 ms an assumption for launches, sampling and the host.
measured  both curves of a pair on this machine, now (`measure_costs`). goodput is given the same
          curves, better ones than the few seconds of profiling that an Engine allows.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
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
    console,
    interval,
    load,
    prepare,
    read_prompts,
    run,
)
from contenders import Contender, contenders, looking
from rich.progress import track
from rich.table import Table

from pipeline.generate.corpus import tokenizer_mark
from specdec.drafters.corpus import Corpus
from specdec.drafters.suffix import SuffixIndex
from specdec.engine.engine import Engine
from specdec.loading.head_files import load_head
from specdec.policies.costs import CostModel, CostTable
from specdec.policies.registry import make_policy
from specdec.request import Request, SamplingParams
from specdec.simulate.bound import least_seconds
from specdec.simulate.record import MOST, WIDTH, measure_costs, record, write_texts
from specdec.simulate.replay import Ratio, Replay, faster, replay
from specdec.simulate.transcripts import Text, Transcript, load_transcripts, save_transcripts

PLACES = ("in_prompt", "in_rows", "in_corpus")


class Costs(StrEnum):
    """Where D(n) and V(n) come from."""

    PAPER = "paper"
    GPU = "gpu"
    MEASURED = "measured"


# ------------------------------------------------------------------------ record


def record_command(
    out: Annotated[Path, typer.Option(help="the traces, safetensors")],
    target: Target = TARGET,
    draft: Draft = DRAFT,
    prompts: Prompts = PROMPTS,
    rows: Rows = 48,
    samples: Annotated[int, typer.Option(help="of each prompt")] = 1,
    tokens: Annotated[int, typer.Option(help="new tokens per prompt, at most")] = 96,
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 1.0,
    verification: Annotated[str, typer.Option(help="rejection or coupled")] = "rejection",
    head: Annotated[Path | None, typer.Option(help="a trained acceptance head")] = None,
    precision: Precision = "fp32",
    slots: Annotated[int, typer.Option(help="rows that the target completes at once")] = 16,
    corpus: Annotated[Path | None, typer.Option(help="of earlier jobs, from the cache")] = None,
    threads: Threads = 0,
) -> None:
    """Let the target complete prompts, and trace what a draft would have met on the way.

    Writes the traces, and prints how many positions they have and how many were accepted. Some 10
    minutes on two cores.
    """
    prepare(threads)
    pair = load(target, draft, precision)
    trained = load_head(head, pair) if head else None
    mode: Any = verification
    engine = Engine(pair, policy=make_policy("none"), verification=mode, slots=slots)
    requests = [
        Request(str(i), ids, SamplingParams(tokens, temperature, seed=i))
        for i, ids in enumerate(
            ids for ids in read_prompts(pair.tokenizer, prompts, rows) for _ in range(samples)
        )
    ]
    done = {
        completion.id: completion.output_ids
        for completion in track(
            write_texts(engine, requests), "completing", len(requests), console=console
        )
    }
    texts = [Text(request, done[request.id]) for request in requests]
    index = None
    if pair.draft is not None and not pair.draft.reads_features:
        index = SuffixIndex(Corpus(corpus, tokenizer_mark(pair.tokenizer)) if corpus else None)
    how: Any = {"head": trained, "most": MOST, "width": WIDTH, "lookup": index, "live": slots}
    traced = record(pair, texts, verification=mode, **how)
    traces = list(track(traced, "tracing", len(texts), console=console))
    about = {
        "pair": pair.describe(),
        "prompts": str(prompts),
        "temperature": temperature,
        "verification": verification,
        "head": str(head) if head else None,
        "corpus": str(corpus) if corpus else None,
    }
    save_transcripts(out, traces, about)
    ranks = np.concatenate([trace.ranks for trace in traces])
    among = ", ".join(f"{(ranks < width).mean():.1%}" for width in range(1, traces[0].width + 1))
    console.print(f"{out}: {len(traces)} rows, {len(ranks)} positions")
    console.print(f"accepted among the draft's first 1, 2, .. choices: {among}")
    if not (found := [trace.looked_up for trace in traces if trace.looked_up]):
        return
    there = np.concatenate([each.lengths > 0 for each in found])
    stood = np.concatenate([each.stood for each in found])
    console.print(
        f"something was looked up at {there.mean():.1%} of the positions; "
        f"of it {stood[there].mean():.2f} tokens stand in the mean"
    )


# ------------------------------------------------------------------------- costs


def gpu_costs(live: int) -> CostModel:
    """The stated roofline of this file's docstring, for `live` rows."""
    bandwidth, peak, context, host = 3.35e12, 989e12, 512, 0.3e-3
    counts = sorted({round(1.15**i) for i in range(70)} | set(range(1, 65)))

    def table(parameters: float, bytes_per_position: int) -> CostTable:
        weights = 2 * parameters / bandwidth
        rest = live * context * bytes_per_position / bandwidth + host
        return CostTable(counts, [max(weights, 2 * parameters * n / peak) + rest for n in counts])

    return CostModel(table(1.24e9, 32_768), table(8.03e9, 131_072))


def paper_costs(step: float | None) -> CostModel:
    """The paper's two numbers, for any number of tokens that a round at batch 1 may have.

    Args:
        step: a draft step's share of a target forward, in place of the paper's.
    """
    forward = 0.108
    drafting = 0.022 if step is None else step * forward
    return CostModel(CostTable([1, 4096], [drafting] * 2), CostTable([1, 4096], [forward] * 2))


def costs_maker(
    kind: Costs,
    live: int,
    step: float | None,
    prompt: int,
    target: str,
    draft: str,
    precision: str,
) -> Callable[[], CostModel]:
    """Makes equal cost models: the clock's, and one for each policy that refines its own."""
    if step is not None and kind is not Costs.PAPER:
        raise typer.BadParameter("--step is for --costs paper")
    if kind is Costs.PAPER:
        if live > 1:
            raise typer.BadParameter("the paper's costs are known for --live 1 only")
        return partial(paper_costs, step)
    if kind is Costs.GPU:
        return lambda: gpu_costs(live)
    pair = load(target, draft, precision)
    curves = measure_costs(pair, live, prompt, 20.0).points()
    console.print("measured (tokens, s):", curves, soft_wrap=True)
    return lambda: CostModel(
        *(CostTable(*zip(*curves[name], strict=True)) for name in ("draft", "verify"))
    )


# ------------------------------------------------------------------------ replay


def replayed(
    traces: list[Transcript],
    warm: list[Transcript],
    named: dict[str, Contender],
    clock: CostModel,
    live: int,
) -> dict[str, Replay]:
    """Replay every policy cold and, if it learns and there are traces to learn from, warm."""
    results = {}
    for name, each in track(named.items(), "replaying", console=console):
        play = partial(replay, costs=clock, live=live, draft=each.draft, lookup=each.lookup)
        results[name] = play(traces, each.make(), steady=live > 1)
        knows = bool(warm) and (not each.lookup or all(trace.looked_up for trace in warm))
        if knows and name.startswith(("threshold", "head", "goodput", "suffix")):
            policy = each.make()
            play(warm, policy)
            results[f"{name}, warm"] = play(traces, policy, steady=live > 1)
    return results


def by_source(result: Replay) -> dict[str, tuple[int, int]]:
    """Candidates accepted and verified, by where they came from."""
    found = {
        place: (
            getattr(result.stats, f"accepted_{place}"),
            getattr(result.stats, f"verified_{place}"),
        )
        for place in PLACES
    }
    counts = result.counts
    drafted = (
        counts.accepted - sum(stood for stood, _ in found.values()),
        counts.verified - sum(verified for _, verified in found.values()),
    )
    return {**found, "drafted": drafted}


def source_table(results: dict[str, Replay]) -> Table:
    """`by_source` of the policies that took what was looked up."""
    table = Table("policy", title="accepted / verified, by source")
    for place in (*PLACES, "drafted"):
        table.add_column(place.replace("_", " "), justify="right")
    for name, result in results.items():
        found = by_source(result)
        if any(verified for place, (_, verified) in found.items() if place in PLACES):
            table.add_row(name, *(f"{stood:,} / {n:,}" for stood, n in found.values()))
    return table


def replay_command(
    traces: Annotated[Path, typer.Argument(help="traces that `record` wrote")],
    warm: Annotated[Path | None, typer.Option(help="traces that estimators learn from")] = None,
    costs: Annotated[Costs, typer.Option(help="see above")] = Costs.PAPER,
    live: Annotated[int, typer.Option(help="rows side by side")] = 1,
    step: Annotated[float | None, typer.Option(help="see above: draft step / forward")] = None,
    plot: Annotated[Path | None, typer.Option(help="Pareto plot, PNG")] = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="all figures")] = None,
    target: Target = TARGET,
    draft: Draft = DRAFT,
    precision: Precision = "fp32",
    threads: Threads = 0,
) -> None:
    """Every policy over the same traces: SpecDec++'s axes, speed, share of the bound.

    Prints a row a policy. Some 3 minutes on two cores.
    """
    prepare(threads)
    loaded, about = load_transcripts(traces)
    prompt = sum(trace.prompt_tokens for trace in loaded) // len(loaded)
    make = costs_maker(costs, live, step, prompt, target, draft, precision)
    trained = bool(about["head"])
    warming = load_transcripts(warm)[0] if warm else []
    named = contenders(trained, loaded[0].width, make)
    if looked_up := all(trace.looked_up for trace in loaded):
        named |= looking(make, live)
    results = replayed(loaded, warming, named, make(), live)
    tokens = sum(len(trace.accepted) - trace.first for trace in loaded)
    bounds = {
        w: tokens / float(least_seconds(loaded, make(), live, w).sum())
        for w in sorted({1, loaded[0].width})
    }
    bound = max(bounds.values())
    fixed = max(
        (name for name in results if name.startswith("fixed")),
        key=lambda name: results[name].tokens_per_second,
    )
    table = Table("policy", title=f"{len(loaded)} rows, {costs} costs, {live} live")
    for column in (
        "verification rate",
        "discard rate",
        "acceptance",
        "tokens/s",
        "/ none",
        f"/ {fixed}",
        "of bound",
    ):
        table.add_column(column, justify="right")
    figures = {}
    for name, result in results.items():
        against = faster(results[fixed], result)
        figures[name] = describe(result, results["none"], against, bound)
        rate = result.counts.acceptance_rate
        table.add_row(
            name,
            f"{result.verification_rate:.3f}",
            f"{result.discard_rate:.3f}",
            "-" if rate is None else f"{rate:.2f}",
            f"{result.tokens_per_second:.2f}",
            f"{figures[name]['speedup']:.3f}",
            interval(against.value, against.low, against.high, digits=3),
            f"{figures[name]['share_of_bound']:.1%}",
        )
    note = "" if live == 1 else " (ignores that rows wait for each other)"
    console.print(table)
    if looked_up:
        console.print(source_table(results))
    for w, reached in bounds.items():
        speedup = reached / results["none"].tokens_per_second
        console.print(
            f"clairvoyant bound, width {w}: {reached:.2f} tokens/s, {speedup:.3f} / none{note}"
        )
    if as_json:
        as_json.write_text(json.dumps({"about": about, "bound": bound, "policies": figures}))
    if plot:
        draw(results, plot, f"{costs} costs, {live} live")


def describe(result: Replay, none: Replay, against: Ratio, bound: float) -> dict[str, Any]:
    """One policy's figures."""
    return {
        "verification_rate": result.verification_rate,
        "discard_rate": result.discard_rate,
        "tokens_per_second": result.tokens_per_second,
        "speedup": result.tokens_per_second / none.tokens_per_second,
        "against_best_fixed": [against.value, against.low, against.high],
        "share_of_bound": result.tokens_per_second / bound,
        "accepted_and_verified": by_source(result),
    }


def draw(results: dict[str, Replay], path: Path, title: str) -> None:
    """Discard rate against verification rate; towards the lower left is better."""
    from matplotlib.figure import Figure  # the Agg canvas: no window system is asked for

    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.subplots()
    families: dict[str, list[tuple[float, float, str]]] = {}
    for name, result in results.items():
        if name != "none":
            family = name.split()[0].rstrip(",") + (", warm" if name.endswith("warm") else "")
            label = name.removesuffix(", warm").split()[-1]
            point = (result.verification_rate, result.discard_rate, label)
            families.setdefault(family, []).append(point)
    for family, points in families.items():
        style = "o-" if family == "fixed" else "s--" if len(points) > 2 else "*"
        size = 12 if style == "*" else 4
        x, y, labels = zip(*points, strict=True)
        axes.plot(x, y, style, markersize=size, label=family)
        for at in zip(x, y, labels, strict=True):
            axes.annotate(at[2], at[:2], fontsize=6, textcoords="offset points", xytext=(3, 3))
    axes.set(xlabel="verification rate", ylabel="discard rate", title=title)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=130)
    console.print(f"plot: {path}")


if __name__ == "__main__":
    run(__doc__, record_command, replay_command)
