"""A row of `completions/` as the response object of `/v1/responses`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline import layout
from pipeline.outputs.openai_messages import message, token

_ECHOED = ("instructions", "max_output_tokens", "metadata", "temperature", "text", "top_p")
"""Parameters that a response repeats as they were given."""


def response_object(
    asked: Mapping[str, Any], sample: Mapping[str, Any], name: str, created: int, model: str
) -> dict[str, Any]:
    """The response to a request.

    Args:
        asked: the request's body.
        sample: the row.
        name: unique to the request, for ids.
        created: seconds since the epoch.
        model: the name that responses give.
    """
    cut = sample["finish_reason"] == "length"
    prompt, output = sample["prompt_tokens"], sample["output_tokens"]
    given = {key: asked[key] for key in _ECHOED if asked.get(key) is not None}
    return {
        "id": f"resp_{name}",
        "object": "response",
        "created_at": created,
        "status": "incomplete" if cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "error": None,
        "model": model,
        "output": [*_items(asked, sample, name, "incomplete" if cut else "completed")],
        "parallel_tool_calls": asked.get("parallel_tool_calls") is not False,
        "tool_choice": asked.get("tool_choice") or "auto",
        "tools": [
            {"parameters": None, "strict": None, **tool} for tool in asked.get("tools") or []
        ],
        **given,
        "usage": {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": output,
            "output_tokens_details": {"reasoning_tokens": sample.get(layout.REASONING_TOKENS) or 0},
            "total_tokens": prompt + output,
        },
    }


def _items(
    asked: Mapping[str, Any], sample: Mapping[str, Any], name: str, status: str
) -> Iterator[dict[str, Any]]:
    """The reasoning, the answer and the calls, those that there are."""
    said = message(sample, asked)
    if (reasoning := said.get("reasoning_content")) is not None:
        part = {"type": "reasoning_text", "text": reasoning}
        yield {"type": "reasoning", "id": f"rs_{name}", "summary": [], "content": [part]}
    calls = said.get("tool_calls") or []
    if said["content"] or not calls:
        told = sample.get(layout.LOGPROBS)
        text = {
            "type": "output_text",
            "text": said["content"] or "",
            "annotations": [],
            "logprobs": [_token(each) for each in told] if told is not None else [],
        }
        content = {"role": "assistant", "status": status, "content": [text]}
        yield {"type": "message", "id": f"msg_{name}", **content}
    for number, call in enumerate(calls):
        yield {
            "type": "function_call",
            "id": f"fc_{name}{number}",
            "call_id": call["id"],
            **call["function"],
            "status": "completed",
        }


def _token(told: Mapping[str, Any]) -> dict[str, Any]:
    """A token and the likeliest ones; here bytes are never null."""
    one, *top = (token(each) for each in (told, *told["top"]))
    for each in (one, *top):
        each["bytes"] = each["bytes"] or []
    return {**one, "top_logprobs": top}
