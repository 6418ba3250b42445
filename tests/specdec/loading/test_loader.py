"""Models that are loaded otherwise than as a folder of plain text-only weights."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from specdec.loading.sources import PairError
from tests.specdec.engine.references import generate
from tests.specdec.loading.saved_models import EOS, complete, load, saved
from tests.specdec.recurrent_models import recurrent_model
from tests.specdec.tiny_models import VOCAB, noisy_copy, seeded, tiny_model

TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "depth": 1,
    "num_heads": 2,
    "out_hidden_size": 64,
}
LAYERS = ["sliding_attention", "full_attention"]
WITH_IMAGES: dict[str, dict[str, Any]] = {
    "qwen3_vl": {"vision_config": VISION | {"deepstack_visual_indexes": []}},
    "qwen2_5_vl": {
        "vision_config": VISION | {"fullatt_block_indexes": [0]},
        "text_config": TEXT
        | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
    },
    "qwen3_5": {
        "vision_config": VISION | {"deepstack_visual_indexes": []},
        "text_config": TEXT
        | {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 16,
        },
    },
    "mistral3": {"vision_config": VISION | {"model_type": "pixtral"}},
    "gemma3": {
        "vision_config": VISION | {"model_type": "siglip_vision_model"},
        "text_config": TEXT | {"layer_types": LAYERS, "sliding_window": 12},
    },
    "gemma4": {
        "vision_config": VISION | {"head_dim": 16, "num_key_value_heads": 2},
        "audio_config": None,
        "text_config": TEXT
        | {
            "layer_types": LAYERS,
            "sliding_window": 12,
            "final_logit_softcapping": 3.0,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 8,
            "per_layer_config": {},
        },
    },
}


def with_images(family: str) -> PreTrainedModel:
    """A tiny model that takes images, too."""
    settings = WITH_IMAGES[family]
    text = settings.get("text_config", TEXT)
    config = AutoConfig.for_model(family, **settings | {"text_config": text})
    model: PreTrainedModel = seeded(AutoModelForImageTextToText.from_config, config)
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight * 30)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("family", WITH_IMAGES)
def test_the_text_part_of_a_model_with_images_completes_as_the_whole(
    family: str, tmp_path: Path
) -> None:
    model = with_images(family)
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
    pair = load(saved(tmp_path / family, model), saved(tmp_path / "draft", noisy_copy(model, 0.05)))
    assert pair.context_length == 256
    names = {name for name, _ in pair.target.model.named_parameters()}
    assert names and not any("vision" in name or "visual" in name for name in names)
    prompt = [5, 17, 3, 3]
    for _ in range(20):
        ids = torch.tensor([prompt])
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        prompt.append(int(logits[0, -1].argmax()))
    assert complete(pair) == tuple(prompt[4:])


@pytest.mark.parametrize("family", ["jamba", "mamba2"])
def test_layers_whose_state_runs_on_complete_with_packed_weights(
    family: str, tmp_path: Path
) -> None:
    model = recurrent_model(family)
    pair = load(saved(tmp_path / family, model), saved(tmp_path / "draft", noisy_copy(model, 0.05)))
    assert complete(pair) == generate(model, (5, 17, 3, 3), 20)
    with pytest.raises(PairError, match="cannot be deterministic"):
        load(tmp_path / family, deterministic=True)


def test_tokens_that_have_no_logits_are_a_warning(
    target: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = [f"w{i}" for i in range(EOS)]
    folder = saved(target, tiny_model(), [*words, "<image>"])
    with caplog.at_level(logging.WARNING):
        pair = load(folder)
    assert pair.vocab_size == VOCAB
    assert (
        f"the tokenizer has {VOCAB + 1} tokens, the target gives logits for {VOCAB}" in caplog.text
    )


def test_a_draft_that_lacks_tokens_of_the_target_is_refused(target: Path, tmp_path: Path) -> None:
    small = saved(tmp_path / "small", tiny_model(vocab=VOCAB - 1))
    with pytest.raises(PairError, match=f"share only {VOCAB - 1}"):
        load(target, small)


def test_a_model_of_a_kind_that_nobody_knows_is_an_error_that_names_it(target: Path) -> None:
    config = json.loads((target / "config.json").read_text()) | {"model_type": "no_such_model"}
    (target / "config.json").write_text(json.dumps(config))
    with pytest.raises(PairError, match=f"{target}.*no_such_model"):
        load(target)
