"""Decoder layers of the Llama family with a third of the operators that transformers runs.

A forward of a few tokens on a CPU spends as much time between kernels as in them, and on a GPU a
launch costs what a small kernel does. So query, key and value are one product, gate and up are one,
both rotations are one, and nothing is rearranged on the way. The layers keep transformers' calling
convention, so that the decoder around them is stock; what does not look exactly like a known layer
is left as it is, and `PackedDecoder` compares the result with the plain forward in any case.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from specdec.kernels.base import LayerKernels
from specdec.kernels.cpu import CpuKernels
from specdec.kernels.scoring import Scoring
from specdec.kernels.structs import Layer
from specdec.model.attention import attend, attend_stored
from specdec.model.linear import KernelLinear, is_plain
from specdec.model.packing import Packing

FUSIBLE = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}
"""transformers' layers that compute what `FusedLayer` does."""


class FusedLayer(nn.Module):
    """x + o(attention(rotated qkv(norm(x)))), then x + down(act(gate(norm(x))) * up(norm(x))).

    Args:
        layer: one of FUSIBLE; its weights are taken over, and its projections are emptied.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.layer_idx: int = attention.layer_idx
        self.head_dim: int = attention.head_dim
        self.query_heads = attention.q_proj.out_features // self.head_dim
        self.key_heads = attention.k_proj.out_features // self.head_dim
        self.scoring = Scoring(attention.scaling)
        self.input_norm, self.mlp_norm = layer.input_layernorm, layer.post_attention_layernorm
        self.epsilon: float = self.input_norm.variance_epsilon
        self.query_norm = getattr(attention, "q_norm", None)
        self.key_norm = getattr(attention, "k_norm", None)
        self.qkv = _joined(attention.q_proj, attention.k_proj, attention.v_proj)
        self.output = attention.o_proj
        self.gate_up = _joined(mlp.gate_proj, mlp.up_proj)
        self.down = mlp.down_proj
        self.activation = mlp.act_fn
        self._whole: Layer | None = None
        self.is_silu = type(self.activation).__name__ in ("SiLU", "SiLUActivation")

    def forward(
        self,
        x: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        packing: Packing,
        **_: object,
    ) -> Tensor:
        """One layer over N packed tokens.

        Args:
            x: [1, N, hidden].
            position_embeddings: cosines and sines, [1, N, head_dim] each.
            packing: where the tokens belong.

        Returns:
            [1, N, hidden].
        """
        if self.is_silu and packing.kernels is not None:
            return self._with_kernels(packing.kernels, None, x, position_embeddings, packing)
        return self._on_torch(self.input_norm(x)[0], x, position_embeddings, packing)

    def _on_torch(
        self,
        normed: Tensor,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        packing: Packing,
    ) -> Tensor:
        """What the layer makes of x [1, N, hidden], its attention reading normed [N, ...]."""
        heads = self.qkv(normed).unflatten(-1, (-1, self.head_dim))
        turning = heads[:, : self.query_heads + self.key_heads]
        if self.query_norm is not None and self.key_norm is not None:
            query, key = turning[:, : self.query_heads], turning[:, self.query_heads :]
            turning = torch.cat([self.query_norm(query), self.key_norm(key)], 1)
        turned = _rotated(turning, *angles)
        query, key = turned[:, : self.query_heads], turned[:, self.query_heads :]
        value = heads[:, self.query_heads + self.key_heads :]
        mixed = attend(packing, self.layer_idx, query, key, value, self.scoring)
        x = x + self.output(mixed.flatten(1))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        y: Tensor = x + self.down(self.activation(gate) * up)
        return y

    def _with_kernels(
        self,
        kernels: LayerKernels,
        normed: Tensor | None,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        packing: Packing,
    ) -> Tensor:
        """The same, in fewer passes over memory; changes x in place and returns it.

        Without `normed` attention reads the input norm of x.
        """
        cache, layer = packing.cache, self.layer_idx
        if (
            type(kernels) is CpuKernels
            and not packing.apart
            and (whole := self._whole or self._as_a_whole()) is not None
        ):
            window, forward = cache.layout[layer].window, packing.shared(angles)
            keys, values = cache.keys[layer], cache.values[layer]
            kernels.whole_layer(whole, forward, x, normed, keys, values, window)
            return x
        flat = x[0]
        if normed is None:
            normed = kernels.add_norm(flat, None, self.input_norm.weight, self.epsilon)
        # `forward`, not a call: what torch puts around one takes as long as a small kernel.
        heads = self.qkv.forward(normed).view(len(flat), -1, self.head_dim)
        norms = None
        if self.query_norm is not None and self.key_norm is not None:
            norms = self.query_norm.weight, self.key_norm.weight, self.epsilon
        kernels.rotate_and_store(
            heads, angles[0][0], angles[1][0], norms,
            cache.keys[layer], cache.values[layer], cache.table, packing.slots, packing.stored,
            scales=cache.scales(layer),
        )  # fmt: skip
        mixed = attend_stored(packing, layer, heads[:, : self.query_heads], self.scoring)
        more = self.output.forward(mixed.view(len(flat), -1))
        normed = kernels.add_norm(flat, more, self.mlp_norm.weight, self.epsilon)
        flat.add_(self.down.forward(kernels.gate(self.gate_up.forward(normed))))
        return x

    def _as_a_whole(self) -> Layer | None:
        """This layer for `CpuKernels.whole_layer`, if all its products are kernels of ours."""
        linears = self.qkv, self.output, self.gate_up, self.down
        weights = [linear.weights for linear in linears if isinstance(linear, KernelLinear)]
        if len(weights) < len(linears):
            return None
        norms = self.input_norm, self.mlp_norm, self.query_norm, self.key_norm
        self._whole = Layer.of(
            weights,
            [norm.weight if norm is not None else None for norm in norms],
            (self.query_heads, self.key_heads, self.head_dim),
            self.epsilon,
            self.scoring.scale,
        )
        return self._whole


class Layers(nn.ModuleList):
    """A list of modules that is its own slice, where that has all of them.

    transformers loops over such a slice, of which `nn.ModuleList` makes a copy each forward: as
    long as half of a draft's layer takes.
    """

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice) and range(len(self))[index] == range(len(self)):
            return self
        return super().__getitem__(index)


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [N, H, D] heads by [1, N, D] angles, each of which stands there twice."""
    cos, sin = cos[0, :, None], sin[0, :, None]
    low, high = heads.chunk(2, -1)
    return torch.addcmul(heads * cos, torch.cat([-high, low], -1), sin)


def _joined(*layers: nn.Linear) -> nn.Linear:
    """One linear layer that gives the outputs of several, one after the other; empties them."""
    first, outputs = layers[0], sum(layer.out_features for layer in layers)
    joined = nn.Linear(first.in_features, outputs, bias=False, device="meta")
    joined.weight = _together([layer.weight for layer in layers])
    if first.bias is not None:
        joined.bias = _together([layer.bias for layer in layers])
    for layer in layers:
        del layer.weight, layer.bias
    return joined


def _together(parameters: list[Tensor]) -> nn.Parameter:
    return nn.Parameter(torch.cat([each.data for each in parameters]), requires_grad=False)


def fuse_layers(decoder: Any) -> None:
    """Replace the layers of `decoder` where they are known and on one device."""
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        return
    decoder.layers = Layers(FusedLayer(each) if _fusible(each) else each for each in layers)


def _fusible(layer: Any) -> bool:
    if type(layer).__name__ not in FUSIBLE:
        return False
    attention, mlp = layer.self_attn, layer.mlp
    linears = [
        attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj,
        attention.o_proj, mlp.down_proj,
    ]  # fmt: skip
    return (
        all(is_plain(linear) for linear in linears)
        and len({(linear.bias is None) for linear in linears[:3]}) == 1
        and len({(linear.bias is None) for linear in linears[3:5]}) == 1
        and len({parameter.device for parameter in layer.parameters()}) == 1
        and not hasattr(layer, "_hf_hook")
    )
