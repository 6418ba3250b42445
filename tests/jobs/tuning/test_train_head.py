from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from jobs.cli import app
from tests.conftest import TinyModels

WriteRows = Callable[..., str]
STAGES = ("loading models", "completing and labelling")


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["train-head", *(str(a) for a in arguments)])


def one_error(result: Result) -> str:
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    before, error, message = result.stderr.partition("error: ")
    assert error
    # Nothing else but what was done until then.
    assert all(line.split(" · ")[0] in STAGES for line in before.splitlines()), before
    return message.strip()


@pytest.fixture
def prompts(write_rows: WriteRows) -> str:
    rows: list[dict[str, Any]] = [{"prompt": f"say {i} times {i * 7}"} for i in range(30)]
    return write_rows("prompts.parquet", [*rows, {"prompt": None}])


@pytest.fixture
def models(tiny_models: TinyModels) -> tuple[str, ...]:
    return ("--target", tiny_models.target, "--draft", tiny_models.draft)


def card(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "card.json").read_text())
    return found


def test_a_head_from_prompts(
    models: tuple[str, ...],
    tiny_models: TinyModels,
    prompts: str,
    write_rows: WriteRows,
    tmp_path: Path,
) -> None:
    chats = [{"messages": [{"role": "user", "content": f"chat {i}"}]} for i in range(9)]
    other = write_rows("other.jsonl", chats)
    folder = tmp_path / "head"
    small = ("--rows", 31, "--max-new-tokens", 12, "--epochs", 2, "--depth", 1)
    result = call(*models, "--prompts", prompts, "--other-prompts", other, *small, "--out", folder)
    assert result.exit_code == 0, result.output
    assert "loading models\n" in result.stderr
    assert "completing and labelling 100%" in result.stderr
    assert "training 100% · loss" in result.stderr
    assert "First look" in result.stderr
    assert "by output position  0–7: " in result.stderr
    assert "left out (1 rows were left out, most often: NullPrompt" in result.stderr
    assert "head, as saved" in result.stdout
    assert "rows of another kind of text: 8" in result.stdout
    assert "confidence (free)" in result.stdout
    assert result.stdout.count("ceiling: both models known") == 4
    assert "knows both models)" in result.stderr
    assert "these figures are rough" in result.stdout

    assert (folder / "reliability.png").read_bytes().startswith(b"\x89PNG")
    found = card(folder)
    assert found["sampling"] == {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    assert found["verification"] == "rejection"
    assert sum(found["labels"][part]["rows"] for part in ("train", "tune", "held_out")) == 30
    assert found["metrics"]["other"]["rows"] == 8
    assert found["metrics"]["held_out"]["ceiling"].keys() == {"before", "after"}
    assert set(found["calibration"]) == {"before", "after"}
    assert found["rows_left_out"]
    assert found["versions"]["torch"]

    from specdec.loading.head_files import load_head
    from specdec.loading.pair import ModelPair

    pair = ModelPair.load(tiny_models.target, tiny_models.draft, device="cpu")
    assert load_head(folder, pair).depth == 1


@pytest.mark.parametrize("verification", ["rejection", "coupled"])
def test_a_head_for_an_eagle_draft_serves_the_engine(
    tiny_models: TinyModels, tiny_eagle: str, prompts: str, tmp_path: Path, verification: Any
) -> None:
    folder = tmp_path / "head"
    own = ("--target", tiny_models.target, "--draft", tiny_eagle, "--prompts", prompts)
    small = ("--rows", 20, "--max-new-tokens", 10, "--epochs", 1, "--depth", 1)
    how = ("--verification", verification, "--out", folder)
    result = call(*own, *small, *how)
    assert result.exit_code == 0, result.output
    assert "ceiling: both models known" in result.stdout
    assert card(folder)["mixing"] == 0

    from specdec.engine.engine import Engine
    from specdec.loading.head_files import load_head
    from specdec.loading.pair import ModelPair
    from specdec.policies.registry import make_policy
    from specdec.request import Request, SamplingParams

    pair = ModelPair.load(tiny_models.target, tiny_eagle, device="cpu")
    head = load_head(folder, pair)
    policy = make_policy("head", threshold=0.99, k_min=1, head=head, estimator="head")
    engine = Engine(pair, policy=policy, verification=verification, slots=2)
    sampling = SamplingParams(max_new_tokens=12, temperature=0, ignore_eos=True)
    requests = [Request(str(i), (3 + i, 4, 5), sampling) for i in range(3)]
    plain = Engine(pair, policy=make_policy("none"), slots=2).generate(requests)
    outputs = {each.id: each.output_ids for each in engine.generate(requests)}
    assert outputs == {each.id: each.output_ids for each in plain}
    assert engine.stats.counts.verified > 0


def test_a_head_for_a_job_file(tiny_models: TinyModels, prompts: str, tmp_path: Path) -> None:
    job = {
        "input": {"paths": prompts, "template": "Q: {{ prompt }}"},
        "output": "out",
        "models": {"target": tiny_models.target, "draft": tiny_models.draft},
        "sampling": {"max_new_tokens": 6, "temperature": 0.5, "top_k": 9},
        "speculation": {"policy": "fixed", "verification": "coupled"},
    }
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(job))
    folder = tmp_path / "head"
    result = call("--job", file, "--rows", 12, "--epochs", 1, "--temperature", 0.7, "--out", folder)
    assert result.exit_code == 0, result.output
    found = card(folder)
    assert found["sampling"]["temperature"] == 0.7
    assert found["sampling"]["top_k"] == 9
    assert found["verification"] == "coupled"


def test_a_head_from_a_jobs_output(
    tiny_models: TinyModels, prompts: str, write_rows: WriteRows, tmp_path: Path
) -> None:
    config = {
        "input": {"paths": [prompts], "prompt_column": "prompt"},
        "models": {"target": tiny_models.target, "draft": tiny_models.draft},
        "sampling": {"max_new_tokens": 6, "temperature": 0},
    }
    target = {"name": tiny_models.target, "digest": "0"}
    record = {"config": config, "fingerprint": {"models": {"target": target}}}
    (tmp_path / "out" / "_specbatch").mkdir(parents=True)
    (tmp_path / "out" / "_specbatch" / "job.json").write_text(json.dumps(record))
    rows = [
        {
            "row_id": f"in.parquet:{i}:0",
            "prompt": f"say {i}",
            "completion": "so it is" * (1 + i % 3),
            "finish_reason": "stop",
        }
        for i in range(12)
    ]
    write_rows("out/completions/unit.parquet", rows)
    folder = tmp_path / "head"
    result = call("--outputs", tmp_path / "out", "--epochs", 1, "--out", folder)
    assert result.exit_code == 0, result.output
    found = card(folder)
    assert found["sampling"]["temperature"] == 0
    assert sum(found["labels"][part]["rows"] for part in ("train", "tune", "held_out")) == 12


def test_mistakes_are_one_line(
    models: tuple[str, ...], tiny_models: TinyModels, prompts: str, tmp_path: Path
) -> None:
    out = ("--out", tmp_path / "head")
    given = (*models, "--prompts", prompts, *out)
    target = ("--target", tiny_models.target)
    for arguments, message in [
        ((*models, *out), "give --prompts, --outputs of a job, or --job"),
        ((*target, "--prompts", prompts, *out), "give --draft"),
        ((*models, "--prompts", "gone.parquet", *out), "no such file"),
        ((*given, "--prompt-column", "q"), "no column 'q'"),
        ((*given, "--prompt-column", "q", "--template", "x"), "give one of"),
        ((*given, "--temperature", "-1"), "sampling.temperature"),
        ((*given, "--verification", "hope"), "speculation.verification"),
        ((*given, "--dtype", "float8"), "models.dtype"),
        ((*models, "--outputs", tmp_path, *out), "no job's output here"),
        ((*target, "--draft", "./gone", "--prompts", prompts, *out), "no such folder"),
        (
            (*target, "--draft", tiny_models.other_vocabulary, "--prompts", prompts, *out),
            "the vocabularies differ",
        ),
    ]:
        assert message in one_error(call(*arguments))
    assert not (tmp_path / "head").exists()


def test_too_few_prompts(models: tuple[str, ...], write_rows: WriteRows, tmp_path: Path) -> None:
    file = write_rows("few.jsonl", [{"prompt": "a"}, {"prompt": None}, {"prompt": "a"}])
    message = one_error(call(*models, "--prompts", file, "--out", tmp_path / "head"))
    assert "1 different prompts" in message
    assert "1 rows were left out" in message


def test_neither_messages_nor_prompt(
    models: tuple[str, ...], write_rows: WriteRows, tmp_path: Path
) -> None:
    file = write_rows("odd.jsonl", [{"text": "a"}])
    message = one_error(call(*models, "--prompts", file, "--out", tmp_path / "head"))
    assert "neither a column 'messages' nor 'prompt'; its columns: text" in message


def test_help_has_an_example() -> None:
    result = call("--help")
    assert result.exit_code == 0
    assert "specbatch train-head --job" in result.stdout
