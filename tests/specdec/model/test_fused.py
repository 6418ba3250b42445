from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from specdec.kernels.cpu import CpuKernels
from specdec.model import fused
from specdec.model.decoder import PackedDecoder
from specdec.model.fused import FusedLayer, fuse_layers
from specdec.model.linear import KernelLinear, Quantization, layer_for, pack_linears
from specdec.model.stock import UnsupportedModel
from specdec.model.trees import Tree
from tests.specdec.model.test_decoder import FAMILIES, FUSED
from tests.specdec.model.test_linear import FULL, HALF
from tests.specdec.tiny_models import VOCAB, tiny_model


def layers_of(decoder: PackedDecoder) -> list[nn.Module]:
    return list(decoder.model.base_model.layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_known_layers_are_fused_and_all_others_left_alone(family: str) -> None:
    model = tiny_model(family, **FAMILIES[family])
    before = [type(layer) for layer in model.base_model.layers]
    layers = layers_of(PackedDecoder(model, fuse=True))
    if family in FUSED:
        assert all(type(layer) is FusedLayer for layer in layers)
    else:
        assert [type(layer) for layer in layers] == before


def test_nothing_is_fused_unless_asked() -> None:
    layers = layers_of(PackedDecoder(tiny_model()))
    assert not any(isinstance(layer, FusedLayer) for layer in layers)


def test_weights_are_taken_over_not_kept_twice() -> None:
    model = tiny_model("qwen2")
    before = {p.data_ptr(): p.numel() for p in model.parameters()}
    fuse_layers(model.base_model)
    after = {p.data_ptr(): p.numel() for p in model.parameters()}
    assert sum(after.values()) == sum(before.values())


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("change", ["quantized projection", "bias on one of three", "hooks"])
def test_a_layer_that_is_not_quite_known_is_left_alone(family: str, change: str) -> None:
    model: Any = tiny_model(family)
    layer = model.base_model.layers[0]
    if change == "quantized projection":

        class Other(nn.Linear):
            pass

        projection = layer.self_attn.k_proj
        layer.self_attn.k_proj = Other(projection.in_features, projection.out_features)
    elif change == "bias on one of three":
        width = layer.self_attn.v_proj.out_features
        bias = layer.self_attn.v_proj.bias
        layer.self_attn.v_proj.bias = nn.Parameter(torch.zeros(width)) if bias is None else None
    else:
        layer._hf_hook = object()
    fuse_layers(model.base_model)
    assert not isinstance(model.base_model.layers[0], FusedLayer)
    assert isinstance(model.base_model.layers[1], FusedLayer)


@pytest.mark.parametrize("heads", [4, 8], ids=["kernels", "torch"])
def test_a_fused_layer_that_computes_something_else_is_refused(
    monkeypatch: pytest.MonkeyPatch, heads: int
) -> None:
    """As a release of transformers might change what a layer of this name computes."""
    model = tiny_model(heads=heads)
    PackedDecoder(copy.deepcopy(model), fuse=True)
    monkeypatch.setattr(fused, "_rotated", lambda heads, cos, sin: heads)
    monkeypatch.setattr(CpuKernels, "gate", lambda self, both: both.chunk(2, -1)[1])
    with pytest.raises(UnsupportedModel, match="differ from the plain forward"):
        PackedDecoder(model, fuse=True)


LAYERS_OF = [
    (family, kind, dtype)
    for family in FUSED
    for kind, dtype in ((None, FULL), ("int8", FULL), (None, HALF), ("int8", HALF))
    if issubclass(layer_for(kind, dtype), KernelLinear)
]
"""Layers that are one call here, by what their products are."""


@pytest.mark.skipif(not LAYERS_OF, reason="no AVX2 here, or no compiler")
@pytest.mark.parametrize(("family", "kind", "dtype"), LAYERS_OF, ids=str)
def test_a_layer_in_one_call_gives_the_bits_of_its_operators(
    family: str, kind: Quantization | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of several lengths, one behind the other's end, chains and trees."""
    model = tiny_model(family, **FAMILIES[family]).to(dtype)
    decoder = PackedDecoder(model, fuse=True)
    pack_linears(model, kind)
    calls = []
    whole_layer = CpuKernels.whole_layer
    monkeypatch.setattr(
        CpuKernels, "whole_layer", lambda *given: (calls.append(1), whole_layer(*given))
    )
    made, text = [], torch.randint(VOCAB, (60,), generator=torch.Generator().manual_seed(0))
    for whole in (True, False):
        if not whole:
            monkeypatch.setattr(FusedLayer, "_as_a_whole", lambda self: None)
            for layer in layers_of(decoder):
                layer._whole = None
        cache = decoder.new_cache(3, 128)
        forwards = [
            decoder.forward(cache, [(1, 40), (0, 3)], text[:43]),
            decoder.forward(cache, [(0, 5), (2, 1), (1, 2)], text[43:51]),
            decoder.forward(cache, [(0, 4), (1, 3)], text[51:58], [Tree(8, [-1, 0, 0, 1]), None]),
        ]
        made.append([hidden.clone() for hidden in forwards])
    assert len(calls) == 3 * len(layers_of(decoder))
    for one, other in zip(*made, strict=True):
        assert one.isfinite().all() and torch.equal(one, other)
