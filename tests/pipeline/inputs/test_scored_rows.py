"""Rows whose completions are given become requests that are scored."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.config.job import JobConfig
from pipeline.errors import RowError
from pipeline.inputs.requests import RowRequests
from pipeline.outputs.verify_unit import columns_of
from specdec.request import SamplingParams
from tests.pipeline.tiny_tokenizers import llama_like


def job(source: dict[str, Any] | None = None, **sampling: Any) -> JobConfig:
    return JobConfig.model_validate(
        {
            "input": source or {"paths": ["x"], "prompt_column": "p", "completion_column": "c"},
            "output": "out",
            "models": {"target": "t"},
            "sampling": sampling,
        }
    )


def requests(context: int | None = None, **sampling: Any) -> RowRequests:
    made = job(**sampling)
    return RowRequests(made.input, made.sampling, llama_like(), context)


def test_a_completion_is_what_follows_the_prompt() -> None:
    """Of a row's own sampling nothing counts, since nothing is sampled."""
    made = requests(temperature=0.3, max_new_tokens=7, logprobs=2)
    row = {"p": "hi", "c": " you", "sampling_params": {"n": 3, "temperature": -1}}
    (request,) = made.of(row, "a:0:0")
    tokenizer = llama_like()
    assert tokenizer.decode(request.prompt_ids) == "<s> hi"
    assert tokenizer.decode([*request.prompt_ids, *request.given_ids]) == "<s> hi you"
    assert request.sampling == SamplingParams(logprobs=2)
    assert (made.count(row), made.columns) == (1, ["p", "c"])


@pytest.mark.parametrize(
    ("row", "error_class", "said"),
    [
        ({"p": "hi", "c": None}, "MalformedCompletion", "column 'c' is null"),
        ({"p": "hi", "c": 7}, "MalformedCompletion", "holds a int, not text"),
        ({"p": "hi", "c": ""}, "MalformedCompletion", "has no tokens"),
        ({"p": "hi", "c": "\ud800"}, "MalformedCompletion", "the tokenizer refused it"),
        ({"p": "hi", "c": " you" * 9}, "PromptTooLong", "have 4 and 36 tokens"),
        ({"p": None, "c": "x"}, "NullPrompt", "null"),
    ],
)
def test_what_cannot_be_scored(row: dict[str, Any], error_class: str, said: str) -> None:
    with pytest.raises(RowError, match=said) as raised:
        requests(context=16).of(row, "a:0:0")
    assert raised.value.error_class == error_class


def test_no_draft_is_asked_for_and_columns_are_those_of_the_record() -> None:
    import pyarrow as pa

    made = job()
    assert not made.drafts
    names = [each.split(":")[0] for each in columns_of(pa.schema([]), made.optional_columns)]
    assert names[-3:] == ["logprob_sum", "perplexity", "scored_tokens"]


@pytest.mark.parametrize(
    ("source", "sampling", "said"),
    [
        (None, {"n": 2}, r"sampling\.n does not go with input\.completion_column"),
        (None, {"return_parsed": True}, r"sampling\.return_parsed does not go"),
        ({"paths": ["x"], "format": "openai", "completion_column": "c"}, {}, "completion_column"),
    ],
)
def test_what_does_not_go_together(
    source: dict[str, Any] | None, sampling: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        job(source, **sampling)
