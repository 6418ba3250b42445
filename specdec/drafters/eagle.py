"""An EAGLE-3 draft as the drafter: it reads what the target knew of each token.

The first forward of a round reads the tokens that the target has computed since, the accepted ones
among them, each with its feature. Every other forward reads the candidates just drawn, with the
draft's own states in place of features. When a row stops drafting its cache falls back to the last
position with a feature of the target's. So its candidates depend on its text alone.

Features lie in the target's cache (specdec/model/features.py). They are there for each token that
the target has computed or taken over from another row, until the draft reads it, if it ever does.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from specdec.drafters.base import Candidates, Choose, Drawn
from specdec.drafters.model import DraftLayout
from specdec.measure.clock import PhaseClock
from specdec.model.cache import SlotCache
from specdec.model.eagle import EagleDecoder
from specdec.model.prefill import feed_ahead
from specdec.model.rows import Row, packed_rows, upload
from specdec.model.sharing import SharedCaches, TokenRow
from specdec.model.trees import Tree

READ_AGAIN = 16
"""Tokens that a row may lack and not count as one whose text the draft has still to read.

Each round reads those that it has accepted; they come in one forward of one layer. Raised, short
gaps are hidden from what policies take a new row to cost.
"""


def pending_of(lacking: int) -> int:
    """Of the positions that a draft has not read of a row, those that policies count."""
    return max(lacking - READ_AGAIN, min(lacking, 1))


class EagleDrafter:
    """Proposes from an EAGLE-3 draft's distribution; see `Drafter`.

    Args:
        decoder: the draft.
        target: the target's cache, still empty: it keeps features from now on.
        vocab_size: tokens that count.
        chunk: most tokens of a row in one forward.
        clock: books what is timed, as `prefill`, `draft` and `sample`.
    """

    def __init__(
        self,
        decoder: EagleDecoder,
        target: SlotCache,
        *,
        vocab_size: int,
        chunk: int,
        clock: PhaseClock,
    ) -> None:
        self.decoder, self.cache, self.target = decoder, decoder.new_cache(0, 0), target
        self.vocab_size, self.chunk, self.clock = vocab_size, chunk, clock
        self.invariant = self.branches = self.reads_known = False
        target.keep_features(decoder.features)

    def room(self, row: TokenRow) -> int:
        """See `Drafter`; there must be a token with a feature, and one behind it."""
        tokens = len(row.tokens)
        return max(0, self.decoder.context_length - tokens) if tokens > self.cache.ahead else 0

    def pending(self, row: TokenRow, read: int) -> int:
        """See `Drafter`."""
        return pending_of(self.lacking(row, read))

    def lacking(self, row: TokenRow, read: int) -> int:
        """Positions that are not among those `read` of a row whose last token is pending."""
        return len(row.tokens) - self.cache.ahead - read

    def begin(
        self,
        rows: Sequence[TokenRow],
        slots: Sequence[int],
        known: Sequence[Sequence[int]],
        shared: SharedCaches,
    ) -> EagleDrafting:
        assert not any(known[slot] for slot in slots), "the target has not computed their features"
        return EagleDrafting(self, rows, slots, shared)

    def forward(self, cache: SlotCache, rows: Sequence[Row], tokens: Tensor) -> Tensor:
        """Read tokens with their features; see `PackedDecoder.forward`."""
        return self.decoder.read(cache, rows, tokens, self.features(rows))

    def features(self, rows: Sequence[Row]) -> Tensor:
        """Features [N, width] of the next positions of some rows, (slot, number)."""
        places = packed_rows(self.cache.lengths, rows)
        slots, positions = upload(
            self.cache.device,
            [row.slot for row in places for _ in range(row.tokens)],
            [at for row in places for at in range(row.start, row.start + row.tokens)],
        )
        return self.target.read_features(slots, positions)


class EagleDrafting:
    """The drafting of one round by an `EagleDrafter`; see `Drafting`."""

    def __init__(
        self,
        drafter: EagleDrafter,
        rows: Sequence[TokenRow],
        slots: Sequence[int],
        shared: SharedCaches,
    ) -> None:
        self._drafter, self._rows, self._slots, self._shared = drafter, rows, slots, shared
        # The active rows' last candidates [n], and the states [n, hidden] they were drawn from.
        self._drawn: tuple[Tensor, Tensor] | None = None

    def step(self, choose: Choose) -> Candidates:
        """One forward for all active rows."""
        by, fed, last = self._drafter, list[int](), None
        if self._drawn is None:
            with by.clock.phase({"prefill": 1.0}):
                given = self._shared, self._rows, self._slots, by.chunk
                fed = feed_ahead(by, by.cache, *given)
            texts = [row.tokens for row in self._rows]
            read = [positions + by.cache.ahead for positions in by.cache.lengths]
            first = DraftLayout.of(texts, read, self._slots)
            rows, (tokens, last) = first.rows, upload(by.cache.device, first.tokens, first.last)
            states = by.features(rows)
        else:
            rows, (tokens, states) = [(slot, 1) for slot in self._slots], self._drawn
        drawing = _Drawing(by.decoder, by.vocab_size, choose, last)
        with by.clock.phase({"draft": 1.0}):
            drawn, q, signals, states = by.decoder.read(by.cache, rows, tokens, states, drawing)
        self._drawn = drawn, states
        return Candidates(drawn, q, signals, [*fed, len(tokens)])

    def go_on(self, indices: Sequence[int]) -> None:
        assert self._drawn is not None, "a step comes first"
        if len(indices) == len(self._slots):
            return
        going = {self._slots[i] for i in indices}
        for slot in self._slots:
            if slot not in going:
                self._drafter.cache.rollback(slot, len(self._rows[slot].tokens) - 1)
        self._slots = [self._slots[i] for i in indices]
        drawn, states = self._drawn
        (at,) = upload(drawn.device, indices)
        self._drawn = drawn[at], states[at]

    def branch(
        self, rows: Sequence[Row], tokens: Tensor, trees: Sequence[Tree], choose: Choose
    ) -> Candidates:
        """Not to be called: each node would need the state of the one before it."""
        raise NotImplementedError("EAGLE-3 drafts chains: `branches` says so")


@dataclass(frozen=True, slots=True, eq=False)
class _Drawing:
    """What becomes of a draft step's states; see `specdec.model.graphs.Tail`.

    Attributes:
        decoder: makes the logits.
        vocab_size: of these.
        choose: draws from them.
        last: int64 [n], which states candidates are drawn from; None: all of them.
    """

    decoder: EagleDecoder
    vocab_size: int
    choose: Choose
    last: Tensor | None

    recordable: ClassVar[bool] = False
    key: ClassVar[Hashable] = None
    inputs: ClassVar[tuple[Tensor, ...]] = ()

    def __call__(self, hidden: Tensor, *inputs: Tensor) -> tuple[*Drawn, Tensor]:
        """What was drawn, and the states [n, hidden] that it was drawn from."""
        model = self.decoder.model
        states = hidden if self.last is None else hidden[self.last]
        normed = self.decoder.normed(states)
        if self.choose.likeliest and self.decoder.most_known < self.vocab_size:
            # Among its own tokens: those that it does not know are many, and none is the likeliest.
            drawn, q, signals = self.choose(model.own_logits(normed), normed, *self.choose.inputs)
            return model.known[drawn], q, signals, states
        logits = model.logits(normed)[:, : self.vocab_size]
        return *self.choose(logits, normed, *self.choose.inputs), states
