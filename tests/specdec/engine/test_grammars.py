"""Outputs that a grammar describes: under speculation as if each token were masked by itself."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from llguidance import LLMatcher
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from specdec.engine.engine import Engine
from specdec.loading.grammars import ModelGrammars
from specdec.lossless.grammars import Masks
from specdec.lossless.sampling import SamplingBatch, coupled_choice, probabilities
from specdec.policies.base import StopPolicy
from specdec.policies.simple import Fixed
from specdec.request import Completion, Request, SamplingParams
from tests.specdec.engine.references import CPU
from tests.specdec.goodness import chi_square_excess, counted, reference_distribution
from tests.specdec.tiny_models import TinyPair, make_pair, noisy_copy, tiny_model
from tests.specdec.workloads import (
    Prompt,
    looking_goodput,
    make,
    outputs,
    prompts,
    requests_of,
)

LETTERS = "abcd"
EOS = len(LETTERS)
VOCAB = EOS + 1
PATTERN = "[ab][bc](a|d[ab]c)[cd]{1,3}"
LONGEST = 8


def tokenizer(letters: str) -> PreTrainedTokenizerFast:
    """A token for each letter, and an end of sequence."""
    tokens = {letter: i for i, letter in enumerate([*letters, "</s>"])}
    backend = Tokenizer(models.BPE(tokens, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


@pytest.fixture(scope="module")
def grammars() -> ModelGrammars:
    return ModelGrammars(tokenizer(LETTERS), VOCAB, [EOS])


@pytest.fixture(scope="module")
def pair() -> TinyPair:
    model = tiny_model(vocab=VOCAB, hidden=16, layers=1, heads=2, kv_heads=1, peak=40.0, seed=4)
    return make_pair(model, noisy_copy(model, 0.4), eos=frozenset({EOS}))


def constrained(**sampling: Any) -> SamplingParams:
    grammar = LLMatcher.grammar_from_regex(PATTERN)
    return SamplingParams(**{"max_new_tokens": 9, "grammar": grammar, **sampling})


@cache
def sentences() -> list[str]:
    """All that the pattern describes."""
    every = ("".join(s) for n in range(LONGEST + 1) for s in itertools.product(LETTERS, repeat=n))
    return [text for text in every if re.fullmatch(PATTERN, text)]


def allowed(output: Sequence[int]) -> list[int]:
    """The tokens that may follow."""
    text = "".join(LETTERS[token] for token in output)
    more = {s[len(text)] for s in sentences() if s.startswith(text) and len(s) > len(text)}
    return [LETTERS.index(letter) for letter in sorted(more)] + [EOS] * (text in sentences())


def ended(output: Sequence[int]) -> bool:
    """Whether the sentence is whole and nothing but an end can follow, or the end was said."""
    return bool(output) and (output[-1] == EOS or allowed(output) == [EOS])


def masked(logits: Tensor, output: Sequence[int]) -> Tensor:
    kept = torch.full_like(logits, float("-inf"))
    kept[allowed(output)] = logits[allowed(output)]
    return kept


@torch.inference_mode()
def first_three(model: PreTrainedModel, prompt: Prompt, asked: SamplingParams) -> Tensor:
    """float64 [V, V, V]: exact joint distribution of the first three tokens, which none ends."""
    joint = torch.zeros([VOCAB] * 3, dtype=torch.float64)

    def go(output: tuple[int, ...], mass: float) -> None:
        if len(output) == 3:
            joint[output] = mass
            return
        logits = model(torch.tensor([[*prompt, *output]]), use_cache=False).logits[0, -1]
        p = reference_distribution(masked(logits, output), asked)
        for token in p.nonzero().flatten().tolist():
            go((*output, token), mass * p[token].item())

    go((), 1.0)
    return joint


def excess(pair: TinyPair, grammars: ModelGrammars, policy: StopPolicy, many: int) -> float:
    """Chi-square of the first three tokens of `many` rows, every third of which is free."""
    prompt, asked = (0, 3, 1, 2), constrained()
    requests = [
        Request(str(i), prompt, replace(asked, seed=i, grammar=asked.grammar if i % 3 else None))
        for i in range(many)
    ]
    engine = Engine(pair, policy=policy, slots=256, grammars=grammars)
    done = engine.generate(requests)
    assert engine.stats.counts.accepted > 0
    tokens = torch.tensor([d.output_ids[:3] for i, d in enumerate(done) if i % 3])
    return chi_square_excess(counted(tokens, VOCAB), first_three(pair.plain, prompt, asked))


@pytest.mark.statistical
@pytest.mark.parametrize("policy", ["fixed 4", "confidence", "suffix", "goodput stated"])
def test_rejection_draws_from_the_masked_target(
    pair: TinyPair, grammars: ModelGrammars, policy: str
) -> None:
    """False alarm 1e-6 each."""
    assert excess(pair, grammars, make(policy, 16), 1000) < 1


@pytest.mark.statistical
def test_masks_that_do_not_see_candidates_are_noticed(
    pair: TinyPair, grammars: ModelGrammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Masks.apply

    def blind(self: Masks, logits: Tensor, owner: Tensor, at: Tensor) -> Tensor:
        return honest(self, logits, owner, self._generated[owner])

    monkeypatch.setattr(Masks, "apply", blind)
    assert excess(pair, grammars, Fixed(3), 300) > 1


@torch.inference_mode()
def by_hand(model: PreTrainedModel, request: Request) -> Prompt:
    """Target-only decoding, one plain forward a token, each masked by itself."""
    batch, output = SamplingBatch.of([request.sampling], CPU), list[int]()
    while not ended(output) and len(output) < request.sampling.max_new_tokens:
        text = torch.tensor([[*request.prompt_ids, *output]])
        logits = masked(model(text, use_cache=False).logits[0, -1], output)[None]
        at = torch.tensor([len(output)])
        output.append(int(coupled_choice(probabilities(logits, batch), batch.seed, at)))
    return tuple(output)


@pytest.mark.parametrize("slots", [1, 16])
@pytest.mark.parametrize("k", [0, 1, 4, 8])
def test_coupled_and_greedy_are_those_of_the_masked_target(
    pair: TinyPair, grammars: ModelGrammars, k: int, slots: int
) -> None:
    """Each sentence is whole, and ends where nothing can follow it."""
    requests = [
        Request(str(i), tuple(t % VOCAB for t in prompt), constrained(seed=i, temperature=i % 2))
        for i, prompt in enumerate(prompts([3 + i % 5 for i in range(16)]))
    ]
    engine = Engine(pair, policy=Fixed(k), verification="coupled", slots=slots, grammars=grammars)
    done = engine.generate(requests)
    assert outputs(done) == [by_hand(pair.plain, request) for request in requests]
    # What alone can follow is known without a draft, and stands.
    assert 0 < engine.stats.accepted_forced == engine.stats.verified_forced
    for each in done:
        assert each.finish_reason == "stop"
        text = "".join(LETTERS[token] for token in each.output_ids if token != EOS)
        assert re.fullmatch(PATTERN, text)


def test_forced_tokens_take_no_round_of_their_own(pair: TinyPair, grammars: ModelGrammars) -> None:
    """Also where the draft proposes nothing: a first letter, five and a choice, the last three."""
    grammar = LLMatcher.grammar_from_regex("(ab|ba)cdab(c|d)bca")
    asked = constrained(grammar=grammar, max_new_tokens=11)
    engine = Engine(pair, policy=Fixed(0), grammars=grammars, slots=4)
    done = engine.generate(requests_of([(i % VOCAB,) for i in range(6)], asked))
    assert [len(output) for output in outputs(done)] == [10] * 6
    assert engine.stats.counts.rounds == 3 * 6


@pytest.mark.parametrize("policy", ["suffix", "goodput stated", "goodput"])
def test_a_round_without_grammars_is_explained_behind_one_with(
    pair: TinyPair, grammars: ModelGrammars, policy: str
) -> None:
    """The later round has more rows, and nothing that is known without a draft."""
    if policy == "goodput":
        pair, made = replace(pair, draft=None), looking_goodput()
    else:
        made = make(policy, 16)
    engine = Engine(pair, policy=made, grammars=grammars, slots=8, lookup=False, trace=True)
    engine.submit(Request("first", (1, 2), constrained()))
    while engine.live or engine.waiting:
        engine.step()
    free = SamplingParams(max_new_tokens=9)
    done = engine.generate([Request(str(i), (i % VOCAB, 1), free) for i in range(6)])
    rounds = [round_ for each in done for round_ in each.trace]
    assert len(rounds) > 6
    assert all(each.reason and not each.sources for each in rounds)


def test_a_sentence_at_its_end_ends_before_min_tokens(
    pair: TinyPair, grammars: ModelGrammars
) -> None:
    """Else there would be no token to go on with. Where it may go on, it has to."""
    whole, longer = (
        constrained(grammar=LLMatcher.grammar_from_regex(regex), min_tokens=6)
        for regex in ("abc", "a{3,7}")
    )
    requests = [Request("whole", (1,), whole), Request("longer", (1,), longer)]
    done = Engine(pair, policy=Fixed(2), grammars=grammars, slots=4).generate(requests)
    assert [len(output) for output in outputs(done)] == [3, 7]


def test_a_cut_off_sentence_says_so(pair: TinyPair, grammars: ModelGrammars) -> None:
    (done,) = Engine(pair, policy=Fixed(4), grammars=grammars).generate(
        [Request("a", (1,), constrained(max_new_tokens=2))]
    )
    assert (done.finish_reason, len(done.output_ids)) == ("length", 2)


def test_what_an_engine_cannot_do_is_that_rows_error(
    pair: TinyPair, grammars: ModelGrammars
) -> None:
    def refusal(engine: Engine, grammar: str) -> str:
        asked = SamplingParams(max_new_tokens=3, grammar=grammar)
        good = Request("good", (1,), SamplingParams(max_new_tokens=3))
        done: Completion
        done, beside = engine.generate([Request("a", (1,), asked), good])
        assert beside.error is None
        return str(done.error)

    regex = LLMatcher.grammar_from_regex("[ab]")
    assert "needs an engine with grammars" in refusal(Engine(pair, policy=Fixed(2)), regex)
    engine = Engine(pair, policy=Fixed(2), grammars=grammars)
    assert "cannot be used: " in refusal(engine, LLMatcher.grammar_from_regex("[ab"))
    assert "InvalidLogits" not in refusal(engine, regex)
    # There is no token to go on with, at once or behind candidates.
    for regex in ("x+", "(ab|ba)x"):
        assert "bans every token" in refusal(engine, LLMatcher.grammar_from_regex(regex))


def test_json_of_a_schema_parses(grammars: ModelGrammars) -> None:
    letters = "".join(chr(code) for code in range(0x21, 0x7F)) + "Ġ"
    size = len(letters) + 1
    model = tiny_model(vocab=size, hidden=16, layers=1, heads=2, kv_heads=1, peak=8.0, seed=1)
    made = ModelGrammars(tokenizer(letters), size, [size - 1])
    schema = {
        "type": "object",
        "properties": {"id": {"type": "integer", "maximum": 99}, "ok": {"type": "boolean"}},
        "required": ["id", "ok"],
        "additionalProperties": False,
    }
    asked = SamplingParams(
        max_new_tokens=60, grammar=LLMatcher.grammar_from_json_schema(schema), temperature=0.5
    )
    engine = Engine(
        make_pair(model, noisy_copy(model, 0.2), eos=frozenset({size - 1})),
        policy=Fixed(4),
        grammars=made,
    )
    done = engine.generate([Request(str(i), (i,), replace(asked, seed=i)) for i in range(12)])
    whole = [each for each in done if each.finish_reason == "stop"]
    assert len(whole) > 6
    for each in whole:
        text = "".join(letters[t] for t in each.output_ids if t < size - 1).replace("Ġ", " ")
        value = json.loads(text)
        assert set(value) == {"id", "ok"} and isinstance(value["ok"], bool)
