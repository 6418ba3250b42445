"""The output has the target's distribution, and these tests notice if it has not."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from specdec.lossless import verification
from specdec.lossless.proposal import Proposal
from specdec.lossless.sampling import SamplingBatch
from specdec.lossless.verification import MODES, accepted_prefix
from specdec.request import SamplingParams
from tests.specdec.goodness import chi_square_excess, counted, reference_distribution
from tests.specdec.lossless.markov import CPU, Markov, Trim, decode_two

SAMPLINGS = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.6),
    SamplingParams(temperature=1.2, top_k=3),
    SamplingParams(temperature=1.0, top_p=0.8),
    SamplingParams(temperature=1.0, min_p=0.15),
    SamplingParams(temperature=1.4, top_k=4, top_p=0.9, min_p=0.05),
]


def in_turns(
    samplings: Sequence[SamplingParams], numbers: Sequence[int]
) -> list[tuple[str, int, SamplingParams]]:
    """Each pair of sampling and number once, the two modes in turns: each meets each of both."""
    modes = ("rejection", "coupled")
    return [
        (modes[(row + column) % 2], k, params)
        for row, params in enumerate(samplings)
        for column, k in enumerate(numbers)
    ]


@pytest.mark.statistical
@pytest.mark.parametrize(("mode", "k", "params"), in_turns(SAMPLINGS, [0, 1, 2, 3]), ids=str)
def test_output_has_the_targets_distribution(mode: str, k: int, params: SamplingParams) -> None:
    """Chi-square of the first token and of the first two jointly; false alarm 1e-6 each."""
    models = Markov.random(vocab=5 + k, seed=10 + k)
    tokens = decode_two(models, params, MODES[mode], k).tokens
    joint = models.first_two(params)
    assert chi_square_excess(counted(tokens[:, :1], models.vocab), joint.sum(1)) < 1
    assert chi_square_excess(counted(tokens, models.vocab), joint) < 1


@pytest.mark.statistical
@pytest.mark.parametrize(("mode", "k", "params"), in_turns(SAMPLINGS[::2], [1, 2, 3]), ids=str)
def test_candidates_that_nobody_drew_keep_the_distribution(
    mode: str, k: int, params: SamplingParams
) -> None:
    """Each follows from the one before; false alarm 1e-6 each."""
    models = Markov.random(vocab=5 + k, seed=10 + k)
    next_one = models.target.topk(2).indices[:, 1]
    outcome = decode_two(models, params, MODES[mode], k, certain=next_one)
    assert 0 < outcome.accepted < outcome.verified
    joint = models.first_two(params)
    assert chi_square_excess(counted(outcome.tokens[:, :1], models.vocab), joint.sum(1)) < 1
    assert chi_square_excess(counted(outcome.tokens, models.vocab), joint) < 1


@pytest.mark.statistical
@pytest.mark.parametrize("mode", ["rejection", "coupled"])
@pytest.mark.parametrize("params", SAMPLINGS[::2], ids=str)
def test_drawn_candidates_behind_certain_ones_keep_the_distribution(
    mode: str, params: SamplingParams
) -> None:
    """Rows with none, one and two certain ones of three, side by side; false alarm 1e-6 each."""
    models = Markov.random(vocab=6, seed=13)
    certain = models.target.topk(2).indices[:, 1]
    outcome = decode_two(models, params, MODES[mode], 3, certain=certain, known=2)
    assert 0 < outcome.accepted < outcome.verified
    joint = models.first_two(params)
    for rows in (slice(None), slice(1, None, 3), slice(2, None, 3)):
        tokens = outcome.tokens[rows]
        assert chi_square_excess(counted(tokens[:, :1], models.vocab), joint.sum(1)) < 1
        assert chi_square_excess(counted(tokens, models.vocab), joint) < 1


@pytest.mark.statistical
def test_a_certain_candidate_that_is_judged_as_if_it_was_drawn_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its place in q is another candidate's."""
    monkeypatch.setattr(Proposal, "known_lengths", lambda self: None)
    models, params = Markov.random(vocab=6, seed=13), SamplingParams()
    certain = models.target.topk(2).indices[:, 1]
    tokens = decode_two(models, params, MODES["rejection"], 3, certain=certain, known=2).tokens
    assert chi_square_excess(counted(tokens, 6), models.first_two(params)) > 1


@pytest.mark.statistical
def test_candidates_that_nobody_drew_may_be_trimmed_by_themselves() -> None:
    models, params = Markov.random(vocab=5, seed=21), SamplingParams()
    tokens = decode_two(
        models, params, MODES["rejection"], 2, trim=drop_a_token, certain=torch.arange(5).roll(1)
    ).tokens
    assert chi_square_excess(counted(tokens, 5), models.first_two(params)) < 1


@pytest.mark.statistical
def test_trimming_by_what_came_before_keeps_the_distribution() -> None:
    """The allowed kind: the second candidate is submitted only after a likely first one."""

    def allowed(candidates: Tensor, scores: Tensor) -> Tensor:
        return 1 + (scores[:, 0] > 0.3).long()

    params = SamplingParams()
    models = Markov.random(vocab=5, seed=21)
    tokens = decode_two(models, params, MODES["rejection"], 2, trim=allowed).tokens
    assert chi_square_excess(counted(tokens, 5), models.first_two(params)) < 1


@pytest.mark.statistical
def test_coupled_verification_allows_any_trimming() -> None:
    """Here a candidate may be dropped by its own score, and not one token changes."""
    models, params = Markov.random(vocab=5, seed=21), SamplingParams()
    coupled = MODES["coupled"]
    trimmed = decode_two(models, params, coupled, 2, rows=20_000, trim=drop_unlikely).tokens
    assert torch.equal(trimmed, decode_two(models, params, coupled, 2, rows=20_000).tokens)


@pytest.mark.parametrize("mode", ["rejection", "coupled"])
def test_a_draft_that_is_the_target_has_everything_accepted(mode: str) -> None:
    table = Markov.random(vocab=6, seed=22).target
    outcome = decode_two(Markov(table, table), SamplingParams(top_p=0.9), MODES[mode], 3, rows=5000)
    assert outcome.accepted == outcome.verified == 15_000


def test_coupled_tokens_are_the_same_for_any_draft_and_k() -> None:
    params = SamplingParams(temperature=1.1, top_p=0.95)
    one, other = Markov.random(7, seed=23), Markov.random(7, seed=24)
    plain = decode_two(one, params, MODES["coupled"], 0, rows=5000).tokens
    for draft in (one.draft, other.draft, one.target):
        for k in (1, 3):
            models = Markov(one.target, draft)
            assert torch.equal(
                decode_two(models, params, MODES["coupled"], k, rows=5000).tokens, plain
            )


def total_variation(models: Markov, params: SamplingParams) -> float:
    """Between the two models' distributions of the first token."""
    p, q = (reference_distribution(each[0], params) for each in (models.target, models.draft))
    return float((p - q).abs().sum() / 2)


@pytest.mark.statistical
@pytest.mark.parametrize("disagreement", [0.3, 1.0, 3.0])
def test_acceptance_rate_is_what_theory_says(disagreement: float) -> None:
    """Rejection: exactly 1 - TV. Coupled: between (1 - TV) / (1 + TV) and 1 - TV.

    Of 50,000 first candidates; 5 standard deviations, so false alarm 6e-7 a side.
    """
    vocab, n, params = 6, 50_000, SamplingParams()
    table = Markov.random(vocab, seed=25, disagreement=disagreement)
    # Every context alike, so that candidates of second rounds have the same acceptance.
    models = Markov(table.target[:1].expand(vocab, -1), table.draft[:1].expand(vocab, -1))
    tv = total_variation(models, params)
    rates = {}
    for name, mode in MODES.items():
        outcome = decode_two(models, params, mode, 1, rows=n)
        rates[name] = outcome.accepted / outcome.verified
    slack = 5 * (0.25 / n) ** 0.5
    assert abs(rates["rejection"] - (1 - tv)) < slack
    assert (1 - tv) / (1 + tv) - slack <= rates["coupled"] <= 1 - tv + slack


@pytest.mark.statistical
def test_greedy_rows_inside_a_rejection_batch_follow_the_argmax() -> None:
    """One batch, greedy and sampled rows by turns, one candidate each; false alarm 1e-6."""
    models, n = Markov.random(vocab=5, seed=26), 60_000
    sampled = SamplingParams(temperature=1.0, top_k=4)
    batch = SamplingBatch.of([SamplingParams(temperature=0), sampled], CPU).rows(
        torch.arange(n) % 2
    )
    batch.seed.copy_(torch.arange(n))
    at, mode = torch.zeros(n, dtype=torch.int64), MODES["rejection"]
    proposal = Proposal(n, 1, CPU)
    tokens, q = mode.propose(models.draft[at], batch, at)
    proposal.add(range(n), torch.arange(n), tokens, q)
    owner = torch.arange(n).repeat_interleave(2)
    context = torch.stack([at, tokens], 1).flatten()
    accepted, bonus = mode.verify(
        models.target[context],
        batch.rows(owner),
        torch.arange(2).repeat(n),
        2 * torch.arange(n),
        torch.ones(n, dtype=torch.int64),
        proposal,
    )
    first = torch.where(accepted > 0, tokens, bonus)
    assert (first[::2] == models.target[0].argmax()).all()
    assert (tokens[::2] == models.draft[0].argmax()).all()
    greedy_bonus = bonus[::2][accepted[::2] == 1]
    assert (greedy_bonus == models.target[models.target[0].argmax()].argmax()).all()
    assert chi_square_excess(counted(first[1::2, None], 5), models.first_two(sampled).sum(1)) < 1


# --------------------------------------------------------------------- would we notice?


def drop_unlikely(candidates: Tensor, scores: Tensor) -> Tensor:
    """Breaks the invariant: the last candidate is dropped for its own low probability."""
    return candidates.shape[1] - (scores[:, -1] < 0.3).long()


def drop_a_token(candidates: Tensor, scores: Tensor) -> Tensor:
    """Breaks the invariant: the last candidate is dropped for being token 1."""
    return candidates.shape[1] - (candidates[:, -1] == 1).long()


Reject = Callable[..., tuple[Tensor, Tensor]]
Ratio = Callable[[Tensor, Tensor, Tensor], Tensor]


def reject_with(ratio: Ratio, residual: Callable[[Tensor, Tensor], Tensor]) -> Reject:
    """`reject` written plainly, with its two ingredients open to damage."""

    def mutant(
        p: Tensor,
        first: Tensor,
        q: Tensor,
        q_row: Tensor,
        candidates: Tensor,
        lengths: Tensor,
        u: Tensor,
        _known: None,
    ) -> tuple[Tensor, Tensor]:
        most = candidates.shape[1]
        at = first[:, None] + torch.minimum(torch.arange(most), lengths[:, None])
        accepted = accepted_prefix(ratio(u, p[at, candidates], q[q_row, candidates]), lengths)
        target = p[first + accepted]
        draft = q[q_row.gather(1, accepted.clamp(max=most - 1)[:, None]).squeeze(1)]
        fallen = (accepted < lengths)[:, None]
        return accepted, torch.where(fallen, residual(target, draft), target)

    return mutant


def right_ratio(u: Tensor, p: Tensor, q: Tensor) -> Tensor:
    return u * q < p


def right_residual(p: Tensor, q: Tensor) -> Tensor:
    return (p - q).clamp(min=0)


MUTANTS: dict[str, tuple[Ratio, Callable[[Tensor, Tensor], Tensor]]] = {
    "residual is p": (right_ratio, lambda p, q: p),
    "residual is |p - q|": (right_ratio, lambda p, q: (p - q).abs()),
    "residual is q": (right_ratio, lambda p, q: q),
    "ratio is q/p": (lambda u, p, q: u * p < q, right_residual),
    "accepts where p >= q only": (lambda u, p, q: q <= p, right_residual),
    "accepts always": (lambda u, p, q: torch.ones_like(u, dtype=torch.bool), right_residual),
    "forgets q": (lambda u, p, q: u < p, right_residual),
}


def excess(models: Markov, params: SamplingParams, k: int, trim: Trim | None = None) -> float:
    tokens = decode_two(models, params, MODES["rejection"], k, trim=trim).tokens
    return chi_square_excess(counted(tokens, models.vocab), models.first_two(params))


@pytest.mark.statistical
@pytest.mark.parametrize("k", [1, 2])
def test_the_harness_passes_an_unbroken_reject(monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    monkeypatch.setattr(verification, "reject", reject_with(right_ratio, right_residual))
    assert excess(Markov.random(6, seed=31), SamplingParams(), k) < 1


@pytest.mark.statistical
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_broken_reject_is_noticed(monkeypatch: pytest.MonkeyPatch, mutant: str, k: int) -> None:
    monkeypatch.setattr(verification, "reject", reject_with(*MUTANTS[mutant]))
    assert excess(Markov.random(6, seed=31), SamplingParams(), k) > 1


@pytest.mark.statistical
def test_a_residual_that_keeps_the_candidate_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = verification.reject_certain

    def forgetful(p: Tensor, first: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        accepted, _ = honest(p, first, *others)
        return accepted, p[first + accepted]

    monkeypatch.setattr(verification, "reject_certain", forgetful)
    models, params = Markov.random(6, seed=31), SamplingParams()
    tokens = decode_two(
        models, params, MODES["rejection"], 1, certain=torch.arange(6).roll(1)
    ).tokens
    assert chi_square_excess(counted(tokens, 6), models.first_two(params)) > 1


@pytest.mark.statistical
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("trim", [drop_unlikely, drop_a_token])
def test_trimming_a_candidate_by_itself_is_noticed(trim: Trim, k: int) -> None:
    assert excess(Markov.random(6, seed=31), SamplingParams(), k, trim) > 1


@pytest.mark.statistical
def test_one_random_number_for_all_candidates_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake seen in public decoders: the seed is re-applied inside the accept loop."""
    honest = verification.uniform

    def same_everywhere(seed: Tensor, position: Tensor, draw: int) -> Tensor:
        return honest(seed, torch.zeros_like(position), draw)  # type: ignore[arg-type]

    monkeypatch.setattr(verification, "uniform", same_everywhere)
    assert excess(Markov.random(6, seed=31), SamplingParams(), 2) > 1
