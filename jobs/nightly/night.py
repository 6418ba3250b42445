"""One night from end to end: plan, converse, filter, publish."""

from __future__ import annotations

import json
import threading
from dataclasses import asdict
from datetime import date as Date
from pathlib import Path
from statistics import fmean
from typing import Any

from jobs.nightly.archive import CARD, ROOT, Archive, Night, WorkFolder
from jobs.nightly.card import card
from jobs.nightly.conversations import (
    Generated,
    OnTurn,
    check_losses,
    generate,
    keep_plan,
    kept_plan,
)
from jobs.nightly.corpus import with_last_night
from jobs.nightly.duplicates import DuplicateIndex
from jobs.nightly.filters import TextFilters
from jobs.nightly.judge import Judge
from jobs.nightly.lock import Lock
from jobs.nightly.publish import (
    Partition,
    check_columns,
    commit,
    described,
    make_partition,
    partition_schema,
)
from jobs.nightly.recipe import Recipe
from jobs.nightly.report import night_report
from jobs.nightly.seeds import pick
from jobs.nightly.selection import Selection
from jobs.nightly.status import now
from jobs.nightly.versions import Version, read_versions
from pipeline.commit.manifest import mark_of
from pipeline.commit.stats import summarise
from pipeline.config.job import JobConfig
from pipeline.config.model_defaults import with_model_defaults
from pipeline.config.model_identity import head_identity, model_identity

_MODELS = "models.json"
_SUMMARY_LEFT_OUT = ("calibration",)


def make_night(
    recipe: Recipe,
    archive: Archive,
    date: Date,
    lock: Lock,
    *,
    on_turn: OnTurn | None = None,
    stop: threading.Event | None = None,
) -> tuple[Night, bool]:
    """Publish a night, unless it is published.

    Args:
        recipe: the recipe.
        archive: its dataset.
        date: the night's.
        lock: the dataset's, held.
        on_turn, stop: as in `generate`.

    Returns:
        The night, and whether this call published it.

    Raises:
        UserError, JobStopped, JobFailed: as in `run_job`. The same call goes on from there; what
            is published stays as it is.
    """
    if (there := archive.night(date.isoformat())) is not None:
        return there, False
    nights = archive.nights()
    work = WorkFolder(archive, date, recipe.mark)
    filters = TextFilters(recipe.filters, structured=recipe.structured)
    used = archive.used_seeds() if recipe.seeds.only_new else {}
    if (picked := kept_plan(work)) is None:
        new = pick(recipe, date, used)
        check_columns(partition_schema(recipe, new.schema), nights)
        keep_plan(work, new)
        picked = kept_plan(work) or new
    picked = picked.without(used)  # what other nights published since this one was begun
    schema = partition_schema(recipe, picked.schema)
    check_columns(schema, nights)
    job = _kept_version(recipe, work).apply(recipe.job)
    job = with_last_night(job, recipe, work, nights)
    made = generate(recipe, job, work, picked.prompts, filters, on_turn=on_turn, stop=stop)

    kept, judge, duplicates = made.conversations, None, None
    if recipe.judge is not None:
        judge = Judge(recipe.judge)
        kept = judge.judge(recipe, job, work, made, on_turn, stop)
    if recipe.filters.duplicates is not None:
        duplicates = DuplicateIndex(recipe.filters.duplicates)
        duplicates.load(archive, nights)
    selection = Selection(recipe.select, duplicates)
    kept = selection.keep(made, kept)
    # Templates, rubrics and choices lose some as well, behind which there may be no step to tell.
    check_losses(made, recipe, lambda: _lost(made))
    models = _models(job)
    partition = make_partition(recipe, date.isoformat(), schema, kept, models["target"])
    night = Night(
        date=date.isoformat(),
        mark=recipe.mark,
        published=now(),
        seeds=picked.seeds,
        conversations=made.begun,
        lost=dict(made.lost),
        filters=_filters(filters, judge, duplicates, selection),
        columns=described(schema),
        models=models,
        sampling=mark_of(with_model_defaults(job)[0].sampling),
        seeds_skipped=dict(picked.skipped),
        judge=_judge(recipe, job, judge, made),
        **_contents(partition),
        **_figures(made),
    )
    lock.check()
    published = commit(archive, partition, night, picked.prompts, duplicates)
    return (night, True) if published else (archive.night(night.date) or night, False)


def _lost(made: Generated) -> str:
    """Why conversations were lost, those that were most first."""
    return "; ".join(f"{why}: {n:,}" for why, n in made.lost.most_common(3))


def _kept_version(recipe: Recipe, work: WorkFolder) -> Version:
    """The draft and head in use when the night was begun: a resume goes on with them."""
    mine = read_versions(recipe).in_use
    work.folder.put_if_absent(_MODELS, json.dumps(asdict(mine)).encode())
    return Version(**json.loads(work.folder.read(_MODELS) or b"{}"))


def _contents(partition: Partition) -> dict[str, Any]:
    return {
        "rows": partition.rows,
        "files": partition.described(),
        "examples": partition.examples,
    }


def _filters(
    *filters: TextFilters | Judge | DuplicateIndex | Selection | None,
) -> list[dict[str, Any]]:
    """What each filter stopped, in the order in which they were asked."""
    return [
        {"name": name, "matched": each.matched[name], "removed": each.removed[name]}
        for each in filters
        if each is not None
        for name in each.names
    ]


def _judge(recipe: Recipe, job: JobConfig, judge: Judge | None, made: Generated) -> dict[str, Any]:
    """What the judge did, in numbers."""
    if judge is None or recipe.judge is None:
        return {}
    return {
        "judged": len(judge.scores),
        "mean_score": fmean(judge.scores) if judge.scores else None,
        "output_tokens": summarise(made.judged)["output_tokens"] if made.judged else 0,
        "target": _short(recipe.judge.job(job).models.target),
    }


def _figures(made: Generated) -> dict[str, Any]:
    """The night in numbers and in money."""
    summary = summarise(made.records)
    known = [cost for cost in made.costs if cost is not None and cost["total"] is not None]
    return {
        "summary": {k: v for k, v in summary.items() if k not in _SUMMARY_LEFT_OUT},
        # Without a price of every turn there is none of the night.
        "cost": sum(c["total"] for c in known) if len(known) == len(made.costs) else None,
        "currency": known[0]["currency"] if known else "USD",
    }


def _models(job: JobConfig) -> dict[str, Any]:
    """What the night ran with: names for people, and what pins the content."""
    models, head = job.models, job.speculation.head
    names = {"target": models.target, "draft": models.draft}
    pins = {role: model_identity(name) for role, name in names.items() if name is not None}
    if head is not None:
        pins["head"] = {"digest": head_identity(head)}
    return {
        **{role: name and _short(name) for role, name in names.items()},
        "head": Path(head).name if head is not None else None,
        "policy": job.speculation.policy,
        "verification": job.speculation.verification,
        "dtype": models.dtype,
        "quantization": models.quantization,
        "pins": pins,
    }


def _short(model: str) -> str:
    """A model's name for people. A local path means nothing elsewhere; its last part may."""
    return Path(model).name if Path(model).is_absolute() else model


def refresh(recipe: Recipe, archive: Archive) -> list[Night]:
    """Write the card anew, and the reports that are missing; a run may have died before it."""
    nights = archive.nights()
    archive.folder.put(CARD, card(recipe, nights).encode())
    there = archive.folder.list(f"{ROOT}/reports")
    for night in nights:
        if f"{night.date}.md" not in there:
            write_report(recipe, archive, night)
    return nights


def write_report(recipe: Recipe, archive: Archive, night: Night) -> None:
    """Write a night's report, with what became of the models that it taught."""
    text = night_report(recipe, night, archive.improvement(night.date))
    archive.folder.put(f"{ROOT}/reports/{night.date}.md", text.encode())
