"""Goodness-of-fit tests with a stated false-alarm probability.

All of them run on fixed seeds, so a run is deterministic: FALSE_ALARM is the probability that a
*correct* implementation with other random numbers would have failed.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from specdec.request import SamplingParams

FALSE_ALARM = 1e-6


def chi_square_excess(observed: Tensor, expected: Tensor) -> float:
    """Pearson's statistic divided by its FALSE_ALARM bound; above 1 the counts do not fit.

    Cells that expect fewer than 5 are pooled. A count in a cell of probability zero never fits.

    Args:
        observed: counts, any shape; expected: the probabilities of the same cells, summing to 1.
    """
    counts = observed.flatten().double().numpy()
    means = expected.flatten().double().numpy() * counts.sum()
    if counts[means == 0].any():
        return float("inf")
    rare = means < 5
    counts = np.append(counts[~rare], counts[rare].sum())
    means = np.append(means[~rare], means[rare].sum())
    counts, means = counts[means > 0], means[means > 0]
    statistic = ((counts - means) ** 2 / means).sum()
    return float(statistic / chi_square_bound(len(means) - 1))


def chi_square_bound(freedom: int) -> float:
    """What Pearson's statistic exceeds with probability FALSE_ALARM, at so many degrees."""
    return float(stats.chi2.isf(FALSE_ALARM, freedom))


def counted(tokens: Tensor, vocab: int) -> Tensor:
    """Counts [vocab, ...] of token tuples [n, m]."""
    m = tokens.shape[1]
    weights = vocab ** torch.arange(m - 1, -1, -1)
    return torch.bincount((tokens * weights).sum(1), minlength=vocab**m).view([vocab] * m)


def reference_distribution(logits: Tensor, params: SamplingParams) -> Tensor:
    """float64 [..., V]: the distribution `params` ask for, sorted out token by token in float64.

    Written apart from specdec.lossless.sampling, the slow way: sort, cut, renormalise, cut again.
    """
    flat = logits.double().reshape(-1, logits.shape[-1])
    return torch.stack([_one_row(row, params) for row in flat]).view(logits.shape)


def _one_row(logits: Tensor, params: SamplingParams) -> Tensor:
    if params.temperature == 0:
        return torch.eye(len(logits), dtype=torch.float64)[logits.argmax()]
    p = torch.softmax(logits / params.temperature, 0)
    if params.top_k:
        p = _keep(p, p.sort(descending=True).indices[: params.top_k].tolist())
    if params.top_p < 1:
        nucleus: list[int] = []
        mass = 0.0
        for token in p.sort(descending=True).indices.tolist():
            nucleus.append(token)
            mass += p[token].item()
            if mass >= params.top_p:
                break
        p = _keep(p, nucleus)
    return _keep(p, (p >= params.min_p * p.max()).nonzero().flatten().tolist())


def _keep(p: Tensor, tokens: list[int]) -> Tensor:
    kept = torch.zeros_like(p)
    kept[tokens] = p[tokens]
    return kept / kept.sum()
