"""Distillation: a draft learns to predict what its target would say.

The target reads the examples once (specdec/training/scores.py); then the draft is trained on its
top-k probabilities and chosen tokens (specdec/training/trainer.py), evaluated before, during and
after on prompts that it has not seen, and kept at its best.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from specdec.loading.pair import ModelPair
from specdec.training.eagle_lessons import EagleLessons
from specdec.training.eagle_student import EagleStudent
from specdec.training.evaluate import Draft
from specdec.training.examples import Example, cut, split
from specdec.training.scores import Scores, score
from specdec.training.settings import DistillError, DistillSettings, DistillWatch, Moment
from specdec.training.student import Student
from specdec.training.trainer import CHECKPOINT_SECONDS, Lessons, Trainer
from specdec.training.workspace import Workspace


def distill(
    pair: ModelPair,
    student: Student | EagleStudent,
    examples: Sequence[Example],
    settings: DistillSettings,
    space: Workspace,
    *,
    record: Mapping[str, Any],
    watch: DistillWatch,
    incumbent: Draft | None = None,
    scores: Path | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
) -> dict[str, Any]:
    """Train a draft, from the start or from its last checkpoint.

    Args:
        pair: the target; loaded with `trainable` if the student is a language model.
        student: the draft; changed in place, in the end to its best weights.
        examples: all there are, or, of a run that was begun, `space.examples()`; some are held out.
        settings: how to train.
        space: the folder of the draft, checked for these arguments.
        record: plain data for the draft's card, `arguments` among it (`Workspace.check`).
        watch: whom to tell.
        incumbent: another draft to evaluate.
        scores: folder for what the target says of the examples, to share between runs; None: it
            goes when the run ends.
        checkpoint_seconds: between checkpoints.

    Returns:
        The card, as in training.json.

    Raises:
        DistillError: there are too few examples.
    """
    usable = cut(examples, min(pair.context_length, student.context_length))
    train, held_out = split(usable, settings.held_out)
    if not train or not held_out:
        raise DistillError(
            f"of {len(usable)} examples {len(held_out)} are held out and {len(train)} left to "
            "learn from; give more examples or another share to hold out"
        )
    if space.examples() is None:
        space.begin(record["arguments"], examples)
    if student.needs_tokenizer:
        # The same vocabulary as the target's: that was checked when the draft was loaded.
        pair.tokenizer.save_pretrained(space.out)
    trainer = Trainer(pair.target, student, settings, space, held_out, watch)
    trainer.start(incumbent)
    lessons: Lessons
    if isinstance(student, EagleStudent):
        reads = student.layers, student.known
        lessons = EagleLessons(
            pair.target, train, *reads, settings.top_k, folder=scores, identity=_identity(pair)
        )
    else:
        lessons = _score(pair, student, train, settings, scores or space.scores, watch)
    trainer.train(train, lessons, checkpoint_seconds)
    results, progress = trainer.finish(), trainer.progress
    card = {
        **record,
        "target": pair.describe()["target"],
        "student": student.name,
        "incumbent": progress.incumbent,
        "parameters": sum(p.numel() for p in student.trainable().values()),
        "settings": asdict(settings),
        "examples": {"trained": len(train), "held_out": len(held_out)},
        "output_tokens": sum(len(e.output_ids) for e in train),
        "token_visits": progress.tokens,
        "steps": progress.step,
        "training_seconds": round(progress.seconds, 1),
        "curve": progress.curve,
        "held_out": results,
    }
    space.finish(card)
    return card


def _score(
    pair: ModelPair,
    student: Student,
    examples: Sequence[Example],
    settings: DistillSettings,
    folder: Path,
    watch: DistillWatch,
) -> Scores:
    """The target's scores of what is trained on."""
    began = time.monotonic()

    def tell(done: int, total: int) -> None:
        watch.moment(Moment("scoring", done, total, done / (time.monotonic() - began)))

    return score(
        pair.target,
        examples,
        folder,
        vocab_size=min(pair.vocab_size, student.vocab_size),
        top_k=settings.top_k,
        identity=_identity(pair),
        progress=tell,
    )


def _identity(pair: ModelPair) -> list[Any]:
    """What pins the content of what the target says."""
    target = pair.describe()["target"]
    return [target.get("digest") or target, pair.describe()["dtype"]]
