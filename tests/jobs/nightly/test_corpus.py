"""A night's candidates are looked up in what the night before it wrote."""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from jobs.nightly.archive import Archive, Night, WorkFolder
from jobs.nightly.corpus import with_last_night
from jobs.nightly.recipe import Recipe
from pipeline import layout
from tests.conftest import TinyModels
from tests.jobs.nightly.recipes import small_recipe

LOOKING = {"policy": "suffix", "verification": "coupled"}


def recipe_of(models: TinyModels, root: Path, speculation: dict[str, Any]) -> Recipe:
    values = small_recipe(models, root)
    values["job"]["speculation"] = speculation
    return Recipe.model_validate(values)


def published(archive: Archive, day: int, mark: str) -> Night:
    """A night whose first turn's output is there."""
    work = WorkFolder(archive, date(2026, 11, day), mark)
    work.output(1).put(layout.JOB, b"{}")
    empty: dict[str, Any] = dict.fromkeys(Night.__dataclass_fields__)
    return replace(Night(**empty), date=work.date.isoformat(), mark=mark)


def test_the_last_published_night_before_it_is_the_corpus(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    recipe = recipe_of(tiny_models, tmp_path, LOOKING)
    archive = Archive.of(recipe)
    nights = [published(archive, day, f"mark{day}") for day in (23, 25, 29)]

    def corpus(day: int, nights: list[Night], recipe: Recipe = recipe) -> tuple[str, ...]:
        work = WorkFolder(archive, date(2026, 11, day), recipe.mark)
        return with_last_night(recipe.job, recipe, work, nights).speculation.corpus

    work = WorkFolder(archive, date(2026, 11, 25), "mark25")
    assert corpus(27, nights) == (work.output(1).url,)
    assert corpus(22, nights) == ()
    # A night that goes on has what it was begun with.
    assert corpus(26, nights[:1]) == corpus(26, nights) != corpus(27, nights)
    # A recipe that says what it wants is not told otherwise.
    for speculation in ({**LOOKING, "corpus": ["/x"]}, {"policy": "fixed"}, {"lookup": False}):
        own = recipe_of(tiny_models, tmp_path, speculation)
        assert corpus(28, nights, own) == own.job.speculation.corpus
