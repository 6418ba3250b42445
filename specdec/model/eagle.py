"""EAGLE-3 drafts (arXiv 2503.01840): one decoder layer over a target's hidden states.

Position p of a row is computed of two things: the *feature* of token p, which is what the target
knew there, and the embedding of token p + 1, which was drawn from that. It proposes token p + 2.
A feature is three of the target's hidden states, fused by `fc`. Where the target has not been yet,
behind tokens that are candidates themselves, the draft's own last state stands in for it.

The vocabulary may be reduced: tokens that the draft does not know have no probability.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from specdec.kernels.choose import cpu_kernels
from specdec.kernels.cpu import CpuKernels
from specdec.kernels.stored import KvDtype
from specdec.model.cache import LayerLayout, SlotCache
from specdec.model.decoder import PackedDecoder
from specdec.model.features import Features
from specdec.model.fused import FusedLayer
from specdec.model.graphs import HIDDEN, Out, Tail
from specdec.model.packing import Packing
from specdec.model.rows import Row


class FirstLayer(FusedLayer):
    """A `FusedLayer` whose attention reads an embedding and a state side by side.

    Args:
        layer: one of FUSIBLE, whose query, key and value projections take twice the width.
        state_norm: of the state; the layer's own norm is of the embedding.
        norm_before_residual: whether the layer adds to the normed state, not to the state.
    """

    def __init__(self, layer: Any, state_norm: Any, norm_before_residual: bool) -> None:
        super().__init__(layer)
        self.state_norm, self.norm_before_residual = state_norm, norm_before_residual

    def read(
        self,
        embedding: nn.Module,
        tokens: Tensor,
        states: Tensor,
        angles: tuple[Tensor, Tensor],
        packing: Packing,
    ) -> Tensor:
        """As `forward`, of the embeddings of tokens [N] and of states [N, hidden], which stay."""
        kernels = packing.kernels if self.is_silu else None
        norms = self.input_norm, self.state_norm
        if type(kernels) is CpuKernels and _is_plain(embedding, states.dtype):
            states = states.contiguous()
            normed = kernels.norm_beside(embedding.weight, tokens.contiguous(), states, norms)
        else:
            both = (embedding(tokens), states)
            normed = torch.cat([_normed(*each) for each in zip(both, norms, strict=True)], -1)
        x = (normed[:, states.shape[1] :] if self.norm_before_residual else states)[None]
        if kernels is not None:
            x = x.clone(memory_format=torch.contiguous_format)
            return self._with_kernels(kernels, normed, x, angles, packing)
        return self._on_torch(normed, x, angles, packing)


class Eagle3(nn.Module):
    """A draft's weights, and what it computes.

    Args:
        config: of transformers, of its layers.
        parts: modules by the names that checkpoints give them: `embed_tokens`, `fc`, `layers`, of
            which the first has a `hidden_norm`, `norm`, `lm_head`, and if states are normed before
            they are fused `input_norm`, or `fc_norm` of each. Its layers are taken apart.
        norm_before_residual: see `FirstLayer`.
        norm_output: whether its states are those behind `norm`.
        known: int64 [draft vocabulary], which of the target's tokens each of the draft's is; None:
            the same.
        vocab_size: tokens of the target.
    """

    known: Tensor | None

    def __init__(
        self,
        config: Any,
        parts: Any,
        *,
        norm_before_residual: bool,
        norm_output: bool,
        known: Tensor | None,
        vocab_size: int,
    ) -> None:
        super().__init__()
        self.config, self.vocab_size, self.norm_output = config, vocab_size, norm_output
        self.embed_tokens, self.fc, self.norm = parts.embed_tokens, parts.fc, parts.norm
        self.input_norm, self.fc_norm = (getattr(parts, f"{n}_norm", None) for n in ("input", "fc"))
        self.lm_head = parts.lm_head
        self.rotary_emb = LlamaRotaryEmbedding(config).to(self.norm.weight.device)
        first, *others = parts.layers
        self.first = FirstLayer(first, first.hidden_norm, norm_before_residual)
        self.others = nn.ModuleList(map(FusedLayer, others))
        self.register_buffer("known", known)

    def fuse(self, states: Tensor) -> Tensor:
        """Features [N, hidden] of the target's states side by side."""
        if self.input_norm is not None:
            states = self.input_norm(states)
        if self.fc_norm is not None:
            each = states.chunk(len(self.fc_norm), -1)
            states = torch.cat([norm(x) for norm, x in zip(self.fc_norm, each, strict=True)], -1)
        fused: Tensor = self.fc(states)
        return fused

    def forward(
        self, tokens: Tensor, states: Tensor, positions: Tensor, packing: Packing
    ) -> Tensor:
        """The next states [N, hidden] of packed tokens int64 [N] and states [N, hidden]."""
        states = states.to(self.norm.weight.dtype)
        angles = self.rotary_emb(states, positions[None])
        x = self.first.read(self.embed_tokens, tokens, states, angles, packing)
        for layer in self.others:
            x = layer(x, angles, packing)
        return _normed(x[0], self.norm) if self.norm_output else x[0]

    def normed(self, states: Tensor) -> Tensor:
        """What logits are made of: states [M, hidden] behind the last norm."""
        return states if self.norm_output else _normed(states, self.norm)

    def own_logits(self, normed: Tensor) -> Tensor:
        """Logits [M, draft vocabulary] of normed states [M, hidden]."""
        own: Tensor = self.lm_head(normed)
        return own

    def logits(self, normed: Tensor) -> Tensor:
        """Logits [M, V] over the target's tokens, of normed states [M, hidden]."""
        own = self.own_logits(normed)
        if self.known is None:
            return own[:, : self.vocab_size]
        logits = own.new_full((len(own), self.vocab_size), float("-inf"))
        return logits.scatter_(1, self.known.expand(len(own), -1), own)


def _is_plain(embedding: nn.Module, dtype: torch.dtype) -> TypeGuard[nn.Embedding]:
    return type(embedding) is nn.Embedding and embedding.weight.dtype == dtype


def _normed(x: Tensor, norm: Any) -> Tensor:
    """The RMS norm of x [N, width]. Torch takes six operators, each as long as a small kernel."""
    kernels = cpu_kernels(x.dtype, x.device)
    if kernels is not None:
        return kernels.add_norm(x.contiguous(), None, norm.weight, norm.variance_epsilon)
    normed: Tensor = norm(x)
    return normed


class EagleDecoder(PackedDecoder):
    """An `Eagle3` draft that runs ragged packed rows, each token with a state.

    Args:
        model: the draft, on the target's device.
        layers: the target's layers whose hidden states it reads; see `Features`.
        context_length: most positions that a row may have.
        use_kernels: whether hand-written kernels work here, as the target has seen.
        kv_dtype: as the target's.

    Attributes:
        features: what the target's cache must keep for it.
        most_known: the last of the target's tokens in its vocabulary; `vocab_size` if it has all.
    """

    reads_features, ahead = True, 1

    def __init__(
        self,
        model: Eagle3,
        layers: Sequence[int],
        context_length: int,
        *,
        use_kernels: bool,
        kv_dtype: KvDtype,
    ) -> None:
        self.model: Any = model
        self.invariant, self.recurrent, self.use_kernels = False, False, use_kernels
        self.recordings, self._records_tails = None, True
        weight = model.norm.weight
        self.dtype, self.device, self.kv_dtype = weight.dtype, weight.device, kv_dtype
        self.context_length = context_length
        self.vocab_size = min(model.vocab_size, model.embed_tokens.weight.shape[0])
        self.most_known = self.vocab_size if model.known is None else int(model.known.max())
        self.features = Features(tuple(layers), weight.shape[0], model.fuse)
        first: FirstLayer = model.first
        layout = LayerLayout(first.key_heads, first.head_dim, first.head_dim)
        self.layout = (layout,) * (1 + len(model.others))
        self._states: Tensor | None = None

    @property
    def layers(self) -> int:
        return 0

    def read(
        self,
        cache: SlotCache,
        rows: Sequence[Row],
        tokens: Tensor,
        states: Tensor,
        tail: Tail[Out] = HIDDEN,  # type: ignore[assignment]
    ) -> Out:
        """As `forward_into`, with a state for each token: [N, hidden]."""
        self._states = states
        try:
            return self.forward_into(cache, rows, tokens, tail)
        finally:
            self._states = None

    def normed(self, states: Tensor) -> Tensor:
        """See `Eagle3.normed`."""
        normed: Tensor = self.model.normed(states)
        return normed

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits [M, V] of states [M, hidden]."""
        logits: Tensor = self.model.logits(self.normed(hidden))
        return logits

    def _run(self, tokens: Tensor, positions: Tensor, packing: Packing) -> Tensor:
        states = self._states
        if states is None:  # forwards that are timed have none
            states = torch.zeros(len(tokens), self.features.width, device=self.device)
        hidden: Tensor = self.model(tokens, states, positions, packing)
        return hidden
