"""How probably verification accepts candidates of a draft, and the most that can be known of it.

Whoever knows both distributions, p of the target and q of the draft, knows the probability that a
candidate is accepted. No estimator knows more, for what is left is chance. So these probabilities
are the ceiling of every estimator: of one that knows the candidate, and of one that does not yet.

    rejection   after the draw min(1, p(y) / q(y)); before it the sum of min(p, q)
    coupled     after it m(y) / q(y); before it the sum of m, where m(y) is the probability that
                the race between tokens which decides is won by y under p and under q
    greedy      1 where both models have the same choice, otherwise 0; before and after
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from specdec.lossless.sampling import (
    Draw,
    SamplingBatch,
    coupled_choice,
    probabilities,
    sample,
    uniform,
)

Verification = Literal["rejection", "coupled"]

_SORTED_ROWS = 16
"""Positions whose tokens are sorted at once: 100 MB at 150,000 tokens. More gain no time."""


@dataclass(frozen=True, slots=True)
class Judged:
    """A candidate at each of n positions, and what becomes of it.

    Attributes:
        candidates: int64 [n].
        accepted: float32 [n], the probability of acceptance; of coupled ones, whether it was.
        knowable: float32 [n, 2], what p and q say of it, before and after the draw.
        stood: float32 [n], how probably the candidate was the text's token, where that is given.
    """

    candidates: Tensor
    accepted: Tensor
    knowable: Tensor
    stood: Tensor | None = None


def judge(
    target_logits: Tensor,
    draft_logits: Tensor,
    params: SamplingBatch,
    at: Tensor,
    verification: Verification,
    text: Tensor | None = None,
) -> Judged:
    """Draw a candidate at each of n positions, and say how probably it is accepted.

    Args:
        target_logits, draft_logits: [n, V], raw.
        params: sampling parameters of the n positions; at: int64 [n], output positions.
        verification: rejection or coupled.
        text: int64 [n], tokens that were drawn from p.
    """
    p, q = probabilities(target_logits, params), probabilities(draft_logits, params)
    if verification == "coupled" and not params.all_greedy:
        chosen = coupled_choice(q, params.seed, at)
        accepted = ((coupled_choice(p, params.seed, at) == chosen) & (chosen >= 0)).float()
        candidates = chosen.clamp(min=0)
        rows = zip(torch.split(p, _SORTED_ROWS), torch.split(q, _SORTED_ROWS), strict=True)
        both = torch.cat([matches(*each) for each in rows])
        after = (_of(both, candidates) / _of(q, candidates)).clamp(max=1)
    else:
        candidates = sample(q, uniform(params.seed, at, Draw.CANDIDATE)).clamp(min=0)
        both = torch.minimum(p, q)
        # No distribution accepts nothing.
        after = (_of(p, candidates) / _of(q, candidates)).clamp(max=1).nan_to_num(0.0)
        accepted = after
    knowable = torch.stack([both.sum(-1).clamp(max=1), after], 1).nan_to_num(0.0)
    if text is None:
        return Judged(candidates, accepted, knowable)
    stood = (_of(both, text) / _of(p, text)).nan_to_num(0.0)
    return Judged(candidates, accepted, knowable, stood)


def _of(x: Tensor, tokens: Tensor) -> Tensor:
    """The numbers [n] of x [n, V] that tokens int64 [n] have."""
    return x.gather(1, tokens[:, None])[:, 0]


def matches(p: Tensor, q: Tensor) -> Tensor:
    """The probability of each token that `coupled_choice` takes it by p and by q.

    Token i wins both races if E_i / p_i and E_i / q_i are the least, that is if E_j is at least
    E_i max(p_j / p_i, q_j / q_i) for all j. E are independent Exp(1), so the probability is one
    over the sum of these maxima. In the order of p / q the first part of the sum is of q, the
    rest of p.

    Args:
        p, q: float32 [n, V], each row summing to 1.

    Returns:
        float32 [n, V], at most min(p, q); their sum is how often the two choose alike.

    Example:
        p = (3/4, 1/4) and q = (1/4, 3/4): each token wins both with 1 / (1 + 3), so the sum is 1/2.
    """
    order = (p / q).nan_to_num(0.0, posinf=torch.inf).argsort(-1)
    p_, q_ = p.gather(1, order).double(), q.gather(1, order).double()
    below = q_.cumsum(-1)  # of q over tokens with a smaller ratio, or the same
    above = p_.sum(-1, keepdim=True) - p_.cumsum(-1)  # of p over those with a larger one
    won = 1 / (below / q_ + above.clamp(min=0) / p_)
    won = torch.where((p_ > 0) & (q_ > 0), won, 0.0)
    return torch.zeros_like(p).scatter_(1, order, won.float())
