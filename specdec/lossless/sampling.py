"""From logits to tokens, with random numbers that are a function of (seed, round, position).

Nothing here keeps a generator: a random number is a hash of the request's seed, the position in its
output and what the number is for. The same request therefore draws the same numbers in any batch,
on any machine, in any retry.

Under `rejection` the row's round is hashed into the seed as well (`SamplingBatch.in_round`). A
candidate behind a rejection is thrown away, and the next round draws at its position again: with
the same number, whatever remembers the discarded candidate would know what is drawn. So no number
is drawn twice. `coupled` must draw the same number at a position in every round: that is its point.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from specdec.kernels.choose import cpu_kernels, kernels_over
from specdec.request import SamplingParams


class Draw(IntEnum):
    """What a random number is for; numbers for different purposes are independent."""

    CANDIDATE = 1
    ACCEPT = 2
    BONUS = 3
    COUPLED = 4


NO_TOKEN = -1
"""What is chosen where there is no distribution.

Logits that are NaN, or infinite, or all -inf have no softmax. Such a row of `probabilities` has NaN
in its first column, and whatever chooses a token from it chooses this.
"""

BLOCK = 128
"""Tokens that `sample` sums up in float32 before it goes on in float64.

Raised, sums are less exact; lowered, there are more of them.
"""


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """The sampling parameters of n rows as tensors, and what the host knows of them.

    Attributes:
        temperature, top_p, min_p: float32 [n]; top_k: int64 [n]; seed: int64 [n].
        greedy: bool [n], rows with temperature 0.
        all_greedy, any_greedy, any_top_p, any_min_p: host booleans, so that unused work is skipped
            without asking the device.
        max_top_k: the largest top_k of the rows.
        drawn: float64 [n], the numbers by which candidates are drawn, if they are known already
            (`candidate_numbers`).
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor
    greedy: Tensor
    all_greedy: bool
    any_greedy: bool
    any_top_p: bool
    any_min_p: bool
    max_top_k: int
    drawn: Tensor | None = None

    @classmethod
    def of(cls, params: Sequence[SamplingParams], device: torch.device) -> SamplingBatch:
        """Stack the parameters of n rows."""

        def floats(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)

        def ints(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        sampled = [p for p in params if p.temperature > 0]
        return cls(
            temperature=floats([p.temperature or 1.0 for p in params]),
            top_k=ints([min(p.top_k, 2**31) for p in params]),
            top_p=floats([p.top_p for p in params]),
            min_p=floats([p.min_p for p in params]),
            seed=ints([signed64(p.seed) for p in params]),
            greedy=torch.tensor([p.temperature == 0 for p in params], device=device),
            all_greedy=not sampled,
            any_greedy=len(sampled) < len(params),
            any_top_p=any(p.top_p < 1 for p in sampled),
            any_min_p=any(p.min_p > 0 for p in sampled),
            max_top_k=max((p.top_k for p in sampled), default=0),
        )

    def in_round(self, number: Tensor) -> SamplingBatch:
        """The parameters of the rows in round `number` int64 [n] of each, with seeds of that round.

        Numbers of different rounds are independent.
        """
        return replace(self, seed=_round_seed(self.seed, number))

    @property
    def used(self) -> dict[str, Tensor]:
        """The tensors in use, by name; the others have no say."""
        used = {"temperature": self.temperature}
        if self.max_top_k or self.any_top_p or self.any_min_p:
            used |= {"top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}
        if self.any_greedy:
            used["greedy"] = self.greedy
        used |= {"seed": self.seed} if self.drawn is None else {"drawn": self.drawn}
        return used

    def rows(self, index: Tensor) -> SamplingBatch:
        """The parameters of the rows in `index` [m], which may repeat; only those in use."""
        return self.of_tensors(tensor[index] for tensor in self.used.values())

    def of_tensors(self, tensors: Iterable[Tensor]) -> SamplingBatch:
        """The same with others in place of those in use, in their order."""
        others: dict[str, Any] = dict(zip(self.used, tensors, strict=False))
        return replace(self, **others)


def probabilities(logits: Tensor, params: SamplingBatch) -> Tensor:
    """The distribution that a row is sampled from.

    Temperature, then top-k, then top-p of what is left, then min-p (the order of transformers'
    `generate`). Tokens that tie with the last one kept are kept. Greedy rows are one-hot.

    Args:
        logits: float [n, V].
        params: of the same n rows.

    Returns:
        float32 [n, V], each row summing to 1; where logits have no softmax, the first is NaN.
    """
    if kernels := kernels_over(logits):
        probs = kernels.softmax(logits, params.temperature)
    else:
        probs = torch.softmax(logits.float() / params.temperature[:, None], dim=-1)
    if params.max_top_k or params.any_top_p or params.any_min_p:
        probs = _truncate(probs, params)
    if params.any_greedy:
        best = greedy_choice(logits)
        one = torch.where(best == NO_TOKEN, torch.nan, 1.0)[:, None]
        one_hot = torch.zeros_like(probs).scatter_(1, best.clamp(min=0)[:, None], one)
        probs = torch.where(params.greedy[:, None], one_hot, probs)
    return probs


def _truncate(probs: Tensor, params: SamplingBatch) -> Tensor:
    """Zero what top-k, top-p and min-p cut from `probs` [n, V] and renormalise.

    Each cut is a floor under the kept probabilities: top-k and top-p keep the `count` likeliest
    tokens, so their floor is the probability of the last of these.
    """
    vocab, top_k, top_p = probs.shape[-1], params.top_k[:, None], params.top_p[:, None]
    limit = torch.where(top_k > 0, top_k, vocab)
    for width in _search_widths(params, vocab, probs.device.type):
        top = probs.topk(width).values  # [n, width], descending
        running = torch.where(torch.arange(width, device=probs.device) < limit, top, 0.0).cumsum(-1)
        total = torch.where(top_k > 0, running[:, -1:], 1.0)
        if width == vocab or not params.any_top_p or bool((running[:, -1:] >= top_p * total).all()):
            break
    # The nucleus is the smallest set that reaches top_p: up to the token at which the mass does.
    nucleus = (running < top_p * total).sum(-1, keepdim=True) + 1
    count = torch.minimum(limit, torch.where(top_p < 1, nucleus, vocab)).clamp(max=width)
    limited = (top_k > 0) | (top_p < 1)
    floor = torch.where(limited, top.gather(1, count - 1), 0.0)
    floor = torch.maximum(floor, params.min_p[:, None] * top[:, :1])
    kept = torch.where(probs >= floor, probs, 0.0)
    cut = kept / kept.sum(-1, keepdim=True)  # beside such a row others keep their bits
    return torch.where(limited | (params.min_p[:, None] > 0), cut, probs)


def _search_widths(params: SamplingBatch, vocab: int, device: str) -> tuple[int, ...]:
    """How many of the likeliest tokens to look at, until the cut is found among them.

    A nucleus is rarely wide, and a CPU takes long to sort a vocabulary. On an accelerator a sort is
    cheap, and asking whether fewer sufficed is not.
    """
    if not params.any_top_p:
        return (min(max(params.max_top_k, 1), vocab),)
    return (min(max(params.max_top_k, 1024), vocab), vocab) if device == "cpu" else (vocab,)


def sample(probs: Tensor, u: Tensor) -> Tensor:
    """Draw one token a row by inversion of the cumulative distribution.

    A block of tokens is drawn, then a token in it. All sums but a block's own are in float64, so
    that the law is that of `probs` within a total variation of 1e-7.

    Args:
        probs: float32 [n, V], non-negative, any positive total.
        u: float64 [n] in [0, 1).

    Returns:
        int64 [n]; a token of probability 0 is never drawn. NO_TOKEN where a row has NaN.
    """
    block, left = _invert(block_masses(probs), u)
    place, _ = _invert(_tokens_of(probs, block).double(), left)
    return torch.where(probs[:, 0].isnan(), NO_TOKEN, block * BLOCK + place)


def _tokens_of(probs: Tensor, block: Tensor) -> Tensor:
    """float32 [n, W]: probs [n, V] of a block's W = min(V, BLOCK) tokens; 0 beyond the last."""
    vocab = probs.shape[-1]
    token = block[:, None] * BLOCK + torch.arange(min(BLOCK, vocab), device=probs.device)
    own = probs.gather(1, token.clamp(max=vocab - 1))
    return torch.where(token < vocab, own, 0.0)


def sample_distinct(probs: Tensor, u: Tensor, spare: Tensor) -> Tensor:
    """Draw W tokens a row, each from what those before it leave: without replacement.

    Args:
        probs: float32 [n, V], as for `sample`.
        u: float64 [n, W] in [0, 1).
        spare: int64 [n, W], taken in place of a token where those before it leave nothing.

    Returns:
        int64 [n, W]; NO_TOKEN where a row has NaN.
    """
    mass, drawn = block_masses(probs), list[Tensor]()
    places = torch.arange(min(BLOCK, probs.shape[1]), device=probs.device)
    for rank in range(u.shape[1]):
        block, left = _invert(mass, u[:, rank])
        own = _tokens_of(probs, block)
        for token in drawn:  # of the block's tokens those that are left
            own = own.masked_fill(places == (token - block * BLOCK)[:, None], 0.0)
        place, _ = _invert(own.double(), left)
        token = block * BLOCK + place
        drawn.append(torch.where(mass.sum(-1) > 0, token, spare[:, rank]) if rank else token)
        rest = own.scatter(1, place[:, None], 0.0).sum(-1, keepdim=True)
        mass = mass.scatter(1, block[:, None], rest.double())
    return torch.where(probs[:, :1].isnan(), NO_TOKEN, torch.stack(drawn, 1))


def block_masses(probs: Tensor) -> Tensor:
    """float64 [n, V // BLOCK + 1]: probs [n, V] summed over blocks of tokens, and the rest."""
    blocks = probs.shape[1] // BLOCK
    whole = torch.unflatten(probs[:, : blocks * BLOCK], 1, (blocks, BLOCK)).sum(-1)
    rest = probs[:, blocks * BLOCK :].sum(-1, keepdim=True)
    return torch.cat([whole, rest], 1).double()


def _invert(mass: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Which of mass float64 [n, m] the numbers u [n] in [0, 1) fall on, and how far in: [0, 1)."""
    total = (cumulative := mass.cumsum(-1))[:, -1:]
    # The minimum guards the case of u * total rounding up to the total.
    at = torch.minimum(u[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    # right=True: the first whose cumulative mass *exceeds* the threshold has positive mass.
    found = torch.searchsorted(cumulative, at, right=True).clamp_(max=mass.shape[1] - 1)
    own = mass.gather(1, found)
    left = (at - cumulative.gather(1, found) + own) / own
    return found[:, 0], left.clamp_(0, 1 - 2.0**-53)[:, 0]


def greedy_choice(logits: Tensor) -> Tensor:
    """The likeliest token of each row of logits [n, V], or NO_TOKEN: int64 [n]."""
    kernels = kernels_over(logits)
    if kernels is not None:
        return kernels.argmax(logits)
    best = logits.argmax(-1, keepdim=True)  # NaN is the largest of all
    return torch.where(logits.gather(1, best).isfinite(), best, NO_TOKEN)[:, 0]


def coupled_choice(probs: Tensor, seed: Tensor, position: Tensor) -> Tensor:
    """The token that (seed, position) chooses from a distribution: argmax(log p + Gumbel noise).

    Written as an exponential race, argmax(p / E) with E ~ Exp(1) per token. Two distributions that
    are close choose the same token with probability at least (1 - TV) / (1 + TV) (Daliri et al.,
    Coupling without communication and drafter-invariant speculative decoding).

    Args:
        probs: float32 [n, V]; seed, position: int64 [n].

    Returns:
        int64 [n]; NO_TOKEN where a row has NaN.
    """
    if kernels := cpu_kernels(torch.float32, probs.device):
        choice = kernels.race(probs.contiguous(), _key(seed, position, Draw.COUPLED))
    else:
        choice = coupled_scores(probs, seed, position).argmax(-1)
    return torch.where(probs[:, 0].isnan(), NO_TOKEN, choice)


def coupled_scores(probs: Tensor, seed: Tensor, position: Tensor) -> Tensor:
    """float32 [n, V]: p / E, of which `coupled_choice` takes the highest."""
    noise = exponential_noise(seed, position, probs.shape[-1])
    return torch.div(probs, noise, out=noise)


def uniform(seed: Tensor, position: Tensor, draw: Draw, branch: Tensor | int = 0) -> Tensor:
    """float64 in [0, 1) of 53 bits, a function of its arguments, whose shapes broadcast.

    `branch` tells numbers apart that are drawn for the same thing at one position of a tree.
    """
    return _shift_right(_key(seed, position, draw, branch), 11).double() * 2.0**-53


def candidate_numbers(
    seeds: ArrayLike, rounds: ArrayLike, positions: ArrayLike, branches: ArrayLike = 0
) -> NDArray[np.float64]:
    """What `uniform` says of Draw.CANDIDATE in a round of each row; shapes broadcast.

    On the host, and many at once: so a device has nothing to do for it before it can draft.
    """
    each = (np.array(given, dtype=np.int64) for given in (seeds, rounds, positions, branches))
    seed, number, at, branch = each
    key = _key(_round_seed(seed, number), at, Draw.CANDIDATE, branch)
    return _shift_right(key, 11).astype(np.float64) * 2.0**-53


def exponential_noise(seed: Tensor, position: Tensor, vocab: int) -> Tensor:
    """float32 [n, vocab] of Exp(1) noise, a function of (seed [n], position [n], token).

    A 64-bit key per row is mixed with the token id by a 32-bit finaliser (two multiply-xorshift
    rounds, constants of Wellons' lowbias32), in place: this is the widest tensor of a round. The
    state half way, before half of the key is added, gives bits of its own.
    """
    key = _key(seed, position, Draw.COUPLED)
    low, high = key.to(torch.int32), _shift_right(key, 32).to(torch.int32)
    token = torch.arange(vocab, dtype=torch.int32, device=seed.device)
    y = (token * -1640531535)[None, :] ^ low[:, None]  # Knuth's 2654435761 as int32
    spare = torch.empty_like(y)
    _xorshift32(y, 16, spare)
    y *= 0x7FEB352D
    x = y + high[:, None]
    _xorshift32(x, 15, spare)
    x *= -2073254261  # 0x846ca68b as int32
    _xorshift32(x, 16, spare)
    return exponential(x, y, spare)


def exponential(x: Tensor, y: Tensor, spare: Tensor) -> Tensor:
    """Exp(1) numbers, float32, of uniform bits int32 x and y, which are overwritten.

    31 bits of x are the integer and y the fraction of a number v in (0, 1), for the race is decided
    near 0: with the integer alone no token of less than 1e-9 of the likeliest one would ever win,
    and one race in 10,000 over 150,000 even tokens would be a tie.

    Args:
        spare: of their shape; what is returned takes its place in memory.
    """
    v = spare.view(torch.float32).copy_(x.bitwise_and_(0x7FFFFFFF))
    v.add_(x.view(torch.float32).copy_(y), alpha=2.0**-32)  # the fraction, less a half
    # Never so near 1 that the noise is infinite, nor 0. The scale is the same for all tokens.
    scale = 2.0**-31 * (1 - 2.0**-24)
    return v.mul_(-scale).sub_(scale * (0.5 + 2.0**-24)).log1p_().neg_()


def _xorshift32(x: Tensor, bits: int, spare: Tensor) -> None:
    """x ^= x >>> bits, in place."""
    torch.bitwise_right_shift(x, bits, out=spare)
    x ^= spare.bitwise_and_((1 << (32 - bits)) - 1)


Int64 = TypeVar("Int64", Tensor, NDArray[np.int64])
"""On a device or on the host: both wrap around alike."""


def _round_seed(seed: Int64, number: Int64) -> Int64:
    return _mix64(_mix64(seed) + (number + 1) * _ROUND)


def _key(seed: Int64, position: Int64, draw: Draw, branch: Int64 | int = 0) -> Int64:
    """A 64-bit hash of (seed, position, draw, branch): two rounds of the splitmix64 finaliser."""
    stream = signed64(draw * _STREAM) + branch * signed64(_BRANCH * _STREAM)
    return _mix64(_mix64(seed) + position * _GOLDEN + stream)


def _mix64(x: Int64) -> Int64:
    x = (x ^ _shift_right(x, 30)) * signed64(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * signed64(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def _shift_right(x: Int64, bits: int) -> Int64:
    """Logical shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def signed64(value: int) -> int:
    """A Python integer as the int64 with the same low 64 bits."""
    return (value + 2**63) % 2**64 - 2**63


_GOLDEN = signed64(0x9E3779B97F4A7C15)
_ROUND = signed64(0xDA942042E4DD58B5)
_STREAM = signed64(0xD1342543DE82EF95)
_BRANCH = 8  # more than there are purposes
