from __future__ import annotations

import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from pipeline.config.structured_outputs import StructuredOutputs
from pipeline.errors import RowError
from pipeline.inputs.openai_requests import CHAT, COMPLETIONS, endpoint_of, request_cells

MESSAGES = [{"role": "user", "content": "hi"}]
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
DEFAULTS: dict[str, Any] = {
    # What vLLM's own classes say that a request is which says nothing (ChatCompletionRequest,
    # CompletionRequest and SamplingParams, of versions from 0.6 on).
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "logit_bias": None,
    "max_completion_tokens": None,
    "n": 1,
    "best_of": None,
    "use_beam_search": False,
    "early_stopping": False,
    "length_penalty": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "seed": None,
    "stop": [],
    "stop_token_ids": [],
    "include_stop_str_in_output": False,
    "ignore_eos": False,
    "min_tokens": 0,
    "bad_words": [],
    "allowed_token_ids": None,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "detokenize": True,
    "truncate_prompt_tokens": None,
    "truncation_side": None,
    "prompt_logprobs": None,
    "prompt_logprob_token_ids": None,
    "prompt_logprob_start": None,
    "logprob_token_ids": None,
    "flat_logprobs": False,
    "stream": False,
    "stream_options": None,
    "stream_interval": None,
    "echo": False,
    "user": None,
    "logprobs_mode": "raw_logprobs",
    "response_format": {"type": "text"},
    "structured_outputs": None,
    "structural_tag": None,
    "guided_json": None,
    "guided_regex": None,
    "guided_choice": None,
    "guided_grammar": None,
    "guided_decoding_backend": None,
    "guided_whitespace_pattern": None,
    "logits_processors": None,
    "priority": 0,
    "request_id": "cmpl-1",
    "session_id": "s",
    "cache_salt": "salt",
    "skip_reading_prefix_cache": None,
    "return_tokens_as_token_ids": False,
    "return_token_ids": False,
    "return_token_offsets": False,
    "return_mm_kwargs": True,
    "routed_experts_prompt_start": 0,
    "trace_decode_token_ids": None,
    "kv_transfer_params": {},
    "ec_transfer_params": None,
    "vllm_xargs": {},
    "extra_args": None,
    "repetition_detection": None,
    "thinking_token_budget": -1,
    "watermarking": False,
}
OF_CHATS = {
    "logprobs": False,
    "top_logprobs": 0,
    "tools": None,
    "tool_choice": "none",
    "parallel_tool_calls": True,
    "reasoning_effort": None,
    "include_reasoning": True,
    "add_generation_prompt": True,
    "continue_final_message": False,
    "add_special_tokens": False,
    "documents": None,
    "chat_template": None,
    "chat_template_kwargs": {},
    "media_io_kwargs": None,
    "mm_processor_kwargs": {},
    "return_prompt_text": None,
}
OF_COMPLETIONS = {
    "logprobs": None,
    "suffix": None,
    "add_special_tokens": True,
    "prompt_embeds": None,
}


PARAMETERS = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
TOOL = {"type": "function", "function": {"name": "f"}}


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
                functions=[],
                function_call="none",
                response_format={"type": "text"},
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
        (
            chat(presence_penalty=0.5, logit_bias={"5": 1}, min_tokens=2, bad_words=["x"]),
            {
                "messages": MESSAGES,
                "sampling_params": {
                    "presence_penalty": 0.5,
                    "logit_bias": {"5": 1},
                    "min_tokens": 2,
                    "bad_words": ["x"],
                },
            },
        ),
        # A model that may call nothing is told of nothing.
        (
            chat(tools=[TOOL], parallel_tool_calls=False),
            {"messages": MESSAGES, "tools": [TOOL], "sampling_params": {}},
        ),
        (
            chat(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "f"}}),
            {
                "messages": MESSAGES,
                "tools": [TOOL],
                "tool_choice": {"type": "function", "function": {"name": "f"}},
                "sampling_params": {"structured_outputs": {"json_schema": {"type": "object"}}},
            },
        ),
        (chat(tools=[TOOL], tool_choice="none"), {"messages": MESSAGES, "sampling_params": {}}),
        (
            chat(logprobs=True, top_logprobs=3, return_token_ids=True),
            {"messages": MESSAGES, "sampling_params": {"logprobs": 3}},
        ),
        (chat(logprobs=True), {"messages": MESSAGES, "sampling_params": {"logprobs": 0}}),
        (
            completion(logprobs=2, max_tokens=1),
            {
                "prompt": "hi",
                "sampling_params": {"logprobs": 2, "max_new_tokens": 1},
            },
        ),
        (chat(seed=-1), {"messages": MESSAGES, "sampling_params": {}}),
        (completion(), {"prompt": "hi", "sampling_params": {"max_new_tokens": 16}}),
        (
            completion(prompt=["one text"]),
            {"prompt": "one text", "sampling_params": {"max_new_tokens": 16}},
        ),
        (
            completion(prompt=[[5, 6]]),
            {"prompt_ids": [5, 6], "sampling_params": {"max_new_tokens": 16}},
        ),
        (
            completion(prompt=[5, 6], max_tokens=2),
            {"prompt_ids": [5, 6], "sampling_params": {"max_new_tokens": 2}},
        ),
    ],
)
def test_what_a_request_asks_for(line: str, cells: dict[str, Any]) -> None:
    assert request_cells(line) == cells


def test_every_parameter_at_its_default_changes_nothing() -> None:
    sampling = {"n": 1, "top_k": 0, "min_p": 0, "stop": [], "stop_token_ids": []}
    sampling |= {"ignore_eos": False, "max_new_tokens": 5, "repetition_penalty": 1}
    sampling |= {"logprobs_mode": "raw_logprobs"}
    sampling |= {"skip_special_tokens": True, "include_stop_str_in_output": False}
    sampling |= {"min_tokens": 0, "bad_words": [], "presence_penalty": 0, "frequency_penalty": 0}
    asked = request_cells(chat(**DEFAULTS, **OF_CHATS, max_tokens=5))
    told = {"add_generation_prompt": True, "continue_final_message": False}
    told |= {"chat_template_kwargs": {}}
    assert asked == {"messages": MESSAGES, "sampling_params": sampling, **told}
    asked = request_cells(completion(**DEFAULTS, **OF_COMPLETIONS, max_tokens=5))
    assert asked == {"prompt": "hi", "sampling_params": sampling}


def test_tool_calls_stay_as_they_are() -> None:
    history = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c", "name": "f", "content": "7"},
    ]
    assert request_cells(chat(messages=history))["messages"] == history


@pytest.mark.parametrize(
    ("url", "endpoint"),
    [
        ("/v1/chat/completions", CHAT),
        ("/chat/completions", CHAT),
        ("v1/chat/completions/", CHAT),
        ("https://api.openai.com/v1/chat/completions", CHAT),
        ("http://host:8000/v1/chat/completions?api-version=1", CHAT),
        ("https://x.azure.com/openai/deployments/m/chat/completions", CHAT),
        ("/completions", COMPLETIONS),
        ("https://host/v1/completions", COMPLETIONS),
        ("https://host/prefix/v1/completions", COMPLETIONS),
    ],
)
def test_endpoints_behind_any_address(url: str, endpoint: str) -> None:
    assert endpoint_of({"url": url}) == endpoint


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
    (chat().replace(CHAT, "/v1/fim/completions"), "UnknownEndpoint", "is not served"),
    (chat().replace(CHAT, "http://[x/v1/completions"), "UnknownEndpoint", "is not served"),
    (chat().replace(CHAT, ""), "UnknownEndpoint", 'url "" is not served; known: /v1/chat/comp'),
    (chat().replace("POST", "GET"), "InvalidRequest", 'POST, got "GET"'),
    (without("body"), "InvalidRequest", "body"),
    (chat(messages="hi"), "MalformedMessages", "must be a list"),
    (chat(messages=None), "MalformedMessages", "must be a list"),
    (chat(stream=True), "UnsupportedParameter", "stream true"),
    (chat(top_logprobs=2), "InvalidSampling", "top_logprobs needs logprobs: true"),
    (chat(logprobs=2), "InvalidSampling", "logprobs must be true or false, got 2"),
    (completion(top_logprobs=2), "UnsupportedParameter", "top_logprobs 2"),
    (completion(tools=[{"type": "function"}]), "UnsupportedParameter", "tools"),
    (chat(tool_choice="required"), "InvalidRequest", "tool_choice required needs tools"),
    (chat(tools=[TOOL], tool_choice="f"), "InvalidRequest", "tool_choice must be auto, none"),
    (
        chat(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "g"}}),
        "InvalidRequest",
        "tool_choice: there is no tool 'g'",
    ),
    (
        chat(tools=[TOOL], tool_choice="required", guided_regex="a"),
        "InvalidSampling",
        "says twice what its completion must be",
    ),
    (completion(tool_choice="required"), "UnsupportedParameter", "tool_choice"),
    (chat(response_format={"type": "xml"}), "InvalidSampling", "response_format.type"),
    (chat(temprature=1), "UnsupportedParameter", "did you mean 'temperature'"),
    (chat(max_tokens=0), "InvalidSampling", "max_tokens must be an integer of at least 1, got 0"),
    (chat(max_completion_tokens="9"), "InvalidSampling", "max_completion_tokens"),
    (
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
        "UnsupportedParameter",
        "message 0: only text",
    ),
    (
        chat(messages=[{"role": "assistant", "content": None, "function_call": {"name": "f"}}]),
        "UnsupportedParameter",
        "message 0: function_call",
    ),
    (chat(best_of=5), "UnsupportedParameter", "best_of 5 is not supported; only 1 is taken"),
    (chat(best_of=True), "UnsupportedParameter", "best_of true"),
    (chat(functions=["x"]), "UnsupportedParameter", 'functions ["x"] is not supported'),
    (chat(use_beam_search=True), "UnsupportedParameter", "only false is taken"),
    (chat(detokenize=False), "UnsupportedParameter", "only true is taken"),
    (chat(chat_template="x"), "UnsupportedParameter", 'chat_template "x" is not supported'),
    (chat(add_special_tokens=True), "UnsupportedParameter", "only false is taken"),
    (completion(add_special_tokens=False), "UnsupportedParameter", "only true is taken"),
    (completion(prompt=[["a"]]), "MalformedPrompt", "a line of its own"),
    (completion(prompt=["a", "b"]), "MalformedPrompt", "a line of its own"),
    (completion(prompt=None), "MalformedPrompt", "text or token ids"),
    (completion(echo=True), "UnsupportedParameter", "echo"),
]


@pytest.mark.parametrize("parallel", [True, False])
def test_calls_that_must_be_are_structured_outputs(parallel: bool) -> None:
    tools = [TOOL, {"type": "function", "function": {"name": "g", "parameters": PARAMETERS}}]
    asked = chat(tools=tools, tool_choice="required", parallel_tool_calls=parallel)
    schema = request_cells(asked)["sampling_params"]["structured_outputs"]["json_schema"]
    StructuredOutputs(json_schema=schema).text()  # compiles
    call = {"name": "g", "parameters": {"n": 1}}
    for calls, good in (([call], True), ([call] * 2, parallel), ([], False), ([{}], False)):
        assert Draft202012Validator(schema).is_valid(calls) == good


@pytest.mark.parametrize(("line", "error_class", "message"), BAD)
def test_what_is_wrong_with_a_request(line: str, error_class: str, message: str) -> None:
    with pytest.raises(RowError) as raised:
        request_cells(line)
    assert raised.value.error_class == error_class
    assert message in raised.value.message
