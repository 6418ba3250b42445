"""Where a row's output ends: end of sequence, stop tokens, stop strings, length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from specdec.request import FinishReason, SamplingParams

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True, slots=True)
class Ending:
    """How many tokens the output has, and why it has no more."""

    length: int
    finish_reason: FinishReason
    stop_reason: int | str | None = None


def find_ending(
    output: Sequence[int],
    known: int,
    sampling: SamplingParams,
    eos_token_ids: frozenset[int],
    decode: Decode | None,
) -> Ending | None:
    """The first end of `output` among its tokens from index `known` on, or None.

    Looks at one token after another, so the answer does not depend on how many of them one round
    committed.
    """
    for index in range(known, len(output)):
        length, token = index + 1, output[index]
        if token in sampling.stop_token_ids:
            return Ending(length, "stop", token)
        if token in eos_token_ids and not sampling.ignore_eos:
            return Ending(length, "stop", token)
        if sampling.stop and decode is not None:
            text = decode(output[max(0, length - _window(sampling.stop)) : length])
            found = [(text.find(stop), stop) for stop in sampling.stop if stop in text]
            if found:
                return Ending(length, "stop", min(found)[1])
        if length == sampling.max_new_tokens:
            return Ending(length, "length")
    return None


def _window(stops: Sequence[str]) -> int:
    """Tokens that cover any stop string: one a byte, and some for what decoding does at an edge."""
    return max(len(stop.encode()) for stop in stops) + 4
