"""The training loop of a draft: steps, schedule, evaluations and checkpoints.

Nothing here is random but the order of the examples, which is a function of the seed and the epoch.
A run that was interrupted therefore ends with the same weights as one that was not, unless the
clock (`DistillSettings.minutes`) set its schedule.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from specdec.model.decoder import PackedDecoder
from specdec.training.evaluate import ALL, Agreements, Batch, Draft, batches, evaluate, layers_of
from specdec.training.examples import Example, packs
from specdec.training.settings import DistillSettings, DistillWatch, Moment
from specdec.training.workspace import Workspace

WARM_UP = 0.05
"""Share of the schedule in which the learning rate rises.

Raised, less is learnt; lowered, the first steps may throw a good draft off. A usual value.
"""

LAST_LR = 0.02
"""What is left of the learning rate at the end, as a share of the highest. A usual value.

Raised, the last weights are noisier.
"""

CHECKPOINT_SECONDS = 120.0
"""Seconds between checkpoints. Raised, an interrupted run loses more; lowered, it writes more."""


class Lessons(Protocol):
    """What a student learns from, besides the examples."""

    def of(self, indices: Sequence[int]) -> Any:
        """The lesson of some examples, as the student's `learn` takes it."""


class Trainee(Draft, Protocol):
    """A draft that can be trained."""

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes, by name."""

    def learn(self, examples: Sequence[Example], lesson: Any, settings: DistillSettings) -> float:
        """Add a step's gradients; returns the mean loss per output token, in nats."""

    def save(self, folder: Path) -> None:
        """Write a checkpoint that `models.draft` can name."""

    def restore(self, folder: Path) -> None:
        """Take the weights that `save` wrote."""


@dataclass(slots=True)
class TrainingState:
    """Where training is, as kept in a checkpoint.

    Attributes:
        step: steps taken.
        evaluations: how many of the schedule's are behind.
        seconds: spent in them.
        tokens: output tokens learned from, repetitions included.
        loss: moving average, nats per output token.
        best: highest merit in `curve`.
        curve: evaluations on the same held-out sample, the untrained draft's first.
        held_out: agreements on all that is held out, of "start", "incumbent" and "result".
        incumbent: the name of that incumbent.
    """

    step: int = 0
    evaluations: int = 0
    seconds: float = 0.0
    tokens: int = 0
    loss: float | None = None
    best: float = 0.0
    curve: list[dict[str, float | None]] = field(default_factory=list)
    held_out: dict[str, dict[str, Any]] = field(default_factory=dict)
    incumbent: str | None = None


class Trainer:
    """Trains one draft.

    Args:
        target: for evaluations.
        student: the draft; changed in place.
        settings: how to train.
        space: where the best weights and checkpoints go.
        held_out: examples to evaluate on.
        watch: whom to tell.
    """

    def __init__(
        self,
        target: PackedDecoder,
        student: Trainee,
        settings: DistillSettings,
        space: Workspace,
        held_out: Sequence[Example],
        watch: DistillWatch,
    ) -> None:
        self._target, self._student, self._settings = target, student, settings
        self._space, self._held_out, self._watch = space, held_out, watch
        self._weights = student.trainable()
        matrices = [p for p in self._weights.values() if p.ndim > 1]
        vectors = [p for p in self._weights.values() if p.ndim <= 1]
        self._optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}],
            lr=settings.lr,
            betas=(0.9, 0.95),
        )
        self._sample: list[Batch] | None = None
        self.progress = TrainingState()

    def start(self, incumbent: Draft | None) -> None:
        """Take up the last checkpoint, or evaluate the draft as it is and make it the best so far.

        Args:
            incumbent: evaluated too, unless a run before did.
        """
        drafts: dict[str, Draft] = {}
        if not self._resume():
            drafts["start"] = self._student
        if incumbent is not None and self.progress.incumbent != incumbent.name:
            drafts["incumbent"] = incumbent
            self.progress.incumbent = incumbent.name
        if drafts:
            self._evaluate_all(drafts)
        if "start" in drafts:
            self._evaluate_sample()
            self.checkpoint()

    def train(
        self, examples: Sequence[Example], lessons: Lessons, checkpoint_seconds: float
    ) -> None:
        """Run the schedule to its end.

        Args:
            examples: to learn from.
            lessons: of the same examples.
            checkpoint_seconds: between checkpoints.
        """
        settings, progress = self._settings, self.progress
        per_epoch = len(packs(examples, settings.batch_tokens))
        steps = settings.epochs * per_epoch
        seconds = settings.minutes * 60 if settings.minutes else math.inf
        at_start = (progress.tokens, progress.seconds)
        saved = time.monotonic()
        for pack in self._order(examples, per_epoch):
            done = max(progress.step / steps, progress.seconds / seconds)
            if done >= 1:
                break
            began = time.monotonic()
            chosen, lesson = [examples[i] for i in pack], lessons.of(pack)
            loss = self._step(chosen, lesson, rate(done + 1 / steps))
            progress.seconds += time.monotonic() - began
            progress.step += 1
            progress.tokens += sum(len(e.output_ids) for e in chosen)
            progress.loss = loss if progress.loss is None else 0.95 * progress.loss + 0.05 * loss
            done = min(1.0, max(progress.step / steps, progress.seconds / seconds))
            speed = (progress.tokens - at_start[0]) / (progress.seconds - at_start[1])
            self._watch.moment(Moment("training", done, 1, speed, progress.loss))
            if int(done * settings.evaluations) > progress.evaluations:
                progress.evaluations = int(done * settings.evaluations)
                self._evaluate_sample(done)
            if time.monotonic() - saved >= checkpoint_seconds:
                self.checkpoint()
                saved = time.monotonic()
        self.checkpoint()

    def finish(self) -> dict[str, Any]:
        """Give the draft its best weights; returns what all evaluations of all held-out rows said.

        The draft that was best on the sample is the result.
        """
        self._student.restore(self._space.out)
        self._evaluate_all({"result": self._student})
        return self.progress.held_out

    def checkpoint(self) -> None:
        """Keep weights, optimizer and progress."""
        tensors: dict[str, Tensor] = {f"weight.{n}": p for n, p in self._weights.items()}
        for index, values in self._optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
        self._space.checkpoint(tensors, asdict(self.progress))

    def _resume(self) -> bool:
        found = self._space.resume()
        if found is None:
            return False
        tensors, state = found
        self.progress = TrainingState(**state)
        moments: dict[int, dict[str, Tensor]] = {}
        with torch.no_grad():
            for name, tensor in tensors.items():
                kind, _, rest = name.partition(".")
                if kind == "weight":
                    self._weights[rest].copy_(tensor)
                else:
                    index, _, key = rest.partition(".")
                    moments.setdefault(int(index), {})[key] = tensor
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": moments})
        return True

    def _order(self, examples: Sequence[Example], per_epoch: int) -> Iterator[list[int]]:
        """Packs of examples from the current step on."""
        epoch, skip = divmod(self.progress.step, per_epoch)
        while True:
            generator = torch.Generator().manual_seed(self._settings.seed * 1_000_003 + epoch)
            yield from packs(examples, self._settings.batch_tokens, generator)[skip:]
            epoch, skip = epoch + 1, 0

    def _step(self, examples: list[Example], lesson: Any, lr_share: float) -> float:
        """One step of AdamW; returns the mean loss per output token, in nats."""
        loss = self._student.learn(examples, lesson, self._settings)
        nn.utils.clip_grad_norm_(self._weights.values(), 1.0)
        for group in self._optimizer.param_groups:
            group["lr"] = self._settings.lr * lr_share
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss

    def _evaluate_all(self, drafts: Mapping[str, Draft]) -> None:
        """Evaluate drafts on all that is held out."""
        found = evaluate(
            self._target, drafts, batches(self._target, self._held_out, layers_of(drafts.values()))
        )
        for name, agreements in found.items():
            self.progress.held_out[name] = {g: a.as_dict() for g, a in agreements.items()}
            self._watch.evaluated(name, agreements)

    def _evaluate_sample(self, done: float = 0.0) -> None:
        """A point of the curve; the weights are saved if they are the best so far."""
        if self._sample is None:
            self._sample = list(batches(self._target, self._sampled(), self._student.layers))
        agreements: Agreements
        (agreements,) = evaluate(self._target, {"": self._student}, self._sample).values()
        overall, progress = agreements[ALL], self.progress
        progress.curve.append(
            {"done": done, "step": progress.step, "seconds": progress.seconds}
            | {"token_visits": progress.tokens, "loss": progress.loss}
            | overall.as_dict()
        )
        self._watch.evaluated(f"sample at {done:.0%}", {ALL: overall})
        if len(progress.curve) == 1 or overall.merit > progress.best:
            progress.best = overall.merit
            self._student.save(self._space.out)

    def _sampled(self) -> list[Example]:
        """Some of the held-out examples, in an order that knows nothing of their files."""
        chosen: list[Example] = []
        tokens = 0
        for example in sorted(self._held_out, key=lambda e: e.digest):
            if tokens >= self._settings.evaluation_tokens:
                break
            chosen.append(example)
            tokens += len(example.output_ids)
        return chosen


def rate(done: float) -> float:
    """The learning rate's share of its highest value: a linear rise, then half a cosine.

    Args:
        done: share of the schedule, in (0, 1].
    """
    if done < WARM_UP:
        return done / WARM_UP
    turn = (min(done, 1.0) - WARM_UP) / (1 - WARM_UP)
    return LAST_LR + (1 - LAST_LR) * (1 + math.cos(math.pi * turn)) / 2
