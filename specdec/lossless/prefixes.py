"""The tokens of rows on the device, and those before each of a batch of positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.model.rows import upload
from specdec.request import SamplingParams


class PrefixRow(Protocol):
    """A row's tokens, and where the output begins in them."""

    sampling: SamplingParams
    tokens: list[int]
    output_start: int


@dataclass(frozen=True, slots=True)
class Prefix:
    """The tokens before each of n positions.

    Attributes:
        tokens: int64 [n, E]: prompt, output and candidates before the position, and then `nowhere`.
        length: int64 [n], how many they are.
        start: int64 [n], where the output begins in them.
        nowhere: the size of the vocabulary, which is no token.
    """

    tokens: Tensor
    length: Tensor
    start: Tensor
    nowhere: int

    @property
    def output(self) -> Tensor:
        """int64 [n, E]: the tokens of the output alone, and elsewhere `nowhere`."""
        place = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return torch.where(place >= self.start[:, None], self.tokens, self.nowhere)


class Prefixes:
    """The tokens of the rows whose logits depend on them; only what is new is sent to the device.

    Args:
        rows: the B live rows, by slot.
        vocab_size: V.
        before: those of the batch before this one, whose tokens are taken over.
    """

    def __init__(
        self,
        rows: Sequence[PrefixRow],
        vocab_size: int,
        device: torch.device,
        before: Prefixes | None = None,
    ) -> None:
        self._rows, self._vocab, self._device = rows, vocab_size, device
        self._reading = [slot for slot, row in enumerate(rows) if row.sampling.reads_prefix]
        had = {id(row): slot for slot, row in enumerate(before._rows)} if before else {}
        source = [had.get(id(row), -1) for row in rows]
        self._known: list[int] = [before._known[s] if before and s >= 0 else 0 for s in source]
        self._table = torch.zeros(len(rows), 0, dtype=torch.int64, device=device)
        if before and before._table.shape[0]:
            self._table = before._table[upload(device, [max(s, 0) for s in source])[0]]
        starts = [row.output_start for row in rows]
        self._start, reads = upload(device, starts, [row.sampling.reads_prefix for row in rows])
        self._reads = reads.bool()

    def follow(self) -> None:
        """Send to the device what the rows' tokens have become."""
        places: list[int] = []
        tokens: list[int] = []
        self._longest = max(len(self._rows[slot].tokens) for slot in self._reading)
        width = self._table.shape[1]
        if self._longest > width:
            # Twice as long as is needed, so that it is not copied in every round.
            self._table = F.pad(self._table, (0, 2 * self._longest - width))
            width = self._table.shape[1]
        for slot in self._reading:
            text, known = self._rows[slot].tokens, self._known[slot]
            places += range(slot * width + known, slot * width + len(text))
            tokens += text[known:]
            self._known[slot] = len(text)
        at, values, self._length = upload(self._device, places, tokens, self._known)
        self._table.view(-1)[at] = values

    def before(self, owner: Tensor, at: Tensor, behind: Tensor) -> Prefix:
        """The tokens before output positions `at` int64 [n] of the slots in `owner` int64 [n].

        Args:
            behind: int64 [n, k], candidates behind the rows' tokens; up to the position they count.
        """
        most = behind.shape[1]
        table = F.pad(self._table[:, : self._longest], (0, most))[owner]
        steps = torch.arange(most, device=self._device)
        table.scatter_(1, self._length[owner, None] + steps, behind)
        length = torch.where(self._reads[owner], self._start[owner] + at, 0)
        inside = torch.arange(table.shape[1], device=self._device) < length[:, None]
        tokens = torch.where(inside, table, self._vocab)
        return Prefix(tokens, length, self._start[owner], self._vocab)


def repeated_ngrams(prefix: Prefix, size: Tensor, most: int) -> Tensor:
    """bool [n, E]: the tokens of a prefix that would end an n-gram which stands in it already.

    Args:
        prefix: of n positions.
        size: int64 [n], tokens of an n-gram; 0: none is looked for.
        most: the largest of these.
    """
    tokens, length = prefix.tokens, prefix.length[:, None]
    found = (tokens != prefix.nowhere) & (size > 0)[:, None]
    for back in range(1, most):
        last = tokens.gather(1, (length - back).clamp(min=0))
        earlier = F.pad(tokens, (back, 0), value=-1)[:, : tokens.shape[1]]
        found &= (earlier == last) | (size <= back)[:, None]
    return found


def ends_of_words(prefix: Prefix, beginnings: Tensor) -> Tensor:
    """bool [n, W]: the words of which all but the last token ends the output before a position.

    Args:
        prefix: of n positions.
        beginnings: int64 [n, W, X]: all but the last token of W words, with -1 in front.
    """
    longest = beginnings.shape[2]
    back = torch.arange(longest, 0, -1, device=beginnings.device)
    place = prefix.length[:, None] - back  # [n, X], where the last X tokens stand
    last = prefix.tokens.gather(1, place.clamp(min=0))
    last = torch.where(place >= prefix.start[:, None], last, prefix.nowhere)
    return ((beginnings == -1) | (beginnings == last[:, None])).all(-1)
