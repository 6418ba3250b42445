"""Decoding steps against the machine's limit: a table and a plot.

    python benchmarks/roofline.py --plot roofline.png
    python benchmarks/roofline.py --precision int8 --batches 1,8,64 --contexts 128,1024

A step computes one token for each of B rows behind C cached positions. It cannot be faster than
reading all weights and the rows' keys and values once at the memory's bandwidth, nor than its
multiplications at the rate of a large product of the same precision; the limit is the longer of the
two. Both are measured here, with the same threads, bandwidth beside every step, since what a shared
machine grants differs from minute to minute. Weights are counted as they are stored: 4 bytes each
in fp32, 2 in bf16, 1 in int8; embeddings are not read as a whole.

Prints by rows and cached positions the milliseconds of a step and the share of the limit it
reaches. Some 2 minutes on two cores.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import CORES, TARGET, Batches, Target, console, run, seconds
from rich.table import Table
from torch import nn

from specdec.loading.pair import ModelPair
from specdec.model.decoder import PackedDecoder
from specdec.model.linear import layer_for

BYTES = {"fp32": 4, "bf16": 2, "int8": 1}
"""Of a stored weight, by precision."""
MOST_CACHE = 4e9
"""Bytes of keys and values; batches and contexts that need more are left out. Memory bounds it."""


def quickest(do: Callable[[], object], repeats: int = 7) -> float:
    """Seconds of the fastest of some calls: a limit is what the machine can do."""
    do()
    return min(seconds(do) for _ in range(repeats))


def bandwidth(numbers: torch.Tensor) -> float:
    """Bytes per second at which numbers far beyond the caches are read."""
    return numbers.numel() * 4 / quickest(numbers.sum)


def matmul_rate(precision: str) -> float:
    """Operations per second of a large matrix product in a precision."""
    n = 2048
    linear = nn.Linear(n, n, bias=False)
    if precision == "bf16":
        linear = linear.bfloat16()
    product = layer_for("int8", linear.weight.dtype)(linear) if precision == "int8" else linear
    x = torch.randn(n, n, dtype=linear.weight.dtype)
    with torch.inference_mode():
        return 2 * n**3 / quickest(lambda: product(x))


def linear_numbers(decoder: PackedDecoder) -> int:
    """How many weights the linear layers have, the LM head included."""
    return sum(
        module.weight.numel()
        for module in decoder.model.modules()
        if getattr(module, "weight", None) is not None
        and module.weight.ndim == 2
        and not isinstance(module, nn.Embedding)
    )


def step(decoder: PackedDecoder, batch: int, context: int, repeats: int) -> float:
    """Median seconds of a step."""
    cache = decoder.new_cache(batch, context + 1)
    rows = [(slot, 1) for slot in range(batch)]
    tokens = torch.arange(batch)

    def forward() -> None:
        cache.pretend(context)
        decoder.logits(decoder.forward(cache, rows, tokens))

    forward()
    return statistics.median(seconds(forward) for _ in range(repeats))


def draw(found: list[dict[str, Any]], title: str, path: Path) -> None:
    """Seconds of a step and their limit by batch, a panel for each context."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    contexts = sorted({each["context"] for each in found})
    figure, axes = plt.subplots(
        1, len(contexts), figsize=(3.2 * len(contexts), 3.4), sharey=True, squeeze=False
    )
    for axis, context in zip(axes[0], contexts, strict=True):
        here = [each for each in found if each["context"] == context]
        x = [each["batch"] for each in here]
        axis.plot(x, [1000 * each["seconds"] for each in here], "o-", label="measured")
        axis.plot(x, [1000 * each["memory"] for each in here], "--", label="memory's limit")
        axis.plot(x, [1000 * each["compute"] for each in here], ":", label="compute's limit")
        axis.set(xscale="log", yscale="log", title=f"{context} cached", xlabel="rows")
        axis.set_xticks(x, [str(each) for each in x])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("ms a step")
    axes[0][0].legend(fontsize=8)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(
    target: Target = TARGET,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or int8")] = "fp32",
    batches: Batches = "1,2,4,8,16,32,64",
    contexts: Annotated[str, typer.Option(help="cached positions of a row")] = "128,512,1024,4096",
    repeats: Annotated[int, typer.Option(help="steps that are timed")] = 7,
    threads: Annotated[int, typer.Option(help="CPU threads")] = CORES,
    plot: Annotated[Path | None, typer.Option(help="a PNG file to write")] = None,
) -> None:
    """Measure the machine, then steps, and print both."""
    torch.set_num_threads(threads)
    rate, large = matmul_rate(precision), torch.ones(1 << 27)
    console.print(f"{precision} products: {rate / 1e9:.0f} GFLOP/s")
    pair = ModelPair.load(
        target,
        dtype="bfloat16" if precision == "bf16" else "float32",
        quantization="int8" if precision == "int8" else None,
    )
    decoder = pair.target
    numbers = linear_numbers(decoder)
    position = decoder.new_cache(1, 1).bytes_per_position
    width = decoder.model.config.num_attention_heads * decoder.layout[0].key_dim
    layers = len(decoder.layout)
    table = Table(
        "rows", "cached", "ms a step", "tokens/s", "GB/s", "limit, ms", "by", "of the limit"
    )
    found: list[dict[str, Any]] = []
    for context in map(int, contexts.split(",")):
        for batch in map(int, batches.split(",")):
            if batch * context * position > MOST_CACHE:
                continue
            reads = bandwidth(large)
            taken = step(decoder, batch, context, repeats)
            memory = (numbers * BYTES[precision] + batch * context * position) / reads
            compute = batch * (2 * numbers + 4 * layers * width * context) / rate
            limit = max(memory, compute)
            found.append(
                {
                    "batch": batch,
                    "context": context,
                    "seconds": taken,
                    "memory": memory,
                    "compute": compute,
                }
            )
            table.add_row(
                str(batch),
                str(context),
                f"{1000 * taken:.1f}",
                f"{batch / taken:.0f}",
                f"{reads / 1e9:.0f}",
                f"{1000 * limit:.1f}",
                "memory" if memory > compute else "compute",
                f"{limit / taken:.0%}",
            )
    console.print(table)
    if plot:
        title = f"{Path(target).stem}, {precision}, {threads} threads"
        draw(found, title, plot)


if __name__ == "__main__":
    run(__doc__, main)
