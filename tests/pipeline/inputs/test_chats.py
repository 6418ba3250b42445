"""What a chat template is told, by the job, a row or a request."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pipeline.config.job import InputConfig
from pipeline.errors import RowError, UserError
from pipeline.inputs.openai_requests import request_cells
from pipeline.inputs.prompts import PromptRenderer
from tests.pipeline.tiny_tokenizers import llama_like

TEMPLATE = (
    "{% if tools %}[{{ tools | map(attribute='function.name') | join(',') }}]{% endif %}"
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}a:{% if enable_thinking is false %}<>{% endif %}"
    "{{ reasoning_effort or '' }}{% endif %}"
)
ASK = [{"role": "user", "content": "hi"}]
BEGUN = [*ASK, {"role": "assistant", "content": "So it"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = llama_like()
    made.chat_template = TEMPLATE
    return made


def rendered(tokenizer: Any, row: dict[str, Any], **how: Any) -> str:
    config = InputConfig(paths=("x",), messages_column="m", **how)
    return said(tokenizer, PromptRenderer(config, tokenizer).prompt_ids(row))


def said(tokenizer: Any, ids: tuple[int, ...]) -> str:
    return str(tokenizer.decode(ids)).replace("</s>", "|").replace(" ", "")


@pytest.mark.parametrize(
    ("how", "row", "text"),
    [
        ({}, {"m": ASK}, "u:hi|a:"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, {"m": ASK}, "u:hi|a:<>"),
        # A row's own variables go before the job's; others stay. Arrow fills in nulls.
        (
            {"chat_template_kwargs": {"enable_thinking": False, "reasoning_effort": "low"}},
            {"m": ASK, "chat_template_kwargs": {"enable_thinking": True, "reasoning_effort": None}},
            "u:hi|a:low",
        ),
        ({}, {"m": ASK, "chat_template_kwargs": '{"reasoning_effort": "high"}'}, "u:hi|a:high"),
        ({"add_generation_prompt": False}, {"m": ASK}, "u:hi|"),
        ({"continue_final_message": True}, {"m": BEGUN}, "u:hi|a:Soit"),
        ({"tools": [TOOL]}, {"m": ASK}, "[f]u:hi|a:"),
        ({"tools": [TOOL], "tools_column": "t"}, {"m": ASK, "t": None}, "[f]u:hi|a:"),
        ({"tools_column": "t"}, {"m": ASK, "t": json.dumps([TOOL, TOOL])}, "[f,f]u:hi|a:"),
        ({"tools_column": "t"}, {"m": ASK, "t": []}, "u:hi|a:"),
        # A column that happens to have such a name says nothing.
        ({}, {"m": ASK, "tools": [TOOL], "add_generation_prompt": False}, "u:hi|a:"),
    ],
)
def test_what_the_template_is_told(
    tokenizer: Any, how: dict[str, Any], row: dict[str, Any], text: str
) -> None:
    assert rendered(tokenizer, row, **how) == text


@pytest.mark.parametrize(
    ("how", "row", "message"),
    [
        ({}, {"chat_template_kwargs": {"thinking": 1}}, "template does not read thinking"),
        ({}, {"chat_template_kwargs": {"tokenize": False}}, "tokenize is no template variable"),
        ({}, {"chat_template_kwargs": "{"}, "text, but not JSON"),
        ({}, {"chat_template_kwargs": [1]}, "must be an object"),
        ({"tools_column": "t"}, {"t": {"a": 1}}, "tools must be a list, got a dict"),
        ({"tools_column": "t"}, {"t": [TOOL, {}]}, "tool 1 has no function with a name"),
        ({"continue_final_message": True}, {}, "the last message must be the assistant's"),
    ],
)
def test_what_is_wrong_with_a_row(
    tokenizer: Any, how: dict[str, Any], row: dict[str, Any], message: str
) -> None:
    with pytest.raises(RowError, match=message):
        rendered(tokenizer, {"m": ASK, **row}, **how)


def test_a_job_that_tells_the_template_what_it_does_not_read_is_refused(tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"^input\.chat_template_kwargs: .* does not read thinking"):
        rendered(tokenizer, {"m": ASK}, chat_template_kwargs={"thinking": False})
    plain = llama_like()
    plain.chat_template = "{{ messages[0].content }}"
    with pytest.raises(UserError, match=r"^input\.tools: the target's chat template does not read"):
        rendered(plain, {"m": ASK}, tools=[TOOL])
    with pytest.raises(UserError, match=r"^input\.tools: tool 1 has no function with a name"):
        rendered(tokenizer, {"m": ASK}, tools=[TOOL, {"function": {}}])


@pytest.mark.parametrize(
    "how",
    [
        {"prompt_column": "p", "chat_template_kwargs": {"a": 1}},
        {"template": "{{ p }}", "continue_final_message": True},
        {"messages_column": "m", "continue_final_message": True, "add_generation_prompt": True},
    ],
)
def test_what_only_a_chat_has_is_refused_elsewhere(how: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"is for chats|do not go together"):
        InputConfig(paths=("x",), **how)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"chat_template_kwargs": {"enable_thinking": False}}, "u:hi|a:<>"),
        ({"reasoning_effort": "low"}, "u:hi|a:low"),
        ({"add_generation_prompt": False}, "u:hi|"),
        (
            {"messages": BEGUN, "continue_final_message": True, "add_generation_prompt": False},
            "u:hi|a:Soit",
        ),
        ({"truncate_prompt_tokens": 2}, "a:"),
    ],
)
def test_what_a_request_tells_the_template(tokenizer: Any, body: dict[str, Any], text: str) -> None:
    line = {"custom_id": "a", "url": "/v1/chat/completions", "body": {"messages": ASK, **body}}
    renderer = PromptRenderer(InputConfig(paths=("x",), format="openai"), tokenizer)
    assert said(tokenizer, renderer.prompt_ids(request_cells(json.dumps(line)))) == text


def test_the_last_tokens_of_a_long_prompt_are_kept(tokenizer: Any) -> None:
    """Behind the beginning of sequence, which a plain prompt has."""
    config = InputConfig(paths=("x",), prompt_column="p", truncate_prompt_tokens=4)
    renderer = PromptRenderer(config, tokenizer)
    assert tokenizer.decode(renderer.prompt_ids({"p": "abcdef"})) == "<s>def"
    assert tokenizer.decode(renderer.prompt_ids({"p": "ab"})) == "<s> ab"
    short = PromptRenderer(config.model_copy(update={"truncate_prompt_tokens": 1}), tokenizer)
    assert tokenizer.decode(short.prompt_ids({"p": "abc"})) == "c"
