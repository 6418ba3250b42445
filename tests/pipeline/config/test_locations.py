"""Paths and URLs, however a user writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.config.job import InputConfig, JobConfig, S3Config
from pipeline.config.locations import plain_location
from pipeline.errors import UserError
from pipeline.storage.folder import find_files, locate, open_folder, reach_folder


@pytest.mark.parametrize(
    ("written", "plain"),
    [
        ("file:///data/a%20b+c.jsonl", "/data/a b+c.jsonl"),
        ("file:/data/x", "/data/x"),
        ("FILE://localhost/data/x#1?.jsonl", "/data/x#1?.jsonl"),
        ("s3a://bucket/a%20b", "s3://bucket/a%20b"),
        ("s3n://bucket//a", "s3://bucket//a"),
        ("S3://bucket/a", "s3://bucket/a"),
        ("/data/100%25/a b", "/data/100%25/a b"),
        ("owner/model@main", "owner/model@main"),
        ("file:x", "file:x"),
    ],
)
def test_one_form_for_the_rest_of_the_code(written: str, plain: str) -> None:
    assert plain_location(written) == plain
    values: dict[str, Any] = {
        "input": {"paths": [written], "prompt_column": "prompt"},
        "output": written,
        "models": {"target": written, "draft": written},
        "speculation": {"policy": "head", "head": written},
    }
    job = JobConfig.model_validate(values)
    found = {*job.input.paths, job.output, job.models.target, job.models.draft}
    assert found | {job.speculation.head} == {plain}


@pytest.mark.parametrize("url", ["file://data/x", "file://x.jsonl", "file://server"])
def test_a_folder_of_another_machine_is_refused(url: str) -> None:
    with pytest.raises(UserError, match="on another machine; write file:///PATH, or"):
        open_folder(url, S3Config())
    with pytest.raises(ValidationError, match="on another machine"):
        InputConfig(paths=(url,), prompt_column="x")


@pytest.mark.parametrize("url", ["s3://KEY:SECRET@bucket/out", "s3a://KEY:SE/CRET@bucket/out"])
def test_a_url_with_a_password_gets_no_further_than_the_job_file(url: str) -> None:
    with pytest.raises(ValidationError) as refused:
        JobConfig.model_validate(
            {
                "input": {"paths": "x", "prompt_column": "p"},
                "output": url,
                "models": {"target": "t"},
            }
        )
    (mistake,) = refused.value.errors()
    assert "a URL must not hold a user name or password" in mistake["msg"]
    assert "SECRET" not in mistake["msg"] and "KEY" not in mistake["msg"]


def test_a_url_of_a_disk_is_its_path(tmp_path: Path) -> None:
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "x#.jsonl").write_text("{}\n")
    url = f"{tmp_path.as_uri()}/a%20b"
    (file,) = find_files(url, S3Config()).files
    assert file.url == str(tmp_path / "a b" / "x#.jsonl")
    folder, name = locate(f"{url}/x#.jsonl", S3Config())
    assert folder.read(name) == b"{}\n"
    assert reach_folder(url, S3Config()).url == str(tmp_path / "a b")


def test_what_is_no_glob_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\*\*b: not a glob: \*\* stands for whole folders"):
        find_files(str(tmp_path / "a**b"), S3Config())
