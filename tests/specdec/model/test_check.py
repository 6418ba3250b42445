from __future__ import annotations

import copy

import pytest
import torch

from specdec.model.check import GRID_CHECK, Reference, distance, full_precision
from specdec.model.stock import StockModel
from tests.specdec.tiny_models import VOCAB, tiny_model


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
    reference = Reference.of(StockModel(tiny_model("llama")), VOCAB, 1024, GRID_CHECK)
    right = reference.at([(0, 130), (1, 20)])
    assert torch.equal(right[0], reference.logits[0][-3])
    assert reference.difference(right, right) == ""
    assert reference.difference(right * float("nan"), right)


def test_flat_logits_are_spread_before_they_are_compared() -> None:
    a, b = torch.randn(4, VOCAB), torch.randn(4, VOCAB)
    assert distance(a * 1e-3, b * 1e-3)[0] == pytest.approx(distance(3 * a, 3 * b)[0], rel=0.1)
