"""Functions that a model may call, and calls that a request of the batch API asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.errors import RowError
from pipeline.inputs.messages import without_nulls

TOOLS = "tools"
"""What a request calls its tools."""

CHOICE = "tool_choice"
"""A parameter: `auto`, `none`, `required`, or the one function that is called."""


def check_tools(tools: Any) -> list[Any] | None:
    """Tools as OpenAI has them, without what is null; None if there are none.

    Raises:
        RowError: they are not such a list; the message says which one is wrong.
    """
    if not isinstance(tools, list):
        raise RowError("InvalidChat", f"tools must be a list, got a {type(tools).__name__}")
    for number, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError("InvalidChat", f"tools: tool {number} has no function with a name")
    return without_nulls(tools) or None


def forced_schema(body: Mapping[str, Any]) -> dict[str, Any] | None:
    """The JSON Schema of a completion that must call; None: it need not.

    As in vLLM, the completion is then the arguments of the one function, or a list of calls.

    Args:
        body: of the request, without nulls.

    Raises:
        RowError: the choice is none of the API's, or of none of the tools.
    """
    choice = body.get(CHOICE, "auto")
    if choice in ("auto", "none"):
        return None
    tools = check_tools(body.get(TOOLS, [])) or []
    parameters = {
        tool["function"]["name"]: tool["function"].get("parameters") or {"type": "object"}
        for tool in tools
    }
    match choice:
        case {"type": "function", "function": {"name": str(name)}}:
            if name not in parameters:
                raise RowError("InvalidRequest", f"{CHOICE}: there is no tool {name!r}")
            return dict(parameters[name])
        case "required":
            if not parameters:
                raise RowError("InvalidRequest", f"{CHOICE} required needs tools")
            calls = [_call(*each) for each in parameters.items()]
            one = {"maxItems": 1} if body.get("parallel_tool_calls") is False else {}
            return {"type": "array", "minItems": 1, **one, "items": {"anyOf": calls}}
    said = "auto, none, required or a function of its own"
    raise RowError("InvalidRequest", f"{CHOICE} must be {said}")


def _call(name: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "parameters": parameters},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }
