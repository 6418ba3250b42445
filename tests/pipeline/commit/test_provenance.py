from __future__ import annotations

import json
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


@pytest.mark.parametrize("here", [True, False])
def test_what_pip_installed_from_a_repository_has_its_commit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, here: bool
) -> None:
    root = Path(provenance.__file__).parents[2] if here else tmp_path

    class Installed:
        def read_text(self, name: str) -> str:
            assert name == "direct_url.json"
            return json.dumps({"vcs_info": {"vcs": "git", "commit_id": "abc"}})

        def locate_file(self, name: str) -> Path:
            return root / name

    monkeypatch.setattr(provenance.importlib.metadata, "distribution", lambda _: Installed())
    # Another copy of the package that is installed says nothing about this one.
    assert (provenance.commits()["source"] == "abc") is here


def test_without_git_nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.commits(tmp_path) == {"source": None, "job": None}


def test_versions_of_what_results_depend_on() -> None:
    assert {"python", "specbatch", "torch", "transformers", "ray"} <= set(manifest.versions())
