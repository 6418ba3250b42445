"""Tiny models on disk, quantised as people publish them: by the packages, or byte by byte."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.specdec.loading.saved_models import saved, set_config, tokenizer
from tests.specdec.tiny_models import tiny_model

GROUP = 32
"""Inputs that share a scale in 4-bit formats."""


def _stored(
    folder: Path, replace: Callable[[str, Tensor], dict[str, Tensor]], quantization: dict[str, Any]
) -> Path:
    """A model whose projections are stored as `replace` says, each given its name and weight."""
    saved(folder, tiny_model())
    weights: dict[str, Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if name.endswith("proj.weight"):
            weights |= replace(name.removesuffix(".weight"), weight)
        else:
            weights[name] = weight
    contiguous = {name: weight.contiguous() for name, weight in weights.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    set_config(folder, quantization_config=quantization)
    return folder


def fp8_blocks(folder: Path) -> Path:
    """As DeepSeek and Qwen publish: one scale for 128 x 128 numbers."""

    def replace(name: str, weight: Tensor) -> dict[str, Tensor]:
        scale = weight.abs().max() / 448
        return {
            f"{name}.weight": (weight / scale).to(torch.float8_e4m3fn),
            f"{name}.weight_scale_inv": scale.reshape(1, 1),
        }

    return _stored(folder, replace, {"quant_method": "fp8", "weight_block_size": [128, 128]})


def fp8_tensors(folder: Path) -> Path:
    """As Mistral publishes: one scale for all of a layer, activations by one that is stored."""

    def replace(name: str, weight: Tensor) -> dict[str, Tensor]:
        scale = weight.abs().max() / 448
        return {
            f"{name}.weight": (weight / scale).to(torch.float8_e4m3fn),
            f"{name}.weight_scale_inv": scale,
            f"{name}.activation_scale": torch.tensor(0.02),
        }

    quantization = {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"}
    return _stored(folder, replace, quantization)


def _four_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers 0 to 15 [in, out], 8 being zero, and scales [in / GROUP, out] of [out, in]."""
    grouped = weight.T.unflatten(0, (-1, GROUP))
    scales = (grouped.abs().amax(1) / 7).half()
    numbers = (grouped / scales[:, None].float()).round().clamp(-8, 7) + 8
    return numbers.flatten(0, 1).int(), scales


def _packed(numbers: Tensor, dim: int, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """int32 of eight 4-bit numbers that follow each other along a dimension, the first lowest."""
    eights = numbers.unflatten(dim, (-1, 8)).movedim(dim + 1, -1).long()
    words = sum(eights[..., at] << (4 * i) for i, at in enumerate(order))
    assert isinstance(words, Tensor)
    return words.to(torch.uint32).view(torch.int32)


def gptq(folder: Path) -> Path:
    def replace(name: str, weight: Tensor) -> dict[str, Tensor]:
        numbers, scales = _four_bits(weight)
        zeros = torch.full_like(scales, 7, dtype=torch.int32)  # the format's offset: 8 - 1
        return {
            f"{name}.qweight": _packed(numbers, 0),
            f"{name}.qzeros": _packed(zeros, 1),
            f"{name}.scales": scales,
            f"{name}.g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // GROUP,
        }

    quantization = {
        "quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True,
    }  # fmt: skip
    return _stored(folder, replace, quantization)


def awq(folder: Path) -> Path:
    order = (0, 2, 4, 6, 1, 3, 5, 7)

    def replace(name: str, weight: Tensor) -> dict[str, Tensor]:
        numbers, scales = _four_bits(weight)
        zeros = torch.full_like(scales, 8, dtype=torch.int32)
        return {
            f"{name}.qweight": _packed(numbers, 1, order),
            f"{name}.qzeros": _packed(zeros, 1, order),
            f"{name}.scales": scales,
        }

    quantization = {
        "quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True,
        "version": "gemm",
    }  # fmt: skip
    return _stored(folder, replace, quantization)


def four_bit_weights(model: Any) -> Any:
    """The plain model that `gptq` and `awq` store, its weights as they come out of four bits."""
    for name, weight in model.named_parameters():
        if name.endswith("proj.weight"):
            numbers, scales = _four_bits(weight.data)
            whole = (numbers.float() - 8) * scales.float().repeat_interleave(GROUP, 0)
            weight.data = whole.T.contiguous()
    return model


def _by_transformers(folder: Path, quantization: Any, **options: Any) -> Path:
    """A model that transformers quantised and saved."""
    plain = saved(folder.with_name(f"{folder.name}-plain"), tiny_model())
    model = AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=quantization, device_map="cpu", **options
    )
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def bitsandbytes_8bit(folder: Path) -> Path:
    from transformers import BitsAndBytesConfig

    return _by_transformers(folder, BitsAndBytesConfig(load_in_8bit=True))


def bitsandbytes_nf4(folder: Path) -> Path:
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    return _by_transformers(folder, quantization)


def torchao_int8(folder: Path) -> Path:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return _by_transformers(folder, TorchAoConfig(Int8WeightOnlyConfig()), dtype=torch.bfloat16)


def torchao_int8_activations(folder: Path) -> Path:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig
    from transformers import TorchAoConfig

    quantization = TorchAoConfig(Int8DynamicActivationInt8WeightConfig())
    return _by_transformers(folder, quantization, dtype=torch.bfloat16)


def compressed_4bit(folder: Path) -> Path:
    return _compressed(folder, "W4A16", "pack-quantized")


def compressed_int8(folder: Path) -> Path:
    return _compressed(folder, "W8A8", "int-quantized")


def compressed_fp8(folder: Path) -> Path:
    return _compressed(folder, "FP8_DYNAMIC", "float-quantized")


def _compressed(folder: Path, scheme: str, form: str) -> Path:
    """A model that compressed-tensors quantised by one of its schemes, without calibration."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationStatus,
        apply_quantization_config,
        preset_name_to_scheme,
    )

    model = tiny_model()
    preset = preset_name_to_scheme(scheme, ["Linear"])
    if preset.weights.group_size:
        preset.weights.group_size = GROUP
    config = QuantizationConfig(config_groups={"all": preset}, ignore=["lm_head"], format=form)
    apply_quantization_config(model, config)
    for module, low, high in _ranges(model):
        from compressed_tensors.quantization.utils import calculate_qparams

        scale, zero = calculate_qparams(low, high, module.quantization_scheme.weights)
        module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data.copy_(zero.reshape(module.weight_zero_point.shape))
        module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format=form)
    compressor.compress_model(model)
    saved(folder, model)
    compressor.update_config(str(folder))
    return folder


def _ranges(model: Any) -> Iterator[tuple[Any, Tensor, Tensor]]:
    """Each quantised layer with the least and the largest weight that each scale is for."""
    for module in model.modules():
        if (scheme := getattr(module, "quantization_scheme", None)) is not None:
            weight = module.weight.data
            grouped = weight.unflatten(1, (-1, scheme.weights.group_size or weight.shape[1]))
            yield module, grouped.amin(-1), grouped.amax(-1)


def gpt_oss_mxfp4(folder: Path) -> Path:
    """As OpenAI publishes: the experts in 4-bit floats, 32 of which share a power of two."""
    model = tiny_model(
        "gpt_oss", num_local_experts=4, num_experts_per_tok=2, sliding_window=12,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    saved(folder, model)
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if name.endswith(("gate_up_proj", "down_proj"))]:
        blocks, scales = _mxfp4(weights.pop(name).transpose(1, 2))
        weights |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    set_config(folder, quantization_config={"quant_method": "mxfp4"})
    return folder


FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
"""What the lower three bits of a 4-bit float mean; the highest is its sign."""


def _mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes [..., in / 32, 16] of two numbers each, the first lower, and exponents."""
    blocks = weight.unflatten(-1, (-1, 32))
    exponents = (blocks.abs().amax(-1) / 6).clamp(min=1e-30).log2().ceil()
    scaled = blocks / exponents.exp2()[..., None]
    nearest = (scaled.abs()[..., None] - FP4).abs().argmin(-1)
    codes = nearest + 8 * (scaled < 0)
    pairs = codes.unflatten(-1, (16, 2))
    return (pairs[..., 0] + 16 * pairs[..., 1]).to(torch.uint8), (exponents + 127).to(torch.uint8)


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config
