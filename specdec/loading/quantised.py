"""Checkpoints whose weights are stored quantised: what they need, and what goes with them.

transformers loads them by the packages of their makers, which are extras of specbatch. Layers that
stay quantised run as those packages run them; whatever is plain once it is loaded runs as always.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch

from specdec.loading.sources import PairError

PACKAGES: dict[str, tuple[str, ...]] = {
    "awq": ("gptqmodel",),
    "bitsandbytes": ("bitsandbytes",),
    "compressed-tensors": ("compressed_tensors",),
    "gptq": ("gptqmodel", "optimum"),
    "torchao": ("torchao",),
}
"""Python modules that a method of quantisation needs. The extra of specbatch has its name."""

HALF_ON_GPUS = {"awq", "fp8", "gptq"}
"""Methods whose kernels on GPUs give half precision."""


def quantised_by(config: Any) -> str | None:
    """The method that a checkpoint's weights are quantised by, by its config; None if by none."""
    for part in (config, config.get_text_config()):
        stored = getattr(part, "quantization_config", None)
        if stored is not None:
            stored = stored if isinstance(stored, Mapping) else stored.to_dict()
            if method := stored.get("quant_method"):
                return str(getattr(method, "value", method))
            if stored.get("load_in_8bit") or stored.get("load_in_4bit"):
                return "bitsandbytes"
    return None


def check_packages(name: str, method: str) -> None:
    """Check that what a method needs is installed.

    Raises:
        PairError: a package is missing; the message says how to install it.
    """
    missing = [each for each in PACKAGES.get(method, ()) if find_spec(each) is None]
    if missing:
        packages = " and ".join(each.replace("_", "-") for each in missing)
        raise PairError(
            f"model {name}: its weights are quantised by {method}, which needs {packages}; "
            f"`pip install 'specbatch[{method}]'`"
        )


def check_dtype(name: str, method: str, dtype: torch.dtype, device: torch.device) -> None:
    """Check that a method's kernels can give a dtype on a device.

    Raises:
        PairError: they cannot.
    """
    if method in HALF_ON_GPUS and device.type != "cpu" and dtype == torch.float32:
        raise PairError(
            f"model {name}: its weights are quantised by {method}, which gives half precision on a "
            "GPU; set dtype to bfloat16, float16 or auto, not float32"
        )


def how_to_load(config: Any, method: str) -> dict[str, Any]:
    """What `from_pretrained` is told besides, so that weights are plain where that is the same.

    compressed-tensors keeps no weight quantised once a model has run. Where it does not round
    activations either, the weights are expanded as they are loaded, and layers are plain.
    """
    if method != "compressed-tensors":
        return {}
    from transformers import CompressedTensorsConfig

    groups = config.quantization_config.get("config_groups") or {}
    rounds = any(
        group.get("input_activations") or group.get("output_activations")
        for group in groups.values()
    )
    return {} if rounds else {"quantization_config": CompressedTensorsConfig(dequantize=True)}


def decompress(model: Any) -> None:
    """Expand weights that compressed-tensors would expand in the first forward of the whole model.

    Packed forwards run its decoder alone. What the package wraps around each layer, in order to
    move weights, goes as well.
    """
    if hasattr(model, "ct_decompress_hook"):
        from compressed_tensors.offload import remove_dispatch

        model.hf_quantizer.compressor.decompress_model(model)
        remove_dispatch(model)
