from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs.cluster import local_paths
from jobs.cluster.local_paths import refuse_local_paths
from pipeline.config.job import JobConfig
from pipeline.errors import UserError


def test_paths_that_the_cluster_does_not_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in.parquet").touch()
    model = {"models": {"target": "org/model"}, "speculation": {"policy": "none"}}

    def job(paths: str, output: str, **changes: Any) -> JobConfig:
        values = {"input": {"paths": paths, "prompt_column": "p"}, "output": output}
        return JobConfig.model_validate({**values, **model, **changes})

    far, here = "http://203.0.113.9:8265", str(tmp_path / "in.parquet")
    mine = {"models": {"target": str(tmp_path)}}
    for refused, field in (
        (job(here, "s3://b/out"), "input.paths"),
        (job(str(tmp_path / "*.parquet"), "s3://b/out"), "input.paths"),
        (job("s3://b/in", str(tmp_path / "new/out")), "output"),
        (job("s3://b/in", "s3://b/out", **mine), "models.target"),
    ):
        with pytest.raises(UserError, match=f"{field}: .* own disk, which {far} does not see"):
            refuse_local_paths(refused, far)
    refuse_local_paths(job("/shared/in/*.parquet", "/shared/out"), far)
    refuse_local_paths(job("s3://b/in", "s3://b/out"), far)
    # This machine, or the near end of a tunnel.
    for near in ("http://127.0.0.1:8265", "http://localhost:8265", "http://[::1]:8265"):
        refuse_local_paths(job(here, str(tmp_path / "out")), near)
    monkeypatch.setattr(local_paths, "_on_network", lambda path: True)
    refuse_local_paths(job(here, str(tmp_path / "out")), far)
