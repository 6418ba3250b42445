"""Logits that have no softmax are their row's error, and nobody else's."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from scipy.stats import chi2_contingency
from torch import Tensor
from transformers import PreTrainedModel

from specdec.engine.engine import Engine
from specdec.lossless.proposal import Proposal
from specdec.lossless.sampling import NO_TOKEN, SamplingBatch, probabilities
from specdec.lossless.verification import MODES, reject
from specdec.request import INVALID_LOGITS, Completion, Request, SamplingParams
from tests.specdec import workloads
from tests.specdec.engine.test_rejection import TINY_VOCAB
from tests.specdec.lossless.markov import CPU
from tests.specdec.tiny_models import VOCAB, TinyPair, make_pair, noisy_copy, tiny_model
from tests.specdec.workloads import SOME, make, outputs, prompts, requests_of

GREEDY = replace(workloads.GREEDY, max_new_tokens=9)
SAMPLED = replace(workloads.SAMPLED, max_new_tokens=9)
POISON = VOCAB - 1
"""A token that a poisoned model cannot read: the last, and in none of the good prompts."""

HEALTHY = [tuple(token % POISON for token in prompt) for prompt in SOME[2:9]]


def poisoned(model: PreTrainedModel, value: float) -> PreTrainedModel:
    """`model` with an embedding that overflowed, as float16 does; it never proposes that token."""
    other = copy.deepcopy(model)
    other.get_input_embeddings().weight.data[POISON] = value
    return other


def quiet(model: PreTrainedModel) -> PreTrainedModel:
    """`model`, which never writes the poison."""
    other = copy.deepcopy(model)
    other.lm_head.weight.data[POISON] = 0.0
    return other


@pytest.fixture(scope="module", params=[float("nan"), float("inf")], ids=["nan", "inf"])
def sick_pair(
    target_model: PreTrainedModel, draft_model: PreTrainedModel, request: pytest.FixtureRequest
) -> TinyPair:
    target = poisoned(quiet(target_model), request.param)
    return make_pair(target, poisoned(quiet(draft_model), request.param))


def run(pair: TinyPair, requests: list[Request], policy: str, mode: str) -> list[Completion]:
    engine = Engine(pair, policy=make(policy), verification=mode, slots=3, prefill_chunk=32)  # type: ignore[arg-type]
    done = engine.generate(requests)
    assert engine.live == 0 and not engine.has_work
    return done


def among(good: list[Request], sampling: SamplingParams) -> list[Request]:
    """The good requests with bad ones between them: poison at the end, in the middle, alone."""
    texts = [(5, 6, POISON), (7, POISON, *[8] * 70), (POISON,)]
    bad = [Request(f"bad{i}", text, sampling) for i, text in enumerate(texts)]
    return [bad[0], *good[:4], bad[1], *good[4:6], bad[2], *good[6:]]


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "grid"])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("mode", ["rejection", "coupled"])
@pytest.mark.parametrize("policy", ["none", "fixed 4"])
def test_logits_without_a_softmax_are_their_rows_error_and_nobody_elses(
    sick_pair: TinyPair, policy: str, mode: str, sampling: SamplingParams, kernels: bool
) -> None:
    """The slots of rows that failed go to others, whose attention must not meet what was there."""
    sick_pair.target.use_kernels = kernels
    good = requests_of(HEALTHY, sampling)
    done = run(sick_pair, among(good, sampling), policy, mode)
    bad = [each for each in done if each.id.startswith("bad")]
    assert [(each.finish_reason, each.output_ids) for each in bad] == [("error", ())] * 3
    assert {each.error_class for each in bad} == {INVALID_LOGITS}
    assert all("logits at output token 1" in str(each.error) for each in bad)
    others = [each for each in done if not each.id.startswith("bad")]
    assert outputs(others) == outputs(run(sick_pair, good, policy, mode))


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("mode", ["rejection", "coupled"])
@pytest.mark.parametrize("policy", ["fixed 4", "entropy", "head online"])
def test_a_draft_without_a_softmax_costs_nobody_a_token(
    target_model: PreTrainedModel,
    draft_model: PreTrainedModel,
    policy: str,
    mode: str,
    sampling: SamplingParams,
) -> None:
    target = quiet(target_model)
    pair = make_pair(target, poisoned(quiet(draft_model), float("nan")))
    sick = [(5, 6, POISON), (7, POISON, *[8] * 70)]
    requests = requests_of([*sick, *HEALTHY[:3]], sampling)
    done = run(pair, requests, policy, mode)
    if mode == "coupled" or sampling is GREEDY:
        alone = make_pair(target, None)
        assert outputs(done) == outputs(run(alone, requests, "none", mode))
    assert [len(each.output_ids) for each in done] == [sampling.max_new_tokens] * len(done)
    assert all(each.counts.accepted == 0 for each in done[:2])
    assert sum(each.counts.accepted for each in done[2:]) > 0


@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize("policy", ["none", "fixed 4", "suffix"])
def test_a_row_that_fails_leaves_others_the_prompt_that_it_shares(
    pair: TinyPair, policy: str, slots: int
) -> None:
    """It takes over what an earlier row has left, and bans every token."""
    prompt = prompts([70], seed=4)
    none = replace(GREEDY, allowed_token_ids=(5,), bad_words=((5,),))
    asked = [none if i % 3 == 1 else GREEDY for i in range(9)]
    requests = [Request(str(i), *prompt, sampling) for i, sampling in enumerate(asked)]
    engine = Engine(pair, policy=make(policy), slots=slots)
    done = engine.generate(requests)
    assert [each.error_class for each in done[1::3]] == [INVALID_LOGITS] * 3
    assert len({each.output_ids for each in done if each.error is None}) == 1
    assert engine.stats.shared_tokens > 4 * 64


# --------------------------------------------------------------------- by hand, odd logits

ODD = {
    "nan": [float("nan")] * 4,
    "one nan": [0.0, 1.0, float("nan"), 0.5],
    "all -inf": [-float("inf")] * 4,
    "one inf": [0.0, float("inf"), 1.0, 0.5],
}
SAMPLINGS = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.7),
    SamplingParams(temperature=0.7, top_k=2),
    SamplingParams(temperature=0.7, top_p=0.9),
    SamplingParams(temperature=0.7, min_p=0.1),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", ["rejection", "coupled"])
@pytest.mark.parametrize("odd", ODD)
def test_no_token_is_chosen_from_odd_logits(odd: str, mode: str, dtype: torch.dtype) -> None:
    """In one batch with rows that are well, for greedy rows alone, sampled ones and both."""
    well = [0.0, 1.0, -float("inf"), 0.5]
    logits = torch.tensor([well, ODD[odd]] * len(SAMPLINGS)).to(dtype)
    each = [params for params in SAMPLINGS for _ in range(2)]
    for rows in (slice(0, 2), slice(2, None), slice(None)):
        params = SamplingBatch.of(each[rows], CPU)
        n = len(logits[rows])
        zeros, places = torch.zeros(n, dtype=torch.int64), torch.arange(n)
        nothing = Proposal(n, 0, CPU)
        accepted, bonus = MODES[mode].verify(logits[rows], params, zeros, places, zeros, nothing)
        assert accepted.tolist() == [0] * n
        assert (bonus[1::2] == NO_TOKEN).all()
        assert ((bonus[::2] >= 0) & (bonus[::2] != 2)).all()
        drawn, _ = MODES[mode].propose(logits[rows], params, zeros)
        assert ((drawn >= 0) & (drawn < 4)).all()


@pytest.mark.parametrize("mode", ["rejection", "coupled"])
def test_only_logits_behind_a_candidate_that_stands_can_fail_a_row(mode: str) -> None:
    """What follows the candidate is NaN in both rows. Row 0's falls, row 1's stands."""
    nan, sure = [float("nan")] * 3, [-50.0, 50.0, -50.0]
    params = SamplingBatch.of([SamplingParams(seed=s) for s in range(2)], CPU)
    proposal = Proposal(2, 1, CPU)
    draft = torch.tensor([[50.0, -50.0, -50.0], sure])
    tokens, q = MODES[mode].propose(draft, params, torch.zeros(2, dtype=torch.int64))
    proposal.add([0, 1], torch.arange(2), tokens, q)
    accepted, bonus = MODES[mode].verify(
        torch.tensor([sure, nan, sure, nan]),
        params.rows(torch.tensor([0, 0, 1, 1])),
        torch.tensor([0, 1, 0, 1]),
        torch.tensor([0, 2]),
        torch.tensor([1, 1]),
        proposal,
    )
    assert accepted.tolist() == [0, 1]
    assert bonus.tolist() == [1, NO_TOKEN]


def test_a_candidate_of_a_draft_without_a_softmax_is_replaced_by_a_draw_from_the_target() -> None:
    p = torch.tensor([[0.2, 0.3, 0.5], [0.1, 0.1, 0.8]])
    q = probabilities(torch.full((1, 3), torch.nan), SamplingBatch.of([SamplingParams()], CPU))
    zero = torch.zeros(1, 1, dtype=torch.int64)
    u = torch.tensor([[1e-9]])
    accepted, residual = reject(p, zero[0], q, zero, zero, torch.tensor([1]), u)
    assert accepted.tolist() == [0]
    assert torch.equal(residual, p[:1])


def test_a_row_that_is_sent_back_leaves_nothing_that_is_not_finite(sick_pair: TinyPair) -> None:
    engine = Engine(sick_pair, policy=make("none"), slots=2, prefill_chunk=32)
    engine.submit(Request("bad", (POISON, *[8] * 90), GREEDY))
    engine.step()
    assert engine.target_cache.lengths[0] == 32
    with torch.inference_mode():
        engine.scheduler._preempt()
    for cache in engine.shared.caches:
        assert all(keys.isfinite().all() for keys in cache.keys)
        assert cache.pages.find((POISON, *[8] * 31)) == []
    done: list[Completion] = []
    while engine.has_work:
        done += engine.step()
    assert [each.error_class for each in done] == [INVALID_LOGITS]


@pytest.mark.statistical
@pytest.mark.parametrize("draft", ["the target", "noisy"])
@pytest.mark.parametrize("policy", ["fixed 4", "goodput", "suffix"])
def test_a_candidate_that_stands_is_not_drawn_again_for_what_comes_behind_it(
    policy: str, draft: str
) -> None:
    """Behind one of two tokens nothing is allowed. Under `rejection` the other one may not gain.

    False alarms: one in a million.
    """
    target = tiny_model(vocab=TINY_VOCAB, hidden=16, layers=1, heads=2, kv_heads=1, seed=4)
    pair = make_pair(target, target if draft == "the target" else noisy_copy(target, 0.3))
    asked = SamplingParams(
        4, temperature=4.0, allowed_token_ids=(1, 2), bad_words=((2, 1), (2, 2)), logprobs=0
    )
    many = [Request(str(i), (0, 3, 1, 2), replace(asked, seed=i)) for i in range(2000)]
    ends: list[Tensor] = []
    for name in ("none", policy):
        engine = Engine(pair, policy=make(name), verification="rejection", slots=64)
        done = engine.generate(many)
        # How many tokens it has, of which the last one is the one that nothing follows.
        assert {each.error_class for each in done} == {None, INVALID_LOGITS}
        said = [str(each.error).partition("output token ")[2][:1] for each in done]
        ends.append(torch.tensor([int(number or 5) for number in said]).bincount(minlength=6))
        for each in done:
            if each.error is None:
                assert each.logprobs is not None
                assert [told.token for told in each.logprobs] == [*each.output_ids]
    assert chi2_contingency(torch.stack(ends)[:, 2:]).pvalue > 1e-6


@pytest.mark.parametrize("mode", ["coupled", "rejection"])
def test_an_end_among_accepted_candidates_comes_before_the_failure(
    target_model: PreTrainedModel, mode: str
) -> None:
    """The row ends at a token behind which its logits would be NaN: plain decoding ends there."""
    target = quiet(target_model)
    prompt = HEALTHY[:1]
    (plain,) = run(make_pair(target, None), requests_of(prompt, GREEDY), "none", "coupled")
    new = [t for t in plain.output_ids[3:] if t not in (*prompt[0], *plain.output_ids[:3])]
    last, end = new[0], plain.output_ids.index(new[0])
    stop = replace(GREEDY, stop_token_ids=(last,))
    for policy in ("none", "fixed 4", "fixed 8"):
        pair = make_pair(target, target)
        # A model that gave NaN when it was loaded would have been refused.
        pair.target.model.get_input_embeddings().weight.data[last] = float("nan")
        (ended,) = run(pair, requests_of(prompt, stop), policy, mode)
        assert (ended.finish_reason, ended.output_ids) == ("stop", plain.output_ids[: end + 1])
        (failed,) = run(pair, requests_of(prompt, GREEDY), policy, mode)
        assert failed.error_class == INVALID_LOGITS
        assert f"logits at output token {end + 2} " in str(failed.error)
