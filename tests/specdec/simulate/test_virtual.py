"""The real engine beside a device that is not there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from specdec.engine import draft_loop
from specdec.policies.base import Signal, StopPolicy
from specdec.policies.costs import CostModel, CostTable
from specdec.policies.kinds import Kind
from specdec.policies.registry import make_policy
from specdec.request import Completion
from specdec.simulate.replay import replay
from specdec.simulate.script import VOCABULARY, Script
from specdec.simulate.transcripts import Transcript
from specdec.simulate.virtual import VirtualEngine
from specdec.simulate.virtual_device import (
    MADE_UP,
    TRANSFER,
    ForwardCosts,
    VirtualDevice,
    no_host,
)

DEPTH = 8


def transcripts(
    rows: int, tokens: int = 40, rate: float = 0.8, width: int = 1, *, greedy: bool = False
) -> list[Transcript]:
    random = np.random.default_rng(3)
    made = []
    for row in range(rows):
        accepted = random.uniform(size=tokens) < rate
        ranks = np.where(accepted, 0, random.integers(1, width + 1, tokens))
        ends = np.arange(tokens) == tokens - 1
        starts = np.flatnonzero(~accepted | ends | (width > 1))
        branch_of = np.full(tokens, -1)
        branch_of[starts] = np.arange(len(starts))
        signals = np.zeros((tokens, width, len(Signal)), dtype=np.float32)
        signals[..., Signal.LOG_TOP] = np.log(random.uniform(0.4, 0.65, tokens))[:, None]
        falls = np.where(accepted, 0, 1.2)[:, None] + 1.3 * np.arange(width)
        signals[..., Signal.LOG_Q] = signals[..., Signal.LOG_TOP] - falls
        branches = np.zeros((len(starts), DEPTH, width, len(Signal)), dtype=np.float32)
        branches[..., : Signal.ENTROPY] = -1.5
        made.append(
            Transcript(
                str(row), "", 20 + row, tokens - 1, greedy, ranks, signals, branch_of, branches
            )
        )
    return made


def costs(seconds: float, token: float = 0.0) -> ForwardCosts:
    return ForwardCosts(CostTable([1, 200], [seconds, seconds + 199 * token]), 0.0)


def engine_of(script: Script, policy: StopPolicy, slots: int = 4, scale: float = 1.0) -> Any:
    return VirtualEngine(script, costs(2e-3 * scale), costs(8e-3 * scale), policy, slots)


def completed(script: Script, policy: StopPolicy, slots: int = 4) -> list[Completion]:
    done: list[Completion] = engine_of(script, policy, slots, 1e-3).generate(script.requests(8))
    return done


def test_a_device_works_beside_the_host_and_results_come_when_it_is_done() -> None:
    device = VirtualDevice()
    began = device.now()
    device.launch(0.03)
    device.launch(0.02)
    arriving = device.fetch(torch.ones(1))
    device.launch(1.0)  # what is queued behind it delays nothing
    assert device.now() - began < 0.02
    arriving()
    assert device.now() - began == pytest.approx(0.05 + TRANSFER, abs=0.01)


def test_a_host_that_takes_no_time_leaves_the_devices_own() -> None:
    device = VirtualDevice(no_host)
    time.sleep(0.01)
    device.launch(0.03)
    assert device.now() == 0
    arriving = device.fetch(torch.ones(1))
    device.launch(1.0)
    arriving()
    assert device.now() == pytest.approx(0.03 + TRANSFER)
    arriving()  # its time has come already
    assert device.now() == pytest.approx(0.03 + TRANSFER)


def test_the_clock_stands_while_something_is_made_up() -> None:
    device = VirtualDevice()
    began = device.now()
    with device.aside("warmup"), device.aside(MADE_UP):
        time.sleep(0.05)
    assert device.now() - began < 0.02
    assert device.seconds[MADE_UP] == pytest.approx(0.05, abs=0.02)
    assert device.seconds["warmup"] < 0.02


@pytest.mark.parametrize("policy", ["none", "fixed", "confidence", "goodput"])
def test_rows_write_the_scripts_text_and_meet_its_acceptance(policy: str) -> None:
    """What is drafted, right or wrong, is judged as the transcript says, by the real engine."""
    rows = transcripts(8)
    script = Script(rows)
    options = {"costs": CostModel(costs(2e-6).seconds, costs(8e-6).seconds)}
    made = make_policy(policy, k=3, k_max=6, threshold=0.3, **(options if "good" in policy else {}))
    for number, completion in enumerate(completed(script, made)):
        first, n = int(script.first[number]), script.lengths[number]
        assert list(completion.output_ids) == script.truth[first : first + n].tolist()
    if policy == "fixed":
        alone = replay(
            rows, make_policy("fixed", k=3), CostModel(costs(1).seconds, costs(4).seconds)
        )
        engine = engine_of(script, make_policy("fixed", k=3), 1, 1e-3)
        counts = [each.counts for each in engine.generate(script.requests(8))]
        # The first token comes with the prompt, which the simulator leaves out.
        assert [c.rounds - 1 for c in counts] == [c.rounds for c in alone.rows]
        assert [c.accepted for c in counts] == [c.accepted for c in alone.rows]


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("policy", ["fixed", "looking", "shaped"])
def test_trees_meet_what_the_script_says_of_siblings(policy: str, greedy: bool) -> None:
    """Rows write the script's text in as many rounds as the simulator's trees take."""
    # A row's last page has room for whole trees, which the simulator always has.
    drawn = transcripts(6, width=3, rate=0.6, greedy=greedy)
    rows = [replace(each, prompt_tokens=each.prompt_tokens + 7) for each in drawn]
    script = Script(rows)

    def made() -> StopPolicy:
        if policy == "fixed":
            return make_policy("fixed", k=3, width=3)
        model = CostModel(costs(2e-6).seconds, costs(8e-6).seconds)
        trees: Any = make_policy("goodput", k_max=6, width=3, costs=model)
        trees.kinds.choose = lambda *_: Kind(policy == "looking", branches=True)
        trees.switch.pays = lambda _: True
        return trees

    engine = engine_of(script, made(), 1, 1e-3)
    done = engine.generate(script.requests(6))
    for number, completion in enumerate(done):
        first, n = int(script.first[number]), script.lengths[number]
        assert list(completion.output_ids) == script.truth[first : first + n].tolist()
    assert sum(accepted for *_, accepted in engine.stats.nodes.values()) > 50
    if policy == "fixed":
        alone = replay(rows, made(), CostModel(costs(1).seconds, costs(4).seconds))
        assert [each.counts.rounds - 1 for each in done] == [each.rounds for each in alone.rows]
        assert [each.counts.accepted for each in done] == [each.accepted for each in alone.rows]
        assert [each.counts.drafted for each in done] == [each.drafted for each in alone.rows]


@pytest.mark.parametrize("width", [1, 4])
def test_a_script_draws_with_the_probabilities_that_its_signals_say(width: int) -> None:
    rows = transcripts(1, width=width)
    script = Script(rows)
    log_q = torch.log_softmax(script.draft_logits, -1).gather(1, script.choices)
    n = script.lengths[0]
    np.testing.assert_allclose(log_q[:n], rows[0].signals[..., Signal.LOG_Q], atol=0.02)
    assert script.draft_logits.shape[1] == VOCABULARY
    assert all(len({*each}) == width for each in script.choices.tolist())


@contextmanager
def ahead(monkeypatch: pytest.MonkeyPatch, always: bool) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(draft_loop, "LIKELY", 0.0 if always else 2.0)
        if not always:
            patch.setattr(draft_loop.DraftLoop, "go_ahead", lambda *_: None)
        yield


@pytest.mark.parametrize("policy", ["confidence", "goodput"])
def test_running_ahead_changes_no_decision(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row is drafted, submitted and accepted for as it is when each step waits."""
    script = Script(transcripts(8))
    counts: list[Any] = []
    forwards = []
    for always in (True, False):
        # Costs that are not learnt: measured ones differ from run to run.
        model = CostModel(costs(2e-6).seconds, costs(8e-6).seconds)
        monkeypatch.setattr(model, "observe_draft", lambda *_: None)
        monkeypatch.setattr(model, "observe_verify", lambda *_: None)
        options = {"costs": model} if policy == "goodput" else {}
        made = make_policy(policy, k_max=6, threshold=0.5, **options)
        freeze_learning(made, monkeypatch)
        with ahead(monkeypatch, always):
            engine = engine_of(script, made, 4, 1e-3)
            counts.append([each.counts for each in engine.generate(script.requests(8))])
            forwards.append(engine.stats.draft_forwards)
    assert counts[0] == counts[1]
    assert forwards[0] > forwards[1]


def test_candidates_that_nobody_looked_at_are_learnt_from_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The text stays, all that is drafted is submitted, and each verdict meets its signals."""
    script = Script(transcripts(8))
    policy: Any = make_policy(
        "goodput", k_max=6, costs=CostModel(costs(2e-6).seconds, costs(8e-6).seconds)
    )
    monkeypatch.setattr(policy.kinds, "choose", lambda *_: Kind(looks=False))
    monkeypatch.setattr(policy.switch, "pays", lambda _: True)  # else a probe would look
    monkeypatch.setattr(policy, "go_on", lambda _: pytest.fail("it was to look at nothing"))
    seen: list[tuple[Any, Any]] = []
    monkeypatch.setattr(
        policy.estimator, "learn", lambda signals, _, stood: seen.append((signals, stood))
    )
    for number, completion in enumerate(completed(script, policy)):
        first, n = int(script.first[number]), script.lengths[number]
        assert list(completion.output_ids) == script.truth[first : first + n].tolist()
        assert completion.counts.drafted == completion.counts.verified > 0
    signals, stood = map(np.concatenate, zip(*seen, strict=True))
    assert 0 < stood.sum() < len(stood)
    # The transcripts' likeliest token is right, and no other one: see `transcripts`.
    likeliest = np.isclose(signals[:, Signal.LOG_Q], signals[:, Signal.LOG_TOP], atol=0.02)
    assert (likeliest == stood).all()


def freeze_learning(policy: StopPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    """What depends on measured seconds goes."""
    nothing: Callable[..., None] = lambda *_: None  # noqa: E731
    monkeypatch.setattr(policy, "observe", nothing)


def test_new_sizes_are_recorded_in_time_that_no_round_is_charged_with() -> None:
    script = Script(transcripts(4, tokens=12))
    engine = engine_of(script, make_policy("fixed", k=2), 4, 1e-3)
    began, wall = engine.clock.now(), time.perf_counter()
    engine.generate(script.requests(4))
    spent = time.perf_counter() - wall  # the host waits for nothing
    assert engine.stats.seconds["warmup"] > 0.05  # a quarter of a tenth of a second for each size
    assert engine.clock.now() - began < spent + 0.02


def test_steady_rounds_take_what_their_forwards_take() -> None:
    """Slow forwards, so that the host hardly counts: busy is 1 target and 2 draft forwards each."""
    script = Script(transcripts(8))
    engine = engine_of(script, make_policy("fixed", k=2), 2, 1.0)
    steady = engine.steady(script.requests(6), seconds=2.0)
    assert steady.rounds > 10
    assert steady.busy / steady.rounds == pytest.approx(2 * 2e-3 + 8e-3, rel=0.05)
    assert steady.busy < steady.seconds
