from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import BloomConfig, MambaConfig, PreTrainedModel

from specdec.model.decoder import PackedDecoder
from specdec.model.linear import pack_linears
from specdec.model.stock import StockModel, UnsupportedModel, context_length
from tests.specdec.tiny_models import VOCAB, tiny_model

BEHIND_THE_HEAD: dict[str, dict[str, Any]] = {
    "gemma3_text": {"final_logit_softcapping": 3.0},
    "gemma4_text": {
        "final_logit_softcapping": 3.0,
        "layer_types": ["sliding_attention", "full_attention"],
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 8,
        "sliding_window": 12,
        "per_layer_config": {},
    },
    "nanochat": {"final_logit_softcapping": 3.0},
    "granite": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.3},
    "cohere2": {"logit_scale": 0.3, "layer_types": ["sliding_attention", "full_attention"]},
}
"""Families whose logits are not what their LM head gives."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", BEHIND_THE_HEAD)
@torch.inference_mode()
def test_logits_are_what_the_models_own_forward_gives(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, peak=60.0, **BEHIND_THE_HEAD[family]).to(dtype)
    decoder = PackedDecoder(copy.deepcopy(model))
    tokens = torch.randint(2, VOCAB, (40,), generator=torch.Generator().manual_seed(1))
    plain = model(input_ids=tokens[None], use_cache=False)
    hidden = decoder.forward(decoder.new_cache(1, 40), [(0, 40)], tokens)
    head_alone = decoder.model.get_output_embeddings()(hidden)
    packed, expected = (x.softmax(-1) for x in (decoder.logits(hidden).float(), plain.logits[0]))
    lacking = head_alone.float().softmax(-1)

    def variation(p: torch.Tensor) -> float:
        return float((p - expected.float()).abs().sum(-1).mean() / 2)

    assert variation(packed) < (1e-5 if dtype == torch.float32 else 0.03)
    assert variation(lacking) > 0.1  # so that what the test would see is there to be seen


def test_the_lm_head_runs_alone_where_nothing_follows_it() -> None:
    stock = StockModel(tiny_model("llama"))
    stock.find_what_follows_the_head(torch.randn(4, 64))
    stock.model.forward = None  # type: ignore[method-assign,assignment]
    assert stock.logits(torch.randn(3, 64)).shape == (3, VOCAB)


def test_linear_layers_that_are_packed_later_are_the_ones_that_run() -> None:
    model = tiny_model("cohere", logit_scale=0.3)
    decoder, hidden = PackedDecoder(model), torch.randn(5, 64)
    before = decoder.logits(hidden)
    pack_linears(model, "int8")
    after = decoder.logits(hidden)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, before, rtol=0.1, atol=0.1 * float(before.std()))


class Doubling(torch.nn.Linear):
    """An LM head that a model's `forward` uses otherwise than the check expects."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (2 if x.ndim == 2 else 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_another_distribution_is_refused_though_its_argmax_is_right(dtype: torch.dtype) -> None:
    model: PreTrainedModel = tiny_model("llama", peak=8.0)
    head = Doubling(64, VOCAB, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    stock = PackedDecoder(copy.deepcopy(model).to(dtype))  # its own forward is asked
    assert not stock._stock._only_head
    model.lm_head.__class__ = torch.nn.Linear
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StockModel, "logits", lambda self, hidden: self.head(hidden) * 1.5)
        with pytest.raises(UnsupportedModel, match="total variation"):
            PackedDecoder(model.to(dtype))


def test_a_config_that_does_not_say_its_context_is_refused_by_name() -> None:
    assert context_length(tiny_model("llama", context=77).config) == 77
    assert context_length(BloomConfig()) == 2048
    config = MambaConfig()
    with pytest.raises(UnsupportedModel, match="max_position_embeddings"):
        context_length(config)
