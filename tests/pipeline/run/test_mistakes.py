"""Jobs and rows with something wrong: what fails the job, when, and what becomes an error row."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import UserError
from tests.conftest import TinyModels
from tests.pipeline.small_jobs import rows_of, run, settings

pytestmark = pytest.mark.ray

USER = [{"role": "user", "content": "tell me"}]


@pytest.fixture
def prompts(write_rows: Callable[..., str]) -> str:
    return write_rows("in.jsonl", [{"messages": USER}] * 4)


@pytest.mark.parametrize(("missing", "message"), [("draft", "no such folder"), ("head", "no acc")])
def test_a_missing_draft_or_head_is_found_before_ray_starts(
    tiny_models: TinyModels,
    prompts: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    missing: str,
    message: str,
) -> None:
    monkeypatch.setattr("pipeline.run.run.connected", lambda: pytest.fail("Ray was wanted"))
    values = settings(tiny_models, prompts, tmp_path / "out")
    if missing == "draft":
        values["models"]["draft"] = "./gone/draft"
    else:
        values["speculation"] = {"head": str(tmp_path / "gone"), "verification": "coupled"}
    with pytest.raises(UserError, match=message):
        run(values)
    assert not (tmp_path / "out").exists()


def test_each_kind_of_bad_row_becomes_an_error_row(
    local_ray: None, tiny_models: TinyModels, tmp_path: Path
) -> None:
    good = {"messages": USER, "tag": "good"}
    bad = {
        "NullPrompt": {"messages": None},
        "EmptyMessages": {"messages": []},
        "MalformedMessages": {"messages": [{"role": "user"}]},
        "PromptTooLong": {"messages": [{"role": "user", "content": "x" * 400}]},
        "InvalidSampling": {"messages": USER, "sampling_params": {"temperature": -1}},
    }
    lines = [json.dumps({**good, "i": i}) for i in range(6)]
    lines[1:1] = [json.dumps({**row, "tag": name}) for name, row in bad.items()]
    lines.insert(3, '{"messages": ')
    file = tmp_path / "in.jsonl"
    file.write_text("\n".join(lines))
    values = settings(
        tiny_models, str(file), tmp_path / "out", unit_rows=3
    )  # some units have errors only
    result = run(values)
    assert result.summary["rows"] == 6
    assert result.summary["errors_by_class"] == dict.fromkeys([*bad, "MalformedLine"], 1)
    errors = rows_of(tmp_path / "out", "errors")
    assert set(errors) | set(rows_of(tmp_path / "out")) == {f"in.jsonl:{i}:0" for i in range(12)}
    for row in errors.values():
        assert row["attempts"] == 1
        assert row["error_message"]
        assert row["tag"] in {row["error_class"], None}
    (malformed,) = (r for r in errors.values() if r["error_class"] == "MalformedLine")
    assert malformed["raw_line"] == '{"messages": '


def test_vocabularies_that_differ_are_the_users_error(
    local_ray: None, tiny_models: TinyModels, prompts: str, tmp_path: Path
) -> None:
    models = {"target": tiny_models.target, "draft": tiny_models.other_vocabulary}
    values = settings(tiny_models, prompts, tmp_path / "out") | {"models": models}
    with pytest.raises(UserError, match="the vocabularies differ at token 5") as caught:
        run(values)
    assert "\n" not in str(caught.value)


def test_more_than_the_cluster_has_is_refused_at_once(
    local_ray: None, tiny_models: TinyModels, prompts: str, tmp_path: Path
) -> None:
    for actors, message in (
        ({"num_gpus": 1}, "needs 1 GPU, but the largest node of this Ray cluster has 0"),
        ({"num_cpus": 64}, "needs 64 CPU, but the largest node of this Ray cluster has 2"),
        ({"min": 3, "num_cpus": 1}, "3 actors of 1 CPU do not fit on this Ray cluster, only 2"),
    ):
        with pytest.raises(UserError, match=message):
            run(settings(tiny_models, prompts, tmp_path / "out", actors=actors))
