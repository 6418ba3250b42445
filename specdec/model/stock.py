"""The parts of a stock transformers model: its decoder, and what turns hidden states into logits.

Between hidden states and logits a model may do more than its LM head: cap them, scale them, cut
off a padded vocabulary. So the model's own `forward` runs there, with a stand-in for its decoder.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

SPREAD = 10.0
"""Standard deviation of the logits that the LM head alone is compared at.

That of a trained model, or more, so that a cap shows.
"""


class UnsupportedModel(ValueError):
    """An architecture that cannot run packed; the message says why."""


BOUNDLESS = 1 << 20
"""Most positions of a model that has no positions, since its state runs on.

Raised, the page table is wider: 8 bytes a slot for each 32 positions.
"""


def context_length(config: Any, bounded: bool = True) -> int:
    """Most positions of a model, by its config; BOUNDLESS if it has none and is not `bounded`.

    Raises:
        UnsupportedModel: the config does not say.
    """
    text = config.get_text_config()
    for name in ("max_position_embeddings", "max_seq_len", "seq_length", "n_positions"):
        length = getattr(text, name, None)
        if isinstance(length, int) and length > 0:
            return length
    if not bounded:
        return BOUNDLESS
    raise UnsupportedModel(
        "its config.json does not say how many positions it has; add max_position_embeddings"
    )


class StockModel:
    """A causal language model of transformers, cut where its decoder ends.

    Attributes:
        model: the whole model.

    Raises:
        UnsupportedModel: no part of it has its embedding.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self._only_head = model, False
        embedding = model.get_input_embeddings()
        parts = [
            name
            for name, part in model.named_children()
            if any(module is embedding for module in part.modules())
        ]
        if not parts or not isinstance(model.get_output_embeddings(), nn.Module):
            raise UnsupportedModel("it has no decoder with an embedding, or no LM head")
        self._part = parts[0]

    @property
    def decoder(self) -> Any:
        """What runs over tokens and gives hidden states, without a part for images."""
        part: Any = getattr(self.model, self._part)
        return getattr(part, "language_model", part)

    @property
    def head(self) -> Any:
        """The LM head."""
        return self.model.get_output_embeddings()

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits [M, V] of hidden states [M, hidden]."""
        if self._only_head:
            logits: Tensor = self.head(hidden)
            return logits
        return self._behind_decoder(hidden)

    def find_what_follows_the_head(self, hidden: Tensor) -> None:
        """See whether logits are what the LM head gives and nothing else, which is faster.

        Args:
            hidden: [M, hidden], some that the decoder gave.
        """
        weight: Tensor = self.head.weight
        if weight.is_floating_point() and weight.dtype != hidden.dtype:
            return  # between them is a conversion (Mamba's float32 states)
        spread = self.head(hidden).float().std().clamp(min=1e-6)
        hidden = hidden * (SPREAD / spread).to(hidden.dtype)
        head, whole = self.head(hidden), self._behind_decoder(hidden)
        self._only_head = head.dtype == whole.dtype and torch.equal(head, whole)

    def _behind_decoder(self, hidden: Tensor) -> Tensor:
        """Logits as the model's own `forward` computes them of these hidden states."""
        # A shallow copy with other parts: whoever packs or replaces the LM head is seen here.
        model = copy.copy(self.model)
        model._modules = {**self.model._modules, self._part: _Given(hidden[None])}
        # The class's forward: an instance's may be one that accelerate put there for the original.
        out = type(model).forward(model, inputs_embeds=hidden[None], use_cache=False)
        logits: Tensor = out.logits[0]
        return logits


class _Given(nn.Module):
    """Stands in for a decoder, with the hidden states that it gives."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    @property
    def decoder(self) -> _Given:
        """Itself: some models (OPT) ask for a part of what it stands in for."""
        return self

    def forward(self, *_: object, **__: object) -> _Output:
        return _Output(self.hidden)


class _Output(tuple[Tensor]):
    """What decoders return: hidden states by name or index; nothing else that they may have."""

    __slots__ = ()

    def __new__(cls, hidden: Tensor) -> _Output:
        return super().__new__(cls, (hidden,))

    def __getattr__(self, name: str) -> Tensor | None:
        return self[0] if name == "last_hidden_state" else None
