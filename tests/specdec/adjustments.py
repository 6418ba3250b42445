"""What rows may ask of their logits, and the slow way to do it: token by token, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from specdec.request import SamplingParams

STOP = 4
"""A stop token of the requests below."""

ALONE: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.7},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 1.2},
    "bias": {"logit_bias": {1: 2.0, 3: -1.5}},
    "min_tokens": {"min_tokens": 3, "stop_token_ids": (STOP,)},
    "bad_words": {"bad_words": ((2, 1), (0,), (3, 4, 3))},
    "allowed": {"allowed_token_ids": (0, 1, 3)},
    "ngram": {"no_repeat_ngram_size": 2},
}
"""Each adjustment alone, where few tokens are enough to meet it."""

PAIRS: dict[str, dict[str, Any]] = {
    f"{a} and {b}": ALONE[a] | ALONE[b]
    for a, b in [
        ("repetition", "frequency"),
        ("repetition", "bias"),
        ("presence", "frequency"),
        ("allowed", "bad_words"),
        ("bias", "min_tokens"),
        ("ngram", "presence"),
    ]
}


def adjusted_by_hand(
    logits: Tensor,
    prompt: Sequence[int],
    output: Sequence[int],
    asked: SamplingParams,
    eos: Sequence[int] = (),
) -> Tensor:
    """float64 [V]: logits [V] of the token after `output`, as the request asks for."""
    x = logits.double().clone()
    text, never = [*prompt, *output], float("-inf")
    if asked.allowed_token_ids is not None:
        for token in range(len(x)):
            x[token] = x[token] if token in asked.allowed_token_ids else never
    if len(output) < asked.min_tokens:
        x[list({*asked.stop_token_ids, *eos})] = never
    for word in asked.bad_words:
        *before, last = word
        if list(output[len(output) - len(before) :]) == before:
            x[int(last)] = never
    n = asked.no_repeat_ngram_size
    if n:
        for i in range(len(text) - n + 1):
            *before, last = text[i : i + n]
            if text[len(text) - n + 1 :] == before:
                x[last] = never
    for token, bias in asked.logit_bias.items():
        x[token] += bias
    for token in set(text):
        by = asked.repetition_penalty
        x[token] = x[token] / by if x[token] > 0 else x[token] * by
    for token in set(output):
        x[token] -= asked.presence_penalty + asked.frequency_penalty * output.count(token)
    return x
