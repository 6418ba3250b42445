"""What a night teaches: a better draft, a better head, or the knowledge that neither is one.

A candidate learns from the night's outputs, except those of conversations whose hash is in the
held-out share: the same seed and template are held out in every night. On these it is compared with
the pair in use (`compare`), and adopted only if it is surely better.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date as Date
from pathlib import Path
from typing import Any

import torch

from jobs.nightly.archive import Archive, Night, WorkFolder
from jobs.nightly.compare import Comparison, Side, compare
from jobs.nightly.conversations import CONVERSATION
from jobs.nightly.recipe import Recipe
from jobs.nightly.versions import Version, models_folder, read_versions, write_versions
from jobs.tuning.common import user_errors
from jobs.tuning.students import LR, Kind, begin, kind_of, load_target
from pipeline.commit import manifest
from pipeline.config.job import JobConfig, SamplingConfig
from pipeline.config.model_identity import digest
from pipeline.generate.loading import load_acceptance_head, load_pair
from pipeline.inputs.row_sampling import row_sampling
from pipeline.outputs.training_data import open_job, read_examples
from specdec.loading.head_files import save_head
from specdec.loading.pair import ModelPair
from specdec.request import Request
from specdec.simulate.transcripts import Text
from specdec.training.distill import distill
from specdec.training.evaluate import JUDGED
from specdec.training.examples import Example
from specdec.training.head import HeadSettings, calibrate, evaluate_head, train_head
from specdec.training.labelling import collect
from specdec.training.labels import Labels, LabelSettings, assign_parts
from specdec.training.settings import DistillSettings, DistillWatch
from specdec.training.workspace import Workspace

Show = Callable[[str], None]
"""Told what is being done."""

_LEAST_LEARN, _LEAST_HELD_OUT = 3, 2
"""Different prompts to learn from, and rows to compare on: with fewer a night teaches nothing."""

LR_OF_NEXT = 2e-4
"""Highest learning rate of a model that is trained further.

Raised, it forgets more of what other nights taught.
"""


@dataclass(frozen=True)
class Lesson:
    """A night's outputs.

    Attributes:
        learn: to learn from.
        held_out: to compare on.
        sampling: as in the night's jobs.
    """

    learn: list[Example]
    held_out: list[Text]
    sampling: SamplingConfig


@dataclass(frozen=True)
class Outcome:
    """What became of a candidate.

    Attributes:
        what: which draft and head it is.
        comparison: with the pair in use.
        training: how it was made, in figures.
    """

    what: str
    comparison: Comparison
    training: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """As in the night's record."""
        decision = "adopted" if self.comparison.adopted else "not adopted"
        return {
            "what": self.what,
            "decision": decision,
            "why": self.comparison.why,
            "training": self.training,
            "comparison": self.comparison.to_json(),
        }


def improve(recipe: Recipe, archive: Archive, night: Night, show: Show) -> dict[str, Any]:
    """Learn from a night, once.

    Args:
        recipe: says what is to be learned.
        archive: the dataset.
        night: published; its jobs' outputs must still be there.
        show: told what is being done; may raise to stop it.

    Returns:
        What is written to `_nightly/improve/DATE.json`.

    Raises:
        UserError: models that cannot be used.
    """
    record: dict[str, Any] = {"night": night.date, "candidates": []}
    versions = read_versions(recipe)
    before = versions.in_use
    if before.night == night.date:
        # Adopted by a run that died before it could say so.
        record["candidates"] = [{"what": "a candidate", "decision": "adopted", "why": before.why}]
    else:
        with user_errors():
            outcomes = list(_candidates(recipe, archive, night, before, show))
        record["candidates"] = [outcome.to_json() for outcome, _ in outcomes]
        adopted = [version for outcome, version in outcomes if outcome.comparison.adopted]
        for version in adopted:
            versions = versions.with_adopted(version.draft, version.head, night.date, version.why)
        if adopted:
            write_versions(recipe, versions)
        if not outcomes:
            record["why"] = "There were too few completions to learn from and to compare on."
    archive.put_json(f"improve/{night.date}.json", record)
    return record


def _candidates(
    recipe: Recipe, archive: Archive, night: Night, before: Version, show: Show
) -> Iterator[tuple[Outcome, Version]]:
    """A draft first, with a head of its own where one is needed; if it is not adopted, a head."""
    job = _job(recipe, before)
    torch.set_num_threads(max(1, int(job.actors.num_cpus or os.cpu_count() or 1)))
    show("loading models")
    pair = load_pair(job)
    lesson = _lesson(recipe, archive, night, pair)
    if lesson is None:
        return
    incumbent = Side("the pair in use", pair, load_acceptance_head(job, pair))
    if recipe.improve.draft:
        outcome, version = _new_draft(recipe, night, before, incumbent, lesson, show)
        yield outcome, version
        if outcome.comparison.adopted:
            return
    if recipe.improve.head:
        yield _new_head(recipe, night, before, incumbent, lesson, show)


def _job(recipe: Recipe, version: Version) -> JobConfig:
    """The job with a version, as the first kind of its actors sees it."""
    job = version.apply(recipe.job)
    return job.in_group(next(iter(job.actors.pools)))


def _lesson(recipe: Recipe, archive: Archive, night: Night, pair: ModelPair) -> Lesson | None:
    """What there is to learn from and to compare on; None: too little."""
    settings = recipe.improve
    work = WorkFolder(archive, Date.fromisoformat(night.date), night.mark)
    outputs = [work.output(turn) for turn in range(1, recipe.most_turns + 1)]
    jobs = [open_job(o.url, o.s3) for o in outputs if manifest.committed_ids(o)]
    learn: list[Example] = []
    texts: list[tuple[str, Text]] = []
    for turn, job in enumerate(jobs, start=1):
        for example in read_examples(job, pair.tokenizer, by=CONVERSATION):
            if example.sampling is not None and example.sampling.grammar is not None:
                continue  # what a grammar forces says nothing of the draft
            # From the second turn on a row's name ends with the sample.
            stem = example.group if turn == 1 else example.group.rpartition("/")[0]
            if _draw(stem) < settings.held_out:
                texts.append((example.digest, _text(example)))
            else:
                learn.append(example)
    # A hash mixes turns and templates, so that the first so many are a fair sample.
    learn = sorted(learn, key=lambda example: example.digest)[: settings.rows]
    texts = sorted(texts, key=lambda each: each[0])[: settings.compare_rows]
    prompts = {example.prompt_ids for example in learn}
    if len(prompts) < _LEAST_LEARN or len(texts) < _LEAST_HELD_OUT:
        return None
    return Lesson(learn, [text for _, text in texts], jobs[0].sampling)


def _draw(stem: str) -> float:
    """A number from 0 to 1 that a seed and template have for ever."""
    return int.from_bytes(hashlib.sha256(f"held out:{stem}".encode()).digest()[:8], "big") / 2**64


def _text(example: Example) -> Text:
    assert example.sampling is not None, "examples of a job say how they were drawn"
    request = Request(example.id, example.prompt_ids, example.sampling)
    return Text(request, example.output_ids, example.group)


# ------------------------------------------------------------------- candidates


def _new_head(
    recipe: Recipe, night: Night, before: Version, incumbent: Side, lesson: Lesson, show: Show
) -> tuple[Outcome, Version]:
    show("training a head")
    folder = _fresh(models_folder(recipe) / f"head-{night.date}")
    head, training = _train_head(recipe, incumbent.pair, lesson, folder)
    show("comparing the head with the pair in use")
    candidate = Side("the new head", incumbent.pair, head)
    found = _compared(recipe, before, incumbent, candidate, lesson)
    if not found.adopted:
        shutil.rmtree(folder)
    what = f"head {folder.name}, beside {_named(before)}"
    version = Version(before.draft, str(folder), night.date, why=found.why)
    return Outcome(what, found, training), version


def _new_draft(
    recipe: Recipe, night: Night, before: Version, incumbent: Side, lesson: Lesson, show: Show
) -> tuple[Outcome, Version]:
    assert before.draft is not None, "the recipe has a draft"
    models, own = models_folder(recipe), kind_of(before.draft)
    kind = Kind(recipe.improve.kind or own)
    show(f"training a draft of the kind {kind}")
    folder = models / f"draft-{night.date}"
    training = _distill(recipe, kind, before.draft if kind is own else None, lesson, folder)
    pair = load_pair(_job(recipe, Version(str(folder), None)))
    head, head_folder = None, None
    if recipe.improve.head or incumbent.head is not None:
        # The head in use knows another draft's states.
        show("training a head for the new draft")
        head_folder = _fresh(models / f"head-{night.date}-of-draft")
        head, training["head"] = _train_head(recipe, pair, lesson, head_folder)
    show("comparing the draft with the pair in use")
    found = _compared(recipe, before, incumbent, Side("the new draft", pair, head), lesson)
    if not found.adopted:
        for left in filter(None, (folder, head_folder)):
            shutil.rmtree(left)
    with_head = f" with {head_folder.name}" if head_folder is not None else ""
    what = f"draft {folder.name}{with_head}, beside {_named(before)}"
    head_name = str(head_folder) if head_folder is not None else None
    return Outcome(what, found, training), Version(
        str(folder), head_name, night.date, why=found.why
    )


def _compared(
    recipe: Recipe, before: Version, incumbent: Side, candidate: Side, lesson: Lesson
) -> Comparison:
    return compare(
        incumbent,
        candidate,
        lesson.held_out,
        _job(recipe, before),
        least_gain=recipe.improve.least_gain,
        control_share=recipe.improve.control_share,
    )


def _fresh(folder: Path) -> Path:
    """A folder without what an earlier attempt left there."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def _named(version: Version) -> str:
    head = f"head {Path(version.head).name}" if version.head is not None else "no head"
    return f"draft {Path(version.draft or 'none').name} and {head}"


def _train_head(
    recipe: Recipe, pair: Any, lesson: Lesson, folder: Path
) -> tuple[Any, dict[str, Any]]:
    """A head for this pair, kept in a folder, and what is known of it."""
    settings = recipe.improve
    labelling = LabelSettings(
        row_sampling(lesson.sampling, None, ""), recipe.job.speculation.verification
    ).for_draft(pair.draft)
    training = HeadSettings(
        depth=settings.head_depth, epochs=settings.head_epochs, seed=settings.seed
    )
    parts = assign_parts([example.prompt_ids for example in lesson.learn])
    labels = Labels.cat(list(collect(pair, zip(lesson.learn, parts, strict=True), labelling)))
    head = train_head(labels, training)
    saved, calibration = calibrate(head, labels)
    metrics = evaluate_head(head, saved, labels)
    names = ("temperature", "top_k", "top_p", "min_p")
    save_head(
        folder,
        saved,
        pair,
        {
            "sampling": {name: getattr(lesson.sampling, name) for name in names},
            "verification": labelling.verification,
            "mixing": labelling.mixing,
            "training": asdict(training),
            "calibration": calibration,
            "metrics": metrics,
            "versions": manifest.versions(),
        },
    )
    estimators = metrics["held_out"]["estimators"]
    after = {name: each["after"] for name, each in estimators.items()}
    return saved.to(pair.draft.device).eval().requires_grad_(False), {
        "rows": len(lesson.learn),
        "positions": len(labels),
        "auc": after["head"]["auc"],
        "auc_ceiling": metrics["held_out"]["ceiling"]["after"]["auc"],
        "log_loss": after["head"]["log_loss"],
        "log_loss_of_confidence": after["confidence"]["log_loss"],
    }


def _distill(
    recipe: Recipe, kind: Kind, draft: str | None, lesson: Lesson, folder: Path
) -> dict[str, Any]:
    """A draft that has learned from the night. A run that was stopped goes on where it was.

    Args:
        kind: of the draft.
        draft: what it is trained further from; None: it is new.
    """
    settings, models = recipe.improve, recipe.job.models
    further = kind is Kind.MODEL and draft is not None
    lr = settings.draft_lr or (LR_OF_NEXT if further else LR[kind])
    arguments = {
        "kind": kind.value,
        "draft": draft,
        "examples": digest(sorted(example.digest for example in lesson.learn)),
        **settings.model_dump(include={"draft_epochs", "draft_minutes", "held_out"}),
        "draft_lr": lr,
    }
    space = Workspace(folder)
    space.check(arguments)
    if (card := space.card()) is None:
        trust = models.trust_remote_code
        pair = load_target(kind, models.target, trust)
        examples = space.examples() or lesson.learn
        card = distill(
            pair,
            begin(kind, pair, examples, draft=draft, trust=trust),
            examples,
            DistillSettings(
                epochs=settings.draft_epochs,
                minutes=settings.draft_minutes,
                lr=lr,
                held_out=settings.held_out,
                seed=settings.seed,
            ),
            space,
            record={"arguments": arguments, "versions": manifest.versions()},
            watch=DistillWatch(),
        )
    start, result = (card["held_out"][name]["all"] for name in ("start", "result"))
    return {
        "kind": kind.value,
        "rows": card["examples"]["trained"],
        "seconds": card["training_seconds"],
        "overlap_before": start["mean_overlap"],
        "overlap": result["mean_overlap"],
        "length_before": start["sampled_length"][JUDGED - 1],
        "length": result["sampled_length"][JUDGED - 1],
    }
