"""Jobs with something wrong: what fails them, and when."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config.job import S3Config
from pipeline.errors import UserError
from pipeline.layout import JOB, STATUS
from pipeline.storage.folder import open_folder
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


def test_a_run_that_is_refused_leaves_the_other_ones_record_as_it_was(
    tiny_models: TinyModels, prompts: str, tmp_path: Path
) -> None:
    """Another run has loaded its models, and committed nothing so far."""
    values = settings(tiny_models, prompts, tmp_path / "out")
    folder = open_folder(str(tmp_path / "out"), S3Config())
    other = subprocess.Popen(["sleep", "60"])
    try:
        status = {"state": "running", "host": socket.gethostname(), "pid": other.pid}
        nothing = dict.fromkeys(
            ("rows", "errors", "rows_total", "units", "units_total", "output_tokens", "seconds"), 0
        )
        unknown = dict.fromkeys(("tokens_per_second", "acceptance_rate", "seconds_left", "message"))
        now = {"name": "j", "stage": "loading", "started": time.time(), "updated": time.time()}
        folder.put(STATUS, json.dumps({**nothing, **unknown, **now, **status}).encode())
        folder.put(JOB, b'{"fingerprint": {}}')
        with pytest.raises(UserError, match="--take-over"):
            run(values)
        assert folder.read(JOB) == b'{"fingerprint": {}}'
    finally:
        other.kill()
        other.wait()


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
