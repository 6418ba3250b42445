"""What a request must be to get a slot, and what memory there is for its keys and values."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import psutil
import torch

from specdec.engine.ending import Decode, StopSearch
from specdec.engine.scheduler import LiveRow
from specdec.lossless.grammars import Grammars
from specdec.model.cache import SlotCache
from specdec.model.decoder import PackedDecoder
from specdec.model.pages import PAGE, pages_of
from specdec.request import InvalidRequest, Request, SamplingParams

log = logging.getLogger(__name__)


class Pair(Protocol):
    """What the engine needs of a `ModelPair`."""

    target: PackedDecoder
    draft: PackedDecoder | None
    vocab_size: int
    context_length: int
    draft_context_length: int
    eos_token_ids: frozenset[int]


def memory_by_default(device: torch.device, share: float = 1.0) -> int:
    """Bytes for keys and values where nobody says: half of an engine's share of what is free.

    Args:
        device: where the models are.
        share: of the device, that this engine may take; others may run beside it.
    """
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = psutil.virtual_memory().available
    return int(share * free) // 2


def divide(caches: Sequence[SlotCache], slots: int, memory: int) -> tuple[int, int]:
    """How many slots there can be, and how many pages each cache can have.

    Layers whose state runs on take memory for each slot. They get half of it at most, so that fewer
    rows are in flight where their states are large.

    Args:
        caches: of all models.
        slots: most that are wanted.
        memory: bytes for all that caches hold.
    """
    each = sum(cache.bytes_per_slot for cache in caches)
    page = PAGE * sum(cache.bytes_per_position for cache in caches)
    possible = max(1, memory // (2 if page else 1) // each) if each else slots
    if possible < slots:
        log.warning(
            "%d rows in flight, not %d: layers whose state runs on take %.3g MB for each of them",
            possible, slots, each / 1e6,
        )  # fmt: skip
        slots = possible
    return slots, max(0, (memory - slots * each) // max(1, page) - 1)  # one is nobody's


def row_of(
    request: Request,
    pair: Pair,
    pages: int,
    decode: Decode | None,
    grammars: Grammars | None,
) -> LiveRow:
    """The row of a request, its output cut to what the context has room for.

    Args:
        request: as submitted.
        pair: the models.
        pages: of each cache.
        decode: token ids to text, which stop strings need.
        grammars: makes matchers, which grammars need.

    Raises:
        InvalidRequest: it cannot be served; the message says why.
    """
    prompt, context = len(request.prompt_ids), pair.context_length
    if not prompt:
        raise InvalidRequest("the prompt has no tokens")
    if not all(0 <= t < pair.vocab_size for t in (*request.prompt_ids, *request.given_ids)):
        raise InvalidRequest(f"the prompt has a token outside the vocabulary of {pair.vocab_size}")
    if request.given_ids:
        return _scored_row(request, context, pages)
    if prompt >= context:
        raise InvalidRequest(
            f"the prompt has {prompt} tokens, but the model's context of {context} must also "
            "hold at least one new token"
        )
    if request.sampling.stop and decode is None:
        raise InvalidRequest("stop strings need an engine with a decode function")
    if request.sampling.grammar is not None:
        if grammars is None:
            raise InvalidRequest("a grammar needs an engine with grammars")
        if fault := grammars.check(request.sampling.grammar):
            raise InvalidRequest(f"the grammar cannot be used: {fault}")
    _check_tokens(request.sampling, pair.vocab_size)
    room = min(request.sampling.max_new_tokens, context - prompt)
    least = min(request.sampling.min_tokens, room)
    sampling = replace(request.sampling, max_new_tokens=room, min_tokens=least)
    row = LiveRow(request, sampling, list(request.prompt_ids), prompt)
    _check_memory(row, "prompt and max_new_tokens", pages)
    if request.sampling.stop and decode is not None:
        row.stops = StopSearch(request.sampling.stop, request.prompt_ids, decode)
    return row


def _scored_row(request: Request, context: int, pages: int) -> LiveRow:
    """The row of a completion that is given: of its sampling, only `logprobs` counts."""
    prompt, given = len(request.prompt_ids), len(request.given_ids)
    if prompt + given > context:
        raise InvalidRequest(
            f"prompt and completion have {prompt} and {given} tokens, but the model's context is "
            f"of {context}"
        )
    sampling = SamplingParams(max_new_tokens=given, logprobs=request.sampling.logprobs or 0)
    row = LiveRow(request, sampling, [*request.prompt_ids, *request.given_ids], prompt)
    _check_memory(row, "prompt and completion", pages)
    return row


def _check_memory(row: LiveRow, what: str, pages: int) -> None:
    """Check that the caches can hold a row."""
    if pages_of(row.need) > pages:
        raise InvalidRequest(
            f"{what} need {row.need} cache positions, but the memory for keys and values holds "
            f"{pages * PAGE}"
        )


def _check_tokens(sampling: SamplingParams, vocab_size: int) -> None:
    """Check that the tokens that a request names are the model's."""
    words: set[int] = set()
    for word in sampling.bad_words:
        if isinstance(word, str):
            raise InvalidRequest(f"bad_words: {word!r} must be given as token ids")
        words.update(word)
    named = {
        "logit_bias": sampling.logit_bias,
        "allowed_token_ids": sampling.allowed_token_ids or (),
        "bad_words": words,
    }
    for name, tokens in named.items():
        for token in tokens:
            if not 0 <= token < vocab_size:
                raise InvalidRequest(
                    f"{name}: the target has no token {token}; it has {vocab_size:,}, from 0 on"
                )
