"""What a completion must be, as a job, a row or a request says it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.config.job import SamplingConfig
from pipeline.config.structured_outputs import StructuredOutputs
from pipeline.errors import RowError
from pipeline.inputs.openai_requests import request_cells
from pipeline.inputs.row_sampling import row_sampling

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
KINDS: list[dict[str, Any]] = [
    {"json_schema": SCHEMA},
    {"json_object": True},
    {"regex": "[0-9]+"},
    {"choice": ["yes", 'no "quotes"', "ja\nnein", "é"]},
    {"grammar": 'start: "a" start | "b"'},
]


@pytest.mark.parametrize("asked", KINDS, ids=str)
def test_a_job_a_row_and_json_text_give_the_same_grammar(asked: dict[str, Any]) -> None:
    job = SamplingConfig(structured_outputs=asked)  # type: ignore[arg-type]
    grammar = row_sampling(job, None, "a:0:0").grammar
    assert grammar
    for override in (asked, json.dumps(asked), {**asked, "regex": asked.get("regex")}):
        row = row_sampling(SamplingConfig(), {"structured_outputs": override}, "a:0:0")
        assert row.grammar == grammar
    assert row_sampling(SamplingConfig(), None, "a:0:0").grammar is None


def test_an_empty_schema_is_one_of_any_json() -> None:
    job = SamplingConfig.model_validate({"structured_outputs": {"json_schema": {}}})
    assert job.structured_outputs is not None
    assert (job.structured_outputs.kind, job.structured_outputs.schema_of_json) == (
        "json_schema",
        {},
    )
    row = row_sampling(SamplingConfig(), {"structured_outputs": {"json_schema": {}}}, "a:0:0")
    assert row.grammar == job.structured_outputs.text()


BAD = [
    ({}, "give exactly one of"),
    ({"regex": "a", "choice": ["b"]}, "got regex and choice"),
    ({"regex": "(a"}, "cannot be compiled"),
    ({"grammar": "start: missing"}, 'cannot be compiled: at 1(8): unknown name: "missing"'),
    ({"json_schema": {"type": "strange"}}, "cannot be compiled"),
    ({"choice": []}, "choice"),
    ({"scheme": {}}, "scheme"),
    ([1], "Input should be a valid dictionary"),
]


@pytest.mark.parametrize(("asked", "message"), BAD)
def test_what_cannot_be_compiled_is_refused_in_a_job_and_is_a_rows_error(
    asked: Any, message: str
) -> None:
    with pytest.raises(ValidationError) as refused:
        StructuredOutputs.model_validate(asked)
    assert message in str(refused.value)
    with pytest.raises(RowError) as caught:
        row_sampling(SamplingConfig(), {"structured_outputs": asked}, "a:0:0")
    assert caught.value.error_class == "InvalidSampling"
    assert "structured_outputs" in caught.value.message
    assert message.split(":")[0] in caught.value.message


def asked_for(**body: Any) -> Any:
    body = {"messages": [{"role": "user", "content": "hi"}], **body}
    line = {"custom_id": "a", "url": "/v1/chat/completions", "body": body}
    return request_cells(json.dumps(line))["sampling_params"].get("structured_outputs")


@pytest.mark.parametrize(
    ("body", "structured"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}, "structured_outputs": {}}, None),
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "strict": True, "schema": SCHEMA},
                }
            },
            {"json_schema": SCHEMA},
        ),
        ({"structured_outputs": {"json": SCHEMA, "regex": None}}, {"json_schema": SCHEMA}),
        ({"structured_outputs": {"choice": ["a"]}}, {"choice": ["a"]}),
        ({"guided_json": json.dumps(SCHEMA)}, {"json_schema": SCHEMA}),
        ({"guided_regex": "a+"}, {"regex": "a+"}),
        ({"guided_choice": ["a", "b"]}, {"choice": ["a", "b"]}),
        ({"guided_grammar": "start: 'a'"}, {"grammar": "start: 'a'"}),
    ],
)
def test_all_ways_of_a_request_to_say_it(body: dict[str, Any], structured: Any) -> None:
    assert asked_for(**body) == structured


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"response_format": {"type": "xml"}}, "must be one of text, json_object and json_schema"),
        ({"response_format": {"type": "json_schema"}}, "has no json_schema.schema"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "says twice"),
        ({"guided_json": "{"}, "text, but not JSON"),
        ({"structured_outputs": "x"}, "must be an object"),
    ],
)
def test_what_no_request_can_ask_for(body: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        asked_for(**body)
