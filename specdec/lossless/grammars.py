"""Which tokens the grammars of rows allow, at every candidate position of a round.

A grammar runs on the host, one token after another. So each draft step tells it the candidates just
drawn, and gets the masks of the next position: target and draft are masked alike, and verification
finds the masks of all its positions made.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specdec.model.rows import upload


class Matcher(Protocol):
    """A grammar, and the tokens that it has read. llguidance's `LLMatcher` is one."""

    def try_consume_tokens(self, tokens: list[int]) -> int:
        """Read tokens as far as they fit; return how many did."""

    def rollback(self, num_tokens: int) -> bool:
        """Forget the last tokens."""

    def validate_tokens(self, tokens: list[int]) -> int:
        """How many of the tokens could be read."""

    def compute_ff_tokens(self) -> list[int]:
        """The tokens of the text that alone can follow, as the tokenizer would cut it."""

    def is_stopped(self) -> bool:
        """Whether nothing but an end can follow."""

    def is_error(self) -> bool:
        """Whether it can go on no more."""

    def get_error(self) -> str:
        """What went wrong."""


class Grammars(Protocol):
    """Makes matchers of grammars, for the tokens of one model."""

    def check(self, grammar: str) -> str | None:
        """Why a grammar cannot be used, or None."""

    def matcher(self, grammar: str) -> Matcher:
        """A matcher that has read nothing."""

    def fill(self, matchers: Sequence[Matcher], words: NDArray[np.int32]) -> None:
        """Write the masks of what may come next to `words` [n, W]: a bit for each token."""


class RowGrammar:
    """A row's grammar: what is committed, and behind it the candidates of the round.

    Args:
        make: makes a matcher that has read nothing.
    """

    def __init__(self, make: Callable[[], Matcher]) -> None:
        self._make, self.matcher = make, make()
        self._committed: list[int] = []
        self._drafted = 0
        self.open = True  # whether anything can follow what it has read

    def forced(self, most: int) -> list[int]:
        """Behind what is committed, the tokens of the only text that can follow: at most so many.

        Other tokens may make the same text, so that these are likely, and not all certain.
        """
        return self.matcher.compute_ff_tokens()[:most]

    def fitting(self, tokens: list[int]) -> int:
        """How many of some tokens can follow what is committed."""
        return self.matcher.validate_tokens(tokens)

    def draft(self, token: int) -> None:
        """Read a candidate; one that does not fit cannot stand, and none is read behind it."""
        self.open = self.open and not self.matcher.is_stopped()
        self.open = self.open and self.matcher.try_consume_tokens([token]) == 1
        self._drafted += self.open

    def forget(self) -> None:
        """Forget the candidates."""
        if self.matcher.is_error():  # which does not go away by rolling back
            self.matcher = self._make()
            self.matcher.try_consume_tokens(self._committed)
        elif self._drafted:
            self.matcher.rollback(self._drafted)
        self._drafted, self.open = 0, True

    def commit(self, token: int) -> bool:
        """Read a token of the output; return whether the grammar ends there."""
        self._committed.append(token)
        self.matcher.try_consume_tokens([token])
        return self.matcher.is_stopped()


class Masks:
    """The masks of one round.

    Args:
        grammars: make the masks.
        rows: each row's grammar, by slot, if it has one.
        generated: output tokens of each row so far.
        vocab_size: V.
    """

    def __init__(
        self,
        grammars: Grammars,
        rows: Sequence[RowGrammar | None],
        generated: Sequence[int],
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self._grammars, self._rows, self._vocab, self._device = grammars, rows, vocab_size, device
        self._slots = [slot for slot, row in enumerate(rows) if row is not None]
        # Rows without a grammar share a mask that allows everything, behind the others.
        place = {slot: i for i, slot in enumerate(self._slots)}
        places = [place.get(slot, len(self._slots)) for slot in range(len(rows))]
        self._place, self._generated = upload(device, places, generated)
        self._table = torch.zeros(0, device=device)
        self._drafted = [0] * len(rows)  # candidates of each row
        for slot in self._slots:
            self._grammar(slot).forget()
        self._add(self._slots)

    def forced(self, slot: int, most: int) -> list[int]:
        """Tokens that the grammar of a row forces next, at most so many; none without a grammar.

        They end before one that the tokenizer has and the model has not.
        """
        grammar = self._rows[slot]
        tokens = [] if grammar is None else grammar.forced(most)
        return [*itertools.takewhile(lambda token: token < self._vocab, tokens)]

    def fitting(self, slot: int, tokens: list[int]) -> int:
        """How many of some tokens a row's grammar allows next; all without a grammar."""
        grammar = self._rows[slot]
        return len(tokens) if grammar is None else grammar.fitting(tokens)

    def lead(self, known: Sequence[Sequence[int]]) -> None:
        """Read the candidates that each row has before any is drawn."""
        for depth in range(max(map(len, known))):
            going = [slot for slot, tokens in enumerate(known) if len(tokens) > depth]
            self._follow(going, [known[slot][depth] for slot in going])

    def follow(self, slots: Sequence[int], tokens: Tensor) -> None:
        """Read the candidates just drawn, `tokens` int64 [n] of these slots; the host waits."""
        self._follow(slots, tokens.tolist())

    def _follow(self, slots: Sequence[int], tokens: Sequence[int]) -> None:
        reading = []
        for slot, token in zip(slots, tokens, strict=True):
            self._drafted[slot] += 1
            if (grammar := self._rows[slot]) is not None:
                grammar.draft(token)
                reading.append(slot)
        self._add(reading)

    def apply(self, logits: Tensor, owner: Tensor, at: Tensor) -> Tensor:
        """Logits float32 [n, V] of slots `owner` at output positions `at` int64 [n], masked."""
        octets = self._table[at - self._generated[owner], self._place[owner]]  # uint8 [n, bytes]
        bits = torch.arange(8, dtype=torch.uint8, device=octets.device)
        allowed = ((octets[:, :, None] >> bits) & 1).flatten(1)[:, : self._vocab]
        return logits.float().masked_fill(allowed == 0, -math.inf)

    def _add(self, slots: Sequence[int]) -> None:
        """Put what may come next of `slots` to the table, uint8 [positions, rows + 1, bytes].

        What was never put there allows everything.
        """
        if (most := max(self._drafted)) >= len(self._table):
            size = 1, len(self._slots) + 1, 4 * -(-self._vocab // 32)
            fresh = torch.full(size, 255, dtype=torch.uint8, device=self._device)
            self._table = torch.cat([self._table, fresh]) if most else fresh
        going = [slot for slot in slots if self._grammar(slot).open]
        if not going:
            return
        words = np.empty((len(going), -(-self._vocab // 32)), dtype=np.int32)
        self._grammars.fill([self._grammar(slot).matcher for slot in going], words)
        # Where no token fits, llguidance would have the output end as if it were whole.
        stuck = [self._grammar(slot).matcher.is_error() for slot in going]
        words[stuck] = 0
        octets = torch.from_numpy(words.view(np.uint8)).to(self._device, non_blocking=True)
        places = [self._slots.index(slot) for slot in going]
        depth, place = upload(self._device, [self._drafted[slot] for slot in going], places)
        self._table[depth, place] = octets

    def _grammar(self, slot: int) -> RowGrammar:
        grammar = self._rows[slot]
        assert grammar is not None, "only slots with a grammar are asked for"
        return grammar
