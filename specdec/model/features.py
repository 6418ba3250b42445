"""Hidden states of some layers, kept for a draft that reads them: its *features* of each token.

A token's feature is computed when the model computes the token. It lies in the token's page beside
its keys and values. So it is shared, copied, moved and forgotten with them, counts as their memory,
and is there for every token that the cache holds. Caches that keep none cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Features:
    """Which hidden states a cache keeps, and as what.

    Attributes:
        layers: the layers whose inputs they are, rising; 0: the embeddings.
        width: numbers of a token's feature.
        fuse: makes features [N, width] of these states side by side [N, layers * hidden].
    """

    layers: Sequence[int]
    width: int
    fuse: Callable[[Tensor], Tensor]


def readable_layers(decoder: Any) -> int:
    """How many layers of a transformers decoder run one after the other, each called once."""
    layers = getattr(decoder, "layers", None)
    return len(layers) if isinstance(layers, nn.ModuleList) else 0


@contextmanager
def collecting(decoder: Any, layers: Sequence[int], device: torch.device) -> Iterator[list[Tensor]]:
    """Within, each forward of a decoder adds the inputs [N, hidden] of some layers to a list.

    Args:
        decoder: with `readable_layers`.
        layers: rising.
        device: where the copies are.
    """
    states: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        states.append(hidden[0].to(device, copy=True))  # fused layers change theirs in place

    hooks = [
        decoder.layers[layer].register_forward_pre_hook(note, with_kwargs=True) for layer in layers
    ]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()
