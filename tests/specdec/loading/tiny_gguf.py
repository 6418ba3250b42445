"""A GGUF file of a tiny random Llama, stored as asked, written with the `gguf` package."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import gguf
import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

Stored = Literal["F32", "F16", "BF16", "Q8_0"]

WIDTH, LAYERS, HEADS = 64, 2, 4
LETTERS = sorted(ByteLevel.alphabet())
TOKENS = [*LETTERS, "th", "the", "<|endoftext|>"]


def write_gguf(file: Path, stored: Stored, seed: int = 0) -> Path:
    """Matrices in `stored`, norms in float32, as llama.cpp writes them."""
    kind = gguf.GGMLQuantizationType[stored]
    generator = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_vocab_size(len(TOKENS))
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(2 * WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(TOKENS)
    normal, control = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
    writer.add_token_types([normal] * (len(TOKENS) - 1) + [control])
    writer.add_token_merges(["t h", "th e"])
    writer.add_eos_token_id(len(TOKENS) - 1)

    def matrix(name: str, rows: int, columns: int, scale: float = 1.0) -> None:
        numbers = scale * generator.standard_normal((rows, columns)) / columns**0.5
        numbers = gguf.quants.quantize(numbers.astype(np.float32), kind)
        writer.add_tensor(f"{name}.weight", numbers, raw_dtype=kind)

    def norm(name: str) -> None:
        numbers = 1 + 0.1 * generator.standard_normal(WIDTH)
        writer.add_tensor(f"{name}.weight", numbers.astype(np.float32))

    matrix("token_embd", len(TOKENS), WIDTH)
    matrix("output", len(TOKENS), WIDTH, 30.0)
    norm("output_norm")
    for layer in (f"blk.{index}" for index in range(LAYERS)):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            matrix(f"{layer}.{name}", WIDTH, WIDTH)
        matrix(f"{layer}.ffn_gate", 2 * WIDTH, WIDTH)
        matrix(f"{layer}.ffn_up", 2 * WIDTH, WIDTH)
        matrix(f"{layer}.ffn_down", WIDTH, 2 * WIDTH)
        norm(f"{layer}.attn_norm")
        norm(f"{layer}.ffn_norm")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
