"""How to train, and whom to tell about it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from specdec.training.evaluate import Agreements


class DistillError(ValueError):
    """Settings or files that cannot be used as asked; the message says what to do."""


@dataclass(frozen=True, slots=True)
class DistillSettings:
    """How to train.

    Attributes:
        epochs: passes over the examples at most.
        minutes: of training at most; what comes first ends it.
        top_k: tokens of the target's distribution that are learned one by one.
        lr: the highest learning rate of AdamW.
        ce_weight: of cross-entropy on the target's tokens, beside KL's 1.
        held_out: share of the prompts that is kept for evaluation.
        batch_tokens: of a step, padding included.
        evaluations: during training, evenly spread.
        evaluation_tokens: output tokens of such an evaluation, about; the first and last one see
            all that is held out.
        bf16: forward and backward in bfloat16, weights and loss in float32.
        rollout: steps of EAGLE-3's training on its own states, the first one, on the target's,
            included; other drafts have none.
        seed: of the order of the examples.

    Raises:
        DistillError: a value is outside its range; the message names it.
    """

    epochs: int = 3
    minutes: float | None = None
    top_k: int = 32
    lr: float = 5e-4
    ce_weight: float = 0.1
    held_out: float = 0.05
    batch_tokens: int = 2000
    evaluations: int = 10
    evaluation_tokens: int = 4000
    bf16: bool = False
    rollout: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        def require(name: str, ok: bool, rule: str) -> None:
            if not ok:
                raise DistillError(f"{name} must be {rule}, got {getattr(self, name)}")

        require("epochs", self.epochs >= 1, "at least 1")
        require("minutes", self.minutes is None or self.minutes > 0, "more than 0")
        require("top_k", self.top_k >= 1, "at least 1")
        require("rollout", self.rollout >= 1, "at least 1")
        require("lr", 0 < self.lr < math.inf, "more than 0")
        require("ce_weight", 0 <= self.ce_weight < math.inf, "0 or more")
        require("held_out", 0 < self.held_out < 1, "between 0 and 1")
        require("batch_tokens", self.batch_tokens >= 1, "at least 1")
        require("evaluations", self.evaluations >= 1, "at least 1")


@dataclass(frozen=True, slots=True)
class Moment:
    """Where a distillation is, as a progress bar would show it.

    Attributes:
        stage: "scoring" or "training".
        done, total: output tokens, of this run or of the schedule.
        tokens_per_second: output tokens, in this run.
        loss: mean of the last steps, in nats per output token.
    """

    stage: str
    done: float
    total: float
    tokens_per_second: float
    loss: float | None = None


@dataclass(frozen=True, slots=True)
class DistillWatch:
    """Whom a distillation tells how far it is, and what its evaluations find.

    Attributes:
        moment: called after each shard and step.
        evaluated: called with a name ("start", "sample at 40%", "result", "incumbent") and
            what was found.
    """

    moment: Callable[[Moment], None] = lambda moment: None
    evaluated: Callable[[str, Agreements], None] = lambda name, agreements: None
