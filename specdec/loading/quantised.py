"""Checkpoints whose weights are stored quantised: what they need, and what goes with them.

transformers loads them by the packages of their makers, which are extras of specbatch. Layers that
stay quantised run as those packages run them; whatever is plain once it is loaded runs as always.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from specdec.loading.sources import PairError
from specdec.model.linear import is_plain

PACKAGES: dict[str, tuple[str, ...]] = {
    "awq": ("gptqmodel",),
    "bitsandbytes": ("bitsandbytes",),
    "compressed-tensors": ("compressed_tensors",),
    "gptq": ("gptqmodel", "optimum"),
    "torchao": ("torchao",),
}
"""Python modules that a method of quantisation needs. The extra of specbatch has its name."""


def quantised_by(config: Any) -> str | None:
    """The method that a checkpoint's weights are quantised by, by its config; None if by none."""
    for part in (config, config.get_text_config()):
        stored = getattr(part, "quantization_config", None)
        if isinstance(stored, Mapping):
            if method := stored.get("quant_method"):
                return str(method)
            if stored.get("load_in_8bit") or stored.get("load_in_4bit"):
                return "bitsandbytes"
    return None


def check_packages(name: str, method: str) -> None:
    """Check that what a method needs is installed.

    Raises:
        PairError: a package is missing; the message says how to install it.
    """
    missing = [each for each in PACKAGES.get(method, ()) if importlib.util.find_spec(each) is None]
    if missing:
        packages = " and ".join(each.replace("_", "-") for each in missing)
        raise PairError(
            f"model {name}: its weights are quantised by {method}, which needs {packages}; "
            f"`pip install 'specbatch[{method}]'`"
        )
