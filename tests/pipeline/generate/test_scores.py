"""From rows with completions to their scores, as a job makes them, but for Ray."""

from __future__ import annotations

import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.commit.schema import completions_table
from pipeline.config.job import JobConfig
from pipeline.generate.loading import load_pair, make_engine
from pipeline.generate.reading import Reader
from pipeline.inputs.requests import RowRequests
from pipeline.inputs.source import read_units
from pipeline.run.plan import plan_job
from tests.conftest import TinyModels

ROWS = [
    {"messages": [{"role": "user", "content": "Hi"}], "c": "Well, hello."},
    {"messages": [{"role": "user", "content": "Hi"}], "c": " Grüße!\n"},
    {"messages": [{"role": "system", "content": "x" * 60}], "c": "y"},
]


def test_they_are_plain_transformers_log_likelihoods(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "in.parquet")
    job = JobConfig.model_validate(
        {
            "input": {
                "paths": [str(tmp_path / "in.parquet")],
                "messages_column": "messages",
                "completion_column": "c",
            },
            "output": str(tmp_path / "out"),
            "models": {"target": tiny_models.target, "draft": tiny_models.draft},
            "sampling": {"temperature": 0.2},
        }
    )
    plan = plan_job(job)
    assert plan.sampling_said == "sampling: none, since completions are given"
    pair = load_pair(job)
    assert pair.draft is None
    requests = RowRequests(job.input, job.sampling, pair.tokenizer, pair.context_length)
    reader = Reader(job, pair.tokenizer, requests)
    (rows,) = read_units(plan.units, plan.table, job.s3)
    cells = [rows.row(i, requests.columns) for i in range(len(ROWS))]
    asked = [requests.of(row, rows.row_id(i))[0] for i, row in enumerate(cells)]
    done = make_engine(job, pair, None).generate(asked)
    outcomes = [[reader.outcome(*each)] for each in zip(cells, asked, done, strict=True)]
    found = completions_table(rows, outcomes, job.optional_columns).to_pylist()

    model = AutoModelForCausalLM.from_pretrained(tiny_models.target).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_models.target)
    for row, given in zip(found, ROWS, strict=True):
        prompt = tokenizer.apply_chat_template(
            given["messages"], add_generation_prompt=True, return_dict=False
        )
        completion = tokenizer(given["c"], add_special_tokens=False)["input_ids"]
        text = torch.tensor([[*prompt, *completion]])
        labels = text.clone()
        labels[:, : len(prompt)] = -100
        with torch.inference_mode():
            loss = float(model(text, labels=labels).loss)  # mean over the completion's tokens
        assert row["scored_tokens"] == len(completion)
        assert row["logprob_sum"] == pytest.approx(-loss * len(completion), abs=1e-3)
        assert row["perplexity"] == pytest.approx(math.exp(loss), rel=1e-3)
        assert (row["completion"], row["prompt_tokens"]) == (given["c"], len(prompt))
        assert (row["finish_reason"], row["output_tokens"]) == ("stop", 0)
        assert "logprobs" not in row
