"""Candidates that branch: they change when tokens come, and never which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher
from transformers import PreTrainedModel

from specdec.engine.engine import Engine
from specdec.loading.grammars import ModelGrammars
from specdec.lossless import trees
from specdec.measure.calibration import Flags
from specdec.policies.base import (
    MOST_CANDIDATES,
    DraftStep,
    RoundOutcome,
    RoundStart,
    Signal,
    StopPolicy,
)
from specdec.policies.simple import Fixed
from specdec.request import Counts, Request, SamplingParams
from tests.specdec.adjustments import ALONE, PAIRS
from tests.specdec.engine import test_grammars, test_logprobs, test_preemption
from tests.specdec.engine.references import Reference
from tests.specdec.engine.test_rejection import excess_of
from tests.specdec.engine.test_transfers import waits
from tests.specdec.recurrent_models import recurrent_model
from tests.specdec.tiny_models import VOCAB, TinyPair, make_pair, noisy_copy, tiny_model
from tests.specdec.workloads import GREEDY, SAMPLED, SOME, Prompt, outputs, prompts, requests_of

SIZES = [(1, 3), (2, 2), (4, 2), (4, 3), (8, 4)]
"""(k, width) of `fixed`."""


@dataclass
class Wild(StopPolicy):
    """Trees of any shape, which looks at no token: by numbers that follow from a seed."""

    seed: int = 0
    width: int = 3
    most: int = 20
    wanted = frozenset({Signal.LOG_TOP})
    chance: np.random.Generator = field(init=False, repr=False)
    outcomes: list[RoundOutcome] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.chance = np.random.default_rng(self.seed)

    def budget(self, start: RoundStart) -> Sequence[int]:
        return self.chance.integers(0, 6, len(start.rows)).tolist()

    def keep(self, step: DraftStep) -> Flags:
        assert step.ranks is not None and len(step.signals) == len(step.rows)
        wanted: Flags = step.ranks < self.chance.integers(0, 4, len(step.rows))
        return wanted

    def go_on(self, step: DraftStep) -> Flags:
        flags: Flags = self.chance.random(len(step.rows)) < 0.6
        return flags

    def prune(self, parents: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
        """Some nodes fall, and with each its later siblings and what follows."""
        every = []
        for own in parents:
            kept: list[int] = []
            for node, parent in enumerate(own):
                elder = [n for n in range(node) if own[n] == parent]
                above = {*elder, parent} - {-1}
                if above <= {*kept} and self.chance.random() < 0.85:
                    kept.append(node)
            every.append(kept)
        return every

    def observe(self, outcome: RoundOutcome) -> None:
        self.outcomes.append(outcome)


@pytest.mark.parametrize(("slots", "mode"), [(1, "rejection"), (4, "coupled"), (16, "rejection")])
@pytest.mark.parametrize(("k", "width"), SIZES)
def test_greedy_equals_transformers_generate(
    pair: TinyPair, reference: Reference, k: int, width: int, slots: int, mode: Any
) -> None:
    """Ragged prompts, prefill in chunks, refills of slots, ends of sequence."""
    engine = Engine(
        replace(pair, eos_token_ids=frozenset({reference.eos})),
        policy=Fixed(k, width),
        verification=mode,
        slots=slots,
        prefill_chunk=64,
    )
    assert outputs(engine.generate(requests_of(reference.prompts, GREEDY))) == reference.outputs


@pytest.mark.parametrize("policy", [Fixed(4, 2), Fixed(2, 4), Wild()], ids=str)
@pytest.mark.parametrize("slots", [1, 16])
def test_coupled_sampling_equals_plain_target_sampling(
    pair: TinyPair, by_hand: list[Prompt], policy: StopPolicy, slots: int
) -> None:
    engine = Engine(pair, policy=policy, verification="coupled", slots=slots, prefill_chunk=64)
    assert outputs(engine.generate(requests_of(SOME, SAMPLED))) == by_hand


@dataclass
class FirstChoices(Fixed):
    """Draws siblings, and keeps none of them."""

    def keep(self, step: DraftStep) -> Flags:
        assert step.ranks is not None
        alone: Flags = step.ranks == 0
        return alone


@pytest.mark.parametrize("mode", ["rejection", "coupled"])
@pytest.mark.parametrize("sampling", [SAMPLED, GREEDY], ids=["sampled", "greedy"])
def test_a_tree_without_branches_is_a_chain(
    pair: TinyPair, mode: Any, sampling: SamplingParams
) -> None:
    """To the last token and count, since it draws and judges by the same random numbers."""

    def run(policy: StopPolicy) -> tuple[list[Prompt], Counts, Any]:
        engine = Engine(pair, policy=policy, verification=mode, slots=5)
        done = outputs(engine.generate(requests_of(SOME, sampling)))
        return done, engine.stats.counts, engine.stats.outcomes

    assert run(FirstChoices(4, 2)) == run(Fixed(4))


def test_siblings_bring_tokens(pair: TinyPair) -> None:
    """Greedy, the same tokens in fewer rounds."""

    def rounds(policy: StopPolicy) -> int:
        engine = Engine(pair, policy=policy, slots=4)
        engine.generate(requests_of(SOME, replace(GREEDY, max_new_tokens=40)))
        return engine.stats.counts.rounds

    chain, tree = rounds(Fixed(4)), rounds(Fixed(4, 3))
    assert tree < 0.9 * chain


ACROSS = [SamplingParams(), SamplingParams(temperature=0.7, top_k=3), SamplingParams(top_p=0.85)]


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("policy", "sampling"),
    [(Fixed(3, 2), ACROSS[1]), (Fixed(2, 4), ACROSS[2]), *((Wild(), each) for each in ACROSS)],
    ids=str,
)
def test_outputs_have_the_targets_distribution(
    small_pair: TinyPair, policy: StopPolicy, sampling: SamplingParams
) -> None:
    """Chi-square of three tokens jointly, 125 cells, 4,000 requests; false alarm 1e-6."""
    assert excess_of(small_pair, policy, sampling, "rejection", 4_000, True) < 1


# ------------------------------------------------------------------------ what rows go through


@test_preemption.EVERY_LAW
def test_rows_that_are_sent_back_draw_the_same_tokens(
    pair: TinyPair, sampling: SamplingParams, mode: Any
) -> None:
    sampling = replace(sampling, max_new_tokens=test_preemption.LONG)
    plenty, engine = test_preemption.run(pair, sampling, None, Fixed(3, 2), mode)
    assert engine.stats.preempted == 0
    short, engine = test_preemption.run(pair, sampling, 9, Fixed(3, 2), mode)
    assert short == plenty
    assert engine.stats.preempted > 0
    for cache in engine.shared.caches:
        assert cache.pages.available == cache.pages.total


@pytest.mark.parametrize("mode", ["rejection", "coupled"])
def test_samples_of_one_prompt_share_what_trees_have_left(pair: TinyPair, mode: Any) -> None:
    """A row that takes over another's pages, once a tree was cut to its path there."""
    (prompt,) = prompts([70], seed=8)
    sampling = replace(SAMPLED, max_new_tokens=40)
    first = Engine(pair, policy=Fixed(4, 3), verification="coupled", slots=3)
    requests = requests_of([prompt] * 8, sampling)
    plain = Engine(pair, policy=StopPolicy(), verification="coupled", slots=1)
    assert outputs(first.generate(requests)) == outputs(plain.generate(requests))
    # Greedy rows that begin with another row's output: pages are found by their tokens.
    engine = Engine(pair, policy=Fixed(4, 3), verification=mode, slots=2)
    (done,) = engine.generate([Request("a", prompt, replace(GREEDY, max_new_tokens=80))])
    longer = (*prompt, *done.output_ids[:64])
    (again,) = engine.generate([Request("b", longer, replace(GREEDY, max_new_tokens=16))])
    assert again.output_ids == done.output_ids[64:]
    assert engine.stats.shared_tokens > 0


def test_what_rows_ask_of_their_logits_sees_each_nodes_own_path(pair: TinyPair) -> None:
    """`coupled`, so that the output is what it is without speculation."""
    kinds = [{}, *ALONE.values(), *PAIRS.values(), {"no_repeat_ngram_size": 3}]
    requests = [
        Request(f"r{i}", SOME[i % len(SOME)][:9], replace(SAMPLED, seed=i, temperature=1.3, **kind))
        for i, kind in enumerate(kinds)
    ]

    def run(policy: StopPolicy) -> list[Prompt]:
        engine = Engine(pair, policy=policy, verification="coupled", slots=6)
        return outputs(engine.generate(requests))

    plain = run(StopPolicy())
    assert run(Fixed(4, 3)) == plain
    assert run(Wild(1)) == plain


@dataclass
class SecondBest(Fixed):
    """Goes on below the second node of a row, not below the first."""

    def keep(self, step: DraftStep) -> Flags:
        assert step.parents is not None
        wanted: Flags = step.parents != 0
        return wanted


def test_rows_with_a_grammar_stay_chains_beside_trees() -> None:
    letters, n = test_grammars.LETTERS, test_grammars.VOCAB
    model = tiny_model(vocab=n, hidden=16, layers=1, heads=2, kv_heads=1, peak=40.0, seed=4)
    pair = make_pair(model, noisy_copy(model, 0.4), eos=frozenset({test_grammars.EOS}))
    grammars = ModelGrammars(test_grammars.tokenizer(letters), n, [test_grammars.EOS])
    pattern = LLMatcher.grammar_from_regex(test_grammars.PATTERN)
    requests = [
        Request(str(i), (i % 4, 1), SamplingParams(max_new_tokens=9, seed=i, grammar=grammar))
        for i, grammar in enumerate([pattern, None, pattern, None, None, pattern])
    ]

    def run(policy: StopPolicy) -> list[Prompt]:
        engine = Engine(pair, policy=policy, verification="coupled", slots=4, grammars=grammars)
        return outputs(engine.generate(requests))

    assert run(SecondBest(4, 2)) == run(StopPolicy())
    policy = Wild(2)
    assert run(policy) == run(StopPolicy())
    assert run(Fixed(3, 3)) == run(StopPolicy())
    assert any(
        own.count(parent) > 1 for each in policy.outcomes for own in each.parents for parent in own
    )


@pytest.mark.parametrize("mode", ["rejection", "coupled"])
def test_log_probabilities_are_those_of_plain_transformers(
    pair: TinyPair, target_model: PreTrainedModel, mode: Any
) -> None:
    asked = test_logprobs.requests()
    engine = Engine(pair, policy=Fixed(4, 3), verification=mode, slots=4)
    for request, done in zip(asked, engine.generate(asked), strict=True):
        if done.logprobs is None:
            continue
        assert [each.token for each in done.logprobs] == list(done.output_ids)
        log_p = test_logprobs.expected(target_model, request, done.output_ids)
        for each, row in zip(done.logprobs, log_p, strict=True):
            assert each.logprob == pytest.approx(row[each.token].item(), abs=1e-3)


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("sampling", [SAMPLED, GREEDY], ids=["sampled", "greedy"])
def test_batch_invariant_pairs_give_the_same_bits_whatever_runs(
    target_model: PreTrainedModel,
    draft_model: PreTrainedModel,
    precision: Any,
    sampling: SamplingParams,
) -> None:
    pair = make_pair(target_model, draft_model, precision=precision, invariant=True)
    requests = requests_of(SOME, replace(sampling, logprobs=2))

    def run(policy: StopPolicy, slots: int, pair: TinyPair = pair) -> list[Any]:
        engine = Engine(pair, policy=policy, verification="coupled", slots=slots, prefill_chunk=64)
        return [(done.output_ids, done.logprobs) for done in engine.generate(requests)]

    alone = run(StopPolicy(), 1, replace(pair, draft=None))
    for k, width, slots in ((2, 2, 16), (4, 3, 1), (8, 3, 16)):
        assert run(Fixed(k, width), slots) == alone, (k, width, slots)
    assert run(Wild(), 5) == alone


def test_models_whose_state_runs_on_get_chains() -> None:
    model = recurrent_model("qwen3_next", seed=3)
    pair = make_pair(model, noisy_copy(model, 0.05))
    engine = Engine(pair, policy=Fixed(3, 3), slots=2)
    plain = Engine(pair, policy=Fixed(3), slots=2)
    requests = requests_of(SOME[:3], GREEDY)
    assert outputs(engine.generate(requests)) == outputs(plain.generate(requests))
    assert engine.stats.counts == plain.stats.counts


# ------------------------------------------------------------------------------- laws and counts


@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    seed=st.integers(0, 99),
    width=st.integers(2, 4),
    most=st.sampled_from([1, 5, 30, 64]),
    lengths=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 12)), min_size=1, max_size=7),
    slots=st.integers(1, 5),
    mode=st.sampled_from(["rejection", "coupled"]),
    temperature=st.sampled_from([0.0, 1.0]),
    eos=st.frozensets(st.integers(0, VOCAB - 1), max_size=12),
)
def test_counts_and_outcomes_obey_their_laws(
    pair: TinyPair,
    seed: int,
    width: int,
    most: int,
    lengths: list[tuple[int, int]],
    slots: int,
    mode: Any,
    temperature: float,
    eos: frozenset[int],
) -> None:
    policy = Wild(seed, width, most)
    engine = Engine(
        replace(pair, eos_token_ids=eos), policy=policy, verification=mode, slots=slots, trace=True
    )
    many = prompts([n for n, _ in lengths])
    requests = [
        Request(str(i), prompt, SamplingParams(max_new_tokens=n, temperature=temperature, seed=i))
        for i, (prompt, (_, n)) in enumerate(zip(many, lengths, strict=True))
    ]
    total = Counts()
    for done in engine.generate(requests):
        total.add(done.counts)
        counts = done.counts
        assert counts.committed == len(done.output_ids)
        assert 0 <= counts.accepted <= counts.verified <= counts.drafted
        assert counts.committed - counts.accepted in (counts.rounds, counts.rounds - 1)
        for round_ in done.trace:
            assert len(round_.parents) == len(round_.candidates)
            assert [*round_.path] == sorted(round_.path)
    stats = engine.stats
    assert stats.counts == total
    for drafted, verified, judged, accepted in stats.nodes.values():
        assert 0 <= accepted <= judged <= verified <= drafted
    sums = [sum(each) for each in zip(*stats.nodes.values(), strict=True)] or [0] * 4
    assert sums[:2] == [total.drafted, total.verified]
    assert sums[3] >= total.accepted
    fed = sum(map(len, many))
    assert stats.target_tokens == fed + total.verified + total.rounds - len(requests)
    for outcome in (each for each in policy.outcomes if each.parents):
        rows = zip(outcome.parents, outcome.kept, outcome.path, outcome.start.nodes, strict=True)
        for parents, kept, path, limit in rows:
            assert len(parents) <= min(limit, most, MOST_CANDIDATES)
            assert {*path} <= {*kept}
            assert [parents[node] for node in path] == [-1, *path][:-1]
        assert outcome.submitted == [*map(len, outcome.kept)]


@pytest.mark.parametrize("mode", ["rejection", "coupled"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_trees_make_the_host_wait_no_more_than_chains(
    mode: Any, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once a round, and once more where the policy looks. A CPU asks itself more."""
    monkeypatch.setattr(trees, "where", trees.every)
    for waited, _ in waits(Fixed(3, 2), temperature, mode):
        assert waited == 1
    for waited, drafted in waits(Wild(), temperature, mode):
        assert waited == 1 + drafted
