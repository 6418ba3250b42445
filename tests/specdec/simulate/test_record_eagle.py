"""Transcripts of EAGLE-3 drafts are what rounds of the engine meet."""

from __future__ import annotations

from dataclasses import replace
from math import sqrt
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import PreTrainedModel

from specdec.engine.engine import Engine
from specdec.policies.base import TOKEN_SIGNALS
from specdec.policies.costs import CostModel
from specdec.policies.registry import make_policy
from specdec.policies.signals import read_signals
from specdec.request import Request, SamplingParams
from specdec.simulate.bound import least_seconds
from specdec.simulate.record import measure_costs, record
from specdec.simulate.replay import acceptance_by_position, replay
from specdec.simulate.transcripts import load_transcripts, save_transcripts
from tests.specdec.eagle_drafts import (
    FITTED,
    Weights,
    eagle_pair,
    fitted_weights,
    foreseeable_target,
    fused,
    plain_draft,
    save,
    target_states,
)
from tests.specdec.goodness import FALSE_ALARM
from tests.specdec.simulate.test_record import (
    GREEDY,
    SAMPLED,
    STATISTICAL,
    Verification,
    ratio_of,
    requests_of,
    run,
    texts_of,
    totals,
)
from tests.specdec.tiny_models import TinyPair
from tests.specdec.workloads import linear, prompts


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return foreseeable_target()


@pytest.fixture(scope="module")
def weights(target: PreTrainedModel) -> Weights:
    return fitted_weights(FITTED, target)


@pytest.fixture(scope="module")
def folder(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("eagle") / "draft", FITTED, weights, "speculators")


@pytest.fixture(scope="module")
def pair(target: PreTrainedModel, folder: Path) -> TinyPair:
    return eagle_pair(target, folder)


def test_every_round_is_what_the_plain_draft_proposes(
    pair: TinyPair, target: PreTrainedModel, weights: Weights
) -> None:
    """Greedy: candidates, verdicts and signals of rounds that begin at each place of the text."""
    sampling, stood = replace(GREEDY, max_new_tokens=12), 0
    for prompt in prompts([7, 1, 12, 5, 9], seed=3):
        (text,) = texts_of(pair, [Request("a", prompt, sampling)])
        (transcript,) = record(pair, [text], most=5)
        assert transcript.free_trimming and transcript.limit == 11 and transcript.first == 1
        whole = [*prompt, *text.output_ids]
        for at in range(transcript.first, 11):
            known = whole[: len(prompt) + at]
            x = fused(weights, target_states(target, known[:-1]))
            run = 0
            for index in range(min(5, 11 - at)):
                logits, made = plain_draft(weights, FITTED, target, known[1:], x)
                y = logits[-1:].argmax(-1)
                expected = read_signals(logits[-1:], y, made[-1:], frozenset(TOKEN_SIGNALS))[0]
                assert torch.tensor(transcript.seen(at, index)) == pytest.approx(expected, abs=2e-3)
                run += run == index and int(y) == text.output_ids[at + index]
                known = [*known, int(y)]
                x = torch.cat([x, made[-1:]])
            for index in range(11 - at, 5):
                assert not transcript.seen(at, index).any()
            assert transcript.runs[at] == run
            assert transcript.accepted[at] == (run > 0)
            stood += run
    assert stood > 5, "the test needs candidates that stand"


@pytest.mark.parametrize("name", ["fixed 1", "fixed 3", "fixed 8", "heuristic", "confidence"])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "coupled"])
def test_rounds_that_match_are_the_engine_s(
    target: PreTrainedModel, folder: Path, name: str, sampling: SamplingParams
) -> None:
    """Rows end by an end-of-sequence token, by length, and after a one-token prompt."""
    plain = eagle_pair(target, folder)
    requests = [*requests_of(10, sampling), Request("one", (5,), sampling)]
    ends = texts_of(plain, requests[:1], "coupled")[0].output_ids[12]
    pair = eagle_pair(target, folder, eos=frozenset({ends}))
    kind, _, k = name.partition(" ")
    made = [make_policy(kind, k=int(k or 2), k_max=6) for _ in range(3)]
    texts = texts_of(pair, requests, "coupled")
    assert len({len(text.output_ids) for text in texts}) > 1
    transcripts = list(record(pair, texts, verification="coupled"))
    tokens = CostModel(linear(0.0, 1.0), linear(0.0, 0.0))
    ours = replay(transcripts, made[0], tokens, live=4)
    for row, theirs in zip(
        ours.rows, run(pair, requests, made[1], "coupled", slots=8), strict=True
    ):
        counts = theirs.counts
        # The first token comes without candidates: a feature and a token behind it are needed.
        assert row == replace(counts, rounds=counts.rounds - 1, committed=counts.committed - 1)
    # A row alone: what its draft steps read is what they cost.
    for request, transcript in zip(requests, transcripts, strict=True):
        engine = Engine(pair, policy=made[2], verification="coupled", slots=1)
        engine.generate([request])
        assert replay([transcript], made[2], tokens).seconds == engine.stats.draft_tokens
        if kind != "fixed":
            break  # what the policy has learned is not the same any more


@pytest.mark.statistical
def test_sampled_rounds_are_the_engine_s_in_law(pair: TinyPair) -> None:
    """As with a language model as draft, under rejection."""
    rows = 90
    recorded = requests_of(rows, SAMPLED)
    others = [
        replace(r, sampling=replace(r.sampling, seed=r.sampling.seed + 1000)) for r in recorded
    ]
    verification: Verification = "rejection"
    transcripts = list(record(pair, texts_of(pair, recorded, verification)))
    bound = stats.norm.isf(FALSE_ALARM / (2 * 3 * len(STATISTICAL)))
    costs = CostModel(linear(1.0, 0.1), linear(3.0, 0.2))
    for name, make in STATISTICAL.items():
        ours = replay(transcripts, make(), costs, live=8).rows
        theirs = [
            replace(c.counts, rounds=c.counts.rounds - 1, committed=c.counts.committed - 1)
            for c in run(pair, others, make(), verification)
        ]
        assert totals(ours).drafted > rows
        for above, below in (
            ("accepted", "verified"),
            ("verified", "rounds"),
            ("committed", "rounds"),
        ):
            (a, da), (b, db) = (ratio_of(side, above, below) for side in (ours, theirs))
            assert abs(a - b) < bound * sqrt(da + db), f"{name}: {above} / {below}, {a} and {b}"


def test_a_file_keeps_them(pair: TinyPair, tmp_path: Path) -> None:
    transcripts = list(record(pair, texts_of(pair, requests_of(3, GREEDY)), width=4))
    assert all(transcript.width == 1 for transcript in transcripts)
    save_transcripts(tmp_path / "t", transcripts, {"a": 1})
    loaded, about = load_transcripts(tmp_path / "t")
    assert about == {"a": 1}
    for ours, theirs in zip(transcripts, loaded, strict=True):
        assert np.array_equal(ours.runs, theirs.runs) and theirs.reads_again
        for at in range(1, len(ours.ranks)):
            for index in (0, 1, 7):
                assert np.array_equal(ours.seen(at, index), theirs.seen(at, index))


def test_no_policy_beats_the_bound_and_costs_are_measured(pair: TinyPair) -> None:
    transcripts = list(record(pair, texts_of(pair, requests_of(6, GREEDY)), most=9))
    costs = measure_costs(pair, slots=2, prompt=400, seconds=0.3)
    assert costs.draft.points()[-1][0] == 400
    least = least_seconds(transcripts, costs).sum()
    for k in range(9):
        assert replay(transcripts, make_policy("fixed", k=k), costs).seconds >= least - 1e-9
    # Of rounds that were recorded no longer, nothing is said of what would have come behind.
    short = list(record(pair, texts_of(pair, requests_of(6, GREEDY)), most=2))
    assert len(acceptance_by_position(short)) == 2
    assert acceptance_by_position(short)[0][0].value > 0.1
