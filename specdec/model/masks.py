"""How far each layer looks back, from the masks that transformers itself builds for it.

A config may have a window that no layer uses, and a layer a window that only its mask has. So the
model runs once over a few tokens under an attention of ours that looks at the masks only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from specdec.model.cache import LayerLayout
from specdec.model.stock import StockModel, UnsupportedModel, context_length

PROBE = "specbatch_probe"
"""The name under which transformers knows the attention and the mask that look."""

SHORT = 8
"""What windows become while a model is checked, so that a short text is longer than they are."""

WINDOWS = ("sliding_window", "attention_chunk_size")
"""Where configs have the numbers from which transformers builds masks."""

NOTHING = LayerLayout(0, 0, 0)
"""That of a layer that attends to nothing."""


def layer_layouts(stock: StockModel, mixes: bool = False) -> tuple[LayerLayout, ...]:
    """What each layer caches, and how far it looks back.

    Args:
        stock: its layers are transformers' own; its attention implementation is changed.
        mixes: whether there are layers that keep a state in place of keys and values.

    Raises:
        UnsupportedModel: a layer attends to something else than what came before.
    """
    probe: dict[int, LayerLayout] = {}
    stock.set_attention(PROBE)
    tokens = torch.arange(4, device=stock.model.get_input_embeddings().weight.device)
    stock.run(tokens, tokens, _probe_attention, probe)
    if not mixes and not probe:
        raise UnsupportedModel("its layers do not take their attention from AttentionInterface")
    if not mixes and sorted(probe) != list(range(len(probe))):
        raise UnsupportedModel(f"only its layers {sorted(probe)} attend; others keep another state")
    return tuple(probe.get(i, NOTHING) for i in range(max(probe, default=-1) + 1))


@contextmanager
def short_windows(config: Any) -> Iterator[None]:
    """Within, a model's masks have windows of at most SHORT tokens."""
    text = config.get_text_config()
    before = {name: getattr(text, name, None) for name in WINDOWS}
    try:
        for name, window in before.items():
            if window:
                setattr(text, name, min(window, SHORT))
        yield
    finally:
        for name, window in before.items():
            if window:
                setattr(text, name, window)


def _probe_mask(
    *,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any],
    device: torch.device,
    config: Any,
    local_size: int | None = None,
    **_: object,
) -> Tensor:
    """A mask [1, 1, q, kv] that knows its window, unless it is neither causal, a window nor chunks.

    Such a one is refused only if an attention layer gets it: decoders of encoders make some that
    they do not use.
    """
    last = context_length(config) - 1
    keys = torch.arange(last + 1, device=device)
    near = {q for n in (local_size or 1, SHORT) for q in (n - 1, n, n + 1, 2 * n)}
    queries = sorted({0, last // 2, last} | {q for q in near if q < last})
    places = [torch.tensor(query, device=device) for query in queries]
    seen = [mask_function(0, 0, place, keys) for place in places]
    mask = torch.ones(1, 1, q_length, kv_length, dtype=torch.bool, device=device)
    for chunked in (False, True):
        span = LayerLayout(0, 0, 0, local_size, chunked=chunked)
        if all(map(torch.equal, seen, (span.sees(place, keys) for place in places))):
            known = mask.as_subclass(_Mask)
            known.window, known.chunked = local_size, chunked
            return known
    return mask


class _Mask(Tensor):
    """A mask that knows how far a token may look back, and so do slices of it.

    Whatever else a model makes of it is a plain tensor: a mask that nobody here knows.
    """

    window: int | None
    chunked: bool

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out: Any = super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        if not isinstance(out, _Mask):
            return out
        if func is not Tensor.__getitem__:
            return out.as_subclass(Tensor)
        out.window, out.chunked = args[0].window, args[0].chunked
        return out


def _probe_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packing: dict[int, LayerLayout] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Note the shapes [1, H, N, D] that a layer caches and the window of its mask; attend to none.

    Raises:
        UnsupportedModel: packed attention would lack something that the layer needs.
    """
    if kwargs.get("position_bias") is not None:
        raise UnsupportedModel("its attention has a bias of positions, which specbatch has not")
    if packing is None:
        raise UnsupportedModel("it does not pass keyword arguments on to its attention layers")
    if attention_mask is not None and not isinstance(attention_mask, _Mask):
        raise UnsupportedModel("its attention has a mask of its own, neither causal nor a window")
    window = attention_mask.window if attention_mask is not None else kwargs.get("window")
    chunked = attention_mask is not None and attention_mask.chunked
    number: Any = module.layer_idx
    layer: int = len(packing) if number is None or number < 0 else number  # as `Packing.layer_of`
    if layer in packing:
        raise UnsupportedModel(
            "a forward runs its layers more than once; specbatch keeps one key of a token a layer"
        )
    sizes = key.shape[1], key.shape[3], value.shape[3]
    packing[layer] = LayerLayout(*sizes, window, chunked)
    return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None


AttentionInterface.register(PROBE, _probe_attention)
AttentionMaskInterface.register(PROBE, _probe_mask)
