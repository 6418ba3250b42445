"""Tiny models with layers whose state runs on, beside layers that attend."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from tests.specdec.tiny_models import tiny_model

MIXED = ["linear_attention", "full_attention", "linear_attention"]
DELTA: dict[str, Any] = {
    "layers": 3,
    "layer_types": MIXED,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
MAMBA2: dict[str, Any] = {
    "layers": 3,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 32,
}

RECURRENT: dict[str, dict[str, Any]] = {
    "qwen3_next": DELTA | EXPERTS,
    "qwen3_5_text": DELTA,
    "qwen3_5_moe_text": DELTA | EXPERTS,
    "olmo_hybrid": DELTA | {"linear_num_key_heads": 4},
    "lfm2": {"layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {
        "layers": 3,
        "layer_types": ["conv", "full_attention", "conv"],
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "num_dense_layers": 1,
    },
    "kimi_linear": {
        "layers": 3,
        "layer_types": MIXED,
        "kv_heads": 4,
        "linear_num_heads": 4,
        "linear_head_dim": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
    "granitemoehybrid": MAMBA2
    | {
        "layer_types": MIXED,
        "shared_intermediate_size": 64,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    },
    "falcon_h1": MAMBA2 | {"mamba_d_ssm": 128},
    "bamba": MAMBA2 | {"attn_layer_indices": [1]},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "mlp", "full_attention", "linear_attention"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 2,
        "chunk_size": 32,
    },
    "jamba": {
        "layers": 3,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
        "num_experts": 2,
        "num_experts_per_tok": 1,
    },
    "zamba": {
        "layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "kv_heads": 4,
        "mamba_d_state": 8,
        "n_mamba_heads": 2,
        "mamba_dt_rank": 8,
    },
    "zamba2": {
        "layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "kv_heads": 4,
        "mamba_d_state": 8,
        "n_mamba_heads": 8,
        "mamba_ngroups": 2,
        "chunk_size": 32,
    },
    "mamba": {"state_size": 8},
    "mamba2": {"num_heads": 8, "state_size": 8, "n_groups": 2, "chunk_size": 32},
}
"""Architectures and what makes them small."""


def recurrent_model(family: str, **options: Any) -> PreTrainedModel:
    """The tiny model of one of RECURRENT."""
    return tiny_model(family, **(RECURRENT[family] | options))
