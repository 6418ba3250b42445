from __future__ import annotations

from pathlib import Path

import pytest
import torch

from specdec.training.examples import Example
from tests.specdec.loading.saved_models import saved
from tests.specdec.tiny_models import VOCAB
from tests.specdec.training.drafts import (
    target_model,
)


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("target"), target_model())


@pytest.fixture(scope="session")
def examples() -> list[Example]:
    """What the target made of 120 prompts, sampled; prompts and outputs have various lengths."""
    model = target_model()
    found = []
    with torch.random.fork_rng():
        torch.manual_seed(4)
        for length in range(2, 12):
            prompts = torch.randint(VOCAB, (12, length))
            whole = model.generate(prompts, do_sample=True, top_k=0, max_new_tokens=8 + length)
            for i, (prompt, tokens) in enumerate(zip(prompts, whole, strict=True)):
                output = tuple(tokens[length:].tolist())
                name = f"{length}:{i}"
                found.append(Example(name, tuple(prompt.tolist()), output, f"part-{i % 2}"))
    return found
