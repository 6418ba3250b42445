"""Texts of real tokens before the real engine and its index, at the pace of a made-up device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specdec.drafters.corpus import Corpus, build_corpus
from specdec.policies.costs import CostModel, CostTable
from specdec.policies.registry import make_policy
from specdec.simulate.virtual import VirtualEngine
from specdec.simulate.virtual_device import TRANSFER, ForwardCosts, no_host
from specdec.simulate.written import Written

PROMPT, OUTPUT, SAMPLES = 40, 30, 3
COSTS = ForwardCosts(CostTable([1, 4, 64], [1.0, 1.0, 2.0]), 0.0)


def texts(prompts: int = 4) -> list[tuple[list[int], list[int]]]:
    """Samples of prompts that go on as the ones before did, but for a token here and there."""
    random = np.random.default_rng(0)
    made: list[tuple[list[int], list[int]]] = []
    for _ in range(prompts):
        prompt = random.integers(1000, 40_000, PROMPT).tolist()
        output = random.integers(1000, 40_000, OUTPUT)
        for _ in range(SAMPLES):
            other = random.random(OUTPUT) < 0.1
            output = np.where(other, random.integers(1000, 40_000, OUTPUT), output)
            made.append((prompt, output.tolist()))
    return made


def engine_of(written: Written, policy: str, slots: int = 2, **options: Any) -> VirtualEngine:
    model = CostModel(CostTable([1], [0.0]), CostTable([1, 4, 64], [1.0, 1.0, 2.0]))
    settings = {"costs": model} if policy == "goodput" else {}
    made = make_policy(policy, **settings)
    return VirtualEngine(written, None, COSTS, made, slots, lookup=True, host=no_host, **options)


@pytest.mark.parametrize("policy", ["none", "suffix", "goodput"])
def test_every_policy_writes_the_same_texts_and_the_same_run_takes_the_same_time(
    policy: str,
) -> None:
    made, seen = texts(), list[Any]()
    written = Written(made)
    for _ in range(2):
        engine = engine_of(written, policy)
        done = engine.generate(written.requests(len(made)))
        counts = engine.stats.counts
        seen.append((engine.clock.now(), counts))
        for completion, (_, output) in zip(done, made, strict=True):
            assert len(completion.output_ids) == len(output)
            # As many tokens are equal among the new numbers as among the old ones.
            pairs = set(zip(completion.output_ids, output, strict=True))
            assert len(pairs) == len({new for new, _ in pairs}) == len({old for _, old in pairs})
        if policy != "none":
            assert counts.accepted > len(made) * OUTPUT / 4
            assert counts.verified > counts.accepted  # some do not stand
        assert engine.stats.shared_tokens > PROMPT / 2  # samples read their prompt once
    assert seen[0] == seen[1]


def test_a_run_takes_what_its_forwards_take() -> None:
    """Prompts of two rows in two forwards, of which samples share one; then a token a round."""
    written = Written(texts(1))
    engine = engine_of(written, "none", slots=1)
    engine.generate(written.requests(1))
    rounds = OUTPUT - 1
    prompt = float(COSTS.seconds(PROMPT))
    assert engine.clock.now() == pytest.approx(prompt + rounds * 1.0 + OUTPUT * TRANSFER)


def test_what_was_written_earlier_is_found(tmp_path: Path) -> None:
    made = texts()
    written = Written(made[::SAMPLES], earlier=[output for _, output in made[1::SAMPLES]])
    build_corpus(written.earlier, tmp_path / "corpus", "")
    accepted = []
    for corpus in (None, Corpus(tmp_path / "corpus", "")):
        engine = engine_of(written, "suffix", corpus=corpus)
        engine.generate(written.requests(len(written.lengths)))
        accepted.append(engine.stats.counts.accepted)
    assert accepted[0] < OUTPUT / 4 < len(written.lengths) * OUTPUT / 4 < accepted[1]


def test_samples_of_a_prompt_stay_together_in_any_order() -> None:
    written, rows = Written(texts(prompts=9)), 9 * SAMPLES
    orders = [[each.id for each in written.requests(rows, seed)] for seed in (None, 0, 1)]
    assert orders[0] == [str(number) for number in range(rows)]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    for order in orders:
        assert sorted(order, key=int) == orders[0]
        for at in range(0, rows, SAMPLES):
            numbers = [int(number) for number in order[at : at + SAMPLES]]
            assert numbers == list(range(numbers[0], numbers[0] + SAMPLES))
