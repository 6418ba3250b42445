"""Rows of `completions/` as what the API's endpoints call messages and tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline import layout
from specdec.request import NO_CHARACTER


def message(sample: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """A chat's answer, with what the model marked in it.

    Args:
        sample: a row.
        asked: the request's body.
    """
    message: dict[str, Any] = {"role": "assistant", "content": sample["completion"]}
    if sample.get(layout.CONTENT) is not None:
        message["content"] = sample[layout.CONTENT]
    if calls := sample.get(layout.TOOL_CALLS):
        one = asked.get("parallel_tool_calls") is False
        message["tool_calls"] = calls[:1] if one else calls
        message["content"] = message["content"] or None
    said = sample.get(layout.REASONING)
    if said is not None and asked.get("include_reasoning") is not False:
        message["reasoning_content"] = said
    return {**message, "refusal": None}


VERY_UNLIKELY = -9999.0
"""What the API has in place of the log-probability of a token that cannot come."""


def finite(logprob: float) -> float:
    """A log-probability as JSON can have it, which knows no infinity."""
    return max(logprob, VERY_UNLIKELY)


def token(told: Mapping[str, Any]) -> dict[str, Any]:
    """A token of a chat, with its bytes where it is whole characters."""
    text = told["token"]
    whole = NO_CHARACTER not in text
    spelled = list(text.encode(errors="replace")) if whole else None
    return {"token": text, "logprob": finite(told["logprob"]), "bytes": spelled}
