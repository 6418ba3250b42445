"""Batched, lossless speculative decoding on stock transformers decoders.

    pair = ModelPair.load(target, draft)
    engine = Engine(pair, policy=make_policy("goodput"))
    engine.generate([Request("a", prompt_ids, SamplingParams(temperature=0.7))])

This package knows torch and transformers, token ids and tensors. It knows nothing of Ray, files or
jobs. Its rooms, from the ground up: measure, kernels, model (one packed forward), lossless (why the
output is exact), policies (when to stop drafting), drafters (who proposes), engine (the loop),
loading, training, simulate.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specdec.engine.engine import Engine
    from specdec.loading.pair import ModelPair
    from specdec.policies.registry import make_policy
    from specdec.request import Request, SamplingParams

__all__ = ["Engine", "ModelPair", "Request", "SamplingParams", "make_policy"]

_HOMES = {
    "Engine": "specdec.engine.engine",
    "ModelPair": "specdec.loading.pair",
    "Request": "specdec.request",
    "SamplingParams": "specdec.request",
    "make_policy": "specdec.policies.registry",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for: torch takes seconds, which `specbatch --help` does not wait for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
