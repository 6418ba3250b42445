from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specdec.lossless.proposal import Proposal
from specdec.lossless.sampling import SamplingBatch
from specdec.lossless.verification import (
    MODES,
    accepted_prefix,
    match,
    reject,
    reject_certain,
)
from specdec.request import SamplingParams
from tests.specdec.lossless.markov import CPU, Markov


def ints(*values: int) -> Tensor:
    return torch.tensor(values)


# ------------------------------------------------------------------ worked examples


def test_accepted_prefix_stops_at_the_first_refusal_and_at_the_length() -> None:
    ok = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]).bool()
    assert accepted_prefix(ok, ints(4, 4, 4, 2, 0)).tolist() == [4, 1, 0, 2, 0]


def test_match_on_four_candidates() -> None:
    """Row 0 drafts 7 3 5 5 and the target chooses 7 3 6 . .: two stand, then the target's 6.

    Row 1 submits two and both stand; row 2 submits none; both get the target's next choice.
    """
    choices = ints(7, 3, 6, 1, 2, 4, 4, 9, 8)
    candidates = torch.tensor([[7, 3, 5, 5], [4, 4, 0, 0], [0, 0, 0, 0]])
    accepted, bonus = match(choices, ints(0, 5, 8), candidates, ints(4, 2, 0))
    assert accepted.tolist() == [2, 2, 0]
    assert bonus.tolist() == [6, 9, 8]


def test_match_ignores_agreement_after_the_first_difference() -> None:
    accepted, bonus = match(ints(1, 2, 3, 4), ints(0), torch.tensor([[9, 2, 3]]), ints(3))
    assert (accepted.tolist(), bonus.tolist()) == ([0], [1])


def test_reject_on_four_candidates() -> None:
    """p/q of the candidates are 2, 0.5, 0.8, 1; u = 0.9, 0.4, 0.81, 0.1.

    min(1, p/q) = 1, 0.5, 0.8, 1, so the third falls and the bonus comes from (p - q)+ there.
    """
    p = torch.tensor(
        [[0.2, 0.4, 0.4], [0.3, 0.2, 0.5], [0.2, 0.4, 0.4], [0.6, 0.2, 0.2], [0.1, 0.1, 0.8]]
    )
    q = torch.tensor([[0.4, 0.2, 0.4], [0.3, 0.4, 0.3], [0.4, 0.5, 0.1], [0.6, 0.2, 0.2]])
    accepted, residual = reject(
        p,
        ints(0),
        q,
        torch.tensor([[0, 1, 2, 3]]),
        torch.tensor([[1, 1, 1, 0]]),
        ints(4),
        torch.tensor([[0.9, 0.4, 0.81, 0.1]]),
    )
    assert accepted.tolist() == [2]
    torch.testing.assert_close(residual, torch.tensor([[0.0, 0.0, 0.3]]))


def test_reject_takes_the_bonus_from_p_after_full_acceptance() -> None:
    p, q = torch.tensor([[0.5, 0.5], [0.3, 0.7]]), torch.tensor([[0.9, 0.1]])
    zero = torch.zeros(1, 1, dtype=torch.int64)
    accepted, residual = reject(p, ints(0), q, zero, zero, ints(1), torch.tensor([[0.5]]))
    assert accepted.tolist() == [1]
    assert torch.equal(residual, p[1:])


def test_what_nobody_drew_is_accepted_with_the_targets_probability_of_it() -> None:
    """p of the candidates is 0.4, 0.5 and 0.2; u = 0.39, 0.5, 0: the second falls.

    The residual is p without it. The other row's only candidate stands, and its bonus is from p.
    """
    p = torch.tensor(
        [
            [0.2, 0.4, 0.4],
            [0.3, 0.5, 0.2],
            [0.2, 0.4, 0.4],
            [0.6, 0.2, 0.2],
            [1, 0, 0],
            [0, 0.5, 0.5],
        ]
    )
    candidates = torch.tensor([[1, 1, 0], [0, 0, 0]])
    u = torch.tensor([[0.39, 0.5, 0.0], [0.99, 0.0, 0.0]])
    accepted, residual = reject_certain(p, ints(0, 4), candidates, ints(3, 1), u)
    assert accepted.tolist() == [1, 1]
    torch.testing.assert_close(residual, torch.tensor([[0.3, 0.0, 0.2], [0.0, 0.5, 0.5]]))


def test_a_drawn_candidate_stands_behind_one_that_nobody_drew() -> None:
    """p of the known ones is 0.5 and 0.4, p/q of the drawn one 0.5; u = 0.49, 0.4, 0.6 and 0.49.

    Row 0: the known one stands, the drawn one falls: (p - q)+. Row 1: the known one falls, and p
    without it is left. Row 2 has drawn candidates alone, and accepts.
    """
    p = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.4, 0.4], [1, 0, 0], [0.6, 0.4, 0], [1, 0, 0]])
    p = torch.cat([p, torch.tensor([[0.2, 0.4, 0.4], [0, 0, 1]])])
    q = torch.tensor([[0.1, 0.1, 0.8], [0.1, 0.1, 0.8]])
    accepted, residual = reject(
        p,
        ints(0, 3, 5),
        q,
        torch.tensor([[0, 0], [0, 0], [1, 0]]),
        torch.tensor([[0, 2], [1, 0], [2, 0]]),
        ints(2, 1, 1),
        torch.tensor([[0.49, 0.6], [0.4, 0.0], [0.49, 0.0]]),
        ints(1, 1, 0),
    )
    assert accepted.tolist() == [1, 0, 1]
    expected = torch.tensor([[0.1, 0.3, 0.0], [0.6, 0.0, 0.0], [0.0, 0.0, 1.0]])
    torch.testing.assert_close(residual, expected)


def test_a_sure_token_that_rounding_refuses_is_still_what_is_drawn() -> None:
    p = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    zero = torch.zeros(1, 1, dtype=torch.int64)
    accepted, residual = reject_certain(p, ints(0), zero, ints(1), torch.ones(1, 1))
    assert accepted.tolist() == [0]
    assert torch.equal(residual, p[:1])


def random_rows(rows: int, vocab: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(2 * torch.randn(rows, vocab, generator=generator), -1)


def round_of(p: Tensor, q: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """One candidate a row, target and draft distributions p and q [n, V] at it."""
    n = len(q)
    u = torch.rand(n, 1, generator=torch.Generator().manual_seed(1)).clamp(1e-6, 1 - 1e-6)
    packed = torch.stack([p, p], 1).flatten(0, 1)
    return reject(
        packed,
        2 * torch.arange(n),
        q,
        torch.arange(n)[:, None],
        candidates,
        torch.ones(n).long(),
        u,
    )


def test_equal_distributions_accept_everything() -> None:
    p = random_rows(5000, 8, 2)
    accepted, _ = round_of(p, p, torch.multinomial(p, 1))
    assert accepted.all()


def test_disjoint_supports_accept_nothing_and_resample_from_p() -> None:
    p, q = random_rows(5000, 8, 3), random_rows(5000, 8, 4)
    p[:, 4:] = 0
    q[:, :4] = 0
    p, q = (x / x.sum(-1, keepdim=True) for x in (p, q))
    accepted, residual = round_of(p, q, torch.multinomial(q, 1))
    assert not accepted.any()
    assert torch.equal(residual, p)


def test_a_rejection_by_rounding_alone_still_has_something_to_resample_from() -> None:
    """q sums to a hair over p everywhere: (p - q)+ is empty, p is the answer."""
    p = torch.tensor([[0.25, 0.75]])
    q = torch.nextafter(p, torch.ones(()))
    q_row, first = torch.zeros(1, 1, dtype=torch.int64), ints(0)
    u = torch.ones(1, 1)  # beyond the largest uniform number, to force the case
    accepted, residual = reject(torch.cat([p, p]), first, q, q_row, q_row, ints(1), u)
    assert accepted.tolist() == [0]
    assert torch.equal(residual, p)


def test_proposal_remembers_which_distribution_a_candidate_came_from() -> None:
    proposal = Proposal(3, 2, CPU)
    assert proposal.distributions() is None
    proposal.add([0, 2], ints(0, 2), ints(5, 6), torch.tensor([[1.0], [2.0]]))
    proposal.add([2], ints(2), ints(7), torch.tensor([[3.0]]))
    assert proposal.lengths == [1, 0, 2]
    assert proposal.candidates.tolist() == [[5, 0], [0, 0], [6, 7]]
    drawn = proposal.distributions()
    assert drawn is not None
    q, q_row = drawn
    assert q[q_row[0, 0]] == 1 and q[q_row[2, 0]] == 2 and q[q_row[2, 1]] == 3


def test_rows_draw_on_from_where_what_is_known_ends() -> None:
    proposal = Proposal.certain([[4, 5], [], [3]], CPU, 3)
    assert proposal.known == proposal.lengths == [2, 0, 1]
    proposal.add([0, 1], ints(0, 1), ints(7, 8), torch.tensor([[1.0], [2.0]]))
    proposal.add([1], ints(1), ints(9), torch.tensor([[3.0]]))
    assert proposal.candidates.tolist() == [[4, 5, 7], [8, 9, 0], [3, 0, 0]]
    assert proposal.lengths == [3, 2, 1]
    drawn = proposal.distributions()
    assert drawn is not None
    q, q_row = drawn
    assert q[q_row[0, 2]] == 1 and q[q_row[1, 0]] == 2 and q[q_row[1, 1]] == 3


@pytest.mark.parametrize("mode", ["rejection", "coupled"])
def test_a_round_without_candidates_yields_one_bonus_token_a_row(mode: str) -> None:
    models = Markov.random(5, seed=32)
    batch = SamplingBatch.of([SamplingParams(seed=s) for s in range(4)], CPU)
    zero = torch.zeros(4, dtype=torch.int64)
    accepted, bonus = MODES[mode].verify(
        models.target[:4], batch, zero, torch.arange(4), zero, Proposal(4, 0, CPU)
    )
    assert accepted.tolist() == [0] * 4
    assert ((bonus >= 0) & (bonus < 5)).all()
