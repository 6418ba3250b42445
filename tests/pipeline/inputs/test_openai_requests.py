from __future__ import annotations

import json
from typing import Any

import pytest

from pipeline.errors import RowError
from pipeline.inputs.openai_requests import CHAT, COMPLETIONS, request_cells

MESSAGES = [{"role": "user", "content": "hi"}]


def chat(**body: Any) -> str:
    body = {"model": "gpt-4o-mini", "messages": MESSAGES, **body}
    return json.dumps({"custom_id": "a", "method": "POST", "url": CHAT, "body": body})


def completion(**body: Any) -> str:
    return json.dumps({"custom_id": "a", "url": COMPLETIONS, "body": {"prompt": "hi", **body}})


@pytest.mark.parametrize(
    ("line", "cells"),
    [
        (chat(), {"messages": MESSAGES, "sampling_params": {}}),
        (
            chat(max_tokens=5, temperature=0, top_p=0.5, n=3, stop="x", seed=4, top_k=-1),
            {
                "messages": MESSAGES,
                "sampling_params": {
                    "temperature": 0,
                    "top_p": 0.5,
                    "n": 3,
                    "stop": "x",
                    "seed": 4,
                    "top_k": 0,
                    "max_new_tokens": 5,
                },
            },
        ),
        (
            chat(max_tokens=5, max_completion_tokens=6, stop=None),
            {"messages": MESSAGES, "sampling_params": {"max_new_tokens": 6}},
        ),
        # What asks for nothing special is no reason to refuse a request.
        (
            chat(
                stream=False,
                tools=[],
                tool_choice="none",
                response_format={"type": "text"},
                logit_bias={},
                presence_penalty=0.0,
                user="u",
                logprobs=None,
            ),
            {"messages": MESSAGES, "sampling_params": {}},
        ),
        (
            chat(
                messages=[
                    {"role": "developer", "content": [{"type": "text", "text": "be "}] * 2},
                    *MESSAGES,
                ]
            ),
            {
                "messages": [{"role": "system", "content": "be be "}, *MESSAGES],
                "sampling_params": {},
            },
        ),
        (completion(), {"prompt": "hi", "sampling_params": {"max_new_tokens": 16}}),
        (
            completion(prompt=[5, 6], max_tokens=2),
            {"prompt_ids": [5, 6], "sampling_params": {"max_new_tokens": 2}},
        ),
    ],
)
def test_what_a_request_asks_for(line: str, cells: dict[str, Any]) -> None:
    assert request_cells(line) == cells


def without(key: str) -> str:
    return json.dumps({k: v for k, v in json.loads(chat()).items() if k != key})


BAD = [
    ("", "MalformedLine", "not JSON"),
    ("{", "MalformedLine", "not JSON"),
    ("nonsense", "MalformedLine", "not JSON"),
    ("[1]", "MalformedLine", "not a JSON object but [1]"),
    ('"text"', "MalformedLine", "not a JSON object"),
    ("[" * 100_000, "MalformedLine", "not JSON"),
    (without("custom_id"), "MissingCustomId", "custom_id"),
    (chat().replace('"a"', "7"), "MissingCustomId", "custom_id"),
    (chat().replace('"a"', '""'), "MissingCustomId", "custom_id"),
    (without("url"), "UnknownEndpoint", "url null"),
    (chat().replace(CHAT, "/v1/embeddings"), "UnknownEndpoint", '"/v1/embeddings" is not served'),
    (chat().replace("POST", "GET"), "InvalidRequest", 'POST, got "GET"'),
    (without("body"), "InvalidRequest", "body"),
    (chat(messages="hi"), "MalformedMessages", "must be a list"),
    (chat(messages=None), "MalformedMessages", "must be a list"),
    (chat(stream=True), "UnsupportedParameter", "stream true"),
    (chat(logprobs=True), "UnsupportedParameter", "logprobs true"),
    (chat(tools=[{"type": "function"}]), "UnsupportedParameter", "tools"),
    (chat(response_format={"type": "json_object"}), "UnsupportedParameter", "response_format"),
    (chat(logit_bias={"5": 1}), "UnsupportedParameter", "logit_bias"),
    (chat(presence_penalty=0.5), "UnsupportedParameter", "presence_penalty 0.5"),
    (chat(temprature=1), "UnsupportedParameter", "did you mean 'temperature'"),
    (chat(max_tokens=0), "InvalidSampling", "max_tokens must be an integer of at least 1, got 0"),
    (chat(max_completion_tokens="9"), "InvalidSampling", "max_completion_tokens"),
    (
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
        "UnsupportedParameter",
        "message 0: only text",
    ),
    (
        chat(messages=[{"role": "assistant", "content": None, "tool_calls": [{}]}]),
        "UnsupportedParameter",
        "tool_calls",
    ),
    (completion(prompt=["a", "b"]), "MalformedPrompt", "a line of its own"),
    (completion(prompt=None), "MalformedPrompt", "text or token ids"),
    (completion(logprobs=0), "UnsupportedParameter", "logprobs 0"),
    (completion(echo=True), "UnsupportedParameter", "echo"),
]


@pytest.mark.parametrize(("line", "error_class", "message"), BAD)
def test_what_is_wrong_with_a_request(line: str, error_class: str, message: str) -> None:
    with pytest.raises(RowError) as raised:
        request_cells(line)
    assert raised.value.error_class == error_class
    assert message in raised.value.message
