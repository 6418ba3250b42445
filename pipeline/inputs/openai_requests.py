"""Lines of OpenAI's batch API as rows: what a request asks for, or why it cannot be served.

A line is kept as it is, in one column: requests of one file have bodies of many shapes, and what
an error says must be found in the line. What the API has and this package has not is an error of
that line alone, unless the request gives it the value that changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa

from pipeline.errors import RowError
from pipeline.inputs import openai_items
from pipeline.inputs.openai_parameters import (
    EFFORT,
    IGNORED,
    NEUTRAL,
    OF_CHAT,
    OF_PROMPT,
    OF_RESPONSE,
    SAMPLING,
    SPECIAL_TOKENS,
    TOP,
    Parameters,
    short,
)
from pipeline.inputs.openai_structured import GUIDED, STRUCTURED, structured_outputs
from pipeline.inputs.tools import CHOICE, TOOLS

REQUEST = "request"
"""The column that holds a line."""

LINES_SCHEMA = pa.schema([(REQUEST, pa.string())], metadata={b"specbatch.format": b"openai"})
"""Marks a file whose lines are requests, among those whose lines are rows of columns."""

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"

KWARGS_COLUMN = "chat_template_kwargs"
"""A column of this name has variables of the chat template, row by row (struct or JSON text)."""

COMPLETION_TOKENS = 16
"""`max_tokens` of a /v1/completions request that gives none, as the API documents it."""

_LENGTHS = {CHAT: ("max_completion_tokens", "max_tokens"), COMPLETIONS: ("max_tokens",)}

_BOTH = {*SAMPLING, *OF_PROMPT, *OF_RESPONSE, *STRUCTURED, *GUIDED}
_SERVED = {
    CHAT: frozenset({"messages", *_LENGTHS[CHAT], *_BOTH, *OF_CHAT, EFFORT, TOP}),
    COMPLETIONS: frozenset({"prompt", *_LENGTHS[COMPLETIONS], *_BOTH}),
}
PARAMETERS = {
    url: Parameters(
        served,
        IGNORED,
        {
            name: fine
            for name, fine in {**NEUTRAL, SPECIAL_TOKENS: (url == COMPLETIONS,)}.items()
            if name not in served
        },
    )
    for url, served in _SERVED.items()
} | {RESPONSES: openai_items.PARAMETERS}
"""What becomes of each parameter, by endpoint."""


def request_cells(line: str | None) -> dict[str, Any]:
    """What a row of columns would hold: `messages`, `prompt` or `prompt_ids`, `sampling_params`.

    Args:
        line: a request, as it stands in the file.

    Raises:
        RowError: names what is wrong with it.
    """
    request = _object(line)
    custom_id_of(request)
    method, body = request.get("method"), request.get("body")
    if method not in (None, "POST"):
        raise RowError("InvalidRequest", f"method must be POST, got {short(method)}")
    url = endpoint_of(request)
    if not isinstance(body, dict):
        raise RowError("InvalidRequest", "body must be an object")
    body = {key: value for key, value in body.items() if value is not None}
    if url == RESPONSES:
        body, url = openai_items.as_chat(body), CHAT
    PARAMETERS[url].check(body)
    cells = _chat(body) if url == CHAT else _completion(body)
    sampling = {key: body[key] for key in SAMPLING if key in body}
    if sampling.get("top_k") == -1:
        sampling["top_k"] = 0  # vLLM's way to switch it off
    if sampling.get("seed") == -1:
        del sampling["seed"]  # vLLM's way to give none
    if (structured := structured_outputs(body)) is not None:
        sampling["structured_outputs"] = structured
    told = _logprobs(body, url)
    if told is not None:
        sampling["logprobs"] = told
    given = [name for name in _LENGTHS[url] if name in body]
    for name in given:
        if type(body[name]) is not int or body[name] < 1:
            got = short(body[name])
            raise RowError("InvalidSampling", f"{name} must be an integer of at least 1, got {got}")
    if given:
        sampling["max_new_tokens"] = body[given[0]]
    elif url == COMPLETIONS:
        sampling["max_new_tokens"] = COMPLETION_TOKENS
    cells |= {key: body[key] for key in OF_PROMPT if key in body}
    return {**cells, "sampling_params": sampling}


def _object(line: str | None) -> dict[str, Any]:
    try:
        request = json.loads(line or "")
    except (ValueError, RecursionError) as error:
        raise RowError("MalformedLine", f"the line is not JSON: {error}") from None
    if not isinstance(request, dict):
        raise RowError("MalformedLine", f"the line is not a JSON object but {short(request)}")
    return request


def custom_id_of(request: Mapping[str, Any]) -> str:
    """The request's `custom_id`.

    Raises:
        RowError: it has none.
    """
    custom_id = request.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise RowError("MissingCustomId", "custom_id must be a text that is not empty")
    return custom_id


def endpoint_of(request: Mapping[str, Any]) -> str:
    """The endpoint that a request's `url` is of: `CHAT`, `COMPLETIONS` or `RESPONSES`.

    Clients write it as the API does, without its version, or behind a server's address.

    Raises:
        RowError: it is of another one.
    """
    url = request.get("url")
    try:
        path = urlsplit(url).path if isinstance(url, str) else ""
    except ValueError:  # an address that is none
        path = ""
    parts = path.strip("/").split("/")
    if parts[-2:] == ["chat", "completions"]:
        return CHAT
    if parts == ["completions"] or parts[-2:] == ["v1", "completions"]:
        return COMPLETIONS
    if parts == ["responses"] or parts[-2:] == ["v1", "responses"]:
        return RESPONSES
    known = f"{CHAT}, {COMPLETIONS} and {RESPONSES}"
    raise RowError("UnknownEndpoint", f"url {short(url)} is not served; known: {known}")


def parsed(line: str | None) -> dict[str, Any]:
    """The line's object, or an empty one if the line is none."""
    try:
        return _object(line)
    except RowError:
        return {}


def _logprobs(body: Mapping[str, Any], url: str) -> Any:
    """How many of the likeliest tokens a response tells; None: it tells no log-probabilities."""
    asked, top = body.get("logprobs"), body.get(TOP)
    if url == COMPLETIONS:
        return None if asked is False else asked
    if asked not in (None, True, False):
        raise RowError("InvalidSampling", f"logprobs must be true or false, got {short(asked)}")
    if top and not asked:
        raise RowError("InvalidSampling", f"{TOP} needs logprobs: true")
    return (top or 0) if asked else None


def _chat(body: Mapping[str, Any]) -> dict[str, Any]:
    messages = body.get("messages")
    if not isinstance(messages, list):
        raise RowError("MalformedMessages", f"messages must be a list, got {short(messages)}")
    told = {key: body[key] for key in OF_CHAT if key in body}
    choice = told.pop(CHOICE, "auto")
    if choice == "none":
        told.pop(TOOLS, None)  # a model that knows of none calls none
    elif choice != "auto":
        told[CHOICE] = choice
    if EFFORT in body:
        variables = body.get(KWARGS_COLUMN, {})
        if isinstance(variables, dict):  # otherwise it is refused by who reads it
            told[KWARGS_COLUMN] = {EFFORT: body[EFFORT], **variables}
    return {"messages": [_message(each, number) for number, each in enumerate(messages)], **told}


def _message(message: Any, number: int) -> Any:
    """A message with plain text as its content; null beside tool calls."""
    if not isinstance(message, dict):
        return message  # which `check_messages` refuses
    for key in ("function_call", "audio"):
        if message.get(key):
            raise RowError("UnsupportedParameter", f"message {number}: {key} is not supported")
    content, role = message.get("content"), message.get("role")
    if isinstance(content, list):
        content = "".join(_text(part, number) for part in content)
    # Chat templates know the newer name of the system's role rarely.
    return {**message, "content": content, "role": "system" if role == "developer" else role}


def _text(part: Any, number: int) -> str:
    """The text of one part of a message's content."""
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise RowError("UnsupportedParameter", f"message {number}: only text is supported")
    return text


def _completion(body: Mapping[str, Any]) -> dict[str, Any]:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        (prompt,) = prompt
    if isinstance(prompt, str):
        return {"prompt": prompt}
    if isinstance(prompt, list) and all(type(token) is int for token in prompt):
        return {"prompt_ids": prompt}
    if isinstance(prompt, list):
        raise RowError("MalformedPrompt", "prompt is a list; give each prompt a line of its own")
    raise RowError("MalformedPrompt", f"prompt must be text or token ids, got {short(prompt)}")
