"""The parts of a stock transformers model: its decoder, and what turns hidden states into logits.

Between hidden states and logits a model may do more than its LM head: cap them, scale them, cut
off a padded vocabulary. So the model's own `forward` runs there, with a stand-in for its decoder.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specdec.model.adapters import ADAPTED, Forward, adapt, first_position, running

log = logging.getLogger(__name__)

OWN = ("eager", "sdpa")
"""Attention of transformers' own, which models are compared with."""

SPREAD = 10.0
"""Standard deviation of the logits that the LM head alone is compared at.

That of a trained model, or more, so that a cap shows.
"""


class UnsupportedModel(ValueError):
    """An architecture that cannot run packed; the message says why."""


CONTEXT = (
    "max_position_embeddings", "max_seq_len", "seq_length", "n_positions", "max_target_positions",
)  # fmt: skip
"""Where configs say how many positions a model has."""

UNSAID = {"bloom": 2048}
"""Positions that models of a type were trained with, where their config does not say.

BLOOM's scores fall with distance (ALiBi), so that nothing in it has a length.
"""

BOUNDLESS = 1 << 20
"""Most positions of a model that has no positions, since its state runs on.

Raised, the page table is wider: 8 bytes a slot for each 32 positions.
"""


def context_length(config: Any, bounded: bool = True) -> int:
    """Most positions of a model, by its config or UNSAID; BOUNDLESS if it is not `bounded`.

    Raises:
        UnsupportedModel: the config does not say.
    """
    text = config.get_text_config()
    for name in CONTEXT:
        length = getattr(text, name, None)
        if isinstance(length, int) and length > 0:
            return length
    if not bounded:
        return BOUNDLESS
    if text.model_type in UNSAID:
        return UNSAID[text.model_type]
    raise UnsupportedModel(
        "its config.json does not say how many positions it has; add max_position_embeddings"
    )


def steady_context(config: Any, bounded: bool = True) -> int:
    """As `context_length`, as far as a token's rotary angles do not depend on the row's length.

    With `longrope`, longer rows have other angles at all of their tokens. With `dynamic`, only rows
    beyond `context_length` have.
    """
    text, length = config.get_text_config(), context_length(config, bounded)
    longest = length
    rope = getattr(text, "rope_parameters", None) or {}
    for each in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if each.get("rope_type") == "longrope":
            original = each.get("original_max_position_embeddings")
            original = original or getattr(text, "original_max_position_embeddings", None)
            length = min(length, original or length)
    if length < longest:
        log.warning(
            "rows may have %d of the model's %d positions: in longer ones, its rotary embeddings "
            "give all tokens other angles", length, longest,
        )  # fmt: skip
    return length


class StockModel:
    """A causal language model of transformers, cut where its decoder ends.

    Args:
        model: the whole model.
        recurrent: whether it has layers whose state runs on; it may have no others.

    Attributes:
        model: the same; methods of its attention layers are replaced (`adapt`).
        context_length: most positions that a row may have.

    Raises:
        UnsupportedModel: no part of it has its embedding, its positions are not known, or its
            attention cannot be replaced.
    """

    def __init__(self, model: PreTrainedModel, recurrent: bool = False) -> None:
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
        self._bypasses = adapt(self.decoder)
        replaceable = self._bypasses or self.decoder._can_set_attn_implementation()
        if not (replaceable or recurrent):
            raise UnsupportedModel("its layers do not take their attention from AttentionInterface")
        self._first_position = first_position(self.decoder)
        self.context_length = steady_context(model.config, not recurrent)
        self.context_length -= self._first_position

    @property
    def decoder(self) -> Any:
        """What runs over tokens and gives hidden states, without a part for images."""
        part: Any = getattr(self.model, self._part)
        return getattr(part, "language_model", part)

    @property
    def head(self) -> Any:
        """The LM head."""
        return self.model.get_output_embeddings()

    def set_attention(self, name: str) -> None:
        """Have the decoder take its attention from here in AttentionInterface, if it does that."""
        if not self._bypasses:
            self.decoder.set_attn_implementation(name)
        else:
            self.decoder.config._attn_implementation = name if name in OWN else ADAPTED

    def run(
        self, tokens: Tensor, positions: Tensor, attention: Callable[..., Any], packing: Any
    ) -> Tensor:
        """Hidden states [N, hidden] of packed tokens.

        Args:
            tokens, positions: int64 [N]; positions in a row begin with 0.
            attention: what `set_attention` named.
            packing: what it is given besides heads.
        """
        places = positions + self._first_position if self._first_position else positions
        with running(Forward(attention, packing, positions, self.context_length)):
            out = self.decoder(
                input_ids=tokens[None], position_ids=places[None], use_cache=False, packing=packing
            )
        hidden: Tensor = out.last_hidden_state[0]
        return hidden

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
        weight = getattr(self.head, "weight", None)
        if not isinstance(weight, Tensor):  # but numbers that a quantiser packed
            return
        if weight.is_floating_point() and weight.dtype != hidden.dtype:
            return  # between them is a conversion (Mamba's float32 states)
        if weight.shape[-1] != hidden.shape[-1]:  # or a product
            return
        spread = self.head(hidden).float().std().clamp(min=1e-6)
        hidden = hidden * (SPREAD / spread).to(hidden.dtype)
        head, whole = self.head(hidden), self._behind_decoder(hidden)
        self._only_head = head.dtype == whole.dtype and torch.equal(head, whole)

    def _behind_decoder(self, hidden: Tensor) -> Tensor:
        """Logits as the model's own `forward` computes them of these hidden states."""
        # A shallow copy with other parts: whoever packs or replaces the LM head is seen here.
        model = copy.copy(self.model)
        given = _Given(hidden[None], getattr(self.model, self._part))
        model._modules = {**self.model._modules, self._part: given}
        # The class's forward: an instance's may be one that accelerate put there for the original.
        out = type(model).forward(model, inputs_embeds=hidden[None], use_cache=False)
        logits: Tensor = out.logits[0]
        return logits


class _Given(nn.Module):
    """Stands in for a decoder, with the hidden states that it gives and whatever else it has."""

    def __init__(self, hidden: Tensor, decoder: nn.Module) -> None:
        super().__init__()
        self.hidden = hidden
        self.__dict__["stands_for"] = decoder  # which is no part of it

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["stands_for"], name)

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
