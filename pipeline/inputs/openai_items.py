"""Requests of OpenAI's `/v1/responses`, in its text form, as requests for chat.

The two endpoints ask for the same in other words. A parameter that both have goes by its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.errors import RowError
from pipeline.inputs.openai_parameters import (
    IGNORED,
    NEUTRAL,
    OF_CHAT,
    OF_RESPONSE,
    SAMPLING,
    TOP,
    Parameters,
)

_LOGPROBS = "message.output_text.logprobs"
_INCLUDED = {_LOGPROBS: True, "reasoning.encrypted_content": False}
"""What `include` may hold, and whether it asks for anything here."""

_OWN = ("input", "instructions", "max_output_tokens", "text", "reasoning", "include", "tools")
"""Parameters that chat has in other words, or not at all."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "truncation": ("disabled",),
    "previous_response_id": (),
    "conversation": (),
    "prompt": (),
    "context_management": ([],),
    "access_programs": (),
    "image": (),
    # that vLLM added to the API
    "previous_input_messages": ([],),
    "previous_response": (),
    "enable_response_messages": (False,),
}
"""What is not supported, and the values that ask for nothing."""

_AS_CHAT = {*SAMPLING, *OF_CHAT, *OF_RESPONSE, TOP, "structured_outputs"}
_AS_CHAT -= {"n", "logprobs", "tools", "prompt_logprobs", "return_token_ids"}
"""Parameters that chat has by the same names."""

PARAMETERS = Parameters(
    frozenset({*_OWN, *_AS_CHAT}),
    IGNORED | {"max_tool_calls", "background_options"},
    {name: fine for name, fine in NEUTRAL.items() if name not in ("tools", *_AS_CHAT)} | _NEUTRAL,
)
"""All of the endpoint."""


def as_chat(body: Mapping[str, Any]) -> dict[str, Any]:
    """The body of a request for chat that asks for the same.

    Args:
        body: of the request, without nulls.

    Raises:
        RowError: names what is wrong, or not supported.
    """
    PARAMETERS.check(body)
    chat = {name: value for name, value in body.items() if name in _AS_CHAT}
    chat["n"] = 1  # one response has one output, whatever the job says
    chat["messages"] = [*_instructions(body), *_messages(body.get("input"))]
    if "max_output_tokens" in body:
        chat["max_completion_tokens"] = body["max_output_tokens"]
    if tools := body.get("tools"):
        chat["tools"] = [*map(_tool, _listed(tools, "tools"))]
    choice = body.get("tool_choice")
    if isinstance(choice, dict) and choice.get("type") == "function":
        chat["tool_choice"] = {"type": "function", "function": {"name": choice.get("name")}}
    if effort := _part(body, "reasoning").get("effort"):
        chat["reasoning_effort"] = effort
    text = _part(body, "text")
    if text.get("verbosity", "medium") != "medium":
        raise RowError("UnsupportedParameter", "text.verbosity is not supported; leave it out")
    if form := text.get("format"):
        chat["response_format"] = _format(form)
    for each in _listed(body.get("include", []), "include"):
        if each not in _INCLUDED:
            known = " and ".join(_INCLUDED)
            raise RowError("UnsupportedParameter", f"include: only {known} are taken, not {each}")
    if body.get("top_logprobs") or _LOGPROBS in body.get("include", []):
        chat["logprobs"] = True
    return chat


def _instructions(body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    if (said := body.get("instructions")) is None:
        return
    if not isinstance(said, str):
        raise RowError("UnsupportedParameter", "instructions: only text is supported")
    yield {"role": "system", "content": said}


def _messages(items: Any) -> list[Any]:
    """Chat messages of what `input` holds: a text, or items."""
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    if not isinstance(items, list):
        raise RowError("MalformedMessages", "input must be a text or a list of items")
    messages: list[Any] = []
    for number, item in enumerate(items):
        match item:
            case {"type": "function_call", "call_id": str(id), "name": str(name)}:
                function = {"name": name, "arguments": item.get("arguments", "{}")}
                call = {"id": id, "type": "function", "function": function}
                # Calls that follow each other are those of one message.
                if messages and messages[-1].get("tool_calls"):
                    messages[-1]["tool_calls"].append(call)
                else:
                    messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
            case {"type": "function_call_output", "call_id": str(id), "output": output}:
                messages.append(
                    {"role": "tool", "tool_call_id": id, "content": _content(output, number)}
                )
            case {"type": "reasoning"}:
                pass  # of earlier turns, which chat templates leave out, too
            case {"role": str(role), "content": content} if (
                item.get("type", "message") == "message"
            ):
                messages.append({"role": role, "content": _content(content, number)})
            case _:
                kind = item.get("type") if isinstance(item, dict) else type(item).__name__
                said = f"input {number}: an item of {kind} is not supported, or not whole"
                raise RowError("UnsupportedParameter", said)
    return messages


def _content(content: Any, number: int) -> Any:
    """The content of an item: a text, or its parts in chat's words."""
    if isinstance(content, str):
        return content
    texts = ("input_text", "output_text", "text")
    parts = [
        part["text"]
        for part in _listed(content, f"input {number}: content")
        if isinstance(part, dict) and part.get("type") in texts and "text" in part
    ]
    if len(parts) < len(content) or not all(isinstance(part, str) for part in parts):
        raise RowError("UnsupportedParameter", f"input {number}: only text is supported")
    return "".join(parts)


def _tool(tool: Any) -> dict[str, Any]:
    """A function as chat has it."""
    if not isinstance(tool, dict) or tool.get("type") != "function":
        kind = tool.get("type") if isinstance(tool, dict) else tool
        raise RowError("UnsupportedParameter", f"tools: only functions are supported, not {kind}")
    return {
        "type": "function",
        "function": {key: value for key, value in tool.items() if key != "type"},
    }


def _format(form: Any) -> Any:
    """A `text.format` as `response_format`, which has a schema one level down."""
    if isinstance(form, dict) and form.get("type") == "json_schema":
        return {
            "type": "json_schema",
            "json_schema": {key: value for key, value in form.items() if key != "type"},
        }
    return form


def _part(body: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = body.get(name, {})
    if not isinstance(value, dict):
        raise RowError("InvalidRequest", f"{name} must be an object")
    return {key: each for key, each in value.items() if each is not None}


def _listed(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise RowError("InvalidRequest", f"{name} must be a list")
    return value
