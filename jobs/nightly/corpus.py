"""What last night wrote is where tonight's candidates are looked up, too."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import date as Date

from jobs.nightly.archive import Archive, Night, WorkFolder
from jobs.nightly.recipe import Recipe
from pipeline import layout
from pipeline.config.job import JobConfig

_CORPUS = "corpus.json"


def with_last_night(
    job: JobConfig, recipe: Recipe, work: WorkFolder, nights: Sequence[Night]
) -> JobConfig:
    """The night's job with the outputs of the published night before it as its corpus.

    A night that goes on has the corpus that it was begun with. A recipe that names a corpus, or
    whose policy looks nothing up, keeps its own.

    Args:
        job: the night's.
        recipe: the recipe.
        work: the night's work folder.
        nights: all that are published, in the order of their dates.
    """
    if job.speculation.corpus or not job.speculation.looks_up:
        return job
    before = [night for night in nights if night.date < work.date.isoformat()]
    found = _outputs(work.archive, before[-1], recipe.most_turns) if before else []
    work.folder.put_if_absent(_CORPUS, json.dumps(found).encode())
    corpus = tuple(json.loads(work.folder.read(_CORPUS) or b"[]"))
    speculation = job.speculation.model_copy(update={"corpus": corpus})
    return job.model_copy(update={"speculation": speculation})


def _outputs(archive: Archive, night: Night, turns: int) -> list[str]:
    """The outputs of a night's turns, those that are still there."""
    work = WorkFolder(archive, Date.fromisoformat(night.date), night.mark)
    outputs = [work.output(turn) for turn in range(1, turns + 1)]
    return [output.url for output in outputs if output.read(layout.JOB) is not None]
