"""What the rows in slots ask for, as tensors that last as long as the rows do."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from specdec.engine.admission import Pair
from specdec.engine.logprobs import LogprobReader, PromptReader
from specdec.engine.scheduler import LiveRow
from specdec.lossless.adjust import Adjuster
from specdec.lossless.grammars import Grammars, Masks, RowGrammar
from specdec.lossless.sampling import SamplingBatch
from specdec.measure.clock import PhaseClock
from specdec.model.cache import SlotCache


class Asked(NamedTuple):
    """What the rows of a batch ask for.

    Attributes:
        sampling: their sampling parameters.
        adjuster: what they ask of their logits, if any of them does.
        reader: reads log-probabilities, if any of them wants some.
        masks: of this round, if any of them has a grammar.
    """

    sampling: SamplingBatch
    adjuster: Adjuster | None
    reader: LogprobReader | None
    masks: Masks | None = None

    @property
    def of_logits(self) -> bool:
        """Whether any row asks for anything of its logits."""
        return self.adjuster is not None or self.masks is not None


class AskedFor:
    """The parameters of the rows in slots, made anew only where the rows are others.

    Args:
        pair: the models.
        cache: the target's.
        chunk: most prompt tokens of a row in one forward.
        clock: books what the prompts' log-probabilities take.
        grammars: makes matchers, if rows may have grammars.

    Attributes:
        prompts: reads the log-probabilities of tokens that are there.
    """

    def __init__(
        self,
        pair: Pair,
        cache: SlotCache,
        chunk: int,
        clock: PhaseClock,
        grammars: Grammars | None,
    ) -> None:
        self._pair, self._device, self._grammars = pair, cache.device, grammars
        self.prompts = PromptReader(pair.target, cache, chunk, pair.vocab_size, clock)
        self._rows: list[LiveRow] = []
        self._masked = False
        self._asked = Asked(SamplingBatch.of([], cache.device), None, None)

    def by(self, rows: Sequence[LiveRow]) -> Asked:
        """What the rows ask for."""
        if self._rows != rows:
            sampling = SamplingBatch.of([row.sampling for row in rows], self._device)
            self._asked = Asked(sampling, self.adjuster_of(rows), reader_of(rows))
            self._rows, self._masked = list(rows), self._open_grammars(rows)
            for slot, row in enumerate(rows):
                if row.sampling.prompt_logprobs is not None and row.prompt_logprobs is None:
                    self.prompts.read(slot, row)
        if self._asked.adjuster is not None:
            self._asked.adjuster.follow()
        return self._asked._replace(masks=self._masks()) if self._masked else self._asked

    def _open_grammars(self, rows: Sequence[LiveRow]) -> bool:
        """Give the rows that ask for a grammar their own; return whether there are any."""
        for row in rows:
            if row.sampling.grammar is not None and row.grammar is None:
                assert self._grammars is not None, "admission refuses grammars otherwise"
                make = partial(self._grammars.matcher, row.sampling.grammar)
                row.grammar = RowGrammar(make)
        return any(row.grammar is not None for row in rows)

    def _masks(self) -> Masks:
        assert self._grammars is not None, "admission refuses grammars otherwise"
        rows, vocab_size = self._rows, self._pair.vocab_size
        own, generated = [row.grammar for row in rows], [row.generated for row in rows]
        return Masks(self._grammars, own, generated, vocab_size, self._device)

    def adjuster_of(self, rows: Sequence[LiveRow]) -> Adjuster | None:
        """An adjuster of the rows, if one of them asks for anything of its logits."""
        if not any(row.adjusts for row in rows):
            return None
        pair, before = self._pair, self._asked.adjuster
        return Adjuster([*rows], pair.eos_token_ids, pair.vocab_size, self._device, before)


def reader_of(rows: Sequence[LiveRow]) -> LogprobReader | None:
    """A reader of log-probabilities, if one of the rows wants some."""
    wanted = any(row.sampling.logprobs is not None for row in rows)
    return LogprobReader(rows) if wanted else None
