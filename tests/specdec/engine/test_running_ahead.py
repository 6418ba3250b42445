"""Draft steps that begin before their round change no row's output, nor what is drafted for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from specdec.engine.draft_loop import DraftLoop
from specdec.engine.engine import Engine
from specdec.engine.scheduler import OutputLengths
from specdec.measure.clock import PhaseClock
from specdec.model.pages import PAGE
from specdec.policies.base import RoundStart, StopPolicy
from specdec.policies.chains import Chain
from specdec.policies.registry import make_policy
from specdec.policies.simple import Fixed
from specdec.request import Completion, Request
from tests.specdec.eagle_drafts import (
    FITTED,
    eagle_pair,
    fitted_weights,
    foreseeable_target,
    save,
)
from tests.specdec.engine.test_memory import bytes_for
from tests.specdec.engine.test_rejection import Beside
from tests.specdec.tiny_models import TinyPair
from tests.specdec.workloads import GREEDY, SAMPLED, prompts, requests_of, sampled_and_greedy

MANY = prompts((5, 40, 1, 12, 17, 64, 3, 33, 9, 21, 2, 70), seed=5)

POLICIES = {
    "fixed": lambda: make_policy("fixed", k=3),
    "heuristic": lambda: make_policy("heuristic", k=2, k_max=6),
    "confidence": lambda: make_policy("confidence", k_max=5, threshold=0.3),
}
"""Deterministic ones: they ask no clock."""


@pytest.fixture(scope="module")
def eagle(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    target: PreTrainedModel = foreseeable_target()
    folder: Path = tmp_path_factory.mktemp("eagle") / "draft"
    return eagle_pair(target, save(folder, FITTED, fitted_weights(FITTED, target), "speculators"))


@pytest.fixture(params=["model", "eagle"])
def either(request: pytest.FixtureRequest, pair: TinyPair) -> TinyPair:
    found: TinyPair = request.getfixturevalue("eagle") if request.param == "eagle" else pair
    return found


def ragged(many: Sequence[Request]) -> list[Request]:
    """Of different lengths, so that rows end and others join in the midst of drafting."""
    return [
        replace(each, sampling=replace(each.sampling, max_new_tokens=3 + 5 * (i % 5)))
        for i, each in enumerate(many)
    ]


def run(
    pair: TinyPair, policy: StopPolicy, many: Sequence[Request], clock: PhaseClock, **options: Any
) -> tuple[list[Completion], Engine]:
    engine = Engine(pair, policy=policy, slots=4, lookup=False, clock=clock, **options)
    return engine.generate(many), engine


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each start of drafting with steps that ran ahead, whether these were the round's."""
    found: list[bool] = []
    run, drop = DraftLoop.run, DraftLoop.drop_ahead

    def counted(loop: DraftLoop, *given: Any) -> None:
        there = loop._ahead is not None
        run(loop, *given)
        if there:
            found.append(True)

    def dropped(loop: DraftLoop, *given: Any) -> None:
        if loop._ahead is not None:
            found.append(False)
        drop(loop, *given)

    monkeypatch.setattr(DraftLoop, "run", counted)
    monkeypatch.setattr(DraftLoop, "drop_ahead", dropped)
    return found


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("mode", "rows"), [("rejection", "greedy"), ("rejection", "both"), ("coupled", "sampled")]
)
def test_rows_are_what_they_are_without_it(
    either: TinyPair, policy: str, mode: Any, rows: str, used: list[bool]
) -> None:
    many = {
        "greedy": requests_of(MANY, GREEDY),
        "sampled": requests_of(MANY, SAMPLED),
        "both": sampled_and_greedy(MANY),
    }[rows]
    many = ragged(many)
    cpu = torch.device("cpu")
    alone, _ = run(either, POLICIES[policy](), many, PhaseClock(cpu), verification=mode)
    assert not used
    beside, engine = run(either, POLICIES[policy](), many, Beside(cpu), verification=mode)
    for one, other in zip(alone, beside, strict=True):
        assert one.error is None and one.output_ids == other.output_ids
        assert one.counts == other.counts
    assert used.count(True) - used.count(False) > 10
    for cache in engine.shared.caches:
        assert cache.pages.available == cache.pages.total


def test_rows_that_are_sent_back_or_adjusted_or_controls(
    pair: TinyPair, used: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever keeps steps from being a round's: they are taken back, and leave nothing."""
    cpu = torch.device("cpu")
    many = requests_of(MANY, replace(SAMPLED, max_new_tokens=50))
    penalised = replace(many[5].sampling, repetition_penalty=1.5)
    many[5] = replace(many[5], sampling=penalised)
    options: dict[str, Any] = {"control_share": 0.2, "verification": "coupled"}
    monkeypatch.setattr(OutputLengths, "mean", lambda *_: 4.0)  # so that too many are admitted
    options["kv_memory_bytes"] = bytes_for(pair, 8 * PAGE)
    alone, before = run(pair, POLICIES["fixed"](), many, PhaseClock(cpu), **options)
    beside, engine = run(pair, POLICIES["fixed"](), many, Beside(cpu), **options)
    assert [each.output_ids for each in alone] == [each.output_ids for each in beside]
    assert engine.stats.preempted == before.stats.preempted > 0
    assert {*used} == {True, False}
    assert sum(sums.n for sums in engine.stats.speedup.control.values()) > 3


class Recording(Fixed):
    """Notes what it is told of each round."""

    def __init__(self, k: int) -> None:
        super().__init__(k)
        self.starts: list[RoundStart] = []

    def budget(self, start: RoundStart) -> Sequence[int]:
        self.starts.append(start)
        return super().budget(start)


def test_the_policy_is_told_what_the_draft_had_to_read_before_it_ran_ahead(
    either: TinyPair, used: list[bool]
) -> None:
    told: list[list[Sequence[int]]] = []
    for clock in (PhaseClock(torch.device("cpu")), Beside(torch.device("cpu"))):
        policy = Recording(3)
        run(either, policy, ragged(requests_of(MANY, GREEDY)), clock)
        told.append([start.draft_pending for start in policy.starts])
    assert used.count(True) - used.count(False) > 10
    assert told[0] == told[1]
    assert max(map(max, told[1])) > 40 and min(map(min, told[1])) >= 0


class LedBySome(StopPolicy):
    """Takes known candidates of the first row in every third round, and drafts for the others."""

    looks_up, most = True, 8

    def __init__(self) -> None:
        self._turn, self._taken = 0, list[int]()

    def choose(self, start: RoundStart, chains: Sequence[Chain]) -> Sequence[int]:
        self._turn += 1
        leads = self._turn % 3 == 0
        self._taken = [min(len(c.tokens), 4) * (leads and i == 0) for i, c in enumerate(chains)]
        return self._taken

    def budget(self, start: RoundStart) -> Sequence[int]:
        return [0 if taken else 4 for taken in self._taken]


def test_a_row_that_does_not_draft_after_all_leaves_nothing_of_the_steps_in_the_drafts_cache(
    pair: TinyPair, used: list[bool]
) -> None:
    ids = prompts((20, 30), seed=7)
    sampling = replace(GREEDY, max_new_tokens=60)
    options: dict[str, Any] = {"verification": "coupled", "slots": 2, "lookup": True}
    engine = Engine(pair, policy=LedBySome(), clock=Beside(torch.device("cpu")), **options)
    engine.generate([Request("first", ids[0], sampling)])  # what its sample finds
    for request in requests_of(ids, sampling):
        engine.submit(request)
    draft = pair.draft
    assert draft is not None and engine.drafter is not None
    cache = engine.drafter.cache
    while engine.has_work:
        engine.step()
        cache.extend(())
        for slot, row in enumerate(engine.scheduler.rows):
            # Behind its tokens it may hold candidates that ran ahead.
            if not (length := min(cache.lengths[slot], len(row.tokens))):
                continue
            alone = draft.new_cache(1, length + 1)
            draft.forward(alone, [(0, length)], torch.tensor(row.tokens[:length]))
            held, _ = cache.read(0, slice(slot, slot + 1), length)
            expected, _ = alone.read(0, slice(0, 1), length)
            assert torch.allclose(held, expected, atol=1e-3)
    assert True in used
