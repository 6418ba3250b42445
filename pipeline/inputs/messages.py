"""Chat messages: what a cell holds, checked, and written as chat templates want it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

from pipeline.errors import RowError

Message = dict[str, Any]


def check_messages(value: Any) -> list[Message]:
    """The chat messages in a cell: a list of {role, content}, or the same as JSON text.

    Content may be a list of text parts. Beside `tool_calls` it may be missing, and is None then.

    Raises:
        RowError: names the message that is wrong.
    """
    if value is None:
        raise RowError("NullPrompt", "messages are null")
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise RowError("MalformedMessages", "messages are text, but not JSON") from None
        if value is None:
            raise RowError("NullPrompt", "messages are null")
    if not isinstance(value, list):
        raise RowError("MalformedMessages", f"messages are a {type(value).__name__}, not a list")
    if not value:
        raise RowError("EmptyMessages", "messages are an empty list")
    return [_message(number, message) for number, message in enumerate(value)]


def _message(number: int, message: Any) -> Message:
    message = as_object(message)
    if not isinstance(message, dict):
        raise RowError("MalformedMessages", f"message {number} is not an object")
    # Arrow fills fields that a message does not have with null; templates must not see those.
    kept: Message = {k: without_nulls(v) for k, v in message.items() if v is not None}
    content = kept.get("content")
    if isinstance(content, list):
        kept["content"] = _joined(number, content)
    beside_calls = content is None and bool(kept.get("tool_calls"))
    for key in ("role",) if beside_calls else ("role", "content"):
        if not isinstance(kept.get(key), str):
            what = "null" if key in message and message[key] is None else "no text"
            raise RowError("MalformedMessages", f"message {number} has {what} in {key!r}")
    return {**kept, "content": None} if beside_calls else kept


def as_object(value: Any) -> Any:
    """What was a map in Parquet, and is a list of keys and values in the job's table."""
    pairs = isinstance(value, list) and bool(value)
    if pairs and all(isinstance(v, dict) and v.keys() == {"key", "value"} for v in value):
        return {pair["key"]: pair["value"] for pair in value}
    return value


def without_nulls(value: Any) -> Any:
    """A value without the fields that are null, as Arrow fills in where an object has none."""
    if isinstance(value, dict):
        return {key: without_nulls(v) for key, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value


def _joined(number: int, parts: list[Any]) -> str:
    """The text of a content that is a list of parts, as chat APIs have it."""
    texts = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise RowError(
                "MalformedMessages", f"message {number} has a content part of {kind}, not of text"
            )
        texts.append(part["text"])
    return "".join(texts)


def spellings(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """The messages in every way that chat templates know, the usual one first.

    They differ in tool calls alone. APIs have a call's arguments as JSON text; most templates want
    the object, and some the text. Most know calls without a content, and some take one for granted.
    """
    if not any(message.get("tool_calls") for message in messages):
        yield list(messages)
        return
    for empty, as_objects in product((None, ""), (True, False)):
        yield [_spelled(message, empty, as_objects) for message in messages]


def _spelled(message: Message, empty: str | None, as_objects: bool) -> Message:
    calls = message.get("tool_calls")
    if not calls:
        return message
    content = empty if message["content"] is None else message["content"]
    if as_objects and isinstance(calls, list):
        calls = [_with_object(call) for call in calls]
    return {**message, "content": content, "tool_calls": calls}


def _with_object(call: Any) -> Any:
    """A tool call with its arguments as an object, if they are one."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        value = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        return call
    if not isinstance(value, dict):
        return call
    return {**call, "function": {**function, "arguments": value}}
