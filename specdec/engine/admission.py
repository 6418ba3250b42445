"""What a request must be to get a slot."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from specdec.engine.ending import Decode, StopSearch
from specdec.engine.scheduler import LiveRow
from specdec.model.cache import round_to_blocks
from specdec.model.decoder import PackedDecoder
from specdec.request import InvalidRequest, Request


class Pair(Protocol):
    """What the engine needs of a `ModelPair`."""

    target: PackedDecoder
    draft: PackedDecoder | None
    vocab_size: int
    context_length: int
    draft_context_length: int
    eos_token_ids: frozenset[int]


def row_of(request: Request, pair: Pair, max_positions: int, decode: Decode | None) -> LiveRow:
    """The row of a request, its output cut to what the context has room for.

    Args:
        request: as submitted.
        pair: the models.
        max_positions: most cache positions of all rows.
        decode: token ids to text, which stop strings need.

    Raises:
        InvalidRequest: it cannot be served; the message says why.
    """
    prompt, context = len(request.prompt_ids), pair.context_length
    if not prompt:
        raise InvalidRequest("the prompt has no tokens")
    if not all(0 <= token < pair.vocab_size for token in request.prompt_ids):
        raise InvalidRequest(f"the prompt has a token outside the vocabulary of {pair.vocab_size}")
    if prompt >= context:
        raise InvalidRequest(
            f"the prompt has {prompt} tokens, but the model's context of {context} must also "
            "hold at least one new token"
        )
    if request.sampling.stop and decode is None:
        raise InvalidRequest("stop strings need an engine with a decode function")
    room = min(request.sampling.max_new_tokens, context - prompt)
    sampling = replace(request.sampling, max_new_tokens=room)
    row = LiveRow(request, sampling, list(request.prompt_ids), prompt)
    if round_to_blocks(row.need) > max_positions:
        raise InvalidRequest(
            f"prompt and max_new_tokens need {row.need} cache positions, but the memory for "
            f"keys and values holds {max_positions}"
        )
    if request.sampling.stop and decode is not None:
        row.stops = StopSearch(request.sampling.stop, request.prompt_ids, decode)
    return row
