"""What a request of the batch API says that its completion must be, in all the ways to say it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.errors import RowError
from pipeline.inputs.tools import forced_schema

STRUCTURED = ("response_format", "structured_outputs")
"""OpenAI's parameter and vLLM's."""

GUIDED = {
    "guided_json": "json_schema",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "guided_json_object": "json_object",
}
"""vLLM's older parameters, and the keys of `structured_outputs` that they are."""


def structured_outputs(body: Mapping[str, Any]) -> dict[str, Any] | None:
    """The `structured_outputs` of a row that asks for the same; None: it may write anything.

    Args:
        body: of the request, without nulls.

    Raises:
        RowError: it says so in two ways, or in none that there is.
    """
    found = [asked for asked in _asked(body) if asked]
    if len(found) > 1:
        raise RowError("InvalidSampling", "the request says twice what its completion must be")
    return found[0] if found else None


def _asked(body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    if (schema := forced_schema(body)) is not None:
        yield {"json_schema": schema}
    yield _of_format(body.get("response_format") or {"type": "text"})
    asked = body.get("structured_outputs") or {}
    if not isinstance(asked, dict):
        raise RowError("InvalidSampling", "structured_outputs must be an object")
    given = {key: value for key, value in asked.items() if value is not None}
    if "json" in given:
        given["json_schema"] = _schema(given.pop("json"))
    yield given
    for name, key in GUIDED.items():
        value = body.get(name)
        if value or value == {}:  # a schema of any JSON
            yield {key: _schema(value) if key == "json_schema" else value}


def _of_format(asked: Any) -> dict[str, Any]:
    """OpenAI's `response_format`."""
    match asked:
        case {"type": "text"}:
            return {}
        case {"type": "json_object"}:
            return {"json_object": True}
        case {"type": "json_schema", "json_schema": {"schema": schema}}:
            return {"json_schema": _schema(schema)}
        case {"type": "json_schema"}:
            raise RowError("InvalidSampling", "response_format has no json_schema.schema")
    known = "text, json_object and json_schema"
    raise RowError("InvalidSampling", f"response_format.type must be one of {known}")


def _schema(value: Any) -> Any:
    """A JSON Schema, which vLLM takes as text, too."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise RowError("InvalidSampling", "the JSON schema is text, but not JSON") from None
