"""Candidates that are looked up: they change when tokens come, and never which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from specdec.drafters.corpus import Corpus, build_corpus
from specdec.engine.engine import Engine
from specdec.measure.clock import PhaseClock
from specdec.policies.base import RoundOutcome, RoundStart, StopPolicy
from specdec.policies.chains import Chain
from specdec.policies.suffix import Suffix
from specdec.request import Completion, Request, SamplingParams
from tests.specdec.engine.references import letters
from tests.specdec.engine.test_preemption import LONG, PROMPTS
from tests.specdec.engine.test_preemption import run as run_short
from tests.specdec.tiny_models import VOCAB, TinyPair, make_pair
from tests.specdec.workloads import (
    GREEDY,
    LOOKING_UP,
    SAMPLED,
    SOME,
    Prompt,
    looking_goodput,
    make,
    outputs,
    requests_of,
)


@pytest.fixture(scope="module")
def lone(pair: TinyPair) -> TinyPair:
    """A target without a draft."""
    return replace(pair, draft=None)


def four_times(sampling: SamplingParams) -> list[Request]:
    """Four samples of each prompt."""
    return requests_of([prompt for prompt in SOME for _ in range(4)], sampling)


@pytest.fixture(scope="module")
def targets_own(lone: TinyPair) -> dict[float, list[Prompt]]:
    """What the target alone makes of `four_times`, by temperature."""
    own = {}
    for sampling in (GREEDY, SAMPLED):
        engine = Engine(lone, policy=StopPolicy(), verification="coupled")
        own[sampling.temperature] = outputs(engine.generate(four_times(sampling)))
    return own


@pytest.mark.parametrize("slots", [1, 16])
@pytest.mark.parametrize("policy", LOOKING_UP)
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_outputs_are_the_targets_own(
    lone: TinyPair,
    targets_own: dict[float, list[Prompt]],
    policy: str,
    slots: int,
    sampling: SamplingParams,
) -> None:
    """Through refills, with a full and an empty index."""
    requests = four_times(sampling)
    expected = targets_own[sampling.temperature]
    engine = Engine(
        lone, policy=LOOKING_UP[policy](), verification="coupled", slots=slots, prefill_chunk=64
    )
    for _ in range(2):
        assert outputs(engine.generate(requests)) == expected
    counts, stats = engine.stats.counts, engine.stats
    assert 0 < counts.accepted < counts.verified == counts.drafted
    assert stats.verified_in_prompt + stats.verified_in_rows == counts.verified
    assert stats.accepted_in_prompt + stats.accepted_in_rows == counts.accepted
    assert stats.accepted_in_prompt > stats.accepted_in_rows
    assert engine.stats.draft_forwards == 0
    # What was generated once is known: most of the second time is accepted.
    assert counts.accepted > counts.committed / 3


@pytest.mark.parametrize("policy", LOOKING_UP)
def test_greedy_rows_are_the_targets_own_under_rejection_too(lone: TinyPair, policy: str) -> None:
    expected = outputs(Engine(lone, policy=StopPolicy()).generate(four_times(GREEDY)))
    mixed = [*four_times(GREEDY), *requests_of(SOME, replace(SAMPLED, seed=9))]
    done = Engine(lone, policy=LOOKING_UP[policy](), slots=7).generate(
        [replace(request, id=str(i)) for i, request in enumerate(mixed)]
    )
    assert outputs(done)[: len(expected)] == expected


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_batch_invariant_targets_give_the_same_tokens_whatever_is_looked_up(
    target_model: PreTrainedModel, precision: Any
) -> None:
    pair = make_pair(target_model, None, precision=precision, invariant=True)
    requests = four_times(replace(SAMPLED, max_new_tokens=40))[:16]

    def run(policy: StopPolicy, slots: int, many: list[Request]) -> list[Completion]:
        engine = Engine(pair, policy=policy, verification="coupled", slots=slots, prefill_chunk=64)
        return engine.generate(many)

    alone = outputs(run(StopPolicy(), 1, requests))
    for slots in (1, 16):
        done = run(make("suffix"), slots, requests)
        assert outputs(done) == alone
        assert sum(each.counts.accepted for each in done) > 0
    assert outputs(run(looking_goodput(), 3, requests[:4:-1])) == alone[:4:-1]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_rows_that_were_sent_back_go_on_with_the_same_tokens(
    lone: TinyPair, sampling: SamplingParams
) -> None:
    sampling = replace(sampling, max_new_tokens=LONG)
    plenty, _ = run_short(lone, sampling, None, StopPolicy(), "coupled")
    short, engine = run_short(lone, sampling, 5, make("suffix"), "coupled")
    assert short == plenty and engine.stats.preempted > 0
    assert len(plenty) == len(PROMPTS)


@pytest.mark.parametrize("verification", ["coupled", "rejection"])
@pytest.mark.parametrize("slots", [1, 16])
@pytest.mark.parametrize("policy", ["goodput stated", "scripted"])
def test_a_draft_goes_on_behind_what_is_known(
    pair: TinyPair,
    targets_own: dict[float, list[Prompt]],
    policy: str,
    slots: int,
    verification: Any,
) -> None:
    """The target's own tokens, with a full and an empty index; greedy rows in both modes."""
    sampled = GREEDY if verification == "rejection" else SAMPLED
    requests = [*four_times(sampled), *four_times(GREEDY)[::5]]
    requests = [replace(request, id=str(i)) for i, request in enumerate(requests)]
    expected = [*targets_own[sampled.temperature], *targets_own[0.0][::5]]
    options: Any = {"verification": verification, "slots": slots, "lookup": True}
    engine = Engine(pair, policy=make(policy), **options)
    for _ in range(2):
        assert outputs(engine.generate(requests)) == expected
    counts, stats = engine.stats.counts, engine.stats
    known = stats.accepted_in_prompt + stats.accepted_in_rows
    assert 0 < known < counts.accepted < counts.verified
    assert stats.draft_forwards > 0


@pytest.mark.parametrize("drafting", [True, False], ids=["a draft", "no draft"])
@pytest.mark.parametrize("beside", [True, False], ids=["beside a device", "on a CPU"])
def test_what_is_looked_up_where_nobody_asks(
    pair: TinyPair, monkeypatch: pytest.MonkeyPatch, drafting: bool, beside: bool
) -> None:
    """Not beside a draft on a device that would wait for it."""
    monkeypatch.setattr(PhaseClock, "asynchronous", beside)
    models = pair if drafting else replace(pair, draft=None)
    engine = Engine(models, policy=make("goodput stated"), verification="coupled")
    engine.generate(four_times(GREEDY))
    found = engine.stats.verified_in_prompt + engine.stats.verified_in_rows
    assert bool(found) is not (drafting and beside)


def test_what_is_known_may_be_left_out(pair: TinyPair) -> None:
    engine = Engine(pair, policy=make("goodput stated"), lookup=False)
    engine.generate(four_times(GREEDY))
    assert engine.stats.verified_in_prompt == engine.stats.verified_in_rows == 0
    assert engine.stats.counts.accepted > 0


def test_stop_strings_end_outputs_where_they_would(lone: TinyPair) -> None:
    (free,) = outputs(Engine(lone, policy=StopPolicy()).generate(requests_of(SOME[:1], GREEDY)))
    stop = letters(free[9:11])
    asked = requests_of([SOME[0]] * 6, replace(GREEDY, stop=(stop,)))
    plain = Engine(lone, policy=StopPolicy(), decode=letters).generate(asked)
    engine = Engine(lone, policy=make("suffix"), decode=letters, slots=2)
    assert outputs(engine.generate(asked)) == outputs(plain)
    assert engine.stats.counts.accepted > 0
    assert all(len(output) < len(free) for output in outputs(plain))


def test_a_row_never_draws_by_the_numbers_of_what_it_looks_up(lone: TinyPair) -> None:
    """A later row of the same seed may read what an earlier one drew, and draws by other numbers.

    First tokens, which nothing is proposed for: without looking up they are the same again.
    """
    requests = requests_of(SOME, SAMPLED)

    def firsts(engine: Engine) -> list[int]:
        return [output[0] for output in outputs(engine.generate(requests))]

    plain, looking = Engine(lone, policy=StopPolicy()), Engine(lone, policy=make("suffix"))
    assert firsts(plain) == firsts(plain)
    assert firsts(looking) != firsts(looking)


def test_a_row_never_draws_by_the_numbers_of_what_a_corpus_holds(
    lone: TinyPair, tmp_path: Path
) -> None:
    """An earlier job may have had the same rows and seeds."""

    def run(*texts: Sequence[int]) -> list[Prompt]:
        corpus = None
        if texts:
            build_corpus(texts, tmp_path / "corpus", "t")
            corpus = Corpus(tmp_path / "corpus", "t")
        engine = Engine(lone, policy=Suffix(), slots=1, corpus=corpus)
        return outputs(engine.generate(requests_of(SOME[:1], SAMPLED)))

    before, one, other = run(), run([VOCAB - 1] * 4), run([VOCAB - 2] * 4)
    assert before != one != other != before
    assert one == run([VOCAB - 1] * 4)


def test_a_draft_is_not_asked_where_candidates_are_looked_up(pair: TinyPair) -> None:
    engine = Engine(pair, policy=make("suffix"))
    engine.generate(four_times(GREEDY))
    assert engine.drafter is None and engine.stats.draft_forwards == 0
    assert engine.stats.counts.accepted > 0


# --------------------------------------------------------------------------- what it learns


class Watched(Suffix):
    """Submits nothing, and keeps what it is told."""

    def choose(self, start: RoundStart, chains: Any) -> list[int]:
        super().choose(start, chains)
        self.seen: list[tuple[list[Chain], RoundOutcome]] = getattr(self, "seen", [])
        self.chains = list(chains)
        return [0] * len(self.chains)

    def observe(self, outcome: RoundOutcome) -> None:
        super().observe(outcome)
        if outcome.looked_up:
            self.seen.append((self.chains, outcome))


def test_candidates_are_judged_whether_or_not_they_are_submitted(lone: TinyPair) -> None:
    policy = Watched()
    engine = Engine(lone, policy=policy, slots=2, trace=True)
    done = engine.generate(requests_of([SOME[0]] * 8, GREEDY))
    assert engine.stats.counts.verified == 0
    judged = sum(known for _, outcome in policy.seen for known, _ in outcome.looked_up)
    stand = sum(right for _, outcome in policy.seen for _, right in outcome.looked_up)
    assert judged > stand > judged / 2
    assert sum(sum(c.judged for c in each.calibration.values()) for each in done) == judged


def test_the_estimate_of_what_always_stands_grows(lone: TinyPair) -> None:
    """The same greedy output again and again."""
    policy = make("suffix")
    engine = Engine(lone, policy=policy, slots=4, trace=True)
    done = engine.generate(requests_of([SOME[0]] * 60, GREEDY))
    first, last = done[4], done[-1]
    predicted: Any = [
        [p for each in completion.trace for p in each.predicted[: each.accepted]]
        for completion in (first, last)
    ]
    means = [sum(each) / len(each) for each in predicted]
    assert means[1] > means[0]
