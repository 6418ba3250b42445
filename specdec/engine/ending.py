"""Where a row's output ends: end of sequence, stop tokens, stop strings, length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from specdec.request import FinishReason, SamplingParams

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True, slots=True)
class Ending:
    """How many tokens the output has, and why it has no more.

    Attributes:
        length: tokens of the output.
        finish_reason, stop_reason: as of the `Completion`.
        error: what went wrong, if the reason is "error".
    """

    length: int
    finish_reason: FinishReason
    stop_reason: int | str | None = None
    error: str | None = None


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


def failure(length: int) -> Ending:
    """The end of a row whose target has no distribution of the token after `length` of them."""
    said = (
        f"the target's logits at output token {length + 1} are NaN, infinite or all -inf; "
        "float16 overflows to that: try models.dtype bfloat16 or float32"
    )
    return Ending(length, "error", error=said)


def _window(stops: Sequence[str]) -> int:
    """Tokens that cover any stop string: one a byte, and some for what decoding does at an edge."""
    return max(len(stop.encode()) for stop in stops) + 4
