from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from pipeline.commit import manifest, provenance


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    done = subprocess.run(
        ["git", "-C", str(folder), *who, *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_the_jobs_folder_is_named_by_its_commit(tmp_path: Path) -> None:
    assert provenance.commits(tmp_path)["job"] is None
    git(tmp_path, "init")
    assert provenance.commits(tmp_path)["job"] is None
    (tmp_path / "job.yaml").write_text("name: x")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert provenance.commits(tmp_path)["job"] == commit
    (tmp_path / "new").write_text("")
    assert provenance.commits(tmp_path)["job"] == commit
    (tmp_path / "job.yaml").write_text("name: y")
    assert provenance.commits(tmp_path)["job"] == f"{commit}-dirty"
    assert provenance.commits()["job"] is None


def test_without_git_nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.commits(tmp_path) == {"source": None, "job": None}


def test_versions_of_what_results_depend_on() -> None:
    assert {"python", "specbatch", "torch", "transformers", "ray"} <= set(manifest.versions())
