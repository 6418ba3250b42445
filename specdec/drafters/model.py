"""A small language model as the drafter.

The first forward of a round reads all that the model lacks of the rows: a prompt in a row's first
round, two tokens after all candidates were accepted, one otherwise; and the candidates that a row
has already. Every other forward reads the candidates just drawn.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from torch import Tensor

from specdec.drafters.base import Candidates, Choose, Drawn
from specdec.measure.clock import PhaseClock
from specdec.model.decoder import PackedDecoder
from specdec.model.prefill import feed_ahead
from specdec.model.rows import Row, upload
from specdec.model.sharing import SharedCaches, TokenRow
from specdec.model.trees import Tree, Trees, in_trees


@dataclass(frozen=True, slots=True)
class DraftLayout:
    """What the first forward of a round reads: the tokens that each row's slot lacks, end to end.

    Two rows, of which the cache has 2 and 3 tokens:

    >>> DraftLayout.of([[5, 6, 7, 8], [1, 2, 3, 4]], cached=[2, 3], slots=[0, 1])
    DraftLayout(rows=[(0, 2), (1, 1)], tokens=[7, 8, 4], last=[1, 2])

    Attributes:
        rows: slot and number of tokens of each.
        tokens: the tokens, packed.
        last: where each row's last one is: its logits propose the first candidate.
    """

    rows: list[Row]
    tokens: list[int]
    last: list[int]

    @classmethod
    def of(
        cls, texts: Sequence[Sequence[int]], cached: Sequence[int], slots: Sequence[int]
    ) -> DraftLayout:
        """The layout of some rows.

        Args:
            texts: the tokens of each live row, by slot.
            cached: how many of them each slot holds already, fewer than there are.
            slots: the rows to read.
        """
        lacking = [texts[slot][cached[slot] :] for slot in slots]
        counts = [len(tokens) for tokens in lacking]
        return cls(
            rows=list(zip(slots, counts, strict=True)),
            tokens=[token for tokens in lacking for token in tokens],
            last=[end - 1 for end in accumulate(counts)],
        )


class ModelDrafter:
    """Proposes from a language model's distribution; see `Drafter`.

    Args:
        decoder: the model.
        vocab_size: tokens that it has in common with the target.
        context_length: most tokens of a row that it can read.
        chunk: most tokens of a row in one forward.
        clock: books what is timed, as `prefill`, `draft` and `sample`.
    """

    def __init__(
        self,
        decoder: PackedDecoder,
        *,
        vocab_size: int,
        context_length: int,
        chunk: int,
        clock: PhaseClock,
    ) -> None:
        self.decoder, self.cache = decoder, decoder.new_cache(0, 0)
        self.vocab_size, self.context_length = vocab_size, context_length
        self.chunk, self.clock = chunk, clock
        self.branches, self.reads_known = not decoder.recurrent, True

    def room(self, row: TokenRow) -> int:
        """See `Drafter`."""
        return max(0, self.context_length - len(row.tokens))

    def pending(self, row: TokenRow, read: int) -> int:
        """See `Drafter`."""
        return len(row.tokens) - read

    def begin(
        self,
        rows: Sequence[TokenRow],
        slots: Sequence[int],
        known: Sequence[Sequence[int]],
        shared: SharedCaches,
    ) -> ModelDrafting:
        return ModelDrafting(self, rows, slots, known, shared)


class ModelDrafting:
    """The drafting of one round by a `ModelDrafter`; see `Drafting`."""

    def __init__(
        self,
        drafter: ModelDrafter,
        rows: Sequence[TokenRow],
        slots: Sequence[int],
        known: Sequence[Sequence[int]],
        shared: SharedCaches,
    ) -> None:
        self._drafter, self._rows, self._slots, self._shared = drafter, rows, slots, shared
        self._known = known
        self._drawn: Tensor | None = None  # the active rows' last candidates [n]

    def step(self, choose: Choose) -> Candidates:
        """One forward for all active rows."""
        by, fed, last = self._drafter, list[int](), None
        if self._drawn is None:
            with by.clock.phase({"prefill": 1.0}):
                given = self._shared, self._rows, self._slots, by.chunk
                fed = feed_ahead(by.decoder, by.cache, *given)
            texts = [
                [*row.tokens, *known] if known else row.tokens
                for row, known in zip(self._rows, self._known, strict=True)
            ]
            first = DraftLayout.of(texts, by.cache.lengths, self._slots)
            rows, (tokens, last) = first.rows, upload(by.cache.device, first.tokens, first.last)
        else:
            rows, tokens = [(slot, 1) for slot in self._slots], self._drawn
        drawn = self._draw(rows, tokens, choose, last)
        self._drawn = drawn.tokens
        return replace(drawn, fed=[*fed, *drawn.fed])

    def branch(
        self, rows: Sequence[Row], tokens: Tensor, trees: Sequence[Tree], choose: Choose
    ) -> Candidates:
        """One forward for all nodes."""
        return self._draw(rows, tokens, choose, None, in_trees(trees))

    def _draw(
        self,
        rows: Sequence[Row],
        tokens: Tensor,
        choose: Choose,
        last: Tensor | None,
        trees: Trees = None,
    ) -> Candidates:
        by = self._drafter
        drawing = _Drawing(by.decoder, by.vocab_size, choose, last)
        by.decoder.warm_up(by.cache, rows, tokens, by.clock, drawing, trees)
        with by.clock.phase({"draft": 1.0}):
            drawn, q, signals = by.decoder.forward_into(by.cache, rows, tokens, drawing, trees)
            if q is not None and by.decoder.recordings is not None:
                q = q.clone()  # verification needs it when later steps have been repeated
        return Candidates(drawn, q, signals, [len(tokens)])

    def go_on(self, indices: Sequence[int]) -> None:
        assert self._drawn is not None, "a step comes first"
        if len(indices) < len(self._slots):
            self._slots = [self._slots[i] for i in indices]
            self._drawn = self._drawn[upload(self._drawn.device, indices)[0]]


@dataclass(frozen=True, slots=True, eq=False)
class _Drawing:
    """What becomes of a draft step's hidden states; see `specdec.model.graphs.Tail`.

    Attributes:
        decoder: makes the logits.
        vocab_size: of these.
        choose: draws from them.
        last: int64 [n], which states candidates are drawn from; None: all of them.
    """

    decoder: PackedDecoder
    vocab_size: int
    choose: Choose
    last: Tensor | None

    @property
    def recordable(self) -> bool:
        return self.choose.recordable

    @property
    def key(self) -> Hashable:
        return self.choose.key, self.last is None

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return self.choose.inputs if self.last is None else (self.last, *self.choose.inputs)

    def __call__(self, hidden: Tensor, *inputs: Tensor) -> Drawn:
        if self.last is not None:
            last, *inputs_ = inputs
            hidden, inputs = hidden[last], tuple(inputs_)
        logits = self.decoder.logits(hidden)[:, : self.vocab_size]
        return self.choose(logits, hidden, *inputs)
