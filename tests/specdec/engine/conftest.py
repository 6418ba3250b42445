from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from tests.specdec.engine.references import (
    LENGTHS,
    Reference,
    generate,
    least_margin,
    sampled_by_hand,
)
from tests.specdec.tiny_models import TinyPair, make_pair, noisy_copy, tiny_model
from tests.specdec.workloads import (
    SAMPLED,
    SOME,
    Prompt,
    prompts,
    requests_of,
)


@pytest.fixture(scope="session")
def reference(target_model: PreTrainedModel) -> Reference:
    """Outputs without near-ties, some of which an end-of-sequence token cuts short."""
    many = prompts(LENGTHS)
    plain = [generate(target_model, prompt, 24) for prompt in many]
    clear = [
        (prompt, output)
        for prompt, output in zip(many, plain, strict=True)
        if least_margin(target_model, prompt, output) > 1e-3
    ]
    assert len(clear) >= 16
    middle = torch.tensor([token for _, output in clear for token in output[3:20]])
    eos = int(middle.mode().values)
    kept = [prompt for prompt, _ in clear]
    cut = [generate(target_model, prompt, 24, eos) for prompt in kept]
    assert 0 < sum(len(output) < 24 for output in cut) < len(cut)
    return Reference(kept, cut, eos)


@pytest.fixture(scope="session")
def by_hand(target_model: PreTrainedModel) -> list[Prompt]:
    return [sampled_by_hand(target_model, request) for request in requests_of(SOME, SAMPLED)]


@pytest.fixture(scope="session")
def small_pair() -> TinyPair:
    """Of five tokens: all that three of them can be is counted."""
    model = tiny_model(vocab=5, hidden=16, layers=1, heads=2, kv_heads=1, peak=60.0, seed=4)
    return make_pair(model, noisy_copy(model, 0.4))
