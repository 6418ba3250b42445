"""What layers cost whose state runs on: a forward of several tokens a row against one.

    python benchmarks/recurrent.py
    python benchmarks/recurrent.py --rows 1,16,64 --threads 2

A model of four layers (three gated delta nets, one that attends) of a 0.8B Qwen3.5's widths, random
and in float32, runs rows of 1 to 17 tokens behind 192 others, as in decoding and verification. Half
of what is replayed at most is replayed. *fold* is the same when a state is due to be moved on.

Beside it, what the delta rule of one such layer takes by itself, and of a tiny one: replaying
tokens in one chunk, as here, against going through them one by one and keeping the state behind
each. Prints tables of milliseconds by tokens a row; some 2 minutes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from common import CORES, Threads, console, prepare, run, seconds
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.qwen3_5.modeling_qwen3_5 import (
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)

from specdec.loading.heap import keep_freed_memory
from specdec.model.decoder import PackedDecoder
from specdec.model.linear import pack_linears

CONTEXT = 192
TOKENS = (1, 2, 3, 5, 9, 17)
HEADS, SIZE = 16, 128


def quickest(do: Callable[[], Any], repeats: int = 5) -> float:
    """Milliseconds of the fastest of some calls."""
    do()
    return min(seconds(do) for _ in range(repeats)) * 1e3


def hybrid() -> PackedDecoder:
    """The model, its linear layers packed as in a job."""
    config = AutoConfig.for_model(
        "qwen3_5_text",
        vocab_size=1000,
        hidden_size=1024,
        intermediate_size=3584,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=256,
        linear_num_value_heads=HEADS,
        linear_num_key_heads=HEADS,
        linear_key_head_dim=SIZE,
        linear_value_head_dim=SIZE,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    decoder = PackedDecoder(model)
    pack_linears(model, None)
    return decoder


def forwards(decoder: PackedDecoder, rows: int) -> Table:
    """Milliseconds of a forward by tokens a row."""
    cache = decoder.new_cache(rows, CONTEXT + 32)
    states = cache.states
    assert states is not None

    def forward(tokens: int, pending: int) -> float:
        ids = torch.zeros(rows * tokens, dtype=torch.int64)

        def once() -> None:
            cache.pretend(CONTEXT)
            states.kept = [CONTEXT - pending] * rows
            decoder.forward(cache, [(slot, tokens) for slot in range(rows)], ids)

        return quickest(once)

    table = Table(title=f"{rows} rows, {cache.bytes_per_slot / 1e6:.1f} MB of states each")
    for name in ("tokens a row", "ms", "of one", "fold"):
        table.add_column(name, justify="right")
    one = 0.0
    for tokens in TOKENS:
        usual = forward(tokens, min(states.reach // 2, states.reach - tokens))
        one = one or usual
        fold = forward(tokens, states.reach)
        table.add_row(str(tokens), f"{usual:.1f}", f"{usual / one:.2f}", f"{fold:.1f}")
    return table


def recurrence(rows: int, tokens: int, heads: int, size: int) -> tuple[float, float, float]:
    """Milliseconds of one layer's delta rule: in one chunk, one by one, keeping each state."""
    first = torch.randn(rows, heads, size, size)
    query, key, value = (torch.randn(rows, tokens, heads, size) for _ in range(3))
    g, beta = -torch.rand(rows, tokens, heads), torch.rand(rows, tokens, heads)
    kept = first.new_empty(rows, tokens, *first.shape[1:])

    def go_on(rule: Any, state: torch.Tensor, at: slice, **options: Any) -> torch.Tensor:
        parts = [each[:, at] for each in (query, key, value)]
        after: torch.Tensor = rule(
            *parts, g=g[:, at], beta=beta[:, at], initial_state=state, output_final_state=True,
            use_qk_l2norm_in_kernel=True, **options,
        )[1]  # fmt: skip
        return after

    def keep_each() -> None:
        state = first
        for t in range(tokens):
            kept[:, t] = state = go_on(torch_recurrent_gated_delta_rule, state, slice(t, t + 1))

    every = slice(tokens)
    chunk = quickest(lambda: go_on(torch_chunk_gated_delta_rule, first, every, chunk_size=tokens))
    steps = quickest(lambda: go_on(torch_recurrent_gated_delta_rule, first, every))
    return chunk, steps, quickest(keep_each)


def recurrences(rows: int, heads: int, size: int) -> Table:
    """The same by tokens a row."""
    table = Table(title=f"{rows} rows, one delta rule of {heads} heads of {size} x {size}")
    for name in ("tokens a row", "one chunk", "one by one", "keeping each state"):
        table.add_column(name, justify="right")
    for tokens in TOKENS:
        table.add_row(str(tokens), *(f"{ms:.2f}" for ms in recurrence(rows, tokens, heads, size)))
    return table


def recurrent(
    rows: Annotated[str, typer.Option(help="rows in a forward, separated by commas")] = "1,16",
    threads: Threads = CORES,
) -> None:
    prepare(threads)
    keep_freed_memory()
    decoder = hybrid()
    with torch.inference_mode():
        for each in map(int, rows.split(",")):
            console.print(recurrences(each, 4, 16))
            console.print(recurrences(each, HEADS, SIZE))
            console.print(forwards(decoder, each))


if __name__ == "__main__":
    run(__doc__, recurrent)
