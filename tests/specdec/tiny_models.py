"""Tiny random models for the tests: real architectures, no downloads, milliseconds a forward."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from specdec.kernels.stored import KvDtype
from specdec.model.decoder import PackedDecoder
from specdec.model.linear import Quantization, pack_linears

VOCAB = 97

DEVICE = torch.device(os.environ.get("SPECBATCH_TEST_DEVICE", "cpu"))
"""Where pairs run: with `cuda` the engine's tests check a GPU against transformers on the CPU."""

Precision = Literal["plain", "float32"] | Quantization
"""Linear layers as they are, or one of the three of specdec.model.linear."""


@dataclass
class TinyPair:
    """What `specdec.engine.admission.Pair` asks for, and the plain target to compare with."""

    target: PackedDecoder
    draft: PackedDecoder | None
    plain: PreTrainedModel
    vocab_size: int
    context_length: int
    draft_context_length: int
    eos_token_ids: frozenset[int] = frozenset()


def tiny_model(
    family: str = "llama",
    *,
    vocab: int = VOCAB,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    context: int = 1024,
    peak: float = 30.0,
    seed: int = 0,
    tied: bool = False,
    **extra: Any,
) -> PreTrainedModel:
    """A random decoder with grouped-query attention.

    Args:
        tied: whether its LM head is its embedding.
        peak: factor on the LM head; random initialisation alone gives logits so flat that rounding
            decides the argmax.
    """
    config = AutoConfig.for_model(
        family,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        max_position_embeddings=context,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **extra,
    )
    model = seeded(AutoModelForCausalLM.from_config, config, seed=seed)
    model.lm_head.weight.data.mul_(peak)
    return model.eval().requires_grad_(False)


def seeded(build: Any, config: Any, seed: int = 0) -> Any:
    """Build a model from its config without touching the global random state."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build(config)


def noisy_copy(model: PreTrainedModel, noise: float, seed: int = 1) -> PreTrainedModel:
    """A draft that is nearly `model`: noise in units of each weight's own standard deviation."""
    draft = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for weight in draft.parameters():
        if weight.ndim > 1:
            weight.data += noise * weight.std() * torch.randn(weight.shape, generator=generator)
    return draft


def make_pair(
    target: PreTrainedModel,
    draft: PreTrainedModel | None,
    *,
    eos: frozenset[int] = frozenset(),
    precision: Precision = "plain",
    invariant: bool = False,
    kv_dtype: KvDtype = "auto",
    draft_context: int | None = None,
) -> TinyPair:
    """Wrap copies of both models; the given ones stay plain."""

    def packed(model: PreTrainedModel, invariant: bool) -> PackedDecoder:
        model = copy.deepcopy(model).to(DEVICE)
        on_cpu = DEVICE.type == "cpu"
        fuse = precision != "plain" or not on_cpu
        decoder = PackedDecoder(model, invariant=invariant, fuse=fuse, kv_dtype=kv_dtype)
        if precision != "plain" and on_cpu:
            pack_linears(model, None if precision == "float32" else precision)
        return decoder

    context = target.config.max_position_embeddings
    return TinyPair(
        target=packed(target, invariant),
        draft=packed(draft, False) if draft is not None else None,
        plain=target,
        vocab_size=target.config.vocab_size,
        context_length=context,
        draft_context_length=draft_context or context,
        eos_token_ids=eos,
    )
