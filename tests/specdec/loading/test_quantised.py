"""Checkpoints that are stored quantised run as transformers runs them, and say what they need."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from specdec.loading import quantised
from specdec.loading.loader import stored_weights_dtype
from specdec.loading.quantised import HALF_ON_GPUS, PACKAGES, check_dtype
from specdec.loading.sources import PairError, find_model
from specdec.model.fused import FusedLayer
from specdec.model.linear import layer_for
from tests.specdec.engine.references import generate, largest_gap
from tests.specdec.loading import quantised_models as stored
from tests.specdec.loading.saved_models import complete, load, saved, set_config
from tests.specdec.tiny_models import noisy_copy, tiny_model

ROOT = Path(__file__).parents[3]
Store = Callable[[Path], Path]

KEPT: tuple[Store, ...] = (
    stored.gptq,
    stored.awq,
    stored.bitsandbytes_8bit,
    stored.bitsandbytes_nf4,
    stored.torchao_int8,
    stored.torchao_int8_activations,
    stored.compressed_int8,
    stored.compressed_fp8,
)
"""Whose layers stay quantised on a CPU."""

DEQUANTISED: tuple[Store, ...] = (
    stored.fp8_blocks,
    stored.fp8_tensors,
    stored.compressed_4bit,
    stored.gpt_oss_mxfp4,
)
"""Whose weights are plain numbers once they are loaded there."""


def store_or_skip(store: Store, folder: Path) -> Path:
    method = next((each for each in PACKAGES if store.__name__.startswith(each[:8])), "")
    for package in PACKAGES.get(method, ()):
        if find_spec(package) is None:
            pytest.skip(f"needs specbatch[{method}]")
    return store(folder)


@pytest.mark.parametrize("store", [*KEPT, *DEQUANTISED], ids=lambda store: store.__name__)
def test_a_quantised_model_completes_as_transformers_has_it(store: Store, tmp_path: Path) -> None:
    folder = store_or_skip(store, tmp_path / "target")
    family = "gpt_oss" if store is stored.gpt_oss_mxfp4 else "llama"
    draft = saved(tmp_path / "draft", noisy_copy(tiny_model(), 0.05)) if family == "llama" else None
    pair = load(folder, draft, dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu")
    prompt, output = (5, 17, 3, 3), complete(pair)
    if store is stored.torchao_int8_activations:
        # Rounding moves activations by whole steps: transformers' own logits of a text and of its
        # tokens one by one differ by 0.03, and on AVX2 there are two tokens 0.014 apart.
        assert largest_gap(model, prompt, output) < 0.05
    else:
        assert output == generate(model, prompt, 20)
    kinds = {type(module) for name, module in layers(pair) if name.endswith(("proj", "down"))}
    assert (layer_for(None, torch.float32) in kinds) == (store in DEQUANTISED)
    assert any(isinstance(module, FusedLayer) for _, module in layers(pair)) == (
        store in DEQUANTISED and family == "llama"
    )
    assert type(pair.target.model.get_output_embeddings()) is layer_for(None, torch.float32)


def layers(pair: Any) -> list[tuple[str, torch.nn.Module]]:
    return list(pair.target.model.named_modules())


@pytest.mark.parametrize("store", [stored.gptq, stored.awq], ids=lambda store: store.__name__)
def test_four_bits_are_the_numbers_that_they_stand_for(store: Store, tmp_path: Path) -> None:
    pair = load(store_or_skip(store, tmp_path / "target"), dtype="float32")
    model = stored.four_bit_weights(tiny_model())
    assert complete(pair) == generate(model, (5, 17, 3, 3), 20)


@pytest.mark.parametrize("store", KEPT, ids=lambda store: store.__name__)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"deterministic": True}, "deterministic: .* stay quantised by"),
        ({"quantization": "int8"}, "quantization int8: .* quantised already"),
    ],
    ids=["deterministic", "int8"],
)
def test_layers_that_stay_quantised_are_no_others_to_change(
    store: Store, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(PairError, match=message):
        load(store_or_skip(store, tmp_path / "target"), **options)


@pytest.mark.parametrize("store", DEQUANTISED, ids=lambda store: store.__name__)
def test_weights_that_are_plain_once_loaded_are_packed_and_deterministic(
    store: Store, tmp_path: Path
) -> None:
    folder = store_or_skip(store, tmp_path / "target")
    if store is stored.gpt_oss_mxfp4:
        with pytest.raises(PairError, match="deterministic"):  # its experts are no linear layers
            load(folder, deterministic=True)
        return
    for options in ({"deterministic": True}, {"deterministic": True, "quantization": "int8"}):
        pair = load(folder, **options)
        assert complete(pair, k=0) == complete(pair, k=3)


@pytest.mark.parametrize(
    ("quantization", "line"),
    [
        ({"quant_method": "compressed-tensors"}, r"needs compressed-tensors; .*'specbatch\[comp"),
        ({"quant_method": "gptq"}, r"needs gptqmodel and optimum; `pip install 'specbatch\[gptq"),
        ({"quant_method": "awq"}, r"needs gptqmodel; `pip install 'specbatch\[awq\]'`"),
        ({"load_in_8bit": True}, r"needs bitsandbytes; `pip install 'specbatch\[bitsandbytes\]'`"),
        ({"quant_method": "torchao"}, r"needs torchao; `pip install 'specbatch\[torchao\]'`"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_missing_package_is_named_with_the_extra_that_has_it(
    target: Path, quantization: dict[str, Any], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_config(target, quantization_config=quantization)
    monkeypatch.setattr(quantised, "find_spec", lambda _: None)
    with pytest.raises(PairError, match=rf"{target}: its weights are quantised by .*{line}"):
        load(target)


@pytest.mark.parametrize("method", sorted(HALF_ON_GPUS))
def test_float32_of_what_gpus_multiply_in_half_is_refused(target: Path, method: str) -> None:
    gpu = torch.device("cuda")
    with pytest.raises(PairError, match=f"{method}.*set dtype to bfloat16, float16 or auto"):
        check_dtype(str(target), method, torch.float32, gpu)
    check_dtype(str(target), method, torch.bfloat16, gpu)
    check_dtype(str(target), method, torch.float32, torch.device("cpu"))


def test_auto_is_half_precision_where_a_quantised_checkpoint_does_not_say(target: Path) -> None:
    set_config(target, dtype=None, quantization_config={"quant_method": "fp8"})
    assert stored_weights_dtype(find_model(str(target)), False) == torch.bfloat16
    set_config(target, dtype="float16")
    assert stored_weights_dtype(find_model(str(target)), False) == torch.float16


def test_every_extra_for_quantised_weights_is_there() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert PACKAGES.keys() <= project["optional-dependencies"].keys()
