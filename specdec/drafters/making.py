"""Which drafter a draft is."""

from __future__ import annotations

from typing import Protocol

from specdec.drafters.base import Drafter
from specdec.drafters.eagle import EagleDrafter
from specdec.drafters.model import ModelDrafter
from specdec.measure.clock import PhaseClock
from specdec.model.cache import SlotCache
from specdec.model.decoder import PackedDecoder
from specdec.model.eagle import EagleDecoder


class Limits(Protocol):
    """What a drafter needs to know of a `ModelPair`."""

    vocab_size: int
    draft_context_length: int


def drafter_of(
    draft: PackedDecoder | None, target: SlotCache, pair: Limits, chunk: int, clock: PhaseClock
) -> Drafter | None:
    """The drafter that proposes from a draft; None if there is none.

    Args:
        draft: a language model, or EAGLE-3.
        target: the target's cache, still empty. EAGLE-3 has it keep features of each token.
        pair: what both models share.
        chunk: most tokens of a row in one forward.
        clock: books what is timed.
    """
    vocab_size, context = pair.vocab_size, pair.draft_context_length
    if draft is None:
        return None
    if isinstance(draft, EagleDecoder):
        return EagleDrafter(draft, target, vocab_size=vocab_size, chunk=chunk, clock=clock)
    return ModelDrafter(
        draft, vocab_size=vocab_size, context_length=context, chunk=chunk, clock=clock
    )
