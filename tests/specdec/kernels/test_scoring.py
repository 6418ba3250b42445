from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from specdec.kernels.scoring import Scoring
from tests.specdec.model.test_decoder import bench_of
from tests.specdec.tiny_models import tiny_model

LAYERS = ["sliding_attention", "full_attention"]
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt_oss": {
        "num_local_experts": 2,
        "num_experts_per_tok": 2,  # all, so that rounding cannot choose others
        "sliding_window": 12,
        "layer_types": LAYERS,
    },
    "gemma2": {
        "sliding_window": 12,
        "layer_types": LAYERS,
        "attn_logit_softcapping": 1.0,
        "final_logit_softcapping": 3.0,
    },
}
"""Sinks, and soft caps before and behind the softmax."""


HEADS = pytest.mark.parametrize("heads", [4, 8], ids=["kernels", "torch"])
"""Heads of 16 numbers, which the compiled kernels take, and of 8, which they do not."""


def model_of(family: str, heads: int) -> PreTrainedModel:
    """One whose sinks and caps matter: scores are not all near zero."""
    model = tiny_model(family, heads=heads, **FAMILIES[family])
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 8
        layer.self_attn.k_proj.weight.data *= 8
        if hasattr(layer.self_attn, "sinks"):
            layer.self_attn.sinks.data = torch.tensor([2.0, -1.0, 0.5, 3.0] * (heads // 4))
    return model


@pytest.mark.parametrize("invariant", [False, True], ids=["", "invariant"])
@pytest.mark.parametrize("family", FAMILIES)
@HEADS
def test_sinks_and_soft_caps_equal_plain(family: str, invariant: bool, heads: int) -> None:
    bench_of(model_of(family, heads), invariant=invariant).check_rollbacks()


@pytest.mark.parametrize("family", FAMILIES)
@HEADS
def test_half_precision_agrees_to_its_precision(family: str, heads: int) -> None:
    bench = bench_of(model_of(family, heads).to(torch.bfloat16))
    bench.check((0, 40), (1, 17), tolerance=0.5)
    bench.check((0, 3), (1, 1), tolerance=0.5)


def test_weights_with_a_sink_sum_to_less_than_one() -> None:
    scores = torch.zeros(1, 2, 1, 3)
    weights = Scoring(1.0, sinks=torch.tensor([0.0, float("-inf")])).weights(scores)
    torch.testing.assert_close(weights.sum(-1).flatten(), torch.tensor([0.75, 1.0]))


def test_a_cap_bounds_scores_and_leaves_small_ones() -> None:
    capped = Scoring(1.0, softcap=5.0).capped(torch.tensor([0.01, 100.0, -100.0]))
    torch.testing.assert_close(capped, torch.tensor([0.01, 5.0, -5.0]), rtol=1e-4, atol=1e-4)
