"""From products of queries and keys to the weights of values: scale, soft cap, bias, sinks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Scoring(NamedTuple):
    """How a layer makes weights of q k^T.

    Attributes:
        scale: factor of the products.
        softcap: what scores are softly bounded by (Gemma 2): softcap * tanh(score / softcap).
        sinks: [H], for each query head the score of one more key that has no value (gpt-oss).
        key_bias: float32 [H, P], what is added to scores of a key by its position (ALiBi, which
            differs from this by the same for all keys of a query).
    """

    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None
    key_bias: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether weights are the softmax of scaled products: what fused kernels compute."""
        return self.softcap is None and self.sinks is None and self.key_bias is None

    def biased(self, mask: Tensor, at: Tensor | None = None) -> Tensor:
        """An additive mask [..., T, L] for each head, or for all: [..., H or 1, T, L].

        `at`, int64 [..., T, L], are the positions of the keys if they are not 0 to L - 1.
        """
        masks = mask[..., None, :, :]
        if self.key_bias is None:
            return masks
        if at is None:
            return masks + self.key_bias[:, None, : mask.shape[-1]]
        last = self.key_bias.shape[1] - 1
        return masks + self.key_bias[:, at.clamp(max=last)].movedim(0, -3)

    def capped(self, scores: Tensor) -> Tensor:
        """Scores, softly bounded."""
        if self.softcap is None:
            return scores
        return torch.tanh(scores / self.softcap) * self.softcap

    def sink_scores(self, scores: Tensor) -> Tensor | None:
        """The sinks as float32 scores [..., H, 1, 1] beside scores [..., H, T, L]; None without."""
        if self.sinks is None:
            return None
        return self.sinks.float()[:, None, None].expand(*scores.shape[:-1], 1)

    def weights(self, scores: Tensor) -> Tensor:
        """Softmax over the last dimension of masked float32 scores [..., H, T, L]."""
        sinks = self.sink_scores(scores)
        if sinks is None:
            return torch.softmax(scores, -1)
        return torch.softmax(torch.cat([scores, sinks], -1), -1)[..., :-1]


PLAIN = Scoring(1.0)
"""Of a layer that does nothing else, scaled elsewhere."""
