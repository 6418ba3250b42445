"""Models that cannot be loaded: each is an error that says which and why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import RwkvConfig, RwkvForCausalLM

from specdec.loading.pair import ModelPair
from specdec.loading.sources import PairError
from tests.specdec.loading.saved_models import load, saved, set_config, tokenizer, without
from tests.specdec.tiny_models import VOCAB, tiny_model


def no_config(target: Path) -> None:
    (target / "config.json").unlink()


def pickled(target: Path) -> None:
    weights = load_file(target / "model.safetensors")
    torch.save(weights, target / "pytorch_model.bin")
    (target / "model.safetensors").unlink()


def no_weights(target: Path) -> None:
    (target / "model.safetensors").unlink()


def damaged_weights(target: Path) -> None:
    (target / "model.safetensors").write_bytes(b"not a tensor" * 100)


def damaged_config(target: Path) -> None:
    (target / "config.json").write_text("{")


def unknown_type(target: Path) -> None:
    set_config(target, model_type="llama_of_tomorrow")


def other_shapes(target: Path) -> None:
    set_config(target, intermediate_size=96)


def a_layer_more(target: Path) -> None:
    set_config(target, num_hidden_layers=3)


def no_tokenizer(target: Path) -> None:
    for file in target.glob("tokenizer*"):
        file.unlink()


def headless(target: Path) -> None:
    tokens = tokenizer()
    without(target, "lm_head.weight")
    tokens.save_pretrained(target)


DAMAGE: dict[Callable[[Path], None], str] = {
    no_config: "no config.json",
    pickled: "safetensors",
    no_weights: "safetensors",
    damaged_weights: "cannot be loaded",
    damaged_config: "cannot be loaded|no usable tokenizer",
    unknown_type: "llama_of_tomorrow",
    other_shapes: "shapes",
    a_layer_more: r"lack model\.layers\.2",
    no_tokenizer: "tokenizer",
    headless: "lm_head",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_model_is_an_error_that_names_it(
    target: Path, damage: Callable[[Path], None]
) -> None:
    damage(target)
    with pytest.raises(PairError, match=DAMAGE[damage]) as error:
        load(target)
    assert str(target) in str(error.value)


def test_a_recurrent_model_is_refused(tmp_path: Path) -> None:
    config = RwkvConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, context_length=64)
    folder = saved(tmp_path / "rwkv", RwkvForCausalLM(config))
    with pytest.raises(PairError, match="RwkvForCausalLM"):
        load(folder)


def test_a_sharing_draft_of_another_width_is_an_error(target: Path, tmp_path: Path) -> None:
    narrow = saved(tmp_path / "d", tiny_model(hidden=32, heads=4))
    with pytest.raises(PairError, match="hidden size is 32, the target's 64"):
        load(target, without(narrow, "embed_tokens.weight", "lm_head.weight"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda", "quantization": "int8"}, "CPUs only"),
        ({"device": "cuda", "deterministic": True}, "CPUs only"),
        ({"device": "cpu", "deterministic": True, "dtype": "bfloat16"}, "float32, not bfloat16"),
        ({"device": "cpu", "quantization": "int8wo", "dtype": "float16"}, "float32, not float16"),
    ],
    ids=str,
)
def test_precisions_that_do_not_go_together_are_refused_before_loading(
    options: dict[str, object], message: str
) -> None:
    with pytest.raises(PairError, match=message):
        ModelPair.load("/no/such/model", **options)  # type: ignore[arg-type]
