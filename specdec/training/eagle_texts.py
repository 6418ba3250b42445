"""An EAGLE-3 draft along a text: its states there, and rounds that begin at any place of it.

The first candidate of a round is proposed from the target's features, each further one from the
draft's own state of the one before it. So the same token has other states in another round.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specdec.model.decoder import PackedDecoder
from specdec.model.eagle import EagleDecoder
from specdec.model.rows import Row
from specdec.training.examples import Example
from specdec.training.scores import read_states

ROUNDS = 64
"""Places of a text whose rounds are run at once. More take more cache."""


class EagleTexts:
    """Holds the draft's cache from text to text: slot 0 for the text, the others for rounds.

    Args:
        target: reads the texts.
        draft: its draft.
        most: most candidates of a round.
    """

    def __init__(self, target: PackedDecoder, draft: EagleDecoder, most: int) -> None:
        self.target, self.draft, self.most = target, draft, most
        self._cache = draft.new_cache(1 + ROUNDS, 0)

    def read(self, example: Example) -> tuple[Tensor, Tensor]:
        """States that the target chose the output tokens from, [n, hidden], and the draft's.

        Those of the draft are [prompt + n - 2, hidden], by position: a round that begins after t
        output tokens proposes from the one at prompt + t - 2.
        """
        draft, wanted = self.draft, self.draft.features.layers
        hidden, inputs = read_states(self.target, [example], wanted)
        features = draft.features.fuse(torch.cat([inputs[layer] for layer in wanted], -1))
        tokens = torch.tensor(example.input_ids[1:], device=draft.device)
        self._cache.grow(1 + ROUNDS, len(tokens) + self.most)
        self._cache.rollback(0, 0)
        known = features[:-1].to(draft.device, self.target.dtype)
        states: Tensor = draft.read(self._cache, [(0, len(tokens))], tokens, known)
        return hidden[len(example.prompt_ids) - 1 :], states.clone()

    def begin(self, starts: Sequence[int], prompt: int) -> range:
        """Slots of rounds that begin after so many output tokens, at most ROUNDS of them.

        Args:
            prompt: tokens of the prompt.
        """
        slots = range(1, 1 + len(starts))
        self._cache.fork(0, slots, [prompt + t - 1 for t in starts])
        return slots

    def go_on(self, rows: Sequence[Row], tokens: Tensor, states: Tensor) -> Tensor:
        """The next states [n, hidden] of rounds that read a token each, int64 [n].

        Args:
            rows: their slots, (slot, 1).
            states: [n, hidden], what the tokens were drawn from.
        """
        found: Tensor = self.draft.read(self._cache, rows, tokens, states)
        return found.clone()
