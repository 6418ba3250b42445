"""Families whose attention or positions are not what transformers' interfaces say."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from specdec.model.decoder import PackedDecoder
from tests.specdec.model.test_decoder import bench_of
from tests.specdec.tiny_models import VOCAB, seeded, tiny_model

DECODER = {"is_decoder": True}
FAMILIES: dict[str, dict[str, Any]] = {
    "gptj": {"rotary_dim": 4},
    "openai-gpt": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 12},
    "roformer": DECODER | {"embedding_size": 32, "rotary_value": True},
    "xglm": {"d_model": 32, "attention_heads": 4, "num_layers": 2, "ffn_dim": 64},
    "bart": {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4},
    "mvp": {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "diffllama": {"num_key_value_heads": 2, "head_dim": 8},
    "roberta": DECODER | {"vocab_size": VOCAB + 1, "pad_token_id": VOCAB},  # never in a text
    "bloom": {"seq_length": 512},
    "bloom, six heads": {"seq_length": 512, "hidden_size": 48, "num_attention_heads": 6},
    "bloom, kernels": {"seq_length": 512, "hidden_size": 96, "num_attention_heads": 6},
    "mpt": {"max_seq_len": 512},
    "mpt, kernels": {"max_seq_len": 512, "hidden_size": 64},
    "falcon": {},
    "falcon, alibi": {"alibi": True},
    "falcon, alibi, kernels": {"alibi": True, "hidden_size": 64},
    "falcon, new": {"new_decoder_architecture": True, "num_kv_heads": 2},
}
"""One of each kind of adapter, and what sizes they need besides; `kernels` take these heads."""


def model_of(name: str) -> PreTrainedModel:
    """A random model whose attention is far from even."""
    family = name.partition(",")[0]
    config = AutoConfig.for_model(
        family,
        **{
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
            "tie_word_embeddings": False,
            **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
            **FAMILIES[name],
        },
    )
    model = seeded(AutoModelForCausalLM.from_config, config).eval().requires_grad_(False)
    draw = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.normal_(std=weight.shape[-1] ** -0.5, generator=draw)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_ragged_rows_and_rollbacks_equal_plain(name: str) -> None:
    bench_of(model_of(name)).check_rollbacks()


def test_a_bias_of_positions_is_the_same_in_any_batch() -> None:
    bench_of(model_of("bloom"), invariant=True).check_rollbacks()


@pytest.mark.parametrize("name", ["falcon, alibi", "falcon, alibi, kernels"])
def test_half_precision_agrees_to_its_precision(name: str) -> None:
    bench = bench_of(model_of(name).to(torch.bfloat16))
    bench.check((0, 40), (1, 17), tolerance=0.3)
    bench.check((0, 3), (1, 1), tolerance=0.3)


def test_a_copy_has_adapters_of_its_own() -> None:
    decoder = PackedDecoder(model_of("gptj"))
    copied = copy.deepcopy(decoder.model)
    for module, other in zip(decoder.model.modules(), copied.modules(), strict=True):
        method = vars(other).get("_attn")
        assert method is None or (method.__self__ is other and vars(module)["_attn"] != method)


def test_positions_that_begin_later_shorten_the_context() -> None:
    assert PackedDecoder(model_of("roberta")).context_length == 512 - VOCAB - 1


def test_a_key_and_value_for_several_queries_is_cached_once() -> None:
    decoder = PackedDecoder(model_of("falcon, new"))
    assert [layer.heads for layer in decoder.layout] == [2, 2]


FACTORS = {
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0],
}


def test_rows_end_where_longer_ones_have_other_angles(caplog: pytest.LogCaptureFixture) -> None:
    original = {"original_max_position_embeddings": 256}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **FACTORS, **original}
    bench = bench_of(tiny_model("phi3", context=1024, rope_parameters=rope, **original))
    assert bench.decoder.context_length == 256
    assert "256 of the model's 1024 positions" in caplog.text
    bench.check((0, 200), (1, 20))
    bench.check((0, 56), (1, 3))


def test_angles_that_change_beyond_the_context_do_not_end_rows() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    bench = bench_of(tiny_model("llama", context=256, rope_parameters=rope), fuse=True)
    assert bench.decoder.context_length == 256
    bench.check((0, 200), (1, 20))
    bench.check((0, 56), (1, 3))
