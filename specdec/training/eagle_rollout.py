"""EAGLE-3's training-time test (arXiv 2503.01840, section 3.2): a draft on its own states.

Position p of a row reads a state and the embedding of token p + 1, and predicts token p + 2. At
step 0 the state is the target's feature of token p. At step s it is what the draft made of
position p - 1 at step s - 1: the position is then the s-th behind the last one with a feature.
So it attends to step 0 as far as position p - s, and behind that to one position of each step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from specdec.training.examples import Example


@dataclass(frozen=True, slots=True)
class Places:
    """Rows of positions, padded to the longest, and where output tokens are predicted in them.

    Attributes:
        tokens: int64 [B, T], token p + 1 of each position p; padding is 0.
        reads: int64 [B, T], which of the target's states, end to end, each position reads.
        window: the first position that any step but the first one computes.
        at: int64 [n], positions in [B * T] of the output tokens, in the examples' order; -1 where
            a row is too short to have one.
        kept: of each step, int64, which of the n output tokens it predicts.
        outputs: n.
    """

    tokens: Tensor
    reads: Tensor
    window: int
    at: Tensor
    kept: list[Tensor]
    outputs: int


def positions_of(examples: Sequence[Example], steps: int) -> Places:
    """Where the tokens of some examples are.

    A token can be predicted at step s if at least s + 2 tokens are before it.
    """
    lengths = [len(e.input_ids) for e in examples]
    width = max(max(lengths) - 1, 1)
    tokens = torch.zeros(len(examples), width, dtype=torch.int64)
    reads = torch.zeros(len(examples), width, dtype=torch.int64)
    start, at, place = 0, list[int](), list[int]()
    for row, (example, length) in enumerate(zip(examples, lengths, strict=True)):
        tokens[row, : length - 1] = torch.tensor(example.input_ids[1:])
        reads[row] = start + torch.arange(width).clamp(max=length - 1)
        start += length
        first = len(example.prompt_ids) - 2
        own = range(first, first + len(example.output_ids))
        place += own
        at += [row * width + p for p in own]
    places = torch.tensor(place)
    window = max(0, min(len(e.prompt_ids) for e in examples) - 1 - steps)
    kept = [(places >= step).nonzero()[:, 0] for step in range(steps)]
    return Places(tokens, reads, window, torch.tensor(at), kept, len(place))


class Rollout(nn.Module):
    """A draft's layer over whole padded rows, at one step after the other, with gradients.

    Args:
        parts: a draft's modules (specdec/loading/eagle.py).
        config: of transformers, of its layer.
        norm_before_residual: whether the layer adds to the normed state, not to the state.
        norm_output: whether its states are those behind `norm`.
    """

    def __init__(
        self, parts: Any, config: Any, *, norm_before_residual: bool, norm_output: bool
    ) -> None:
        super().__init__()
        self.embed_tokens, self.fc, self.norm = parts.embed_tokens, parts.fc, parts.norm
        self.input_norm, self.fc_norm = (getattr(parts, f"{n}_norm", None) for n in ("input", "fc"))
        self.head = parts.lm_head
        (self.layer,) = parts.layers
        self.norm_before_residual, self.norm_output = norm_before_residual, norm_output
        self.rotary = LlamaRotaryEmbedding(config)

    def normed(self, states: Tensor) -> Tensor:
        """What logits are made of."""
        return states if self.norm_output else _norm(self.norm, states)

    def fused(self, states: Tensor) -> Tensor:
        """Features of the target's states side by side."""
        states = states.to(self.fc.weight.dtype)
        if self.input_norm is not None:
            states = _norm(self.input_norm, states)
        if self.fc_norm is not None:
            each = states.chunk(len(self.fc_norm), -1)
            states = torch.cat([_norm(n, x) for n, x in zip(self.fc_norm, each, strict=True)], -1)
        fused: Tensor = self.fc(states)
        return fused.float()

    def steps(self, tokens: Tensor, features: Tensor, window: int, steps: int) -> list[Tensor]:
        """States of each step: [B, T, hidden], of all but the first from `window` on.

        Args:
            tokens: int64 [B, T], those behind the features.
            features: [B, T, hidden].
            window: the first position that later steps compute.
            steps: how many.
        """
        layer, width = self.layer, tokens.shape[1]
        attention = layer.self_attn
        weight = torch.cat([getattr(attention, f"{n}_proj").weight for n in "qkv"])
        biases = [getattr(attention, f"{n}_proj").bias for n in "qkv"]
        bias = None if biases[0] is None else torch.cat(biases)
        embedded = self.embed_tokens(tokens).float()
        hidden = embedded.shape[-1]
        read = nn.functional.linear(
            _norm(layer.input_layernorm, embedded), weight[:, :hidden], bias
        )
        positions = torch.arange(width, device=tokens.device)[None]
        cos, sin = (each[0] for each in self.rotary(embedded, positions))
        behind = positions[0, :, None] - positions  # [T, T], query minus key
        found, keys, values = list[Tensor](), list[Tensor](), list[Tensor]()
        x = features
        for step in range(steps):
            begin = window if step else 0
            normed = _norm(layer.hidden_norm, x)
            heads = read[:, begin:] + nn.functional.linear(normed, weight[:, hidden:])
            query, key, value = _heads(attention, heads, cos[begin:], sin[begin:])
            keys.append(key)
            values.append(value)
            hidden_keys = behind[begin:] < step
            mixed = _attend(query, keys, values, hidden_keys, attention.scaling)
            y = (normed if self.norm_before_residual else x) + attention.o_proj(mixed)
            y = y + layer.mlp(_norm(layer.post_attention_layernorm, y))
            y = _norm(self.norm, y) if self.norm_output else y
            found.append(y)
            # The next step reads, at each position, what this one made of the position before it.
            before = y[:, max(window - 1, 0) : -1] if not step else y[:, :-1]
            x = nn.functional.pad(before, (0, 0, width - window - before.shape[1], 0))
        return found


def rolled_out(
    rollout: Rollout, places: Places, states: Tensor, steps: int, *, everywhere: bool = False
) -> list[Tensor]:
    """A draft's states at output tokens, at each step.

    Args:
        places: of `positions_of`; what each step keeps comes from it.
        states: [N, layers * hidden], the target's, of the examples' tokens end to end.
        steps: how many.
        everywhere: keep at each step what the first one keeps: the first steps' worth of a row is
            then of no meaning.

    Returns:
        Of each step, [kept, hidden].
    """
    device = states.device
    features = rollout.fused(states)[places.reads.to(device)]
    window = 0 if everywhere else places.window
    width = features.shape[1]
    found = []
    for step, state in enumerate(rollout.steps(places.tokens.to(device), features, window, steps)):
        kept = places.kept[0 if everywhere else step]
        row, column = places.at[kept] // width, places.at[kept] % width
        found.append(state[row.to(device), (column - (window if step else 0)).to(device)])
    return found


def _norm(norm: Any, x: Tensor) -> Tensor:
    x = x.float()
    return nn.functional.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)


def _heads(attention: Any, heads: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """Rotated query and key, and value, [B, heads, T, D] each, of [B, T, ...]."""
    dim = attention.head_dim
    sizes = [getattr(attention, f"{n}_proj").out_features for n in "qkv"]
    query, key, value = (
        each.reshape(*each.shape[:2], -1, dim).transpose(1, 2)
        for each in torch.split(heads, sizes, -1)
    )
    if getattr(attention, "q_norm", None) is not None:
        query, key = _norm(attention.q_norm, query), _norm(attention.k_norm, key)
    return _rotated(query, cos, sin), _rotated(key, cos, sin), value


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = heads.chunk(2, -1)
    return (heads * cos + torch.cat([-high, low], -1) * sin).to(heads.dtype)


def _attend(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    hidden: Tensor,
    scaling: float,
) -> Tensor:
    """What positions of the last step read: [B, T, heads * D].

    Args:
        query: [B, H, T, D], of the last step.
        keys, values: of each step, [B, KV, T, D]; but for the first, they begin as queries do.
        hidden: bool [T, T of step 0], keys of step 0 that a query does not see.
    """
    group, step = query.shape[1] // keys[0].shape[1], len(keys) - 1
    grouped = (query * scaling).reshape(len(query), -1, group, *query.shape[2:])  # [B, KV, G, T, D]
    flat = grouped.flatten(2, 3)
    scores = (flat @ keys[0].transpose(-1, -2)).view(*grouped.shape[:-1], -1).float()
    parts = [scores.masked_fill(hidden, float("-inf"))]
    # Position p at step s reads step j at position p - (s - j).
    shifted = [
        (_shifted(keys[j], step - j)[:, :, None], _shifted(values[j], step - j)[:, :, None])
        for j in range(1, step + 1)
    ]
    parts += [(grouped * key).sum(-1, keepdim=True).float() for key, _ in shifted]
    weights = torch.softmax(torch.cat(parts, -1) if step else parts[0], -1).to(values[0].dtype)
    count = keys[0].shape[2]
    mixed = (weights[..., :count].flatten(2, 3) @ values[0]).view(grouped.shape)
    for j, (_, value) in enumerate(shifted):
        mixed = mixed + weights[..., count + j, None] * value
    read: Tensor = mixed.flatten(1, 2).transpose(1, 2).flatten(2)
    return read


def _shifted(x: Tensor, by: int) -> Tensor:
    """Each position of [B, H, T, D] in the place of the one `by` behind it; zeros come first."""
    return nn.functional.pad(x[:, :, : x.shape[2] - by], (0, 0, by, 0)) if by else x
