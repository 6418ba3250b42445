"""Versions of the pair: which draft and head the nights run with, and the way back.

models/versions.json holds all of it: the versions in the order in which they were adopted, and the
number of the one in use. Version 0 is what the recipe itself names.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from jobs.nightly.archive import ROOT
from jobs.nightly.recipe import Recipe
from jobs.nightly.status import now
from pipeline.config.job import JobConfig, S3Config
from pipeline.errors import UserError
from pipeline.storage.folder import open_folder

_FILE = "versions.json"


@dataclass(frozen=True)
class Version:
    """A draft and a head that belong together.

    Attributes:
        draft, head: as in a job file; None: none.
        night: whose outputs taught it.
        adopted: when, ISO 8601.
        before: number of the version that it replaced.
        why: the evidence, in a sentence.
    """

    draft: str | None
    head: str | None
    night: str = ""
    adopted: str = ""
    before: int = 0
    why: str = "what the recipe names"

    def apply(self, job: JobConfig) -> JobConfig:
        """The job with this draft and head."""
        return job.model_copy(
            update={
                "models": job.models.model_copy(update={"draft": self.draft}),
                "speculation": job.speculation.model_copy(update={"head": self.head}),
            }
        )


@dataclass(frozen=True)
class Versions:
    """All versions.

    Attributes:
        known: in order; the first is the recipe's own.
        current: number of the one in use.
    """

    known: tuple[Version, ...]
    current: int = 0

    @property
    def in_use(self) -> Version:
        """The version in use."""
        return self.known[self.current]

    def with_adopted(self, draft: str | None, head: str | None, night: str, why: str) -> Versions:
        """These, and a new one in use."""
        new = Version(draft, head, night, now(), before=self.current, why=why)
        return Versions((*self.known, new), current=len(self.known))


def models_folder(recipe: Recipe) -> Path:
    """Where versions are."""
    return Path(recipe.improve.folder or f"{recipe.output}/{ROOT}/models")


def read_versions(recipe: Recipe) -> Versions:
    """The versions there are.

    A recipe that now names another draft or head has spoken: it begins again with its own.
    """
    own = Version(recipe.job.models.draft, recipe.job.speculation.head)
    if recipe.improve.folder is None and "://" in recipe.output:
        return Versions((own,))
    path = models_folder(recipe) / _FILE
    if not path.is_file():
        return Versions((own,))
    data = json.loads(path.read_text())
    known = tuple(Version(**each) for each in data["known"])
    if (known[0].draft, known[0].head) != (own.draft, own.head):
        return Versions((own,))
    return Versions(known, data["current"])


def write_versions(recipe: Recipe, versions: Versions) -> None:
    """Keep the versions, in one step."""
    folder = open_folder(str(models_folder(recipe)), S3Config())
    folder.put(_FILE, json.dumps(asdict(versions), indent=1).encode())


def roll_back(recipe: Recipe, to: int | None = None) -> tuple[Version, int]:
    """Go back to the version before the one in use, or to any.

    Args:
        recipe: the recipe.
        to: number of a version; None: the one before.

    Returns:
        The version in use from now on, and its number.

    Raises:
        UserError: there is none.
    """
    versions = read_versions(recipe)
    if to is None and versions.current == 0:
        raise UserError("the recipe's own draft and head are in use; there is nothing before them")
    number = versions.in_use.before if to is None else to
    if not 0 <= number < len(versions.known):
        raise UserError(f"--to {number}: there are versions 0 to {len(versions.known) - 1}")
    write_versions(recipe, Versions(versions.known, number))
    return versions.known[number], number


def listed(versions: Versions) -> Sequence[tuple[str, ...]]:
    """The versions as lines of a table: number, draft, head, night, why."""
    return [
        (
            f"{number}{' (in use)' if number == versions.current else ''}",
            _short(version.draft),
            _short(version.head),
            version.night or "–",
            version.why,
        )
        for number, version in enumerate(versions.known)
    ]


def _short(path: str | None) -> str:
    return "–" if path is None else Path(path).name
