from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.model import attention, check, decoder, grid
from specdec.model.cache import KEY_BLOCK, SlotCache
from specdec.model.check import (
    CPU_CHECK,
    ProductsInFloat32,
    Reference,
    distance,
    full_precision,
    products_for,
)
from specdec.model.decoder import PackedDecoder
from specdec.model.stock import StockModel, UnsupportedModel
from tests.specdec.tiny_models import VOCAB, tiny_model

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@torch.inference_mode()
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "phimoe"])
def test_full_precision_is_the_same_weights_in_float32(family: str) -> None:
    model = tiny_model(family, peak=8.0).to(torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    tokens = torch.randint(2, VOCAB, (1, 50), generator=torch.Generator().manual_seed(0))
    with full_precision(model):
        widened = model(tokens, use_cache=False).logits
    exact = copy.deepcopy(model).float()(tokens, use_cache=False).logits
    half = model(tokens, use_cache=False).logits
    assert widened.dtype == torch.float32 and half.dtype == torch.bfloat16
    assert distance(widened[0], exact[0])[0] < 0.1 * distance(half[0], exact[0])[0]
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_weights_are_half_again_after_a_forward_that_failed() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    with pytest.raises(IndexError), full_precision(model):
        model(torch.tensor([[VOCAB + 3]]))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any(module._forward_pre_hooks for module in model.modules())


@torch.inference_mode()
def test_logits_that_are_no_numbers_differ() -> None:
    reference = Reference.of(StockModel(tiny_model("llama")), VOCAB, 1024, CPU_CHECK)
    right = reference.at([(0, 70), (1, 20)])
    assert torch.equal(right[0], reference.logits[0][-3])
    assert reference.difference(right, right) == ""
    assert reference.difference(right * float("nan"), right)


def test_flat_logits_are_spread_before_they_are_compared() -> None:
    a, b = torch.randn(4, VOCAB), torch.randn(4, VOCAB)
    assert distance(a * 1e-3, b * 1e-3)[0] == pytest.approx(distance(3 * a, 3 * b)[0], rel=0.1)


# ------------------------------------------------- what two short rows have to show of a fault


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SlotCache, "kernels", None)


@DTYPES
def test_a_fault_behind_the_first_block_of_queries_is_seen(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, blocks = attention.product_attention, list[int]()

    def wrong(query: Tensor, *others: Any) -> Tensor:
        blocks.append(query.shape[3])
        return right(query, *others) * (query.shape[3] == attention.QUERY_BLOCK)

    model = tiny_model("gemma2", attn_logit_softcapping=20.0).to(dtype)
    PackedDecoder(copy.deepcopy(model))
    monkeypatch.setattr(attention, "product_attention", wrong)
    with pytest.raises(UnsupportedModel, match="differ from the plain forward"):
        PackedDecoder(model)
    assert set(blocks) > {attention.QUERY_BLOCK}


@pytest.mark.usefixtures("without_kernels")
def test_a_fault_behind_the_first_block_of_keys_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = grid.invariant_attention

    def wrong(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, *others: Any) -> Tensor:
        near = (each[..., :KEY_BLOCK, :] for each in (keys, values))
        return right(query, *near, mask[..., :KEY_BLOCK], *others)

    PackedDecoder(tiny_model("llama"), invariant=True)
    monkeypatch.setattr(grid, "invariant_attention", wrong)
    with pytest.raises(UnsupportedModel, match="differ from the plain forward"):
        PackedDecoder(tiny_model("llama"), invariant=True)


@DTYPES
def test_a_fault_of_long_rows_alone_is_seen(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise is measured in the other row."""
    right = attention._long_row
    monkeypatch.setattr(attention, "_long_row", lambda *given: 0.5 * right(*given))
    with pytest.raises(UnsupportedModel, match="differ from the plain forward"):
        PackedDecoder(tiny_model("llama").to(dtype))


@DTYPES
@pytest.mark.parametrize("further", [-1, 1])
def test_a_window_that_is_wrong_by_one_is_seen(
    dtype: torch.dtype, further: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = decoder.layer_layouts

    def wrong(*stock: Any) -> Any:
        return tuple(
            type(each)(each.heads, each.key_dim, each.value_dim, (each.window or 0) + further)
            for each in found(*stock)
        )

    model = tiny_model("mistral", sliding_window=4096, context=8192, peak=60.0).to(dtype)
    PackedDecoder(copy.deepcopy(model))
    monkeypatch.setattr(decoder, "layer_layouts", wrong)
    with pytest.raises(UnsupportedModel, match="differ from the plain forward"):
        PackedDecoder(model)


@torch.inference_mode()
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt_oss"])
def test_one_row_tells_what_half_precision_costs(family: str) -> None:
    """Unless there are experts: then both rows do."""
    model = tiny_model(family).to(torch.bfloat16)
    reference = Reference.of(StockModel(model), VOCAB, 1024, CPU_CHECK)
    with full_precision(model):
        exact = torch.cat([check._tail(model, row) for row in reference.rows])
    mean, most = distance(torch.cat(reference.logits), exact)
    assert reference.noise[0] > 0.6 * mean and reference.noise[1] > 0.3 * most


# --------------------------------------------------------------- CPUs without half precision


HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


class Packed(Tensor):
    """Weights of a quantiser, which multiply with what they are given."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0].dtype if func is F.linear else super().__torch_function__(func, types, args)


@HALVES
def test_plain_layers_alone_multiply_in_float32(dtype: torch.dtype) -> None:
    x, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((3, 64), (8, 64), (8,)))
    wide = F.linear(x.float(), weight.float(), bias.float())
    with ProductsInFloat32():
        assert torch.equal(F.linear(x, weight, bias), wide.to(dtype))
        assert F.linear(x, weight.as_subclass(Packed), bias) == dtype
        assert torch.equal(F.linear(x.float(), weight.float(), bias.float()), wide)


@HALVES
@pytest.mark.parametrize("fuse", [False, True], ids=["stock", "fused"])
def test_a_fault_is_seen_on_cpus_without_half_precision(
    dtype: torch.dtype, fuse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "packable", lambda dtype: dtype == torch.float32)
    assert isinstance(products_for(dtype, torch.device("cpu")), ProductsInFloat32)
    assert not isinstance(products_for(torch.float32, torch.device("cpu")), ProductsInFloat32)
    model = tiny_model("qwen3", peak=8.0).to(dtype)
    PackedDecoder(copy.deepcopy(model), fuse=fuse)
    right = StockModel.logits
    with monkeypatch.context() as patch:
        patch.setattr(StockModel, "logits", lambda self, hidden: 1.5 * right(self, hidden))
        with pytest.raises(UnsupportedModel, match="differ from the plain forward"):
            PackedDecoder(copy.deepcopy(model), fuse=fuse)
    long_row = attention._long_row
    monkeypatch.setattr(attention, "_long_row", lambda *given: 0.5 * long_row(*given))
    with pytest.raises(UnsupportedModel, match="differ from the plain forward"):
        PackedDecoder(model, fuse=fuse)
