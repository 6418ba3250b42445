from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from specdec.lossless import verification
from specdec.lossless.sampling import SamplingBatch
from specdec.lossless.verification import MODES, Mode, Proposal, accepted_prefix, match, reject
from specdec.request import SamplingParams
from tests.specdec.goodness import chi_square_excess, counted, reference_distribution

CPU = torch.device("cpu")


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


# -------------------------------------------------------- a speculative decoder without models


@dataclass(frozen=True)
class Markov:
    """Language models small enough to enumerate: logits depend on the last token alone."""

    target: Tensor
    draft: Tensor

    @classmethod
    def random(cls, vocab: int, seed: int, disagreement: float = 1.5) -> Markov:
        generator = torch.Generator().manual_seed(seed)
        target = 1.5 * torch.randn(vocab, vocab, generator=generator)
        noise = disagreement * torch.randn(vocab, vocab, generator=generator)
        return cls(target, target + noise)

    @property
    def vocab(self) -> int:
        return len(self.target)

    def first_two(self, params: SamplingParams) -> Tensor:
        """float64 [V, V]: exact joint distribution of the two tokens after token 0."""
        p = reference_distribution(self.target, params)
        return p[0][:, None] * p


Trim = Callable[[Tensor, Tensor], Tensor]
"""(candidates [n, K], draft probabilities of each [n, K]) -> submitted lengths [n]."""


@dataclass
class Outcome:
    tokens: Tensor
    """[n, 2], the first two output tokens."""
    verified: int
    accepted: int


def decode_two(
    models: Markov,
    params: SamplingParams,
    mode: Mode,
    k: int,
    rows: int = 100_000,
    first_seed: int = 0,
    trim: Trim | None = None,
) -> Outcome:
    """The first two output tokens of `rows` independent requests with seeds of their own."""
    seed = torch.arange(first_seed, first_seed + rows)
    output = torch.zeros(rows, 2 + k + 1, dtype=torch.int64)
    generated = torch.zeros(rows, dtype=torch.int64)
    verified = accepted_total = 0
    batch = SamplingBatch.of([params], CPU)
    while len(active := (generated < 2).nonzero().flatten()):
        n = len(active)
        shared = batch.rows(torch.zeros(n, dtype=torch.int64))
        shared.seed.copy_(seed[active])
        start = generated[active]
        last = torch.where(start > 0, output[active, (start - 1).clamp(min=0)], 0)
        proposal = Proposal(n, k, CPU)
        index = torch.arange(n)
        contexts, scores = [last], []
        for depth in range(k):
            logits = models.draft[contexts[-1]]
            tokens, q = mode.propose(logits, shared, start + depth)
            proposal.add(range(n), index, tokens, q)
            scores.append(torch.softmax(logits, -1).gather(1, tokens[:, None]))
            contexts.append(tokens)
        lengths = torch.full((n,), k)
        if trim is not None:
            lengths = trim(proposal.candidates, torch.cat(scores, 1))
        packed_row = index.repeat_interleave(lengths + 1)
        first = (lengths + 1).cumsum(0) - lengths - 1
        offset = torch.arange(len(packed_row)) - first[packed_row]
        context = torch.stack(contexts, 1)[packed_row, offset]
        accepted, bonus = mode.verify(
            models.target[context],
            shared.rows(packed_row),
            start[packed_row] + offset,
            first,
            lengths,
            proposal,
        )
        assert ((accepted >= 0) & (accepted <= lengths)).all()
        steps = torch.arange(k)
        places = (start[:, None] + steps).clamp(max=output.shape[1] - 1)
        rows_at = active[:, None].expand(-1, k)
        stands = steps < accepted[:, None]
        output[rows_at[stands], places[stands]] = proposal.candidates[stands]
        output[active, start + accepted] = bonus
        generated[active] = start + accepted + 1
        verified += int(lengths.sum())
        accepted_total += int(accepted.sum())
    return Outcome(output[:, :2], verified, accepted_total)


SAMPLINGS = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.6),
    SamplingParams(temperature=1.2, top_k=3),
    SamplingParams(temperature=1.0, top_p=0.8),
    SamplingParams(temperature=1.0, min_p=0.15),
    SamplingParams(temperature=1.4, top_k=4, top_p=0.9, min_p=0.05),
]


@pytest.mark.statistical
@pytest.mark.parametrize("mode", ["rejection", "coupled"])
@pytest.mark.parametrize("k", [0, 1, 2, 3])
@pytest.mark.parametrize("params", SAMPLINGS, ids=str)
def test_output_has_the_targets_distribution(mode: str, k: int, params: SamplingParams) -> None:
    """Chi-square of the first token and of the first two jointly; false alarm 1e-6 each."""
    models = Markov.random(vocab=5 + k, seed=10 + k)
    tokens = decode_two(models, params, MODES[mode], k, rows=60_000).tokens
    joint = models.first_two(params)
    assert chi_square_excess(counted(tokens[:, :1], models.vocab), joint.sum(1)) < 1
    assert chi_square_excess(counted(tokens, models.vocab), joint) < 1


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
    """Breaks the invariant as in DESIGN.md §3: "drop b when drawn"."""
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


def lengths_of(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


@pytest.mark.parametrize("mode", ["rejection", "coupled"])
def test_a_round_without_candidates_yields_one_bonus_token_a_row(mode: str) -> None:
    models = Markov.random(5, seed=32)
    batch = SamplingBatch.of([SamplingParams(seed=s) for s in range(4)], CPU)
    zero = torch.zeros(4, dtype=torch.int64)
    accepted, bonus = MODES[mode].verify(
        models.target[:4], batch, zero, lengths_of(range(4)), zero, Proposal(4, 0, CPU)
    )
    assert accepted.tolist() == [0] * 4
    assert ((bonus >= 0) & (bonus < 5)).all()
