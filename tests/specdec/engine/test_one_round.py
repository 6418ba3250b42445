"""The algorithm without the machinery (examples/one_round.py) gives the Engine's tokens."""

from __future__ import annotations

import pytest
from transformers import PreTrainedModel

from examples.one_round import generate
from specdec.engine.engine import Engine
from specdec.policies.simple import Fixed
from specdec.request import SamplingParams
from tests.specdec.tiny_models import TinyPair
from tests.specdec.workloads import GREEDY, SAMPLED, SOME, outputs, requests_of

TRUNCATED = SamplingParams(temperature=0.8, top_k=20, top_p=0.9, max_new_tokens=17, seed=5)


@pytest.mark.parametrize("k", [0, 1, 4])
@pytest.mark.parametrize(
    ("mode", "sampling"),
    [
        ("coupled", GREEDY),
        ("coupled", SAMPLED),
        ("coupled", TRUNCATED),
        # Under rejection they agree, too, where both draft the same number of candidates.
        ("rejection", GREEDY),
        ("rejection", SAMPLED),
    ],
    ids=["greedy", "coupled", "coupled truncated", "rejection greedy", "rejection"],
)
def test_one_round_after_another_gives_the_engines_tokens(
    pair: TinyPair,
    target_model: PreTrainedModel,
    draft_model: PreTrainedModel,
    k: int,
    mode: str,
    sampling: SamplingParams,
) -> None:
    # The Engine drafts at once for a prompt of one token, which is all pending; other numbers then.
    longer = [prompt for prompt in SOME if len(prompt) > 1][:6]
    requests = requests_of(longer, sampling)
    engine = Engine(pair, policy=Fixed(k), verification=mode, slots=3)  # type: ignore[arg-type]
    done = engine.generate(requests)
    by_hand = [
        generate(target_model, draft_model, list(r.prompt_ids), k, r.sampling, mode)
        for r in requests
    ]
    assert outputs(done) == [tuple(output) for output in by_hand]
    if k:
        assert 0 < engine.stats.counts.accepted < engine.stats.counts.verified
