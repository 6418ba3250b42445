"""Which code a job ran with: commits, where there is a repository."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
from pathlib import Path

_PATIENCE = 10
"""Seconds that git may take. A repository on a network disk needs some; a job waits for no more."""


def commits(job_folder: Path | None = None) -> dict[str, str | None]:
    """Git commits of this package's source and of the job file's folder.

    Args:
        job_folder: the folder; None: not known.

    Returns:
        `source` and `job`: a commit, with "-dirty" if tracked files differ from it; null if there
        is no repository, or no git to ask.
    """
    return {
        "source": _installed_commit() or _commit(Path(__file__).parent, Path(__file__)),
        "job": None if job_folder is None else _commit(job_folder),
    }


def _installed_commit() -> str | None:
    """The commit that pip installed from a repository, as it notes it (PEP 610)."""
    try:
        distribution = importlib.metadata.distribution("specbatch")
        source = json.loads(distribution.read_text("direct_url.json") or "{}")
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None
    here = Path(__file__).resolve()
    if Path(str(distribution.locate_file("pipeline"))).resolve() not in here.parents:
        return None  # this code comes from elsewhere on the path
    commit = source.get("vcs_info", {}).get("commit_id")
    return commit if isinstance(commit, str) else None


def _commit(folder: Path, tracked: Path | None = None) -> str | None:
    """The folder's commit; with `tracked`, only if that file is in the repository."""
    if tracked is not None and _git(folder, "ls-files", "--error-unmatch", str(tracked)) is None:
        return None  # installed into an environment that lies inside someone's repository
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}-dirty" if changed else commit


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
