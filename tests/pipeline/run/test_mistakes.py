"""Jobs with something wrong: what fails them, and when."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import UserError
from tests.conftest import TinyModels
from tests.pipeline.small_jobs import run, settings

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
