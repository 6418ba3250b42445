from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from transformers import AutoTokenizer

from pipeline import layout
from pipeline.config.job import S3Config
from pipeline.errors import UserError
from pipeline.outputs.training_data import open_job, read_examples
from pipeline.storage.folder import open_folder
from specdec.training.examples import Example
from tests.conftest import S3Server, TinyModels

LOCAL = S3Config()
EOS = 1

WriteJob = Callable[..., str]


@pytest.fixture(scope="module")
def tokenizer(tiny_models: TinyModels) -> Any:
    return AutoTokenizer.from_pretrained(tiny_models.target)


def row(number: int, completion: str, reason: str = "stop", **more: Any) -> dict[str, Any]:
    return {
        "row_id": f"in.parquet:{number}:0",
        "prompt": f"say {number}",
        "completion": completion,
        "finish_reason": reason,
        **more,
    }


def read(url: str, tokenizer: Any, s3: S3Config = LOCAL, **options: Any) -> list[Example]:
    return read_examples(open_job(url, s3), tokenizer, **options)


def test_rows_as_token_ids(write_job_output: WriteJob, tokenizer: Any) -> None:
    url = write_job_output({"b": [row(2, "two", "length")], "a": [row(0, "zero"), row(1, "")]})
    zero, one, two = read(url, tokenizer)
    assert [e.id for e in (zero, one, two)] == [f"in.parquet:{i}:0" for i in range(3)]
    assert zero.prompt_ids == tuple(tokenizer("say 0").input_ids)
    assert zero.output_ids == (*tokenizer("zero", add_special_tokens=False).input_ids, EOS)
    assert one.output_ids == (EOS,)
    assert EOS not in two.output_ids
    assert zero.group == "in.parquet"
    assert tokenizer.decode(two.output_ids) == "two"


def test_prompts_are_rendered_as_the_job_did(write_job_output: WriteJob, tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "hi"}]
    url = write_job_output(
        {"a": [row(0, "x", messages=chat)]}, input={"paths": "p", "messages_column": "messages"}
    )
    (found,) = read(url, tokenizer)
    assert tokenizer.decode(found.prompt_ids) == "<s><|user|>hi</s><|assistant|>"

    url = write_job_output(
        {"a": [row(0, "x", n=3)]}, name="t", input={"paths": "p", "template": "{{ n }}+{{ n }}="}
    )
    (found,) = read(url, tokenizer)
    assert tokenizer.decode(found.prompt_ids) == "<s>3+3="


def test_a_jobs_own_requests(write_job_output: WriteJob, tokenizer: Any) -> None:
    """Lines of OpenAI's batch API, and a sampling of the row's own."""

    def line(**body: Any) -> str:
        return json.dumps({"custom_id": "a", "url": "/v1/completions", "body": body})

    lines = [line(prompt="hi", max_tokens=9, temperature=0, n=2), line(prompt="ho", stop="x")]
    rows = [{**row(i, "so"), "request": each} for i, each in enumerate(lines)]
    rows.append({**rows[0], "row_id": "in.parquet:0:1"})
    url = write_job_output({"a": rows}, input={"paths": "p", "format": "openai"})
    first, stopped, second = read(url, tokenizer)
    assert tokenizer.decode(first.prompt_ids) == "<s>hi"
    assert tokenizer.decode(stopped.prompt_ids) == "<s>ho"
    assert (first.output_ids[-1], stopped.output_ids[-1] == EOS) == (EOS, False)
    assert first.sampling is not None and second.sampling is not None
    assert (first.sampling.max_new_tokens, first.sampling.temperature) == (9, 0)
    assert second.sampling == replace(first.sampling, seed=second.sampling.seed)
    assert second.sampling.seed != first.sampling.seed

    override = row(0, "so", sampling_params={"temperature": 0.25, "top_k": None})
    url = write_job_output({"a": [override]}, name="own", sampling={"temperature": 0.5, "top_k": 7})
    (found,) = read(url, tokenizer)
    assert found.sampling is not None
    assert (found.sampling.temperature, found.sampling.top_k) == (0.25, 7)


@pytest.mark.parametrize(
    ("sampling", "override"),
    [
        ({"stop": ["\n"]}, None),
        ({"stop_token_ids": [5]}, None),
        ({"ignore_eos": True}, None),
        ({}, '{"stop": ["x"]}'),
    ],
)
def test_an_end_that_may_be_the_jobs_is_not_the_targets(
    write_job_output: WriteJob, tokenizer: Any, sampling: dict[str, Any], override: str | None
) -> None:
    rows = [row(0, "a", sampling_params=override), row(1, "b", sampling_params='{"stop": []}')]
    first, second = read(write_job_output({"a": rows}, sampling=sampling), tokenizer)
    assert EOS not in first.output_ids
    assert (EOS in second.output_ids) == (sampling.keys() <= {"stop"})


def test_half_a_character_at_the_end_is_left_out(
    write_job_output: WriteJob, tokenizer: Any
) -> None:
    url = write_job_output({"a": [row(0, "na\N{REPLACEMENT CHARACTER}", "length")]})
    (found,) = read(url, tokenizer)
    assert tokenizer.decode(found.output_ids) == "na"


def test_limit_and_groups(write_job_output: WriteJob, tokenizer: Any) -> None:
    rows = [row(i, "x", kind="even" if i % 2 == 0 else None) for i in range(5)]
    url = write_job_output({"a": rows[:3], "b": rows[3:]})
    found = read(url, tokenizer, limit=4, by="kind")
    assert [e.group for e in found] == ["even", "None", "even", "None"]


def test_a_job_that_has_committed_nothing(write_job_output: WriteJob, tokenizer: Any) -> None:
    with pytest.raises(UserError, match="has not committed a completion yet"):
        read(write_job_output({}), tokenizer)


def test_what_is_no_job(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no job's output here"):
        open_job(str(tmp_path), LOCAL)


@pytest.mark.parametrize("damage", [lambda record: "{", lambda record: json.dumps({"a": 1})])
def test_a_record_that_cannot_be_read(
    write_job_output: WriteJob, damage: Callable[[str], str]
) -> None:
    url = write_job_output({})
    file = Path(url, layout.JOB)
    file.write_text(damage(file.read_text()))
    with pytest.raises(UserError, match=r"job\.json is not what this version writes"):
        open_job(url, LOCAL)


def test_a_column_that_is_not_there(write_job_output: WriteJob, tokenizer: Any) -> None:
    url = write_job_output({"a": [row(0, "x", kind="k")]})
    with pytest.raises(UserError, match=r"a\.parquet: no column 'kinds'; did you mean 'kind'\?"):
        read(url, tokenizer, by="kinds")


def test_a_damaged_file(write_job_output: WriteJob, tokenizer: Any) -> None:
    url = write_job_output({"a": [row(0, "x")]})
    Path(url, "completions/a.parquet").write_bytes(b"PAR1 not really PAR1")
    with pytest.raises(UserError, match=r"completions/a\.parquet cannot be read"):
        read(url, tokenizer)


@pytest.mark.s3
def test_a_job_on_s3(s3_env: S3Server, write_job_output: WriteJob, tokenizer: Any) -> None:
    local = write_job_output({"a": [row(0, "zero")]})
    s3_env.client().create_bucket(Bucket="outputs")
    s3 = S3Config(endpoint=s3_env.endpoint)
    remote = open_folder("s3://outputs/job", s3)
    for folder, _, files in os.walk(local):
        for file in files:
            path = Path(folder, file)
            remote.put(str(path.relative_to(local)), path.read_bytes())
    assert read(remote.url, tokenizer, s3) == read(local, tokenizer)


def test_the_table_of_the_fixture_is_what_jobs_write(write_job_output: WriteJob) -> None:
    """Of the columns that are read; guards the tests above against a change of the schema."""
    from pipeline.commit.schema import COMPLETION_COLUMNS
    from pipeline.inputs.row_ids import ROW_ID

    assert ROW_ID == "row_id"
    assert COMPLETION_COLUMNS["completion"] == pa.string()
    assert COMPLETION_COLUMNS["finish_reason"] == pa.string()
