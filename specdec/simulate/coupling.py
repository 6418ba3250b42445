"""Candidates drawn given what the target wrote: speculative sampling from its other end.

After the true prefix x_<t, a candidate y_t is drawn *given* x_t:

    x_t was drawn from p. Let y_t = x_t with probability min(1, q(x_t) / p(x_t)), otherwise draw y_t
    from (q - p)+, normalised.

Proof: speculative sampling draws y ~ q, lets x = y with probability min(1, p(y) / q(y)), otherwise
x ~ (p - q)+ / TV. Both ways P(x = y = v) = min(p(v), q(v)), and for v /= w, P(x = v, y = w) =
(p - q)+(v) (q - p)+(w) / TV. It is the maximal coupling of p and q, read from either end. []

A tree has siblings: further candidates at the same place, drawn without replacement. y_2 meets what
rejecting y_1 left: p' = (p - q)+ and q' = q without y_1, both normalised. Given the rejection, x_t
is distributed as p'. So the same coupling gives y_2 from p', q' and x_t, and so on. Behind an
accepted one the others are drawn from what is left of q.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.lossless.sampling import Draw, SamplingBatch, sample, uniform


def reversed_coupling(p: Tensor, q: Tensor, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Candidates given what the target drew: the maximal coupling from its other end.

    Args:
        p, q: float32 [n, V], the target's and the draft's distributions.
        x: int64 [n], drawn from p.
        u, v: float64 [n], independent uniform numbers in [0, 1).

    Returns:
        int64 [n], distributed as q, and equal to x as often as rejection sampling accepts.
    """
    at = x[:, None]
    same = u[:, None] * p.gather(1, at) < q.gather(1, at)
    residual = (q - p).clamp_(min=0)
    # p == q up to rounding may fail the test by a hair, with nothing left: q is the right answer.
    residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, q)
    return torch.where(same[:, 0], x, sample(residual, v).clamp(min=0))


def choices_given(
    p: Tensor, q: Tensor, x: Tensor, width: int, params: SamplingBatch, at: Tensor
) -> Tensor:
    """Siblings drawn without replacement, given what the target drew, the first being its coupling.

    Args:
        p, q, x: see `reversed_coupling`.
        width: siblings.
        params, at: seeds and output positions of the n places.

    Returns:
        int64 [n, width]; -1 where nothing is left of q.
    """
    found: list[Tensor] = []
    met = torch.zeros_like(x, dtype=torch.bool)
    for rank in range(width):
        seed = params.in_round(torch.full_like(at, rank)).seed if rank else params.seed
        u, v = (uniform(seed, at, draw) for draw in (Draw.ACCEPT, Draw.BONUS))
        left = q.sum(-1) > 0
        y = torch.where(met, sample(q, v), reversed_coupling(p, q, x, u, v))
        y = torch.where(left, y, -1)
        found.append(y)
        met |= y == x
        rest = (p - q).clamp_(min=0)
        rest /= rest.sum(-1, keepdim=True)
        p = torch.where((left & ~met)[:, None] & rest.isfinite().all(-1, keepdim=True), rest, p)
        q = without(q, y)
    return torch.stack(found, 1)


def without(q: Tensor, y: Tensor) -> Tensor:
    """q float32 [n, V] without y int64 [n], normalised; zeros where nothing is left."""
    rest = q.scatter(1, y.clamp(min=0)[:, None], 0.0)
    return torch.nan_to_num_(rest / rest.sum(-1, keepdim=True))
