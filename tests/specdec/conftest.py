from __future__ import annotations

import pytest
import torch
from tiny_models import TinyPair, make_pair, noisy_copy, tiny_model
from transformers import PreTrainedModel


@pytest.fixture(scope="session", autouse=True)
def two_threads() -> None:
    """The machine is shared, and tiny tensors gain nothing from more."""
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def target_model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="session")
def draft_model(target_model: PreTrainedModel) -> PreTrainedModel:
    """Agrees with the target on roughly four greedy tokens in five."""
    return noisy_copy(target_model, 0.08)


@pytest.fixture(scope="session")
def pair(target_model: PreTrainedModel, draft_model: PreTrainedModel) -> TinyPair:
    return make_pair(target_model, draft_model)


@pytest.fixture(scope="session")
def self_pair(target_model: PreTrainedModel) -> TinyPair:
    """The draft is the target."""
    return make_pair(target_model, target_model)
