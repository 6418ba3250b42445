from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scipy import stats
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from specdec.lossless.sampling import (
    NO_TOKEN,
    Draw,
    SamplingBatch,
    coupled_choice,
    coupled_scores,
    exponential_noise,
    probabilities,
    sample,
    uniform,
)
from specdec.request import SamplingParams
from tests.specdec.goodness import FALSE_ALARM, chi_square_excess, counted, reference_distribution

CPU = torch.device("cpu")


def random_logits(rows: int, vocab: int, spread: float, seed: int = 0) -> Tensor:
    return spread * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def batch(*params: SamplingParams) -> SamplingBatch:
    return SamplingBatch.of(params, CPU)


def by_transformers(logits: Tensor, params: SamplingParams) -> Tensor:
    """[V] as `generate` would sample one row, its warpers in its order."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(params.temperature))])
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0:
        warpers.append(MinPLogitsWarper(params.min_p))
    return torch.softmax(warpers(None, logits[None].clone()), -1)[0]


TRUNCATIONS = [
    SamplingParams(temperature=0.7),
    SamplingParams(temperature=1.5, top_k=5),
    SamplingParams(temperature=1.0, top_k=1),
    SamplingParams(temperature=1.0, top_k=1000),
    SamplingParams(temperature=0.9, top_p=0.8),
    SamplingParams(temperature=2.0, top_p=0.05),
    SamplingParams(temperature=1.0, min_p=0.1),
    SamplingParams(temperature=1.3, top_k=20, top_p=0.9),
    SamplingParams(temperature=1.3, top_k=20, top_p=0.9, min_p=0.05),
    SamplingParams(temperature=0.6, top_p=0.95, min_p=0.02),
]


@pytest.mark.parametrize("params", TRUNCATIONS, ids=str)
def test_truncation_equals_transformers_warpers(params: SamplingParams) -> None:
    logits = random_logits(16, 211, 2.0)
    ours = probabilities(logits, batch(*[params] * 16))
    theirs = torch.stack([by_transformers(row, params) for row in logits])
    assert torch.equal(ours > 0, theirs > 0)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_rows_of_one_batch_keep_their_own_parameters() -> None:
    params = [*TRUNCATIONS, SamplingParams(temperature=0), SamplingParams(temperature=0, top_p=0.5)]
    logits = random_logits(len(params), 211, 2.0, seed=3)
    ours = probabilities(logits, batch(*params))
    for row, its, got in zip(logits, params, ours, strict=True):
        if its.temperature == 0:
            assert torch.equal(got, torch.nn.functional.one_hot(row.argmax(), 211).float())
        else:
            torch.testing.assert_close(got, by_transformers(row, its), rtol=1e-4, atol=1e-7)


def test_the_bits_of_a_row_do_not_depend_on_what_others_ask_for() -> None:
    """Nor does the last bit of a log-probability, then, whoever is in the batch."""
    params = [*TRUNCATIONS, SamplingParams(temperature=0)]
    logits = random_logits(len(params), 211, 2.0, seed=5)
    together = probabilities(logits, batch(*params))
    for row, its, got in zip(logits, params, together, strict=True):
        assert torch.equal(probabilities(row[None], batch(its))[0], got)


def test_taking_rows_of_a_batch_takes_their_parameters() -> None:
    params = [*TRUNCATIONS, SamplingParams(temperature=0, seed=9)]
    index = torch.tensor([10, 2, 2, 0, 8])
    logits = random_logits(5, 97, 2.0)
    taken = batch(*params).rows(index)
    assert taken.seed.tolist() == [9, 0, 0, 0, 0]
    expected = torch.stack(
        [
            probabilities(row[None], batch(params[i]))[0]
            for row, i in zip(logits, index.tolist(), strict=True)
        ]
    )
    torch.testing.assert_close(probabilities(logits, taken), expected)


@pytest.mark.parametrize("top_k", [0, 2000])
def test_a_nucleus_wider_than_the_first_search_is_found_whole(top_k: int) -> None:
    """A flat distribution over 5000 tokens: 90% of it is far more than the 1024 looked at first."""
    params = SamplingParams(top_p=0.9, top_k=top_k)
    logits = random_logits(3, 5000, 0.3)
    ours = probabilities(logits, batch(params, replace(params, top_p=0.01), params))
    expected = reference_distribution(logits, params)
    assert (expected[0] > 0).sum() > 1024
    for row in (0, 2):
        # Where the nucleus ends may differ by the rounding of a sum of thousands of float32.
        assert abs((ours[row] > 0).sum() - (expected[row] > 0).sum()) <= 1
        assert (ours[row] - expected[row]).abs().sum() < 2e-3
    narrow = reference_distribution(logits[1], replace(params, top_p=0.01))
    torch.testing.assert_close(ours[1].double(), narrow, rtol=1e-4, atol=1e-9)


def test_tokens_that_tie_with_the_last_one_kept_are_kept() -> None:
    logits = torch.tensor([[3.0, 1.0, 1.0, 0.0]])
    assert (probabilities(logits, batch(SamplingParams(top_k=2)))[0] > 0).tolist() == [1, 1, 1, 0]


def test_uniform_numbers_differ_by_seed_position_and_draw() -> None:
    seeds, positions = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    numbers = [uniform(seeds, positions, draw) for draw in Draw]
    assert torch.equal(numbers[0], uniform(seeds, positions, Draw.CANDIDATE))
    assert torch.cat(numbers).unique().numel() == 4 * 4096


def test_extreme_seeds_are_seeds_like_others() -> None:
    params = [
        SamplingParams(seed=s) for s in (-1, 0, 2**63 - 1, 2**63, 2**64 - 1, 2**64 + 5, -(2**63))
    ]
    numbers = uniform(batch(*params).seed, torch.zeros(7, dtype=torch.int64), Draw.BONUS)
    assert ((numbers > 0) & (numbers < 1)).all()
    assert numbers[0] == numbers[4]  # the same low 64 bits
    assert numbers[3] == numbers[6]
    assert numbers.unique().numel() == 5


@pytest.mark.statistical
@pytest.mark.parametrize("axis", ["seeds", "positions"])
def test_uniform_numbers_are_uniform(axis: str) -> None:
    """Kolmogorov-Smirnov over 200,000 neighbouring seeds or positions; false alarm 1e-6."""
    many, zero = torch.arange(200_000), torch.zeros(200_000, dtype=torch.int64)
    for draw in Draw:
        u = uniform(many, zero, draw) if axis == "seeds" else uniform(zero, many, draw)
        assert u.dtype == torch.float64
        assert u.min() >= 0 and u.max() < 1
        assert abs(u.double().mean() - 0.5) < 5 * (1 / 12 / len(u)) ** 0.5
        assert stats.kstest(u.double().numpy(), "uniform").pvalue > FALSE_ALARM


def correlation(x: Tensor, y: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([x.flatten(), y.flatten()]).double())[0, 1])


@pytest.mark.statistical
def test_numbers_for_different_purposes_are_uncorrelated() -> None:
    """Six pairs of 200,000 numbers; |r| > 5 / sqrt(n) has probability 6e-7 each."""
    seeds, positions = torch.arange(200_000) // 16, torch.arange(200_000) % 16
    numbers = [uniform(seeds, positions, draw) for draw in Draw]
    for i, one in enumerate(numbers):
        for other in numbers[:i]:
            assert abs(correlation(one, other)) < 5 / 200_000**0.5


@pytest.mark.statistical
def test_noise_is_exponential() -> None:
    """KS of 300 x 1009 numbers, and of each of 40 single rows and tokens; false alarm 1e-6 each."""
    noise = exponential_noise(torch.arange(300) // 10, torch.arange(300) % 10, 1009)
    assert noise.min() > 0 and torch.isfinite(noise).all()
    for numbers in (noise.flatten(), *noise[:20], *noise[:, :20].T):
        assert stats.kstest(numbers.double().numpy(), "expon").pvalue > FALSE_ALARM


@pytest.mark.statistical
def test_noise_of_neighbouring_seeds_positions_and_tokens_is_uncorrelated() -> None:
    """200,000 pairs each; |r| > 5 / sqrt(n) has probability 6e-7."""
    vocab = 1000
    zero, steps = torch.zeros(200, dtype=torch.int64), torch.arange(200)
    by_position = exponential_noise(zero, steps, vocab)
    by_seed = exponential_noise(steps, zero, vocab)
    pairs = [
        (by_position[1:], by_position[:-1]),
        (by_seed[1:], by_seed[:-1]),
        (by_seed[1:], by_position[1:]),
        (by_position[:, 1:], by_position[:, :-1]),
        (by_position[:, :500], by_position[:, 500:]),
        (by_position[1:, 1:], by_position[:-1, :-1]),
    ]
    for one, other in pairs:
        assert abs(correlation(one, other)) < 5 / one.numel() ** 0.5


def test_noise_of_a_row_is_the_same_alone_and_in_a_batch() -> None:
    seeds, positions = torch.arange(17) * 7919 - 3, torch.arange(17) % 5
    together = exponential_noise(seeds, positions, 523)
    for row in range(17):
        alone = exponential_noise(seeds[row : row + 1], positions[row : row + 1], 523)
        assert torch.equal(together[row], alone[0])


@pytest.mark.statistical
@pytest.mark.parametrize("peak", [0.0, 1.5, 4.0])
def test_coupled_choice_follows_the_distribution(peak: float) -> None:
    """Chi-square over 200,000 (seed, position) keys and 11 tokens; false alarm 1e-6."""
    p = torch.softmax(random_logits(1, 11, peak, seed=5)[0], -1)
    keys = torch.arange(200_000)
    choices = torch.cat(
        [coupled_choice(p.expand(len(k), -1), k // 100, k % 100) for k in keys.split(50_000)]
    )
    assert chi_square_excess(counted(choices[:, None], 11), p) < 1


@pytest.mark.statistical
def test_choices_of_successive_positions_are_independent() -> None:
    """Chi-square of 100,000 pairs against p x p over 5 tokens; false alarm 1e-6."""
    p = torch.softmax(random_logits(1, 5, 1.0, seed=6)[0], -1)
    seeds = torch.arange(100_000)
    pair = [
        coupled_choice(p.expand(100_000, -1), seeds, torch.full_like(seeds, at)) for at in (3, 4)
    ]
    assert chi_square_excess(counted(torch.stack(pair, 1), 5), p[:, None] * p) < 1


@pytest.mark.parametrize("vocab", [1, 7, 256, 1000, 49152])
def test_coupled_choice_is_the_highest_score(vocab: int) -> None:
    """On a CPU a kernel looks for it, which takes few logarithms."""
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(60, vocab, generator=generator)
    p = torch.softmax(logits * torch.logspace(-2, 2, 60)[:, None], -1)  # flat ones and sure ones
    p[::7, ::3] = 0.0
    p[:, 0] += 1e-9
    seeds = torch.arange(60) * 2**55 - 2**60
    at = torch.arange(60)
    assert torch.equal(coupled_choice(p, seeds, at), coupled_scores(p, seeds, at).argmax(-1))
    p[3] = torch.nan
    assert coupled_choice(p, seeds, at)[3] == NO_TOKEN


def test_coupled_choice_of_a_one_hot_row_is_its_token() -> None:
    tokens = torch.arange(50) % 13
    one_hot = torch.nn.functional.one_hot(tokens, 13).float()
    assert torch.equal(coupled_choice(one_hot, torch.arange(50), torch.arange(50)), tokens)


def test_coupled_choice_never_takes_a_token_of_probability_zero() -> None:
    p = torch.zeros(4000, 7)
    p[:, 2], p[:, 5] = 1e-7, 1 - 1e-7
    chosen = coupled_choice(p, torch.arange(4000), torch.zeros(4000, dtype=torch.int64))
    assert set(chosen.tolist()) <= {2, 5}


EDGES = [0.0, 2.0**-53, 1e-7, 0.25, 0.5, 0.999999, 1 - 2.0**-53]


@pytest.mark.parametrize("total", [1.0, 1e-6, 0.3])
def test_sample_never_returns_a_token_of_probability_zero(total: float) -> None:
    rows = [
        [0, 0, 1, 0],
        [1, 0, 0, 0],
        [0, 0, 0, 1],
        [0, 0.5, 0.5, 0],
        [0.3, 0, 0.7, 0],
        [0, 1e-30, 1, 0],
    ]
    probs = total * torch.tensor(rows).repeat_interleave(len(EDGES), 0)
    token = sample(probs, torch.tensor(EDGES * len(rows), dtype=torch.float64))
    assert (probs.gather(1, token[:, None]) > 0).all()


def test_sample_stays_inside_a_large_vocabulary_whose_mass_rounds() -> None:
    """Cumulated float32 mass of 150,000 tokens is not 1; the last token must still be possible."""
    probs = torch.softmax(random_logits(4, 150_000, 3.0), -1)
    probs[:, -1000:] = 0
    token = sample(probs, torch.tensor([0, 0.5, 1 - 1e-6, 1 - 2.0**-53], dtype=torch.float64))
    assert (probs.gather(1, token[:, None]) > 0).all()


@pytest.mark.statistical
def test_sample_follows_the_distribution() -> None:
    """Chi-square over 200,000 seeds and 7 tokens; false alarm 1e-6."""
    p = torch.softmax(random_logits(1, 7, 1.5, seed=8)[0], -1)
    seeds = torch.arange(200_000)
    u = uniform(seeds, torch.zeros_like(seeds), Draw.CANDIDATE)
    tokens = sample(0.4 * p.expand(len(seeds), -1), u)  # any total will do
    assert chi_square_excess(counted(tokens[:, None], 7), p) < 1
