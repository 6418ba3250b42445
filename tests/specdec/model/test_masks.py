from __future__ import annotations

from typing import Any

import pytest
import torch

from specdec.model import decoder
from specdec.model.cache import LayerLayout
from specdec.model.decoder import PackedDecoder
from specdec.model.masks import SHORT, short_windows
from specdec.model.stock import UnsupportedModel
from tests.specdec.model.test_decoder import bench_of
from tests.specdec.tiny_models import tiny_model

WINDOW = 12
ONLY_IN_THE_MASK: dict[str, dict[str, Any]] = {
    "phimoe": {"sliding_window": WINDOW, "num_local_experts": 2},
    "qwen2_moe": {
        "sliding_window": WINDOW,
        "use_sliding_window": True,
        "max_window_layers": 1,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
}
"""Families whose attention layers are not told of the window that their masks have."""


@pytest.mark.parametrize("family", ONLY_IN_THE_MASK)
def test_a_window_that_only_the_mask_has_is_kept(family: str) -> None:
    bench = bench_of(tiny_model(family, **ONLY_IN_THE_MASK[family]))
    assert WINDOW in {layer.window for layer in bench.decoder.layout}
    bench.check((0, 40), (1, 20))
    bench.check((0, 2), (1, 30))


def test_attention_in_chunks_equals_plain() -> None:
    layers = ["chunked_attention", "full_attention"]
    model = tiny_model(
        "llama4_text", layer_types=layers, attention_chunk_size=12, intermediate_size_mlp=64
    )
    bench = bench_of(model)
    assert [(layer.window, layer.chunked) for layer in bench.decoder.layout] == [
        (12, True), (None, False),
    ]  # fmt: skip
    bench.check((0, 40), (1, 11))
    bench.check((0, 9), (1, 2), (2, 26))


def test_a_mask_that_is_neither_a_window_nor_chunks_is_refused() -> None:
    model = tiny_model("llama")
    model.config.is_causal = False
    with pytest.raises(UnsupportedModel, match="mask"):
        PackedDecoder(model)


def test_layers_that_run_more_than_once_are_refused() -> None:
    """In half precision the check of logits takes their difference for rounding."""
    with pytest.raises(UnsupportedModel, match="more than once"):
        PackedDecoder(tiny_model("hrm_text").to(torch.bfloat16))


@pytest.mark.parametrize("fuse", [False, True], ids=["stock", "fused"])
def test_a_window_that_no_layer_uses_is_ignored(fuse: bool) -> None:
    """Some checkpoints of Llama carry a `sliding_window` that transformers' Llama never reads."""
    bench = bench_of(tiny_model("llama", sliding_window=WINDOW), fuse=fuse)
    assert {layer.window for layer in bench.decoder.layout} == {None}
    bench.check((0, 40), (1, 3))


def test_windows_are_short_while_a_model_is_checked_and_right_afterwards() -> None:
    decoder = PackedDecoder(tiny_model("mistral", sliding_window=200))
    assert [layer.window for layer in decoder.layout] == [200, 200]
    assert decoder.model.config.sliding_window == 200
    with pytest.raises(KeyError), short_windows(decoder.model.config):
        assert decoder.model.config.sliding_window == SHORT
        raise KeyError
    assert decoder.model.config.sliding_window == 200


def test_a_window_longer_than_the_context_hides_nothing() -> None:
    bench = bench_of(tiny_model("mistral", context=64, sliding_window=100))
    bench.check((0, 60), (1, 20))


@torch.inference_mode()
def test_a_window_that_is_lost_is_seen_by_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    found = decoder.layer_layouts
    monkeypatch.setattr(
        decoder,
        "layer_layouts",
        lambda *stock: tuple(LayerLayout(*each[:3]) for each in map(_numbers, found(*stock))),
    )
    with pytest.raises(UnsupportedModel, match="differ from the plain forward"):
        PackedDecoder(tiny_model("mistral", sliding_window=4096, context=8192))


def _numbers(layout: Any) -> tuple[int, int, int]:
    return layout.heads, layout.key_dim, layout.value_dim
