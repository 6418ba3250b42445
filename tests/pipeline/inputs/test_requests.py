from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pyarrow as pa
import pytest

from pipeline.config.job import InputConfig, SamplingConfig
from pipeline.errors import RowError
from pipeline.inputs.blocks import UnitRows
from pipeline.inputs.requests import RowRequests
from pipeline.inputs.row_sampling import row_seed
from pipeline.inputs.units import Piece, Unit
from tests.conftest import TinyModels

JOB = SamplingConfig(max_new_tokens=5, temperature=0.5, seed=3, n=2)
NAME = "a.jsonl:4:0"


@pytest.fixture(scope="module")
def tokenizer(tiny_models: TinyModels) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_models.target)


def requests(tokenizer: Any, context: int | None = None, **how: str) -> RowRequests:
    return RowRequests(InputConfig(paths=("x",), **how), JOB, tokenizer, context)  # type: ignore[arg-type]


def chat(**body: Any) -> str:
    body = {"messages": [{"role": "user", "content": "hi"}], **body}
    return json.dumps({"custom_id": "a", "url": "/v1/chat/completions", "body": body})


def test_a_row_has_the_jobs_samples_each_with_a_seed_of_its_own(tokenizer: Any) -> None:
    first, second = requests(tokenizer, prompt_column="p").of({"p": "hi", "other": 1}, NAME)
    assert (first.id, second.id) == (NAME, "a.jsonl:4:1")
    assert tokenizer.decode(first.prompt_ids) == "<s>hi" == tokenizer.decode(second.prompt_ids)
    assert first.sampling.seed == row_seed(3, NAME)
    assert second.sampling.seed == row_seed(3, "a.jsonl:4:1")
    assert (first.sampling.max_new_tokens, first.sampling.temperature) == (5, 0.5)


@pytest.mark.parametrize(
    ("how", "row", "prompt"),
    [
        ({"prompt_column": "p"}, {"p": "hi"}, "<s>hi"),
        ({"template": "{{ p }}!"}, {"p": "hi"}, "<s>hi!"),
        (
            {"messages_column": "m"},
            {"m": [{"role": "user", "content": "hi"}]},
            "<s><|user|>hi</s><|assistant|>",
        ),
    ],
)
@pytest.mark.parametrize("as_text", [False, True])
def test_a_rows_own_sampling(
    tokenizer: Any, how: dict[str, str], row: dict[str, Any], prompt: str, as_text: bool
) -> None:
    own = {"temperature": 0, "n": 3, "max_new_tokens": 7.0}
    row = {**row, "sampling_params": json.dumps(own) if as_text else own}
    made = requests(tokenizer, **how)
    found = made.of(row, NAME)
    assert [request.id for request in found] == [f"a.jsonl:4:{s}" for s in range(3)]
    for request in found:
        assert tokenizer.decode(request.prompt_ids) == prompt
        assert (request.sampling.temperature, request.sampling.max_new_tokens) == (0, 7)
    assert made.count(row) == 3


def test_a_row_has_log_probabilities_only_where_the_job_has_a_column_for_them(
    tokenizer: Any,
) -> None:
    row = {"p": "hi", "sampling_params": {"logprobs": 2}}
    with pytest.raises(RowError, match="the job has no column for them"):
        requests(tokenizer, prompt_column="p").of(row, NAME)
    job = JOB.model_copy(update={"logprobs": 0})
    made = RowRequests(InputConfig(paths=("x",), prompt_column="p"), job, tokenizer)
    assert made.of(row, NAME)[0].sampling.logprobs == 2
    lines = RowRequests(InputConfig(paths=("x",), format="openai"), JOB, tokenizer)
    (one, _) = lines.of({"request": chat(logprobs=True, top_logprobs=1)}, NAME)
    assert one.sampling.logprobs == 1


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_the_names_that_others_have_for_the_most_tokens(
    tokenizer: Any, name: str, as_text: bool
) -> None:
    made = requests(tokenizer, prompt_column="p")

    def of(own: dict[str, Any]) -> int:
        cell = json.dumps(own) if as_text else own
        request, _ = made.of({"p": "hi", "sampling_params": cell}, NAME)
        return request.sampling.max_new_tokens

    assert of({name: 7.0}) == of({name: 7, "max_new_tokens": 7}) == 7
    assert of({name: None, "max_new_tokens": 7}) == 7  # as Arrow fills what a row does not have
    with pytest.raises(RowError, match=f"max_new_tokens 8 and {name} 7 are the same setting"):
        of({name: 7, "max_new_tokens": 8})


def test_a_line_of_a_batch_brings_prompt_and_sampling(tokenizer: Any) -> None:
    made = requests(tokenizer, format="openai")
    assert made.columns == ["request", "sampling_params"]
    row = {"request": chat(n=3, max_tokens=9, seed=8)}
    found = made.of(row, NAME)
    assert len(found) == 3
    assert tokenizer.decode(found[0].prompt_ids) == "<s><|user|>hi</s><|assistant|>"
    assert found[0].sampling.seed == 8
    assert len({request.sampling.seed for request in found}) == 3
    assert all(request.sampling.max_new_tokens == 9 for request in found)


@pytest.mark.parametrize("how", [{"prompt_column": "p"}, {"format": "openai"}])
def test_one_sample_is_the_one_that_all_samples_have(tokenizer: Any, how: dict[str, str]) -> None:
    made = requests(tokenizer, **how)
    row = {"p": "hi", "request": chat(n=2, seed=8)}
    for request in made.of(row, NAME):
        assert made.sample(row, request.id) == request


@pytest.mark.parametrize("place", ["job", "row", "text of a row", "line"])
def test_a_stop_that_is_a_special_token_is_a_stop_token_wherever_it_is_said(
    tokenizer: Any, place: str
) -> None:
    stops = ["<|user|>", "</s>x", "no"]
    job = SamplingConfig(stop=tuple(stops) if place == "job" else ())
    how: dict[str, Any] = {"format": "openai"} if place == "line" else {"prompt_column": "p"}
    made = RowRequests(InputConfig(paths=("x",), **how), job, tokenizer)
    own: Any = None
    if place != "job":
        own = json.dumps({"stop": stops}) if place == "text of a row" else {"stop": stops}
    row = {"p": "hi", "sampling_params": own, "request": chat(stop=stops)}
    (request,) = made.of(row, NAME)
    assert request.sampling.stop == tuple(stops)
    assert request.sampling.stop_token_ids == (tokenizer.convert_tokens_to_ids("<|user|>"),)


@pytest.mark.parametrize(
    "own", [{"stop": ["\ufffd"]}, {"stop": ""}, {"stop_token_ids": [10**6]}, {"stop": ["a", ""]}]
)
@pytest.mark.parametrize("how", [{"prompt_column": "p"}, {"format": "openai"}])
def test_a_stop_that_cannot_be_found_is_the_rows_error(
    tokenizer: Any, how: dict[str, str], own: dict[str, Any]
) -> None:
    row = {"p": "hi", "sampling_params": own, "request": chat(**own)}
    with pytest.raises(RowError, match="InvalidSampling: stop"):
        requests(tokenizer, **how).of(row, NAME)


def test_first_samples_and_why_others_have_none(tokenizer: Any) -> None:
    rows: dict[str, dict[str, Any]] = {
        "f:0:0": {"p": "a"},
        "f:1:0": {"p": None},
        "f:2:0": {"p": "b", "sampling_params": {"n": 0}},
        "f:3:0": {"p": None},
        "f:4:0": {"p": "c", "sampling_params": {"n": 5}},
    }
    left_out: Counter[str] = Counter()
    found = requests(tokenizer, prompt_column="p").first_samples(rows, left_out)
    assert [request.id for request in found] == ["f:0:0", "f:4:0"]
    assert sorted(left_out.values()) == [1, 2]
    assert "NullPrompt: column 'p' is null" in left_out


@pytest.mark.parametrize(
    ("row", "error_class", "samples"),
    [
        ({"p": None}, "NullPrompt", 2),
        ({"p": None, "sampling_params": {"n": 4}}, "NullPrompt", 4),
        ({"p": "x", "sampling_params": {"n": 0}}, "InvalidSampling", 2),
        ({"p": "x", "sampling_params": {"n": 4, "top_k": -1}}, "InvalidSampling", 4),
        ({"p": "x" * 20}, "PromptTooLong", 2),
        ({"p": "x" * 100_000}, "PromptTooLong", 2),
    ],
)
def test_what_is_wrong_with_a_row(
    tokenizer: Any, row: dict[str, Any], error_class: str, samples: int
) -> None:
    made = requests(tokenizer, context=20, prompt_column="p")
    for make in (made.of, made.sample):
        with pytest.raises(RowError) as caught:
            make(row, NAME)
        assert caught.value.error_class == error_class
    assert made.count(row) == samples


@pytest.mark.parametrize("line", [None, "", "{", "[]", chat(n=0), chat(stream=True)])
def test_a_line_that_is_no_request(tokenizer: Any, line: str | None) -> None:
    made = requests(tokenizer, format="openai")
    with pytest.raises(RowError):
        made.of({"request": line}, NAME)
    assert made.count({"request": line}) == JOB.n


def test_the_longest_prompt_leaves_room_for_a_token(tokenizer: Any) -> None:
    made = requests(tokenizer, context=20, prompt_column="p")
    (request, _) = made.of({"p": "x" * 18}, NAME)
    assert len(request.prompt_ids) == 19


def test_columns_of_a_unit_as_a_row() -> None:
    broken = pa.Array.from_buffers(
        pa.string(),
        2,
        [None, pa.array([0, 2, 4], pa.int32()).buffers()[1], pa.py_buffer(b"ok\xff\xfe")],
    )
    times = pa.array([1, 2**62], pa.timestamp("us"))
    table = pa.table({"p": broken, "t": times})
    unit = Unit.of(Piece("a.parquet", 0, 2, "url", "parquet", 0, 1))
    rows = UnitRows(unit, table, {})
    assert rows.row(0, ["p", "no such column"]) == {"p": "ok"}
    for column, error_class in (("p", "MalformedText"), ("t", "MalformedValue")):
        with pytest.raises(RowError) as caught:
            rows.row(1, [column])
        assert caught.value.error_class == error_class
    assert rows.row(1, []) == {}
