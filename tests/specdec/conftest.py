from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from transformers import PreTrainedModel

from tests.specdec.tiny_models import TinyPair, make_pair, noisy_copy, tiny_model


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny tensors gain nothing from threads, and on a busy machine lose a hundredfold to them."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def seldom_collected() -> None:
    """Rows are lists, made by the ten thousand, and Python looks for garbage after each 700.

    It would go through torch and transformers a few times a test, for a third of its time.
    """
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """For tests of bits: work split over threads must not change them either."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


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
