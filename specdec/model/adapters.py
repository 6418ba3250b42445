"""Attention layers that do not ask `AttentionInterface`, and position embeddings that count.

transformers has decoders whose attention computes its own softmax, and others that number the
tokens of a forward from 0. While a packed forward runs, a method of theirs is another one: it takes
the layer's own projections and gives queries, keys and values to packed attention. ADAPTERS says
which method of which class; `PackedDecoder` compares the result with the plain forward in any case.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionMaskInterface

from specdec.model.cache import round_to_blocks

ADAPTED = "specbatch_adapted"
"""The attention of a decoder whose layers have adapters, by which its masks are made: not at all.

One for N packed tokens would have N x N numbers, and no adapter reads it.
"""


class Forward(NamedTuple):
    """The packed forward that runs.

    Attributes:
        attention: what transformers would find in its AttentionInterface.
        packing: what this attention needs to know of the batch.
        positions: int64 [N], of the packed tokens.
        context: most positions that a row may have.
    """

    attention: Callable[..., tuple[Tensor, None]]
    packing: Any
    positions: Tensor
    context: int


_forward: ContextVar[Forward | None] = ContextVar("packed forward", default=None)


@contextmanager
def running(forward: Forward) -> Iterator[None]:
    """Within, the methods that `adapt` replaced run packed."""
    token = _forward.set(forward)
    try:
        yield
    finally:
        _forward.reset(token)


def adapt(decoder: nn.Module) -> bool:
    """Replace methods of the modules of a decoder that ADAPTERS knows, and of its positions.

    Returns:
        Whether its attention does not ask AttentionInterface.
    """
    attention, bypasses = 0, False
    for module in decoder.modules():
        known = ADAPTERS.get(_name(type(module)))
        if known is not None:
            if not isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = attention  # type: ignore[assignment]
            attention += 1
            bypasses = known[1] is not _passed_on
            _replace(module, *known)
        elif _counts_positions(module):
            _replace(module, "forward", _positions)
    return bypasses


def first_position(decoder: nn.Module) -> int:
    """The position that a model's first token has: not 0 in RoBERTa and its kin.

    They number tokens from behind the id of their padding, unless they are told positions.
    """
    for module in decoder.modules():
        if hasattr(module, "create_position_ids_from_input_ids"):
            padding: int = module.padding_idx  # type: ignore[assignment]
            return padding + 1
    return 0


def _name(kind: type) -> str:
    """As in ADAPTERS: code that comes with a checkpoint may have classes of the same names."""
    folder = kind.__module__.removeprefix("transformers.models.").partition(".")[0]
    return f"{folder}.{kind.__name__}"


def _replace(module: nn.Module, method: str, adapter: Callable[..., Any]) -> None:
    def either(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if _forward.get() is None:
            return getattr(type(self), method)(self, *args, **kwargs)
        return adapter(self, *args, **kwargs)

    # accelerate keeps what it replaced, and moves a layer's input to its device before it.
    name = "_old_forward" if method == "forward" and hasattr(module, "_hf_hook") else method
    setattr(module, name, MethodType(either, module))


def _running() -> Forward:
    forward = _forward.get()
    assert forward is not None
    return forward


def _counts_positions(module: nn.Module) -> bool:
    """Whether a module embeds positions that it numbers itself if it is given none."""
    if not isinstance(module, nn.Embedding) or type(module) is nn.Embedding:
        return False
    parameters = inspect.signature(type(module).forward).parameters
    return {"past_key_values_length", "position_ids"} <= parameters.keys()


def _positions(module: Any, *args: Any, **kwargs: Any) -> Any:
    kwargs["position_ids"] = _running().positions
    return type(module).forward(module, *args, **kwargs)


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """Attention of heads [1, H, N, D]: [1, N, H, D]."""
    forward = _running()
    out, _ = forward.attention(module, query, key, value, None, packing=forward.packing, **options)
    return out


def _split(projected: Tensor, heads: int) -> Tensor:
    """[1, H, N, D] of [1, N, H * D]."""
    return projected.view(*projected.shape[:-1], heads, -1).transpose(1, 2)


def _beside(module: Any, name: str) -> Any:
    """A function that is defined where the class of a module is."""
    return getattr(sys.modules[type(module).__module__], name)


def _passed_on(module: Any, *args: Any, **kwargs: Any) -> Any:
    """Layers that do ask AttentionInterface, in a decoder that tells them nothing."""
    return type(module).forward(module, *args, packing=_running().packing, **kwargs)


def _softmax(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Any:
    """A method that is given heads [1, H, N, D] and returns such (GPT-J, CodeGen, GPT-NeoX)."""
    return _attend(module, query, key, value).transpose(1, 2), None


def _softmax_gpt(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> list[Tensor]:
    scale = None if module.scale else 1.0
    out = _attend(module, query, key.transpose(-1, -2), value, scaling=scale)
    return [out.transpose(1, 2)]


def _softmax_gpt_neo(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Any:
    window = module.config.window_size if module.attention_type == "local" else None
    out = _attend(module, query, key, value, scaling=1.0, window=window)
    return out.transpose(1, 2), None


def _bert(
    module: Any, hidden_states: Tensor, *_: Any, sinusoidal_pos: Any = None, **__: Any
) -> Any:
    projections = module.query, module.key, module.value
    heads = [_split(each(hidden_states), module.num_attention_heads) for each in projections]
    if sinusoidal_pos is not None:  # RoFormer
        turning = 3 if module.rotary_value else 2
        turned = module.apply_rotary_position_embeddings(sinusoidal_pos, *heads[:turning])
        heads[:turning] = turned
    return _attend(module, *heads).flatten(2), None


def _bart(module: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
    projections = module.q_proj, module.k_proj, module.v_proj
    heads = [_split(each(hidden_states), module.num_heads) for each in projections]
    return module.out_proj(_attend(module, *heads).flatten(2)), None


def _bloom(module: Any, hidden_states: Tensor, residual: Tensor, *_: Any, **__: Any) -> Any:
    heads = module._reshape(module.query_key_value(hidden_states))
    bias = _alibi(
        _beside(module, "build_alibi_tensor"), module.num_heads, 1.0, *_place(hidden_states)
    )
    return module.dense(_attend(module, *heads, key_bias=bias).flatten(2)) + residual, None


def _mpt(module: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
    joined = module.Wqkv(hidden_states)
    if module.clip_qkv:
        joined = joined.clamp(min=-module.clip_qkv, max=module.clip_qkv)
    heads = [_split(each, module.n_heads) for each in joined.chunk(3, -1)]
    bias = _mpt_alibi(
        _beside(module, "build_mpt_alibi_tensor"), module.n_heads, *_place(hidden_states)
    )
    out = _attend(module, *heads, scaling=module.softmax_scale, key_bias=bias)
    return module.out_proj(out.flatten(2)), None


def _falcon(
    module: Any,
    hidden_states: Tensor,
    alibi: Any = None,
    *_: Any,
    position_embeddings: Any,
    **__: Any,
) -> Any:
    split = module._split_heads(module.query_key_value(hidden_states))
    query, key, value = (each.transpose(1, 2) for each in split)
    if module.new_decoder_architecture:  # which repeats each key and value for the queries of it
        group = module.num_heads // module.num_kv_heads
        key, value = key[:, ::group], value[:, ::group]
    bias = None
    if alibi is None:
        query, key = _beside(module, "apply_rotary_pos_emb")(query, key, *position_embeddings)
    else:
        build, scale = _beside(module, "build_alibi_tensor"), module.inv_norm_factor
        bias = _alibi(build, module.num_heads, scale, *_place(hidden_states))
    return module.dense(_attend(module, query, key, value, key_bias=bias).flatten(2)), None


def _diffllama(
    module: Any, hidden_states: Tensor, position_embeddings: Any, *_: Any, **__: Any
) -> Any:
    """Which attends twice with the same weights: here once, to both halves of the values."""
    projections = module.q_proj, module.k_proj, module.v_proj
    query, key, value = (
        each(hidden_states).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
        for each in projections
    )
    query, key = _beside(module, "apply_rotary_pos_emb")(query, key, *position_embeddings)
    value = torch.cat([half.repeat(1, 2, 1, 1) for half in value.chunk(2, 1)], -1)
    first, second = _attend(module, query, key, value).chunk(2, 2)
    more, less = (
        torch.exp(torch.sum(q * k, -1, dtype=torch.float32)).to(hidden_states.dtype)
        for q, k in ((module.lambda_q1, module.lambda_k1), (module.lambda_q2, module.lambda_k2))
    )
    mixed = module.groupnorm(first - (more - less + module.lambda_init) * second)
    return module.o_proj(((1 - module.lambda_init) * mixed).flatten(2)), None


def _place(hidden_states: Tensor) -> tuple[int, torch.device]:
    """For how many positions and where a bias is needed."""
    return round_to_blocks(_running().context), hidden_states.device


# Layers share these, so that masks with them are made once a forward. Recorded forwards hold their
# addresses: none may go.
@functools.cache
def _alibi(build: Any, heads: int, scale: float, positions: int, device: torch.device) -> Tensor:
    """What BLOOM and Falcon add to scores [H, P]: as they round it, which Falcon does."""
    ones = torch.ones(1, positions, dtype=torch.int64, device=device)
    bias: Tensor = build(ones, heads, torch.float32)[:, 0] * scale
    return bias


@functools.cache
def _mpt_alibi(build: Any, heads: int, positions: int, device: torch.device) -> Tensor:
    bias: Tensor = build(heads, positions, device=device)[:, 0]
    return bias


ADAPTERS: dict[str, tuple[str, Callable[..., Any]]] = {
    "bloom.BloomAttention": ("forward", _bloom),
    "codegen.CodeGenAttention": ("_attn", _softmax),
    "diffllama.DiffLlamaAttention": ("forward", _diffllama),
    "falcon.FalconAttention": ("forward", _falcon),
    "git.GitSelfAttention": ("forward", _bert),
    "gptj.GPTJAttention": ("_attn", _softmax),
    "gpt_neo.GPTNeoSelfAttention": ("_attn", _softmax_gpt_neo),
    "gpt_neox_japanese.GPTNeoXJapaneseAttention": ("_attn", _softmax),
    "megatron_bert.MegatronBertSelfAttention": ("forward", _bert),
    "mpt.MptAttention": ("forward", _mpt),
    "mvp.MvpAttention": ("forward", _bart),
    "nemotron.NemotronAttention": ("forward", _passed_on),
    "openai.Attention": ("_attn", _softmax_gpt),
    "rembert.RemBertSelfAttention": ("forward", _bert),
    "roformer.RoFormerSelfAttention": ("forward", _bert),
    "stablelm.StableLmAttention": ("forward", _passed_on),
    "trocr.TrOCRAttention": ("forward", _bart),
    "xglm.XGLMAttention": ("forward", _bart),
}
"""By folder and class of transformers: which method is replaced, and what runs a packed batch."""


def _no_mask(*, device: torch.device, **_: object) -> Tensor:
    """Some decoders (MPT, Falcon) rearrange a mask, whatever it is."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


AttentionMaskInterface.register(ADAPTED, _no_mask)
