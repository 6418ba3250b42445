"""Who proposes candidates: the `Drafter` seam.

In each round the engine asks a drafter to `begin` and then, as long as the stop policy wants more,
for one `step` after another. A step gives one more candidate of each row that still drafts.

    drafting = drafter.begin(rows, slots, known, shared)
    while the policy wants more:
        step = drafting.step(choose)          # one more candidate a row
        drafting.go_on(indices)             # which of the rows draft another

Where candidates branch, all but the first step are

        step = drafting.branch(rows, tokens, trees, choose)     # some children of each node

A drafter may keep state of each row in a `SlotCache`. The engine moves and rolls it back with the
rows, so that between rounds it holds a prefix of a row's tokens and never a rejected candidate.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from specdec.model.cache import SlotCache
from specdec.model.rows import Row
from specdec.model.sharing import SharedCaches, TokenRow
from specdec.model.trees import Tree

Drawn = tuple[Tensor, Tensor | None, Tensor | None]
"""Candidates int64 [n]; the distributions float32 [n, V] that they were drawn from, if verification
needs them; their signals float32 [n, len(Signal)], if a policy wants them. Of siblings tokens are
[n, width] and signals [n, width, len(Signal)]."""


class Choose(Protocol):
    """Draws candidates of n rows from the draft's logits: a pure function of tensors.

    So it can be recorded together with the forward that makes the logits, and repeated on others.

    Attributes:
        recordable: whether `key` and `inputs` say all of it. What rows ask of their logits is more.
        likeliest: whether it draws the likeliest token of each row, whatever tokens stand for.
        key: all of it that is no tensor. What has the same key computes the same.
        inputs: tensors [n, ...] that it reads besides.
    """

    @property
    def recordable(self) -> bool: ...

    @property
    def likeliest(self) -> bool: ...

    @property
    def key(self) -> Hashable: ...

    @property
    def inputs(self) -> tuple[Tensor, ...]: ...

    def __call__(self, logits: Tensor, hidden: Tensor, *inputs: Tensor) -> Drawn:
        """Draw from logits [n, V], made of states [n, H], with such inputs."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """One more candidate of each of n active rows.

    Attributes:
        tokens, q, signals: see `Drawn`. Tokens and signals are good until the next step.
        fed: tokens of each forward that it took.
    """

    tokens: Tensor
    q: Tensor | None
    signals: Tensor | None
    fed: Sequence[int]

    def of(self, index: Tensor) -> Candidates:
        """Those of some of the rows: index int64 [m]."""
        q, signals = (None if each is None else each[index] for each in (self.q, self.signals))
        return Candidates(self.tokens[index], q, signals, self.fed)

    def kept(self) -> Candidates:
        """A copy that is good for longer."""
        signals = None if self.signals is None else self.signals.clone()
        return Candidates(self.tokens.clone(), self.q, signals, self.fed)


class Drafting(Protocol):
    """The drafting of one round."""

    def step(self, choose: Choose) -> Candidates:
        """Propose one more candidate for each active row."""

    def go_on(self, indices: Sequence[int]) -> None:
        """Keep those of the active rows that draft another candidate: indices into them."""

    def branch(
        self, rows: Sequence[Row], tokens: Tensor, trees: Sequence[Tree], choose: Choose
    ) -> Candidates:
        """Read nodes of the rows' trees and draw children of each.

        Args:
            rows: slot and number of nodes.
            tokens: int64 [n], the nodes', which are drawn candidates.
            trees: of each row, what was read of it and these nodes.
            choose: draws of each node.
        """


class Drafter(Protocol):
    """Proposes candidates.

    Attributes:
        cache: what it keeps of each row.
        branches: whether it can draft trees.
        reads_known: whether it goes on behind candidates that rows have already.
    """

    cache: SlotCache
    branches: bool
    reads_known: bool

    def room(self, row: TokenRow) -> int:
        """Most candidates that it can propose for a row."""

    def pending(self, row: TokenRow, read: int) -> int:
        """Tokens of a row that it must read before it can propose, as policies count.

        What it reads again in each round is not among them.

        Args:
            row: the row.
            read: positions of it that the cache holds.
        """

    def begin(
        self,
        rows: Sequence[TokenRow],
        slots: Sequence[int],
        known: Sequence[Sequence[int]],
        shared: SharedCaches,
    ) -> Drafting:
        """Start to draft for some of the live rows.

        Args:
            rows: the live rows, by slot.
            slots: those that draft.
            known: of each live row the candidates that it has already, which the first step reads.
            shared: the caches, `cache` among them, whose slots take over each other's beginnings.
        """
