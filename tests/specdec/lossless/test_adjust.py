"""Adjusted logits are what the slow way gives, and transformers where it has the same."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.generation import logits_process as hf

from specdec.lossless.adjust import Adjuster
from specdec.request import SamplingParams
from tests.specdec.adjustments import ALONE, PAIRS, STOP, adjusted_by_hand
from tests.specdec.workloads import prompts

VOCAB, EOS, CPU = 11, 9, torch.device("cpu")
KINDS = {"nothing": dict[str, Any](), **ALONE, **PAIRS, "trigram": {"no_repeat_ngram_size": 3}}


@dataclass
class Row:
    sampling: SamplingParams
    tokens: list[int]
    output_start: int


def some_rows(seed: int = 0) -> list[Row]:
    """A row of each kind, with prompts and outputs of different lengths over few tokens."""
    texts = prompts([12 + 3 * (i % 5) for i in range(len(KINDS))], seed)
    return [
        Row(SamplingParams(**asked), [t % VOCAB for t in text], 3 + i % 7)
        for i, (asked, text) in enumerate(zip(KINDS.values(), texts, strict=True))
    ]


def adjust(
    rows: list[Row], logits: Tensor, owner: list[int], drafted: list[int], candidates: Tensor
) -> Tensor:
    adjuster = Adjuster(rows, [EOS], VOCAB, CPU)
    adjuster.follow()
    at = [
        len(rows[o].tokens) - rows[o].output_start + k for o, k in zip(owner, drafted, strict=True)
    ]
    return adjuster(logits, torch.tensor(owner), torch.tensor(at), candidates[owner])


@pytest.mark.parametrize("seed", range(4))
def test_each_position_sees_its_own_row_and_the_candidates_before_it(seed: int) -> None:
    """All kinds in one batch, each with up to three candidates; the row without any stays as is."""
    rows, most = some_rows(seed), 3
    generator = torch.Generator().manual_seed(seed)
    candidates = torch.randint(VOCAB, (len(rows), most), generator=generator)
    owner = [slot for slot in range(len(rows)) for _ in range(most + 1)]
    drafted = [*range(most + 1)] * len(rows)
    logits = 3 * torch.randn(len(owner), VOCAB, generator=generator)
    untouched = logits.clone()
    found = adjust(rows, logits, owner, drafted, candidates)
    assert torch.equal(logits, untouched)
    for i, (slot, k) in enumerate(zip(owner, drafted, strict=True)):
        row = rows[slot]
        output = row.tokens[row.output_start :] + candidates[slot, :k].tolist()
        prompt = row.tokens[: row.output_start]
        expected = adjusted_by_hand(logits[i], prompt, output, row.sampling, [EOS])
        torch.testing.assert_close(found[i].double(), expected, rtol=1e-6, atol=1e-6)
        if not row.sampling.adjusts:
            assert torch.equal(found[i], logits[i])


SAME_IN_TRANSFORMERS: dict[str, LogitsProcessor] = {
    "repetition": hf.RepetitionPenaltyLogitsProcessor(1.7),
    "bias": hf.SequenceBiasLogitsProcessor({(1,): 2.0, (3,): -1.5}),
    "bad_words": hf.NoBadWordsLogitsProcessor([[2, 1], [0], [3, 4, 3]]),
    "allowed": hf.SuppressTokensLogitsProcessor([t for t in range(VOCAB) if t not in (0, 1, 3)]),
    "ngram": hf.NoRepeatNGramLogitsProcessor(2),
    "trigram": hf.NoRepeatNGramLogitsProcessor(3),
}


@pytest.mark.parametrize("kind", [*SAME_IN_TRANSFORMERS, "min_tokens"])
def test_it_is_to_the_last_bit_what_transformers_makes_of_it(kind: str) -> None:
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(1))
    for text in prompts((4, 9, 30), seed=3):
        text = tuple(token % VOCAB for token in text)
        # Transformers looks for bad words in the prompt, too: here there is next to none.
        row = Row(SamplingParams(**KINDS[kind]), list(text), 1)
        processor = SAME_IN_TRANSFORMERS.get(kind) or hf.MinNewTokensLengthLogitsProcessor(
            1, 3, [EOS, STOP]
        )
        expected = processor(torch.tensor([text]), logits.clone())
        none = torch.zeros(1, 0, dtype=torch.int64)
        assert torch.equal(adjust([row], logits, [0], [0], none), expected)


def test_rows_that_come_and_go_keep_their_tokens() -> None:
    """What is on the device follows the rows through growth, other slots and other neighbours."""
    rows = [row for row in some_rows() if row.sampling.reads_prefix]
    adjuster = Adjuster(rows, [EOS], VOCAB, CPU)
    adjuster.follow()
    generator = torch.Generator().manual_seed(2)
    for step in range(6):
        rows = [*rows[1:], rows[0]] if step % 2 else rows[:-1]
        if step == 4:
            rows = [*some_rows(9)[1:3], *rows]
        for row in rows:
            row.tokens += torch.randint(VOCAB, (7,), generator=generator).tolist()
        adjuster = Adjuster(rows, [EOS], VOCAB, CPU, adjuster)
        adjuster.follow()
        logits = torch.randn(len(rows), VOCAB, generator=generator)
        owner = torch.arange(len(rows))
        at = torch.tensor([len(row.tokens) - row.output_start for row in rows])
        none = torch.zeros(len(rows), 0, dtype=torch.int64)
        again = Adjuster(rows, [EOS], VOCAB, CPU)
        again.follow()
        assert torch.equal(adjuster(logits, owner, at, none), again(logits, owner, at, none))


def test_an_output_that_nothing_ends_has_no_end_to_ban() -> None:
    row = Row(SamplingParams(min_tokens=3, ignore_eos=True), [1, 2], 1)
    logits = torch.randn(1, VOCAB)
    none = torch.zeros(1, 0, dtype=torch.int64)
    assert torch.equal(adjust([row], logits, [0], [0], none), logits)


def test_half_precision_is_adjusted_in_single() -> None:
    row = Row(SamplingParams(frequency_penalty=0.3), [1, 2, 2, 2], 1)
    logits = torch.full((1, VOCAB), 8.0, dtype=torch.bfloat16)
    found = adjust([row], logits, [0], [0], torch.zeros(1, 0, dtype=torch.int64))
    assert found.dtype == torch.float32
    assert found[0, 2].item() == pytest.approx(8 - 0.9, abs=1e-5)


def test_only_rows_that_ask_are_said_to() -> None:
    assert not SamplingParams(temperature=0.5, top_k=3, stop_token_ids=(1,)).adjusts
    for asked in (*ALONE.values(), *PAIRS.values()):
        assert SamplingParams(**asked).adjusts
        assert replace(SamplingParams(**asked), temperature=0).adjusts
