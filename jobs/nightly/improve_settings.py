"""The section `improve` of the recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.config.locations import Location
from pipeline.config.section import Section, example


class ImproveConfig(Section):
    """After a night its outputs teach the pair; what is not surely better is not adopted."""

    model_config = example({"head": True, "held_out": 0.2})

    head: bool = Field(default=False, description="Train the next acceptance head.")
    draft: bool = Field(default=False, description="Train the next draft.")
    kind: Literal["model", "eagle3"] | None = Field(
        default=None,
        description="Kind of the next draft: `model`, a small language model, or `eagle3`, a layer "
        "over the target's hidden states. A draft in use of this kind is trained further, else a "
        "new one begins. `null`: the kind of the draft in use.",
    )
    folder: Location | None = Field(
        default=None,
        description="Local folder of the versions, on a disk that all workers see. `null`: "
        "`models/` beside the dataset's own files, which must then be local.",
    )
    held_out: float = Field(
        default=0.2,
        gt=0,
        lt=1,
        description="Share of prompts that teach nothing: candidates are compared on them.",
    )
    rows: int = Field(default=400, ge=4, description="Completions to learn from, at most.")
    compare_rows: int = Field(default=64, ge=2, description="Held-out rows to compare on, at most.")
    least_gain: float = Field(
        default=0.0,
        ge=0,
        description="Adopt a candidate only if the lower 95% bound of its gain exceeds 1 by more "
        "than this.",
    )
    control_share: float = Field(
        default=0.25,
        gt=0,
        le=0.5,
        description="Share of control rounds when candidate and present pair are run side by side.",
    )
    head_depth: int = Field(default=3, ge=0, description="Residual blocks of the head.")
    head_epochs: int = Field(
        default=20, ge=1, description="Times that the head's training goes through its rows."
    )
    draft_minutes: float = Field(
        default=10.0, gt=0, description="Most minutes of the draft's training."
    )
    draft_epochs: int = Field(
        default=2,
        ge=1,
        description="Times that the draft's training goes through its rows, at most.",
    )
    draft_lr: float | None = Field(
        default=None,
        gt=0,
        description="Highest learning rate of the draft's training. `null`: 2e-4 for a model that "
        "is trained further, otherwise that of `specbatch distill`.",
    )
    seed: int = Field(default=0, description="Seed of training and of the choice of rows.")
