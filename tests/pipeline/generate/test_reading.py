"""What a job's columns say of what the engine returned."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pipeline.commit.schema import Failed, Finished, Outcome
from pipeline.config.job import JobConfig
from pipeline.conventions import Message, ToolCall
from pipeline.errors import UserError
from pipeline.generate.reading import Reader
from pipeline.inputs.requests import RowRequests
from specdec.request import INVALID_LOGITS, Completion
from tests.pipeline.tiny_tokenizers import CHATML, chat_like

TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
MESSAGES = [{"role": "user", "content": "hi"}]
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 3}},
    "required": ["n"],
}
HERMES = CHATML + "{# <tool_call> <think> </think> #}{% if tools %}t{% endif %}"


def outcome(
    row: dict[str, Any],
    text: str,
    *,
    template: str = HERMES,
    done: Completion | None = None,
    **job: Any,
) -> Outcome:
    """What becomes of a row whose completion is this text; "…" at its end: it was cut off."""
    values = {
        "input": {"paths": ["x"], "messages_column": "m"},
        "output": "out",
        "models": {"target": "t"},
        "speculation": {"policy": "none"},
        **job,
    }
    config = JobConfig.model_validate(values)
    tokenizer = chat_like(template)
    requests = RowRequests(config.input, config.sampling, tokenizer)
    reader = Reader(config, tokenizer, requests)
    request, *_ = requests.of(row, "a:0:0")
    ids = tuple(tokenizer(text.removesuffix("…"), add_special_tokens=False)["input_ids"])
    reason: Any = "length" if text.endswith("…") else "stop"
    done = done or Completion("a", len(request.prompt_ids), ids, reason)
    return reader.outcome(row, request, done)


def message(row: dict[str, Any], text: str, **job: Any) -> Message | None:
    found = outcome(row, text, **job)
    assert isinstance(found, Finished)
    assert found.text == text
    return found.message


THOUGHT = '<think>Hm.</think>Yes.<tool_call>{"name": "f", "arguments": {}}</tool_call>'
CALLED = Message("Yes.", "Hm.", (ToolCall("f", "{}"),))
LINES = {"paths": ["x"], "format": "openai"}


def line(url: str = "/v1/chat/completions", **body: Any) -> dict[str, Any]:
    asked = {"messages": MESSAGES, **body} if "chat" in url else {"prompt": "hi", **body}
    return {"request": json.dumps({"custom_id": "a", "url": url, "body": asked})}


@pytest.mark.parametrize(
    ("row", "job", "expected"),
    [
        ({"m": MESSAGES}, {}, None),
        (
            {"m": MESSAGES},
            {
                "input": {"paths": ["x"], "messages_column": "m", "tools": [TOOL]},
                "sampling": {"parse_response": True},
            },
            CALLED,
        ),
        (
            {"m": MESSAGES, "t": json.dumps([TOOL])},
            {
                "input": {"paths": ["x"], "messages_column": "m", "tools_column": "t"},
                "sampling": {"parse_response": True},
            },
            CALLED,
        ),
        (line(tools=[TOOL]), {"input": LINES}, CALLED),
        (
            line(tools=[TOOL], tool_choice="none"),
            {"input": LINES},
            Message(THOUGHT.removeprefix("<think>Hm.</think>"), "Hm."),
        ),
        (line(tools=[TOOL]), {"input": LINES, "sampling": {"parse_response": False}}, None),
        (line("/v1/completions"), {"input": LINES}, None),
    ],
)
def test_messages_are_read_where_the_job_asks_for_it(
    row: dict[str, Any], job: dict[str, Any], expected: Message | None
) -> None:
    assert message(row, THOUGHT, **job) == expected


@pytest.mark.parametrize("kind", [INVALID_LOGITS, "InvalidRequest"])
def test_a_row_that_went_wrong_in_the_engine_keeps_its_class(kind: str) -> None:
    done = Completion("a", 3, (), "error", error="why", error_class=kind)
    failed = outcome({"m": MESSAGES}, "", done=done)
    assert isinstance(failed, Failed)
    assert (failed.error.error_class, failed.error.message) == (kind, "why")


def test_messages_that_nothing_marks_are_refused() -> None:
    with pytest.raises(UserError, match=r"^sampling\.parse_response: .* does not tell"):
        outcome({"m": MESSAGES}, "x", template=CHATML, sampling={"parse_response": True})
    # Of lines nobody has asked.
    assert message(line(), "x", template=CHATML, input=LINES) == Message("x")


def test_messages_are_of_chats() -> None:
    plain = {"paths": ["x"], "prompt_column": "p"}
    with pytest.raises(ValueError, match=r"sampling\.parse_response is for chats"):
        outcome({"p": "x"}, "x", input=plain, sampling={"parse_response": True})


def parsed(text: str, row: Any = None, **structured: Any) -> Outcome:
    sampling = {"return_parsed": True, "structured_outputs": structured or None}
    return outcome({"m": MESSAGES, "sampling_params": row}, text, sampling=sampling)


@pytest.mark.parametrize(
    ("structured", "row", "text", "expected"),
    [
        ({"json_schema": SCHEMA}, None, ' {"n": 3}', '{"n": 3}'),
        ({"json_object": True}, None, '{"é": 1e400}', '{"é": 1e400}'),
        ({}, {"structured_outputs": json.dumps({"json_schema": SCHEMA})}, '{"n": 4}', '{"n": 4}'),
        # What need not be JSON is not looked at.
        ({"regex": "a+"}, None, "aa", None),
        ({"json_schema": SCHEMA}, {"structured_outputs": {"choice": ["x"]}}, "x", None),
        ({}, None, "text", None),
    ],
)
def test_json_is_a_column_where_it_was_asked_for(
    structured: dict[str, Any], row: Any, text: str, expected: str | None
) -> None:
    found = parsed(text, row, **structured)
    assert isinstance(found, Finished)
    assert (found.text, found.parsed) == (text, expected)


@pytest.mark.parametrize(
    ("schema", "text", "said"),
    [
        (SCHEMA, '{"n": …', "cut off after 6 tokens, Expecting value"),
        (SCHEMA, '{"n": 2}', r"\$\.n: 2 is less than the minimum of 3; it ends with '{\"n\": 2}'"),
        (SCHEMA, '{"n": NaN}', "NaN is no JSON"),
        ({"type": "array"}, "[" * 5000, "not JSON of its schema"),
    ],
)
def test_what_is_not_json_of_its_schema_is_an_error(
    schema: dict[str, Any], text: str, said: str
) -> None:
    found = parsed(text, json_schema=schema)
    assert isinstance(found, Failed)
    assert found.error.error_class == "InvalidOutput"
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(found.error.message)
