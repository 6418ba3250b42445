"""Drafts in training, of either kind: what they begin as, and the target that teaches them."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch takes seconds to import, and `--help` needs none of it
    from specdec.loading.pair import ModelPair
    from specdec.training.eagle_student import EagleStudent
    from specdec.training.examples import Example
    from specdec.training.student import Student


class Kind(StrEnum):
    """Kinds of drafts."""

    MODEL = "model"
    EAGLE3 = "eagle3"


LR = {Kind.MODEL: 5e-4, Kind.EAGLE3: 2e-3}
"""Highest learning rates: of layers that were the target's, and of one that begins at random."""

FIRST_LAYERS = (0, 1)
"""Layers of the target that a new model has.

The first ones read what the embedding writes; a last one, right after them, does not know its input
(SmolLM2-135M, untrained: 14 nats per token with 0,1, but 77 with 0,29).
"""

DRAFT_VOCAB = 8192
"""Tokens that a new EAGLE-3 draft proposes. Raised, each step takes longer; lowered, more tokens
are the target's alone to choose.
"""


def kind_of(draft: str) -> Kind:
    """Of which kind a draft is.

    Raises:
        PairError: it is missing, or its config cannot be read.
    """
    from specdec.loading.eagle import eagle_config
    from specdec.loading.sources import find_model

    return Kind.MODEL if eagle_config(find_model(draft)) is None else Kind.EAGLE3


def load_target(kind: Kind, name: str, trust: bool, *, bf16: bool = False) -> ModelPair:
    """A target, as it teaches a kind of draft.

    Args:
        trust: run Python code that comes with it.
        bf16: whether an EAGLE-3 draft learns from it in bfloat16.

    Raises:
        PairError: it is missing or unsupported.
    """
    from specdec.loading.pair import ModelPair

    eagle = kind is Kind.EAGLE3
    return ModelPair.load(
        name,
        dtype="bfloat16" if eagle and bf16 else "float32",
        trainable=not eagle,
        trust_remote_code=trust,
    )


def begin(
    kind: Kind,
    pair: ModelPair,
    examples: Sequence[Example],
    *,
    draft: str | None = None,
    layers: Sequence[int] = FIRST_LAYERS,
    draft_vocab: int = DRAFT_VOCAB,
    trust: bool = False,
) -> Student | EagleStudent:
    """A draft that is to be trained.

    Args:
        pair: of `load_target`.
        examples: what it will learn from.
        draft: a draft of this kind to go on with; None: a new one.
        layers: of the target, that a new model has.
        draft_vocab: tokens that a new EAGLE-3 draft proposes.
        trust: run Python code that comes with the draft.

    Raises:
        PairError: the draft is missing or does not fit the target.
        DistillError: it is of another kind, or cannot be trained.
    """
    from specdec.training.eagle_student import EagleStudent
    from specdec.training.student import Student

    if kind is Kind.EAGLE3:
        if draft is not None:
            return EagleStudent.from_draft(pair, draft)
        return EagleStudent.begin(pair, examples, draft_vocab)
    if draft is not None:
        return Student.from_draft(pair, draft, trust_remote_code=trust)
    return Student.from_layers(pair, layers)
