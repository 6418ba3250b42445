"""With an EAGLE-3 draft the output is the target's, whatever the draft proposes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from transformers import PreTrainedModel

from specdec.engine.engine import Engine
from specdec.lossless.verification import MODES
from specdec.model.pages import PAGE
from specdec.policies.base import StopPolicy
from specdec.policies.simple import Fixed
from specdec.request import Completion, Request, SamplingParams
from tests.specdec import workloads
from tests.specdec.eagle_drafts import (
    FITTED,
    Shape,
    eagle_pair,
    fitted_weights,
    foreseeable_target,
    random_weights,
    save,
)
from tests.specdec.engine.references import generate, sampled_by_hand
from tests.specdec.engine.test_memory import bytes_for
from tests.specdec.engine.test_preemption import EVERY_LAW, run
from tests.specdec.engine.test_rejection import TINY_HIDDEN, TINY_VOCAB, Beside, excess_of
from tests.specdec.recurrent_models import recurrent_model
from tests.specdec.tiny_models import DEVICE, TinyPair, tiny_model
from tests.specdec.workloads import (
    DRAFTING,
    POLICIES,
    Prompt,
    make,
    outputs,
    prompts,
    requests_of,
)

SOME = prompts((5, 40, 1, 2, 17, 64), seed=5)
GREEDY = replace(workloads.GREEDY, max_new_tokens=16)
SAMPLED = replace(workloads.SAMPLED, max_new_tokens=16)


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return foreseeable_target()


@pytest.fixture(scope="module")
def folder(target: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    weights = fitted_weights(FITTED, target)
    return save(tmp_path_factory.mktemp("eagle") / "draft", FITTED, weights, "speculators")


@pytest.fixture(scope="module")
def pair(target: PreTrainedModel, folder: Path) -> TinyPair:
    return eagle_pair(target, folder)


@pytest.fixture(scope="module")
def by_hand(target: PreTrainedModel) -> dict[str, list[Prompt]]:
    sampled = [sampled_by_hand(target, request) for request in requests_of(SOME, SAMPLED)]
    return {"greedy": [generate(target, prompt, 16) for prompt in SOME], "sampled": sampled}


@pytest.mark.parametrize("policy", POLICIES)
def test_greedy_equals_transformers_generate(
    pair: TinyPair, by_hand: dict[str, list[Prompt]], policy: str
) -> None:
    """Prompts of one token, prefill in chunks, refills of slots."""
    engine = Engine(pair, policy=make(policy, FITTED.hidden), slots=3, prefill_chunk=16)
    assert outputs(engine.generate(requests_of(SOME, GREEDY))) == by_hand["greedy"]
    if policy in DRAFTING:
        assert 0 < engine.stats.counts.accepted < engine.stats.counts.verified


@pytest.mark.parametrize("policy", POLICIES)
def test_coupled_sampling_equals_plain_target_sampling(
    pair: TinyPair, by_hand: dict[str, list[Prompt]], policy: str
) -> None:
    made = make(policy, FITTED.hidden)
    engine = Engine(pair, policy=made, verification="coupled", slots=5, prefill_chunk=16)
    assert outputs(engine.generate(requests_of(SOME, SAMPLED))) == by_hand["sampled"]


@pytest.mark.parametrize(("k", "slots"), [(1, 16), (2, 1), (3, 4), (5, 2), (6, 16), (8, 8)])
def test_both_are_so_for_any_number_of_candidates_and_rows(
    pair: TinyPair, by_hand: dict[str, list[Prompt]], k: int, slots: int
) -> None:
    requests = [
        replace(request, id=f"{name}{i}")
        for name, sampling in (("g", GREEDY), ("s", SAMPLED))
        for i, request in enumerate(requests_of(SOME, sampling))
    ]
    engine = Engine(pair, policy=Fixed(k), verification="coupled", slots=slots)
    done = outputs(engine.generate(requests))
    assert done == by_hand["greedy"] + by_hand["sampled"]


TARGETS: dict[str, tuple[Callable[[], PreTrainedModel], Shape]] = {
    "qwen3": (lambda: tiny_model("qwen3", layers=3), Shape(kind="qwen3", own_embedding=False)),
    "one key head": (lambda: tiny_model(layers=4, kv_heads=1), Shape(kv_heads=1)),
    "tied": (lambda: tiny_model(layers=3, tied=True), Shape(own_embedding=False)),
    "its head": (lambda: tiny_model(layers=3), Shape(own_head=False, draft_vocab=None)),
    "recurrent": (lambda: recurrent_model("qwen3_5_text"), Shape()),
}


@pytest.mark.parametrize("name", TARGETS)
def test_greedy_equals_generate_with_drafts_that_know_nothing(name: str, tmp_path: Path) -> None:
    build, shape = TARGETS[name]
    model = build()
    made = eagle_pair(model, save(tmp_path / "d", shape, random_weights(shape), "speculators"))
    engine = Engine(made, policy=Fixed(3), slots=3, prefill_chunk=16)
    expected = [generate(model, prompt, 16) for prompt in SOME]
    assert outputs(engine.generate(requests_of(SOME, GREEDY))) == expected
    assert engine.stats.counts.drafted > 100


def counts(done: list[Completion]) -> list[Any]:
    return [(each.output_ids, each.counts) for each in done]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("mode", ["rejection", "coupled"])
def test_what_is_proposed_depends_on_a_rows_own_text_alone(
    pair: TinyPair, sampling: SamplingParams, mode: Any
) -> None:
    """Not on the rows beside it, or on slots that it moves to."""

    def run(slots: int) -> list[Any]:
        engine = Engine(
            pair, policy=Fixed(4), verification=mode, slots=slots, prefill_chunk=16, trace=True
        )
        done = engine.generate(requests_of(SOME, sampling))
        return [(*each, [at.candidates for at in row.trace])
                for each, row in zip(counts(done), done, strict=True)]  # fmt: skip

    assert run(1) == run(3) == run(16)


@pytest.mark.parametrize("policy", ["fixed 4", "goodput stated", "scripted"])
def test_steps_that_run_ahead_change_nothing(
    pair: TinyPair, by_hand: dict[str, list[Prompt]], policy: str
) -> None:
    """As beside a GPU: a round's first step is launched before the policy has answered."""
    made = make(policy, FITTED.hidden)
    engine = Engine(pair, policy=made, slots=3, clock=Beside(DEVICE), prefill_chunk=16)
    assert outputs(engine.generate(requests_of(SOME, GREEDY))) == by_hand["greedy"]


TINY = Shape(
    hidden=8, target_hidden=TINY_HIDDEN, heads=2, kv_heads=1, vocab=TINY_VOCAB, draft_vocab=3
)


@pytest.fixture(scope="module")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    model = tiny_model(
        vocab=TINY_VOCAB, hidden=TINY_HIDDEN, layers=3, heads=2, kv_heads=1, peak=60.0, seed=4
    )
    folder = tmp_path_factory.mktemp("tiny") / "draft"
    return eagle_pair(model, save(folder, TINY, random_weights(TINY), "sglang"))


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("policy", "sampling", "mode"),
    [
        ("fixed 4", SamplingParams(), "rejection"),
        ("scripted", SamplingParams(temperature=0.7, top_k=4), "rejection"),
        ("goodput stated", SamplingParams(temperature=1.3, top_p=0.85), "rejection"),
    ],
)
def test_outputs_have_the_targets_distribution(
    tiny_pair: TinyPair, policy: str, sampling: SamplingParams, mode: str
) -> None:
    """Two of five tokens are never proposed. Chi-square as in test_rejection, false alarm 1e-6."""
    assert excess_of(tiny_pair, make(policy, 8), sampling, mode, 4_000, True) < 1


@pytest.mark.statistical
def test_a_proposal_that_is_said_to_be_another_one_is_noticed(
    tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if tokens outside of the draft's vocabulary had been possible."""
    kind = type(MODES["rejection"])
    honest = kind.propose

    def spread(*args: Any) -> tuple[Tensor, Tensor | None]:
        tokens, q = honest(*args)
        assert q is not None
        q = q + 0.2
        return tokens, q / q.sum(-1, keepdim=True)

    monkeypatch.setattr(kind, "propose", spread)
    assert excess_of(tiny_pair, Fixed(4), SamplingParams(), "rejection", 6_000) > 1


@EVERY_LAW
def test_rows_that_are_sent_back_draw_the_same_tokens(
    pair: TinyPair, sampling: SamplingParams, mode: Any
) -> None:
    sampling = replace(sampling, max_new_tokens=50)
    plenty, _ = run(pair, sampling, None, Fixed(3), mode)
    short, engine = run(pair, sampling, 5, Fixed(3), mode)
    assert short == plenty and engine.stats.preempted > 0


def test_samples_of_one_prompt_share_it_in_both_models(
    pair: TinyPair, target: PreTrainedModel
) -> None:
    requests = requests_of([SOME[5]] * 6, SAMPLED)
    engine = Engine(pair, policy=Fixed(3), verification="coupled", slots=4, prefill_chunk=512)
    expected = [sampled_by_hand(target, request) for request in requests]
    assert outputs(engine.generate(requests)) == expected
    assert engine.stats.shared_tokens >= 3 * (len(SOME[5]) - 2)
    unshared = Engine(pair, policy=Fixed(3), verification="coupled", slots=4, least_shared=10_000)
    assert outputs(unshared.generate(requests)) == expected
    saved = unshared.stats.draft_tokens - engine.stats.draft_tokens
    assert saved >= 3 * (len(SOME[5]) - 3)


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_batch_invariant_targets_give_the_same_tokens_whatever_runs(
    target: PreTrainedModel, folder: Path, kv_dtype: Any
) -> None:
    made = eagle_pair(target, folder, precision="float32", invariant=True, kv_dtype=kv_dtype)

    def outputs_of(policy: StopPolicy, slots: int, pages: int | None = None) -> list[Prompt]:
        memory = bytes_for(made, pages * PAGE) if pages else None
        engine = Engine(
            made, policy=policy, verification="coupled", slots=slots, kv_memory_bytes=memory
        )
        return outputs(engine.generate(requests_of(SOME, SAMPLED)))

    alone = outputs_of(StopPolicy(), 1)
    for k, slots, pages in ((1, 16, None), (4, 1, None), (8, 16, None), (4, 16, 6)):
        assert outputs_of(Fixed(k), slots, pages) == alone, (k, slots, pages)


def test_features_are_memory_of_the_target_and_nobody_else_pays(pair: TinyPair) -> None:
    plain = pair.target.new_cache(0, 0).bytes_per_position
    with_draft = Engine(pair, policy=Fixed(2)).target_cache
    assert with_draft.bytes_per_position == plain + 4 * FITTED.hidden
    for other in (
        Engine(pair, policy=make("none")),
        Engine(replace(pair, draft=None), policy=Fixed(2)),
    ):
        assert other.target_cache.features is None
        assert other.target_cache.bytes_per_position == plain


@pytest.mark.parametrize("mode", ["rejection", "coupled"])
def test_rows_may_ask_for_tokens_that_the_draft_does_not_know(
    pair: TinyPair, folder: Path, mode: Any
) -> None:
    """Then it has no distribution, its candidates fall, and the row fails not."""
    assert pair.draft is not None
    known = set(pair.draft.model.known.tolist())
    unknown = tuple(token for token in range(97) if token not in known)[:5]
    for sampling in (GREEDY, SAMPLED):
        asked = replace(sampling, allowed_token_ids=unknown)
        done, plain = (
            Engine(pair, policy=Fixed(k), verification=mode).generate(requests_of(SOME, asked))
            for k in (3, 0)
        )
        assert {token for each in outputs(done) for token in each} <= set(unknown)
        if mode == "coupled" or sampling is GREEDY:
            assert outputs(done) == outputs(plain)


def test_a_request_alone_counts_what_its_rounds_took(pair: TinyPair) -> None:
    """The first step of each round reads what was accepted, and one token more."""
    engine = Engine(pair, policy=Fixed(2), slots=1)
    (done,) = engine.generate([Request("a", SOME[1], replace(GREEDY, max_new_tokens=30))])
    read = len(SOME[1]) + len(done.output_ids) - 1 + done.counts.drafted
    assert engine.stats.draft_tokens <= read
