"""Labels and ceilings: what p and q say of a candidate, in closed form."""

from __future__ import annotations

from itertools import product
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from specdec.lossless.sampling import SamplingBatch, coupled_choice
from specdec.request import SamplingParams
from specdec.training.judging import Judged, judge, matches
from specdec.training.reliability import reliability, weighted_auc

P, Q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.6, 0.2])
SAME = torch.tensor([0.25, 0.25, 0.5])
N = 4000
NEARLY = 4.5 * 0.5 / N**0.5
"""A share of N draws is off by more than 4.5 standard deviations once in 100,000 times."""


def judged(
    p: Tensor,
    q: Tensor,
    verification: Literal["rejection", "coupled"] = "rejection",
    temperature: float = 1.0,
    text: Tensor | None = None,
) -> Judged:
    """N candidates from the same two distributions."""
    params = SamplingBatch.of([SamplingParams(temperature=temperature, seed=5)], P.device)
    rows = params.rows(torch.zeros(N, dtype=torch.int64))
    target, draft = (x.log().expand(N, len(x)) for x in (p, q))
    return judge(target, draft, rows, torch.arange(N), verification, text)


def test_a_label_is_the_probability_that_rejection_sampling_accepts() -> None:
    """p = (.5 .3 .2), q = (.2 .6 .2): candidates are drawn by q, labels are min(1, p / q)."""
    found = judged(P, Q)
    assert torch.allclose(found.accepted, torch.tensor([1.0, 0.5, 1.0])[found.candidates])
    shares = torch.bincount(found.candidates, minlength=3) / N
    assert (shares - Q).abs().max() < NEARLY


def test_what_can_be_known_before_the_draw_is_the_overlap() -> None:
    """0.2 + 0.3 + 0.2, whatever is drawn; after it nothing is left to know but the label."""
    found = judged(P, Q)
    assert torch.allclose(found.knowable[:, 0], torch.tensor(0.7))
    assert torch.equal(found.knowable[:, 1], found.accepted)
    assert abs(float(found.accepted.mean()) - 0.7) < NEARLY


def test_greedy_leaves_nothing_to_chance() -> None:
    for p, q, label in ((P, Q, 0.0), (P, P, 1.0)):
        found = judged(p, q, temperature=0)
        assert found.accepted.unique().tolist() == [label]
        assert found.knowable.unique().tolist() == [label]


def test_a_coupled_candidate_is_known_as_far_as_its_race_is() -> None:
    """p = (3/4, 1/4), q = (1/4, 3/4): both choose a token alike with 1/4 each."""
    p, q = torch.tensor([0.75, 0.25]), torch.tensor([0.25, 0.75])
    assert torch.allclose(matches(p[None], q[None]), torch.tensor([[0.25, 0.25]]))
    found = judged(p, q, "coupled")
    assert torch.allclose(found.knowable[:, 0], torch.tensor(0.5))
    assert torch.allclose(found.knowable[:, 1], torch.tensor([1.0, 1 / 3])[found.candidates])
    assert set(found.accepted.unique().tolist()) == {0.0, 1.0}
    for token in (0, 1):  # what is known is how often it comes true
        own = found.candidates == token
        share = float(found.accepted[own].mean())
        assert abs(share - float(found.knowable[own, 1].mean())) < NEARLY * (N / own.sum()) ** 0.5


def test_matches_are_what_coupled_choices_do() -> None:
    """With tokens that only one of the two has, and a ratio that two tokens share."""
    p = torch.tensor([0.0, 0.4, 0.0, 0.1, 0.2, 0.3])
    q = torch.tensor([0.0, 0.1, 0.3, 0.2, 0.4, 0.0])
    found = matches(p[None], q[None])[0]
    seed, at = torch.full((N,), 3), torch.arange(N)
    a, b = (coupled_choice(x.expand(N, -1), seed, at) for x in (p, q))
    shares = torch.bincount(a[a == b], minlength=len(p)) / N
    assert (shares - found).abs().max() < NEARLY
    assert found[[0, 2, 5]].tolist() == [0, 0, 0]
    # The law that coupled verification is known by: (1 - TV) / (1 + TV) at least.
    overlap = float(torch.minimum(p, q).sum())
    assert overlap / (2 - overlap) <= float(found.sum()) <= overlap


def test_how_probably_the_candidate_was_the_text() -> None:
    """min(1, q / p) of the text's token under rejection; the share of its race under coupled."""
    text = torch.arange(N) % 3
    stood = judged(P, Q, text=text).stood
    assert stood is not None
    assert torch.allclose(stood, torch.tensor([0.4, 1.0, 1.0])[text])
    coupled = judged(P, Q, "coupled", text=text).stood
    assert coupled is not None
    assert torch.allclose(coupled, (matches(P[None], Q[None])[0] / P)[text])
    # A token that the target never writes cannot have been a candidate that stood.
    never = judged(torch.tensor([0.0, 0.5, 0.5]), Q, text=torch.zeros(N, dtype=torch.int64)).stood
    assert never is not None and never.unique().tolist() == [0.0]


def test_no_distribution_accepts_nothing() -> None:
    broken = torch.full((3,), torch.nan)
    modes: tuple[Literal["rejection", "coupled"], ...] = ("rejection", "coupled")
    for verification, p in product(modes, (P, broken)):
        found = judged(p, broken, verification)
        assert found.accepted.unique().tolist() == [0.0]
        assert found.knowable.unique().tolist() == [0.0]


def test_the_ceiling_of_auc_in_closed_form() -> None:
    """Half of the places have p = q, half have P and Q, of which y = 1 stands half the time.

    After the draw: labels 1 (share 0.7) and 1/2 (0.3). An accepted one is above a rejected one
    unless both are of those with 1/2. Accepted are 0.7 + 0.15 of all, rejected 0.15:
    AUC = (0.7 + 0.15 / 2) / 0.85. Before it: 1 and 0.7; rejected ones all have 0.7, accepted ones
    are 0.5 with 1 and 0.35 with 0.7: AUC = (0.5 + 0.35 / 2) / 0.85.
    """
    y = np.array([0, 1, 2])
    after = np.concatenate([np.ones(10), np.array([1.0, 0.5, 1.0])[y.repeat([2, 6, 2])]])
    before = np.repeat([1.0, 0.7], 10)
    assert weighted_auc(after, after) == pytest.approx((0.7 + 0.15 / 2) / 0.85)
    assert weighted_auc(before, after) == pytest.approx((0.5 + 0.35 / 2) / 0.85)
    both = [judged(SAME, SAME), judged(P, Q)]
    knowable = torch.cat([each.knowable for each in both]).double().numpy()
    accepted = torch.cat([each.accepted for each in both]).double().numpy()
    for i, expected in enumerate(((0.5 + 0.35 / 2) / 0.85, (0.7 + 0.15 / 2) / 0.85)):
        found = reliability(knowable[:, i], accepted)
        assert found["auc"] == pytest.approx(expected, abs=0.02)
        assert found["ece"] < 0.02
