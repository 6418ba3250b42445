"""How often a round makes the host wait for the device: on a GPU that costs its head start."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from specdec.engine.engine import Engine
from specdec.policies.base import StopPolicy
from specdec.policies.registry import make_policy
from specdec.request import Request, SamplingParams
from tests.specdec.adjustments import ALONE
from tests.specdec.tiny_models import make_pair, noisy_copy, tiny_model

METHODS = ("item", "tolist", "cpu", "numpy", "nonzero", "unique")
"""Tensor methods that need numbers on the host."""

OPERATORS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2")
"""The operators behind `int(x)`, `if x:` and the like; and indexing with a boolean mask."""


class Methods(TorchFunctionMode):
    """Counts calls of METHODS."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if getattr(function, "__name__", "") in METHODS:
            self.counts[function.__name__] += 1
        return function(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    """Counts calls of OPERATORS."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        masks = args[1] if name in ("index", "index_put_") else ()
        if name in OPERATORS or any(m is not None and m.dtype == torch.bool for m in masks):
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


def waits(
    policy: StopPolicy, temperature: float, verification: Any, **asked: Any
) -> list[tuple[int, int]]:
    """By decoding round: how often the host waited, and the draft forwards."""
    target = tiny_model()
    pair = make_pair(target, noisy_copy(target, 0.2))
    engine = Engine(pair, policy=policy, verification=verification, slots=4)
    for row in range(4):
        sampling = SamplingParams(temperature=temperature, max_new_tokens=24, seed=row, **asked)
        engine.submit(Request(str(row), (1, 2, 3 + row), sampling))
    engine.step()  # profiles, and feeds the prompts
    found = []
    while engine.live == 4:
        counts: Counter[str] = Counter()
        before = engine.stats.draft_forwards
        with Methods(counts), Operators(counts):
            engine.step()
        # What `PhaseClock.fetch` gives is read by numpy or tolist: once for each wait.
        found.append((counts.total() - counts["cpu"], engine.stats.draft_forwards - before))
    return found


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("verification", ["rejection", "coupled"])
@pytest.mark.parametrize("name", ["none", "fixed", "heuristic", "confidence", "suffix", "goodput"])
def test_a_round_waits_once_and_once_more_for_each_look_at_candidates(
    name: str, verification: str, temperature: float
) -> None:
    policy = make_policy(name, k=3, k_max=4, threshold=0.05)
    rounds = waits(policy, temperature, verification)
    assert len(rounds) > 3
    looks = 1 if policy.wanted else 0
    for waited, drafted in rounds:
        assert waited == 1 + looks * drafted
    if name in ("fixed", "heuristic", "confidence"):
        assert any(drafted for _, drafted in rounds)


def test_what_rows_ask_of_their_logits_makes_nobody_wait() -> None:
    everything = {key: value for kind in ALONE.values() for key, value in kind.items()}
    everything |= {"allowed_token_ids": tuple(range(90)), "no_repeat_ngram_size": 3}
    rounds = waits(make_policy("fixed", k=3), 0.8, "rejection", **everything)
    assert len(rounds) > 3
    assert all(waited == 1 for waited, _ in rounds)


def test_what_waits_is_counted() -> None:
    x = torch.tensor([1.0, 0.0])
    for wait in (
        lambda: x.tolist(), lambda: x[0].item(), lambda: int(x[0]), lambda: bool(x[0] > 0),
        lambda: x[x > 0], lambda: x.cpu(), lambda: x.nonzero(), lambda: torch.equal(x, x),
    ):  # fmt: skip
        counts: Counter[str] = Counter()
        with Methods(counts), Operators(counts):
            wait()
        assert counts.total() >= 1
