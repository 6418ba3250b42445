"""What rows ask of their logits holds under speculation, and exactly."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.engine.engine import Engine
from specdec.lossless.adjust import Adjuster
from specdec.lossless.sampling import SamplingBatch, coupled_choice, probabilities
from specdec.policies.base import StopPolicy
from specdec.policies.simple import Fixed
from specdec.request import Request, SamplingParams
from tests.specdec.adjustments import ALONE, PAIRS, adjusted_by_hand
from tests.specdec.engine.references import CPU
from tests.specdec.goodness import chi_square_excess, counted, reference_distribution
from tests.specdec.tiny_models import TinyPair, make_pair, noisy_copy, tiny_model
from tests.specdec.workloads import SOME, Prompt, make, outputs

VOCAB = 5
PROMPT = (0, 3, 1, 2)
KINDS = ALONE | PAIRS


@pytest.fixture(scope="module")
def tiny_pair() -> TinyPair:
    shape: dict[str, Any] = {"hidden": 16, "layers": 1, "heads": 2, "kv_heads": 1}
    model = tiny_model(vocab=VOCAB, peak=60.0, seed=4, **shape)
    return make_pair(model, noisy_copy(model, 0.4))


@torch.inference_mode()
def first_three(model: PreTrainedModel, asked: SamplingParams) -> Tensor:
    """float64 [V, V, V]: exact joint distribution of the first three output tokens."""
    texts, joint = torch.tensor([PROMPT]), torch.ones(1, dtype=torch.float64)
    for _ in range(3):
        logits = model(texts, use_cache=False).logits[:, -1]
        adjusted = torch.stack(
            [
                adjusted_by_hand(row, PROMPT, text[len(PROMPT) :], asked)
                for row, text in zip(logits, texts.tolist(), strict=True)
            ]
        )
        joint = (joint[:, None] * reference_distribution(adjusted, asked)).flatten()
        joint = joint.nan_to_num()  # behind what cannot be, all may be banned
        every = torch.arange(VOCAB).repeat(len(texts))[:, None]
        texts = torch.cat([texts.repeat_interleave(VOCAB, 0), every], 1)
    return joint.view([VOCAB] * 3)


def excesses(
    pair: TinyPair, policy: StopPolicy, kinds: dict[str, dict[str, Any]], each: int
) -> dict[str, float]:
    """Chi-square of the first three tokens of `each` requests of each kind, all in one batch."""
    requests = [
        Request(f"{kind}:{i}", PROMPT, SamplingParams(max_new_tokens=4, seed=n * each + i, **asked))
        for i in range(each)
        for n, (kind, asked) in enumerate(kinds.items())
    ]
    engine = Engine(pair, policy=policy, slots=256)
    done = outputs(engine.generate(requests))
    counts = engine.stats.counts
    assert 0 < counts.accepted < counts.verified
    found = {}
    for n, (kind, asked) in enumerate(kinds.items()):
        tokens = torch.tensor([output[:3] for output in done[n :: len(kinds)]])
        expected = first_three(pair.plain, SamplingParams(**asked))
        found[kind] = chi_square_excess(counted(tokens, VOCAB), expected)
    return found


@pytest.mark.statistical
@pytest.mark.parametrize("policy", ["fixed 4", "confidence", "suffix", "goodput stated"])
def test_the_outputs_have_the_distribution_that_was_asked_for(
    tiny_pair: TinyPair, policy: str
) -> None:
    """Under rejection, 400 requests a kind, rows without a wish among them; false alarm 1e-6 each.

    Under `min_tokens` no row may end within the three tokens that are looked at.
    """
    found = excesses(tiny_pair, make(policy, 16), {"nothing": {}, **KINDS}, 400)
    assert max(found.values()) < 1, found


class BlindToCandidates(Adjuster):
    """An adjuster with a bug: it sees what is committed, and no drafted token."""

    def __call__(self, logits: Tensor, owner: Tensor, at: Tensor, behind: Tensor) -> Tensor:
        first = torch.full((1 + int(owner.max()),), 10**6).scatter_reduce(0, owner, at, "amin")
        return super().__call__(logits, owner, first[owner], behind)


@pytest.mark.statistical
def test_an_adjustment_that_does_not_see_drafted_tokens_is_noticed(
    tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specdec.engine.asked.Adjuster", BlindToCandidates)
    found = excesses(tiny_pair, Fixed(3), {k: ALONE[k] for k in ("frequency", "ngram")}, 800)
    assert min(found.values()) > 1, found


# ------------------------------------------------------------------ the same tokens

EOS = 7
WISHES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"repetition_penalty": 1.4}, {"repetition_penalty": 1.4}),
    ({"no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 2}),
    ({"logit_bias": {5: 4.0, 11: -6.0}}, {"sequence_bias": {(5,): 4.0, (11,): -6.0}}),
    ({"min_tokens": 12, "logit_bias": {EOS: 30}}, {"min_new_tokens": 12, "bias": 30}),
    ({"bad_words": ((5,), (11, 12))}, {"bad_words_ids": [[5], [11, 12]]}),
    ({"allowed_token_ids": tuple(range(40))}, {"suppress_tokens": [*range(40, 97)]}),
    ({}, {}),
]
"""What a request asks for, and how transformers' `generate` is asked for the same."""


@pytest.fixture(scope="module")
def wished(target_model: PreTrainedModel) -> tuple[list[Request], list[Prompt]]:
    """Requests, and what `generate` makes of them; without those in which a near-tie decides."""
    requests, expected = [], []
    for i, prompt in enumerate(SOME):
        asked, hf = WISHES[i % len(WISHES)]
        hf = dict(hf)
        if hf.pop("bias", 0):
            hf["sequence_bias"] = {(EOS,): 30.0}
        ids = torch.tensor([prompt])
        out: Any = target_model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=20,
            eos_token_id=EOS,
            pad_token_id=0,
            output_scores=True,
            return_dict_in_generate=True,
            **hf,
        )
        top = torch.cat(out.scores).topk(2).values
        if (top[:, 0] - top[:, 1]).min() > 1e-3:
            sampling = SamplingParams(temperature=0, max_new_tokens=20, **asked)
            requests.append(Request(str(i), prompt, sampling))
            expected.append(tuple(out.sequences[0, len(prompt) :].tolist()))
    assert len(requests) >= 10
    return requests, expected


@pytest.mark.parametrize("slots", [1, 16])
@pytest.mark.parametrize("k", [0, 1, 4, 8])
def test_greedy_equals_transformers_with_its_own_processors(
    pair: TinyPair, wished: tuple[list[Request], list[Prompt]], k: int, slots: int
) -> None:
    requests, expected = wished
    engine = Engine(
        replace(pair, eos_token_ids=frozenset({EOS})),
        policy=Fixed(k),
        slots=slots,
        prefill_chunk=64,
    )
    assert outputs(engine.generate(requests)) == expected


@torch.inference_mode()
def sampled_by_hand(model: PreTrainedModel, request: Request) -> Prompt:
    """Target-only sampling of adjusted logits, one plain forward a token."""
    batch = SamplingBatch.of([request.sampling], CPU)
    output: list[int] = []
    for at in range(request.sampling.max_new_tokens):
        text = torch.tensor([[*request.prompt_ids, *output]])
        logits = model(text, use_cache=False).logits[0, -1]
        asked = adjusted_by_hand(logits, request.prompt_ids, output, request.sampling)
        p = probabilities(asked.float()[None], batch)
        output.append(int(coupled_choice(p, batch.seed, torch.tensor([at]))))
        if output[-1] in request.sampling.stop_token_ids:
            break
    return tuple(output)


@pytest.fixture(scope="module")
def sampled(target_model: PreTrainedModel) -> tuple[list[Request], list[Prompt]]:
    """A request of each kind, and what plain sampling makes of it."""
    requests = [
        Request(kind, SOME[i % len(SOME)], SamplingParams(max_new_tokens=16, seed=i, **asked))
        for i, (kind, asked) in enumerate(KINDS.items())
    ]
    return requests, [sampled_by_hand(target_model, request) for request in requests]


@pytest.mark.parametrize("slots", [1, 16])
@pytest.mark.parametrize("k", [0, 1, 4, 8])
def test_coupled_equals_plain_sampling_of_adjusted_logits(
    pair: TinyPair, sampled: tuple[list[Request], list[Prompt]], k: int, slots: int
) -> None:
    requests, expected = sampled
    engine = Engine(pair, policy=Fixed(k), verification="coupled", slots=slots)
    assert outputs(engine.generate(requests)) == expected


# -------------------------------------------------------------------- what else it touches


def letters(ids: Any) -> str:
    return "".join(chr(33 + i) for i in ids)


def test_nothing_ends_an_output_before_min_tokens(pair: TinyPair) -> None:
    """Neither end of sequence nor stop token nor stop string; the last is found behind them."""
    free = SamplingParams(temperature=0, max_new_tokens=16)
    (plain,) = Engine(pair, policy=Fixed(3)).generate([Request("a", SOME[0], free)])
    early, late = letters(plain.output_ids[2:3]), letters(plain.output_ids[8:10])
    ended = frozenset({plain.output_ids[4]})
    engine = Engine(replace(pair, eos_token_ids=ended), policy=Fixed(3), decode=letters)
    stops = replace(free, stop=(early, late))
    (first,) = engine.generate([Request("b", SOME[0], stops)])
    assert first.stop_reason == early and len(first.output_ids) <= 3
    least = replace(stops, min_tokens=7, stop=(early,))
    (other,) = engine.generate([Request("c", SOME[0], least)])
    assert len(other.output_ids) > 7
    assert not ended & set(other.output_ids[:7])


def test_an_end_that_the_model_never_says_needs_no_ban(pair: TinyPair) -> None:
    """A tokenizer may have more tokens than its model gives logits for."""
    free = SamplingParams(temperature=0, max_new_tokens=9)
    beyond = replace(free, min_tokens=5, stop_token_ids=(pair.vocab_size, pair.vocab_size + 9))
    ended = replace(pair, eos_token_ids=frozenset({pair.vocab_size + 3}))
    done = Engine(ended, policy=Fixed(2)).generate(
        [Request("free", SOME[0], free), Request("beyond", SOME[0], beyond)]
    )
    assert len({*outputs(done)}) == 1


def test_a_row_that_bans_every_token_fails_alone(pair: TinyPair) -> None:
    none = SamplingParams(max_new_tokens=4, allowed_token_ids=(5,), bad_words=((5,),))
    requests = [
        Request("good", SOME[0], SamplingParams(max_new_tokens=4)),
        Request("none", SOME[1], none),
    ]
    good, bad = Engine(pair, policy=Fixed(2)).generate(requests)
    assert len(good.output_ids) == 4
    assert bad.error is not None and "bans every token" in bad.error


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"logit_bias": {97: 1}}, "logit_bias: the target has no token 97; it has 97, from 0 on"),
        ({"allowed_token_ids": (1, -1)}, "allowed_token_ids: the target has no token -1"),
        ({"bad_words": ((3, 200),)}, "bad_words: the target has no token 200"),
        ({"bad_words": ("damn",)}, "bad_words: 'damn' must be given as token ids"),
    ],
)
def test_tokens_that_are_none_are_refused(pair: TinyPair, asked: dict[str, Any], said: str) -> None:
    request = Request("a", (1,), SamplingParams(**asked))
    (done,) = Engine(pair, policy=Fixed(2)).generate([request])
    assert done.error is not None and said in done.error
