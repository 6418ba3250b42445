"""Every command that reads rows makes the same requests of them.

Two jobs ask for the same completions: one in lines of OpenAI's batch API, one in columns, with a
`sampling_params` column that overrides the job's sampling row by row.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

import jobs.tuning.head_rows
import jobs.tuning.profile_draft
from pipeline.config.job import S3Config
from pipeline.inputs.row_sampling import row_seed
from pipeline.outputs.training_data import open_job, read_examples
from specdec.engine.engine import Engine
from specdec.request import Request, SamplingParams
from specdec.training.examples import Example
from tests.conftest import TinyModels
from tests.jobs.command_line import call
from tests.pipeline.small_jobs import rows_of

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]

KINDS = ("openai", "columns")
ROWS = 12
SEED = 7
OWN: tuple[dict[str, Any], ...] = (
    {},
    {"max_new_tokens": 3, "temperature": 0},
    {"max_new_tokens": 5, "top_k": 4, "n": 2},
)
"""What rows say of their sampling, in turns."""

JOBS = {"max_new_tokens": 8, "temperature": 0.5, "ignore_eos": True, "seed": SEED}
"""What the job says."""

SAMPLES = ROWS // 3 * 4
"""Samples of the whole job."""

TOKENS = ROWS // 3 * (8 + 3 + 2 * 5)
"""Output tokens of the whole job: no row ends before its `max_new_tokens`."""

FIRST_TOKENS = ROWS // 3 * (8 + 3 + 5)
"""Those of every row's first sample."""


def own(row: int) -> dict[str, Any]:
    return OWN[row % len(OWN)]


def line(row: int) -> dict[str, Any]:
    """A row as a request: chats and completions in turns."""
    names = {"max_new_tokens": "max_tokens"}
    body: dict[str, Any] = {names.get(key, key): value for key, value in own(row).items()}
    # A completion that gives none would have 16 tokens.
    body.setdefault("max_tokens", JOBS["max_new_tokens"])
    if row % 2:
        url, body["prompt"] = "/v1/completions", f"say {row}"
    else:
        url, body["messages"] = "/v1/chat/completions", [{"role": "user", "content": f"say {row}"}]
    return {"custom_id": f"r{row}", "url": url, "body": body}


def prompt(kind: str, row: int) -> str:
    """The prompt as the target reads it."""
    if kind == "openai" and row % 2 == 0:
        return f"<s><|user|>say {row}</s><|assistant|>"
    return f"<s>say {row}"


def sampling(row: int, sample: int) -> SamplingParams:
    values = {key: value for key, value in own(row).items() if key != "n"}
    seed = row_seed(SEED, f"in.jsonl:{row}:{sample}")
    return SamplingParams(**{**JOBS, "seed": seed, **values})


@dataclass(frozen=True)
class Job:
    """A job that was run; `output` is its folder."""

    kind: str
    file: Path
    output: Path


@pytest.fixture(scope="module", params=KINDS)
def job(
    request: pytest.FixtureRequest, tiny_models: TinyModels, tmp_path_factory: Any, local_ray: None
) -> Job:
    folder: Path = tmp_path_factory.mktemp(request.param)
    if request.param == "openai":
        rows, how = [line(i) for i in range(ROWS)], {"format": "openai"}
    else:
        rows = [{"prompt": f"say {i}", "sampling_params": own(i)} for i in range(ROWS)]
        how = {"prompt_column": "prompt"}
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "input": {"paths": "in.jsonl", **how},
        "output": "out",
        "models": {"target": tiny_models.target, "draft": tiny_models.draft},
        "sampling": JOBS,
        "speculation": {"policy": "fixed", "k": 2, "verification": "coupled", "trace": True},
        "actors": {"slots": 4, "num_cpus": 2},
        "unit_rows": 5,
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(values))
    result = call("run", folder / "job.yaml", "--quiet")
    assert result.exit_code == 0, result.output
    assert result.output == ""
    return Job(request.param, folder / "job.yaml", folder / "out")


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """The requests that engines of this process are given."""
    requests: list[Request] = []
    submit = Engine.submit

    def watched(self: Engine, request: Request) -> None:
        requests.append(request)
        submit(self, request)

    monkeypatch.setattr(Engine, "submit", watched)
    return requests


def check_first_samples(job: Job, requests: list[Request], tokenizer: Any) -> None:
    """Every row's first sample is among the requests once, as the job made it."""
    assert sorted(request.id for request in requests) == sorted(
        f"in.jsonl:{i}:0" for i in range(ROWS)
    )
    for request in requests:
        row = int(request.id.split(":")[1])
        assert tokenizer.decode(request.prompt_ids) == prompt(job.kind, row)
        assert request.sampling == sampling(row, 0)


@pytest.fixture(scope="module")
def tokenizer(tiny_models: TinyModels) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_models.target)


def test_run(job: Job) -> None:
    rows = rows_of(job.output)
    assert len(rows) == SAMPLES
    for name, row in rows.items():
        _, number, _ = name.split(":")
        assert row["output_tokens"] == sampling(int(number), 0).max_new_tokens
        assert row["prompt_tokens"] > 0


def test_verify_report_and_explain(job: Job) -> None:
    result = call("verify", job.output, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["rows_out"] == SAMPLES
    result = call("report", job.output)
    assert result.exit_code == 0, result.output
    result = call("explain", job.output, "--row", "in.jsonl:2:1")
    assert result.exit_code == 0, result.output
    assert "accepted" in result.stdout
    units = pq.read_table(job.output / "stats" / "units.parquet").to_pylist()
    assert sum(unit["output_tokens"] for unit in units) == TOKENS


def test_plan(job: Job, tmp_path: Path) -> None:
    result = call("plan", job.file, "--set", f"output={tmp_path / 'new'}", "--json", "--rows", ROWS)
    assert result.exit_code == 0, result.output
    assert f"generating {ROWS} rows · done in" in result.stderr
    found = json.loads(result.stdout)
    assert found["left_out"] == 0
    assert found["output_tokens"]["value"] == pytest.approx(TOKENS)


def test_profile(
    job: Job, submitted: list[Request], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs.tuning.profile_draft, "COST_SECONDS", 0.2)
    result = call("profile", job.file, "--json", "--rows", ROWS)
    assert result.exit_code == 0, result.output
    assert "recording acceptance 100% · done in" in result.stderr
    found = json.loads(result.stdout)
    assert (found["rows"], found["output_tokens"]) == (ROWS, FIRST_TOKENS)
    check_first_samples(job, submitted, tokenizer)


def test_train_head_on_a_jobs_prompts(
    job: Job, submitted: list[Request], tokenizer: Any, tmp_path: Path
) -> None:
    options = ("--rows", ROWS, "--epochs", 1, "--seed", SEED, "--out", tmp_path / "head")
    result = call("train-head", "--job", job.file, *options)
    assert result.exit_code == 0, result.output
    card = json.loads((tmp_path / "head" / "card.json").read_text())
    parts = ("train", "tune", "held_out")
    assert sum(card["labels"][part]["positions"] for part in parts) == FIRST_TOKENS
    check_first_samples(job, submitted, tokenizer)


@pytest.fixture
def examples(job: Job, tokenizer: Any) -> list[Example]:
    """What is learned from the job's outputs: every sample that is not without text."""
    found = read_examples(open_job(str(job.output), S3Config()), tokenizer)
    assert ROWS <= len(found) <= SAMPLES
    for example in found:
        _, row, sample = example.id.split(":")
        assert tokenizer.decode(example.prompt_ids) == prompt(job.kind, int(row))
        assert example.sampling == sampling(int(row), int(sample))
    return found


def test_train_head_on_a_jobs_outputs(
    job: Job, examples: list[Example], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    labelled: list[Example] = []
    collect = jobs.tuning.head_rows.collect

    def watched(pair: Any, items: Iterable[tuple[Example, Any]], *rest: Any, **more: Any) -> Any:
        items = list(items)
        labelled.extend(example for example, _ in items)
        return collect(pair, items, *rest, **more)

    monkeypatch.setattr(jobs.tuning.head_rows, "collect", watched)
    options = ("--epochs", 1, "--seed", SEED, "--out", tmp_path / "head")
    result = call("train-head", "--outputs", job.output, *options)
    assert result.exit_code == 0, result.output
    assert labelled == examples
    labels = json.loads((tmp_path / "head" / "card.json").read_text())["labels"]
    assert sum(part["rows"] for part in labels.values()) == len(examples)


def test_distill(job: Job, examples: list[Example], tmp_path: Path) -> None:
    folder = tmp_path / "draft"
    quick = ("--epochs", 1, "--held-out", 0.3, "--threads", 1)
    result = call("distill", job.output, "--out", folder, "--from-layers", "0", *quick)
    assert result.exit_code == 0, result.output
    card = json.loads((folder / "training.json").read_text())
    assert sum(card["examples"].values()) == len(examples)


@pytest.mark.parametrize("job", ["openai"], indirect=True)
def test_run_batch(job: Job, tiny_models: TinyModels, tmp_path: Path) -> None:
    """What `run` has made of these lines is what `run-batch` would: it finds nothing missing."""
    answers = tmp_path / "out.jsonl"
    shutil.copytree(job.output, f"{answers}.specbatch")
    given = [f"sampling.{key}={json.dumps(value)}" for key, value in JOBS.items()]
    given += ["unit_rows=5", "speculation.verification=coupled"]
    sets = [word for each in given for word in ("--set", each)]
    models = ("--model", tiny_models.target, "--draft", tiny_models.draft)
    source = job.file.parent / "in.jsonl"
    result = call("run-batch", "-i", source, "-o", answers, *models, *sets)
    assert result.exit_code == 0, result.output
    assert "starting actors" not in result.stderr
    lines = answers.read_text().splitlines()
    assert len(lines) == ROWS
    for row, text in enumerate(lines):
        body = json.loads(text)["response"]["body"]
        samples = own(row).get("n", 1)
        assert len(body["choices"]) == samples
        tokens = sampling(row, 0).max_new_tokens
        assert body["usage"]["completion_tokens"] == samples * tokens
        assert Counter(c["finish_reason"] for c in body["choices"]) == {"length": samples}
