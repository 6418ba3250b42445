"""What a night would be: all of it that can be known before a model is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from datetime import date as Date

from jobs.nightly.archive import Archive
from jobs.nightly.filters import TextFilters
from jobs.nightly.publish import check_columns, described, partition_schema
from jobs.nightly.recipe import Recipe
from jobs.nightly.seeds import Picked, pick
from pipeline.config.job import JobConfig
from pipeline.config.model_defaults import in_force, sources, with_model_defaults
from pipeline.config.model_identity import check_models


def check_night(recipe: Recipe, date: Date) -> Iterator[str]:
    """Check a recipe as a night does, and say in lines what would be asked and published.

    Args:
        recipe: the recipe.
        date: the night's.

    Raises:
        UserError: seeds, templates, models or columns with which no night can be made.
    """
    archive = Archive.of(recipe)
    judge = None if recipe.judge is None else recipe.judge.job(recipe.job)
    for job in filter(None, (recipe.job, judge)):
        check_models(job, ask_hub=False)
    TextFilters(recipe.filters)
    picked = pick(recipe, date, archive.used_seeds() if recipe.seeds.only_new else {})
    schema = partition_schema(recipe, picked.schema)
    check_columns(schema, archive.nights())
    yield f"night of {date}: {picked.seeds:,} seeds, {len(picked.prompts):,} prompts"
    yield from _requests(recipe, picked)
    if judge is not None and recipe.judge is not None:
        least = recipe.judge.threshold
        kept = "no score is too low" if least is None else f"{least:g} and more are kept"
        yield f"judge: {judge.models.target}; {kept}; {_sampling(judge)}"
    if recipe.select is not None:
        yield f"select: {recipe.select.keep} of {recipe.job.sampling.n} by {recipe.select.by}"
    yield _sampling(recipe.job)
    yield "columns: " + ", ".join(f"{name} {kind}" for name, kind in described(schema).items())


def _requests(recipe: Recipe, picked: Picked) -> Iterator[str]:
    """How much is asked, turn by turn, if no filter stops anything."""
    samples = recipe.job.sampling.n
    prompts = Counter(prompt.template for prompt in picked.prompts)
    for turn in range(1, recipe.most_turns + 1):
        there = [template for template in recipe.templates if turn <= len(template.turns)]
        asked = {template.name: recipe.asked(template.name, turn) for template in there}
        kinds = [f"{name} as {each.kind}" for name, each in asked.items() if each is not None]
        count = sum(prompts[name] for name in asked) * samples
        yield f"turn {turn}: {count:,} completions" + (f" ({', '.join(kinds)})" if kinds else "")
    if recipe.judge is not None:
        yield f"judge: {sum(prompts.values()) * samples:,} completions at most"


def _sampling(job: JobConfig) -> str:
    with_defaults, recommended = with_model_defaults(job, ask_hub=False)
    found = sources(with_defaults.sampling, recommended)
    return f"sampling: {in_force(with_defaults.sampling.model_dump(), found)}"
