"""A target of four layers, drafts to train for it, and a run of `distill`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from specdec.engine.engine import Engine
from specdec.loading.pair import ModelPair
from specdec.policies.simple import Fixed
from specdec.request import Request, SamplingParams
from specdec.training.distill import distill
from specdec.training.examples import Example
from specdec.training.settings import DistillSettings, DistillWatch
from specdec.training.student import Student
from specdec.training.workspace import Workspace
from tests.specdec.loading.saved_models import set_config
from tests.specdec.tiny_models import tiny_model

QUICK = DistillSettings(epochs=2, lr=3e-3, held_out=0.2, batch_tokens=200, evaluations=4, top_k=8)
LAYERS = (0, 3)
PADDED = 112
"""Rows for those families whose tokenizers bring a token of their own."""


def target_model(family: str = "llama", **extra: Any) -> Any:
    return tiny_model(family, layers=4, **extra)


def tie(folder: Path) -> None:
    """Make the LM head of a saved model its embedding."""
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    weights["model.embed_tokens.weight"] *= 30  # otherwise its logits are flat
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    set_config(folder, tie_word_embeddings=True)


def load(folder: Path) -> ModelPair:
    return ModelPair.load(str(folder), device="cpu", trainable=True)


def greedy(pair: ModelPair, k: int = 3) -> tuple[int, ...]:
    """What the pair makes of one prompt; the draft decides nothing."""
    sampling = SamplingParams(max_new_tokens=20, temperature=0, ignore_eos=True)
    (done,) = Engine(pair, policy=Fixed(k)).generate([Request("a", (5, 17, 3, 3), sampling)])
    assert done.error is None
    return done.output_ids


def run(
    pair: ModelPair,
    student: Student,
    examples: list[Example],
    folder: Path,
    settings: DistillSettings = QUICK,
    watch: DistillWatch | None = None,
    **options: Any,
) -> dict[str, Any]:
    space = Workspace(folder)
    arguments = {"student": student.name, "epochs": settings.epochs}
    space.check(arguments)
    record = {"arguments": arguments}
    return distill(
        pair,
        student,
        examples,
        settings,
        space,
        record=record,
        watch=watch or DistillWatch(),
        **options,
    )


def plain_probs(example: Example) -> Tensor:
    """What the target's plain forward says at the example's output positions: [n, V]."""
    logits = target_model()(torch.tensor([example.input_ids])).logits[0]
    return torch.softmax(logits[len(example.prompt_ids) - 1 :], -1)
