"""Greedy output is transformers' own, for every policy."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle
from typing import Any

import pytest
from transformers import PreTrainedModel

from specdec.engine.engine import Engine
from specdec.policies.simple import Fixed
from specdec.request import Request, SamplingParams
from tests.specdec.engine.references import Reference, generate
from tests.specdec.tiny_models import VOCAB, TinyPair, make_pair, noisy_copy, tiny_model
from tests.specdec.workloads import (
    DRAFTING,
    GREEDY,
    POLICIES,
    make,
    outputs,
    prompts,
    requests_of,
)

ALONE_OR_FEW = cycle([(1, "rejection"), (4, "coupled")])


@pytest.mark.parametrize(
    ("policy", "slots", "mode"),
    [
        *((policy, 16, "rejection") for policy in POLICIES),
        *((policy, *next(ALONE_OR_FEW)) for policy in POLICIES),
    ],
)
def test_greedy_equals_transformers_generate(
    pair: TinyPair, reference: Reference, policy: str, slots: int, mode: str
) -> None:
    """Ragged prompts, prefill in chunks, refills of slots, ends of sequence."""
    engine = Engine(
        replace(pair, eos_token_ids=frozenset({reference.eos})),
        policy=make(policy),
        verification=mode,  # type: ignore[arg-type]
        slots=slots,
        prefill_chunk=64,
    )
    some = 6 if slots == 1 else len(reference.prompts)
    done = engine.generate(requests_of(reference.prompts[:some], GREEDY))
    assert outputs(done) == reference.outputs[:some]
    for completion, output in zip(done, reference.outputs[:some], strict=True):
        assert completion.finish_reason == ("stop" if output[-1] == reference.eos else "length")
    if policy in DRAFTING:
        assert 0.3 < (engine.stats.counts.acceptance_rate or 0) < 0.99


WINDOWED: dict[str, Any] = {
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 16},
    "gptj": {"rotary_dim": 8},
    "bloom": {},
    "granite": {"logits_scaling": 3.0},
    "cohere2": {"logit_scale": 0.3} | WINDOWED,
    "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 1} | WINDOWED,
    "gemma2": {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 5.0} | WINDOWED,
    "gemma4_text": {
        "final_logit_softcapping": 5.0,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 2,
        "layers": 4,
        "sliding_window": 16,
        "layer_types": 2 * WINDOWED["layer_types"],
        "per_layer_config": {},
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_generate_in_every_family(family: str) -> None:
    model = tiny_model(family, seed=3, **FAMILIES[family])
    engine = Engine(
        make_pair(model, noisy_copy(model, 0.08)), policy=Fixed(4), slots=4, prefill_chunk=32
    )
    many = prompts((1, 40, 9, 70, 25, 3))
    done = outputs(engine.generate(requests_of(many, GREEDY)))
    assert done == [generate(model, prompt, 24) for prompt in many]


@pytest.mark.parametrize("policy", POLICIES)
def test_greedy_rows_among_sampled_ones_equal_transformers_under_rejection(
    pair: TinyPair, reference: Reference, policy: str
) -> None:
    engine = Engine(
        replace(pair, eos_token_ids=frozenset({reference.eos})), policy=make(policy), slots=8
    )
    greedy = requests_of(reference.prompts, GREEDY)
    sampled = [
        Request(f"s{i}", prompt, SamplingParams(max_new_tokens=24, top_p=0.9, seed=i))
        for i, prompt in enumerate(reference.prompts)
    ]
    mixed = [request for both in zip(greedy, sampled, strict=True) for request in both]
    assert outputs(engine.generate(mixed))[::2] == reference.outputs


def test_a_draft_of_another_architecture_changes_nothing(
    target_model: PreTrainedModel, reference: Reference
) -> None:
    draft = tiny_model("qwen3", hidden=32, heads=4, layers=1, seed=9)
    pair = make_pair(target_model, draft, eos=frozenset({reference.eos}))
    engine = Engine(pair, policy=Fixed(4), slots=5, prefill_chunk=64)
    assert outputs(engine.generate(requests_of(reference.prompts, GREEDY))) == reference.outputs


@pytest.mark.parametrize("policy", POLICIES)
def test_without_a_draft_every_policy_decodes_plainly_or_looks_candidates_up(
    pair: TinyPair, reference: Reference, policy: str
) -> None:
    alone = replace(pair, draft=None, eos_token_ids=frozenset({reference.eos}))
    engine = Engine(alone, policy=make(policy), slots=4, control_share=0.1, trace=True)
    assert outputs(engine.generate(requests_of(reference.prompts, GREEDY))) == reference.outputs
    assert engine.stats.draft_forwards == 0
    if not engine.policy.looks_up:
        assert engine.stats.counts.drafted == 0
        assert engine.stats.counts.rounds == engine.stats.counts.committed
        assert not engine.stats.speedup.control
