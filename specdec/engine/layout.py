"""Where everything lies in the one target forward of a round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from specdec.model.rows import Row


class VerifiedRow(Protocol):
    """What the layout needs of a row: its tokens, and how many of them are output."""

    tokens: list[int]

    @property
    def generated(self) -> int:
        """Output tokens so far."""


@dataclass(frozen=True, slots=True)
class VerifyLayout:
    """The packed tokens of a verification, and which of them are scored (host numbers).

    Each row feeds its pending tokens, then its submitted candidates. The logits at its last pending
    token judge its first candidate; those at its last candidate give the bonus token. So a row with
    k candidates needs k + 1 of them. Of a tree, those at each node judge its children.

    A row of tokens 5 6 7, of which the cache has 2 and the output has one, with 2 candidates; then
    a row whose prompt 1 2 3 4 is fed in chunks of 3:

    >>> rows = [row(prompt=[5, 6], output=[7]), row(prompt=[1, 2, 3, 4], output=[])]
    >>> layout = VerifyLayout.of(rows, cached=[2, 0], submitted=[2, 0], width=2, chunk=3)
    >>> layout.rows                 # slot 0: the token 7 and two candidates; slot 1: 1 2 3
    [(0, 3), (1, 3)]
    >>> layout.pending
    [7, 1, 2, 3]
    >>> layout.order                # candidates of both rows are 0..3, pending tokens 4..7
    [4, 0, 1, 5, 6, 7]
    >>> layout.scored, layout.first
    ([0, 1, 2, 5], [0, 3])
    >>> layout.owner, layout.at
    ([0, 0, 0, 1], [1, 2, 3, 0])
    >>> layout.complete
    [True, False]

    Attributes:
        rows: slot and number of packed tokens of each row.
        pending: the pending tokens of all rows, end to end.
        order: each packed token as an index into all candidates [B * width] followed by `pending`.
        scored: packed tokens whose logits are needed.
        first: where each row's begin among the scored.
        owner, at: the row of each scored token, and the output position that its logits predict.
        complete: whether a row's tokens are then all fed; only then does it commit something.
    """

    rows: list[Row]
    pending: list[int]
    order: list[int]
    scored: list[int]
    first: list[int]
    owner: list[int]
    at: list[int]
    complete: list[bool]

    @property
    def numbers(self) -> tuple[list[int], ...]:
        """What the device needs: pending, order, scored, first, owner, at."""
        return self.pending, self.order, self.scored, self.first, self.owner, self.at

    @classmethod
    def of(
        cls,
        rows: Sequence[VerifiedRow],
        cached: Sequence[int],
        submitted: Sequence[int],
        width: int,
        chunk: int,
        depths: Callable[[int], Sequence[int]] | None = None,
    ) -> VerifyLayout:
        """The layout of a round.

        Args:
            rows: the B live rows, by slot.
            cached: how many of its tokens the target's cache holds of each, at least; fewer than
                there are.
            submitted: how many candidates each submits, at most `width`.
            width: columns of the table of candidates.
            chunk: most pending tokens of a row in one forward. A row that has more submits none.
            depths: how far behind its tokens each candidate of a row comes; by default 1, 2, ..
        """
        packed: list[Row] = []
        pending: list[int] = []
        order: list[int] = []
        scored: list[int] = []
        first: list[int] = []
        owner: list[int] = []
        at: list[int] = []
        complete: list[bool] = []
        for slot, (row, k) in enumerate(zip(rows, submitted, strict=True)):
            begin, generated = cached[slot], row.generated
            tokens = row.tokens[begin : begin + chunk]
            known, drafted = len(rows) * width + len(pending), slot * width
            order += range(known, known + len(tokens))
            pending += tokens
            packed.append((slot, len(tokens) + k))
            first.append(len(scored))
            scored.append(len(order) - 1)
            owner.append(slot)
            at.append(generated)
            if k:
                scored += range(len(order), len(order) + k)
                order += range(drafted, drafted + k)
                owner += [slot] * k
                behind = range(1, k + 1) if depths is None else depths(slot)[:k]
                at += [generated + depth for depth in behind]
            complete.append(begin + len(tokens) == len(row.tokens))
        return cls(packed, pending, order, scored, first, owner, at, complete)
