"""Rows of `completions/` as the API's responses."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from openai.types.chat import ChatCompletion
from openai.types.responses import Response

from pipeline.commit.files import unit_files
from pipeline.commit.record import Actor, Work
from pipeline.commit.schema import Finished
from pipeline.config.job import S3Config
from pipeline.config.sampling import optional_columns
from pipeline.conventions import Message, ToolCall
from pipeline.inputs.joining import plan_units
from pipeline.inputs.listing import list_inputs
from pipeline.inputs.source import read_units
from pipeline.inputs.units import plan_files, table_of
from pipeline.outputs.openai_responses import write_responses
from pipeline.storage.folder import open_folder
from specdec.request import Completion, TokenLogprob

S3 = S3Config()
CALL = ToolCall("f", '{"a": 1}')
TOOLS = [{"type": "function", "function": {"name": "f"}}]


def answered(
    folder: Path,
    asked: list[dict[str, Any]],
    done: list[Finished],
    url: str = "/v1/chat/completions",
) -> list[Any]:
    """The bodies of responses, by requests with these bodies and how they were completed."""
    lines = [
        json.dumps({"custom_id": f"{n}", "url": url, "body": body}) for n, body in enumerate(asked)
    ]
    (folder / "in.jsonl").write_text("\n".join(lines))
    plans = plan_files(list_inputs([str(folder)], S3), S3, 100, format="openai")
    units = plan_units(plans, 100)
    (rows,) = read_units(units, table_of(plans), S3)
    files = unit_files(
        rows,
        [[each] for each in done],
        job="j",
        own_n=True,
        actor=Actor("a", "n"),
        work=Work(0.0, 1.0, {}, {}, 1),
        optional=optional_columns({}, {"format": "openai"}),
        token_text=str,
        trace=False,
    )
    output = open_folder(str(folder / "out"), S3)
    for name, content in files.files:
        output.put(name, content)
    good, bad = io.StringIO(), io.StringIO()
    write_responses(output, units, "model", good, bad)
    assert not bad.getvalue()
    return [json.loads(line)["response"]["body"] for line in good.getvalue().splitlines()]


TOLD = TokenLogprob(7, -0.5, ((7, -0.5), (3, -1.0)))


def finished(message: Message | None, reason: Any = "stop") -> Finished:
    return Finished("<whole>", Completion("a", 1, (7,), reason, logprobs=(TOLD,)), message)


def test_messages_with_tool_calls_and_reasoning(tmp_path: Path) -> None:
    both = Message("", "why", (CALL, CALL))
    asked: list[tuple[dict[str, Any], Finished]] = [
        ({"tools": TOOLS}, finished(both)),
        ({"tools": TOOLS, "parallel_tool_calls": False}, finished(both)),
        ({"include_reasoning": False}, finished(Message("So.", "why"))),
        ({}, finished(Message("So.", None, (CALL,)), "length")),
        ({}, finished(Message("", "why", reasoning_tokens=1))),
        ({}, finished(None)),
    ]
    bodies = answered(tmp_path, [body for body, _ in asked], [done for _, done in asked])
    choices = [ChatCompletion.model_validate(body, strict=True).choices[0] for body in bodies]
    first, one, silent, cut, thought, plain = choices
    assert first.finish_reason == one.finish_reason == "tool_calls"
    assert first.message.content is None
    calls = first.message.tool_calls
    assert calls is not None
    assert [(c.type, c.function.name, c.function.arguments) for c in calls] == [
        ("function", "f", '{"a": 1}')
    ] * 2
    assert calls[0].id != calls[1].id
    assert one.message.tool_calls is not None
    assert len(one.message.tool_calls) == 1
    assert first.message.reasoning_content == "why"
    assert (silent.message.content, hasattr(silent.message, "reasoning_content")) == ("So.", False)
    assert (cut.finish_reason, cut.message.content) == ("length", "So.")
    assert (thought.message.content, thought.message.reasoning_content) == ("", "why")
    assert (plain.finish_reason, plain.message.content) == ("stop", "<whole>")
    assert plain.message.tool_calls is None
    spent = [body["usage"]["completion_tokens_details"]["reasoning_tokens"] for body in bodies]
    assert spent == [0, 0, 0, 0, 1, 0]


@pytest.mark.parametrize("url", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
def test_a_token_that_cannot_come_has_a_number_that_json_knows(tmp_path: Path, url: str) -> None:
    told = TokenLogprob(7, -0.5, ((7, -0.5), (3, -math.inf)))
    one = Finished("<whole>", Completion("a", 1, (7,), "stop", logprobs=(told,)), None)
    (body,) = answered(tmp_path, [{}], [one], url)
    assert "-9999.0" in json.dumps(body, allow_nan=False)


def test_response_objects_have_an_item_for_each_part(tmp_path: Path) -> None:
    tool = {"type": "function", "name": "f"}
    both = Message("So.", "why", (CALL, CALL), reasoning_tokens=1)
    asked: list[tuple[dict[str, Any], Finished]] = [
        ({"input": "hi", "tools": [tool], "temperature": 0.5}, finished(both)),
        ({"input": "hi", "instructions": "be", "max_output_tokens": 3}, finished(None, "length")),
        ({"input": "hi"}, finished(Message("", None, (CALL,)))),
    ]
    done = [each for _, each in asked]
    bodies = answered(tmp_path, [body for body, _ in asked], done, "/v1/responses")
    first, cut, called = (Response.model_validate(body, strict=True) for body in bodies)
    kinds = [item.type for item in first.output]
    assert kinds == ["reasoning", "message", "function_call", "function_call"]
    assert (first.output_text, first.status, first.temperature) == ("So.", "completed", 0.5)
    call: Any = first.output[2]
    assert (call.name, call.arguments, call.call_id[:5]) == ("f", '{"a": 1}', "call_")
    answer: Any = first.output[1]
    assert [len(each.top_logprobs) for each in answer.content[0].logprobs] == [2]
    assert (cut.output_text, cut.status, cut.instructions) == ("<whole>", "incomplete", "be")
    assert cut.incomplete_details is not None
    assert cut.incomplete_details.reason == "max_output_tokens"
    assert [item.type for item in called.output] == ["function_call"]
    assert first.usage is not None
    assert first.usage.output_tokens_details.reasoning_tokens == 1
    assert cut.usage is not None
    assert (cut.usage.input_tokens, cut.usage.output_tokens) == (1, 1)
