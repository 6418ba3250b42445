"""Under `rejection` a policy may remember all of earlier rounds, discarded candidates included."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.engine.engine import Engine
from specdec.lossless.sampling import Draw, SamplingBatch, uniform
from specdec.measure.calibration import Flags
from specdec.policies.base import DraftStep, Indices, RoundOutcome, RoundStart, Signal, StopPolicy
from specdec.request import Request, SamplingParams
from tests.specdec.goodness import chi_square_bound
from tests.specdec.lossless.markov import CPU, Markov
from tests.specdec.tiny_models import make_pair, tiny_model

VOCAB = 5
TOKENS = 241


@dataclass
class Remembers(StopPolicy):
    """Drafts three if the row's last round drafted fewer, else none; goes on while q(y) >= 0.3.

    How many were drafted says something of candidates that were thrown away. It obeys the
    invariant: nothing is decided about a candidate once it is drawn.
    """

    wanted = frozenset({Signal.LOG_Q})

    def budget(self, start: RoundStart) -> list[int]:
        return [3 if row.k < 3 else 0 for row in start.rows]

    def go_on(self, step: DraftStep) -> Flags:
        flags: Flags = np.exp(step.signals[:, Signal.LOG_Q]) >= 0.3
        return flags

    def observe(self, outcome: RoundOutcome) -> None:
        for row, drafted in zip(outcome.start.rows, outcome.drafted, strict=True):
            row.k = drafted


def markov(table: Tensor) -> PreTrainedModel:
    """A model whose logits depend on the last token alone: row i of `table` [V, V] follows i."""
    model = tiny_model(vocab=VOCAB, hidden=16, layers=1, heads=1, kv_heads=1)
    for layer in model.model.layers:  # adds nothing
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    # A one-hot state has the root mean square 1 / 4, so its norm is 4 at the token.
    model.get_input_embeddings().weight.data = torch.eye(VOCAB, 16)
    model.lm_head.weight.data.zero_()[:, :VOCAB] = table.T / 4
    return model


def transitions(target: PreTrainedModel, draft: PreTrainedModel, rows: int) -> Indices:
    """[V, V] counts of successive output tokens."""
    engine = Engine(make_pair(target, draft), policy=Remembers(), slots=256)
    sampling = [SamplingParams(max_new_tokens=TOKENS, seed=seed) for seed in range(rows)]
    done = engine.generate([Request(str(p.seed), (0, 1), p) for p in sampling])
    tokens = np.array([each.output_ids for each in done])
    counts = engine.stats.counts
    assert 0 < counts.accepted < counts.verified
    return np.bincount(VOCAB * tokens[:, :-1].ravel() + tokens[:, 1:].ravel(), minlength=25)


def excess(models: Markov, rows: int) -> float:
    """Chi-square of the transitions by the token before, over its bound; above 1 it is noticed."""
    found = transitions(markov(models.target), markov(models.draft), rows).reshape(VOCAB, VOCAB)
    p = torch.softmax(models.target.double(), -1).numpy()
    expected = found.sum(1, keepdims=True) * p
    statistic = ((found - expected) ** 2 / expected).sum()
    return float(statistic / chi_square_bound(VOCAB * (VOCAB - 1)))


MODELS = Markov.random(VOCAB, seed=2)


@pytest.mark.statistical
def test_a_policy_may_remember_what_was_discarded() -> None:
    """120,000 transitions of a Markov chain over 5 tokens, chi-square; false alarm 1e-6."""
    assert excess(MODELS, rows=500) < 1


@pytest.mark.statistical
def test_numbers_that_are_drawn_twice_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same test fails where a position has the same number in every round."""
    monkeypatch.setattr("specdec.lossless.sampling._round_seed", lambda seed, number: seed)
    assert excess(MODELS, rows=400) > 1


def numbers_of(rounds: int, positions: int, rows: int) -> Tensor:
    """float64 [rows, rounds, positions]: what rows of neighbouring seeds accept by."""
    axes = torch.arange(rows), torch.arange(rounds), torch.arange(positions)
    seed, number, at = (axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij"))
    batch = SamplingBatch.of([SamplingParams()], CPU).rows(torch.zeros_like(seed))
    batch.seed.copy_(seed)
    u = uniform(batch.in_round(number).seed, at, Draw.ACCEPT)
    return u.view(rows, rounds, positions)


def test_no_number_is_drawn_twice() -> None:
    numbers = numbers_of(32, 32, 32)
    assert numbers.unique().numel() == 32**3


@pytest.mark.statistical
def test_numbers_of_neighbouring_rounds_rows_and_positions_are_uncorrelated() -> None:
    """200,000 pairs each; |r| > 5 / sqrt(n) has probability 6e-7."""
    u = numbers_of(60, 60, 60)
    for one, other in [
        (u[:, 1:], u[:, :-1]),
        (u[1:], u[:-1]),
        (u[:, 1:, 1:], u[:, :-1, :-1]),
        (u[:, 1:, :-1], u[:, :-1, 1:]),
        (u[1:, 1:], u[:-1, :-1]),
        (u[1:, :-1], u[:-1, 1:]),
    ]:
        pair = torch.stack([one.flatten(), other.flatten()])
        assert abs(float(torch.corrcoef(pair)[0, 1])) < 5 / one.numel() ** 0.5
