"""Requests of /v1/responses become those for chat that ask for the same."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pipeline.errors import RowError
from pipeline.inputs.openai_requests import request_cells

SCHEMA = {"type": "object"}
FUNCTION = {"name": "f", "parameters": SCHEMA, "strict": True}


def cells(**body: Any) -> dict[str, Any]:
    line = {"custom_id": "a", "method": "POST", "url": "/v1/responses", "body": body}
    return request_cells(json.dumps(line))


def said(content: str, role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": content}


def call(id: str) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("body", "messages"),
    [
        ({"input": "hi"}, [said("hi")]),
        (
            {"instructions": "be", "input": [said("a", "developer"), said("b")]},
            [said("be", "system"), said("a", "system"), said("b")],
        ),
        (
            {
                "input": [
                    {
                        "type": "message",
                        "role": "user",
                        "content": [{"type": "input_text", "text": "a"}] * 2,
                    },
                    {"type": "reasoning", "id": "r", "summary": []},
                    {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
                    {"type": "function_call", "call_id": "2", "name": "f", "arguments": "{}"},
                    {"type": "function_call_output", "call_id": "1", "output": "7"},
                    {
                        "role": "assistant",
                        "content": [{"type": "output_text", "text": "b", "annotations": []}],
                    },
                ]
            },
            [
                said("aa"),
                {"role": "assistant", "content": None, "tool_calls": [call("1"), call("2")]},
                {"role": "tool", "tool_call_id": "1", "content": "7"},
                said("b", "assistant"),
            ],
        ),
    ],
)
def test_input_becomes_messages(body: dict[str, Any], messages: list[Any]) -> None:
    assert cells(**body) == {"messages": messages, "sampling_params": {"n": 1}}


def test_parameters_in_the_words_of_chat() -> None:
    found = cells(
        input="hi",
        max_output_tokens=5,
        temperature=0.5,
        top_logprobs=2,
        top_k=3,
        tools=[{"type": "function", **FUNCTION}],
        text={"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}},
        reasoning={"effort": "low", "summary": "auto"},
        include=["reasoning.encrypted_content"],
        store=True,
        background=False,
        truncation="disabled",
        previous_response_id=None,
    )
    assert found["sampling_params"] == {
        "n": 1,
        "temperature": 0.5,
        "top_k": 3,
        "max_new_tokens": 5,
        "logprobs": 2,
        "structured_outputs": {"json_schema": SCHEMA},
    }
    assert found["tools"] == [{"type": "function", "function": FUNCTION}]
    assert found["chat_template_kwargs"] == {"reasoning_effort": "low"}
    told = cells(input="hi", include=["message.output_text.logprobs"])
    assert told["sampling_params"]["logprobs"] == 0


@pytest.mark.parametrize(
    ("body", "error_class", "message"),
    [
        ({}, "MalformedMessages", "input must be a text or a list"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "UnsupportedParameter", "input 0: an"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "UnsupportedParameter",
            "input 0: only text is supported",
        ),
        ({"input": "x", "previous_response_id": "r"}, "UnsupportedParameter", "previous_response"),
        ({"input": "x", "background": True}, "UnsupportedParameter", "only false is taken"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "UnsupportedParameter", "web_search"),
        ({"input": "x", "include": ["y"]}, "UnsupportedParameter", "include: only"),
        ({"input": "x", "max_tokens": 5}, "UnsupportedParameter", "max_tokens: unknown parameter"),
        ({"input": "x", "n": 2}, "UnsupportedParameter", "n: unknown parameter"),
        ({"input": "x", "stream": True}, "UnsupportedParameter", "stream true is not supported"),
        ({"input": "x", "text": {"verbosity": "low"}}, "UnsupportedParameter", "text.verbosity"),
        ({"input": "x", "text": []}, "InvalidRequest", "text must be an object"),
        ({"input": "x", "instructions": [said("y")]}, "UnsupportedParameter", "instructions"),
    ],
)
def test_what_is_wrong_is_named(body: dict[str, Any], error_class: str, message: str) -> None:
    with pytest.raises(RowError) as raised:
        cells(**body)
    assert raised.value.error_class == error_class
    assert message in raised.value.message
