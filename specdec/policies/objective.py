"""What `goodput` maximises: pure arithmetic on estimates and costs, without any state.

A round commits one token per row plus what is accepted. It takes the time of its draft steps and of
one verification. Tokens per second over many rounds are largest if every round maximises

    gain = expected tokens - price * seconds,        price = the goodput reached (tokens/s).

What will be reached is not known at first, and changes with the batch. `best_constant` says what it
would be with the best constant length; `goodput` corrects that by what it has reached.

This is the renewal-reward form of the decision process of SpecDec++ (arXiv 2405.19715). There a
threshold on the risk says when to stop; here the price takes its place, so that the answer follows
the batch and what it costs. Two questions have this form:

    leading_rows   before a step: which rows take it, when it is not known what it will bring?
    best_prefixes  before verification: which of the candidates drawn are worth verifying?
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import numpy as np

from specdec.measure.calibration import Array
from specdec.policies.base import FEW
from specdec.policies.costs import CostModel

AHEAD = 8
"""Draft steps that a decision looks ahead.

A staircase of costs may repay two candidates where one does not: it must see the second to draft
the first. More steps see further and take proportionally longer. 8 is the width of a kernel's tile
on a CPU, behind which the next jump of a staircase lies.
"""

_STEPS = np.arange(1, AHEAD + 1)


def best_constant(costs: CostModel, rows: int, rate: float, most: int) -> float:
    """Tokens per second of the best constant length, none included.

    Args:
        costs: of both models.
        rows: how many there are.
        rate: how often a candidate behind accepted ones is accepted.
        most: the longest length.
    """
    k = np.arange(most + 1)
    verify = costs.verify.curve(rows, rows * (most + 1))[rows * k]
    return float(rows * (np.cumsum(rate**k) / (k * costs.draft(rows) + verify)).max())


def best_tree(
    costs: CostModel, fed: int, rows: int, rates: tuple[float, float], price: float, most: int
) -> tuple[int, float]:
    """The depth of the best tree of one shape for all rows, and the tokens that it gains.

    The shape is that of `fixed` with a width of 2: paths leave the draft's first choices once.

    Args:
        costs: of both models.
        fed: packed tokens of the verification as it is.
        rows: how many there are.
        rates: how often a first child of an accepted node is accepted, and how often a second one
            is where the first was not.
        price: tokens that a second is worth.
        most: the greatest depth; at most AHEAD is looked at.
    """
    first, second = rates
    depth = _STEPS[:most]
    aside = (1 - first) * second * depth * first ** (depth - 1)
    tokens = rows * np.cumsum(first**depth + aside)
    nodes = rows * np.cumsum(1 + depth)  # of each level the first choice, and what leaves here
    read = rows * np.concatenate([[1], 1 + depth[:-1]])
    drafting = np.cumsum(costs.draft.curve(0, int(read[-1]))[read])
    verifying = costs.verify.curve(fed, fed + int(nodes[-1]))
    gains = tokens - price * (drafting + verifying[nodes] - verifying[0])
    best = int(gains.argmax())
    return best + 1, float(gains[best])


def leading_rows(
    rates: Sequence[float] | Array,
    expected: Sequence[float] | Array,
    first: Sequence[float] | Array,
    further: Sequence[Sequence[float]] | Array,
    price: float,
    steps: int,
) -> tuple[int, int, float]:
    """How many of the leading rows to take further, and what that gains.

    Considers every number j of rows and every number of steps. The first step adds `expected`
    tokens of each row; each later one the row's rate times the one before.

    Args:
        rates: of n rows, how often a candidate is accepted behind accepted ones.
        expected: tokens that each row's next candidate is expected to add, falling.
        first: seconds that the first step takes for the leading 1..n rows.
        further: seconds of all else, by number of rows and of steps (`further_seconds`).
        price: tokens that a second is worth.
        steps: most candidates that the rows may still get; at most AHEAD are looked at.

    Returns:
        The best number of rows, at least 1, of steps, at least 1, and the tokens that these gain;
        less than 0 if they lose.
    """
    most = min(steps, AHEAD)
    if len(rates) > FEW:
        chain = np.multiply.outer(np.array(expected), np.ones(most))
        chain[:, 1:] = np.array(rates)[:, None]
        tokens = chain.cumprod(1).cumsum(1).cumsum(0)
        gains = tokens - price * (np.array(first)[:, None] + np.array(further)[:, :most])
        at = int(gains.argmax())
        return at // most + 1, at % most + 1, float(gains.flat[at])
    # In plain Python: after a forward an array operation takes longer than a row does here.
    number, length, gained, added = 1, 1, -inf, [0.0] * most
    each = zip(rates, expected, first, further, strict=True)
    for j, (rate, next_token, seconds, more) in enumerate(each, start=1):
        row = 0.0
        for step, rest in zip(range(most), more, strict=False):
            row += next_token
            next_token *= rate
            added[step] += row
            gain = added[step] - price * (seconds + rest)
            if gain > gained:
                number, length, gained = j, step + 1, gain
    return number, length, gained


def further_seconds(
    costs: CostModel, fed: int, n: int, share: float, floor: float = 0.0
) -> Sequence[Sequence[float]] | Array:
    """Seconds of 1..AHEAD more candidates of each of 1..n rows, less the first draft step.

    Args:
        costs: of both models.
        fed: packed tokens of the verification as it is.
        n: rows.
        share: how much of the candidates will be submitted.
        floor: the least seconds that each of them takes.

    Returns:
        [n, AHEAD], as lists where they are few.
    """
    j = np.arange(1, n + 1)[:, None]
    submitted = np.rint(share * j * _STEPS).astype(int)
    verify = costs.verify.curve(fed, fed + int(submitted[-1, -1]))
    drafting = costs.draft.curve(1, n)[:, None] * (_STEPS - 1)
    further: Array = np.maximum(verify[submitted] - verify[0], floor * submitted) + drafting
    return further if n > FEW else further.tolist()


def best_prefixes(
    candidates: Sequence[tuple[float, int]], verify: Sequence[float], price: float
) -> Sequence[tuple[float, int]]:
    """Which candidates are worth verifying: a prefix of each row's, the best of all such sets.

    A row's survival falls with every candidate. So the likeliest candidates, however many, hold a
    prefix of every row, and one pass over all their numbers is the whole search. A staircase of
    costs has many local optima; all of them are seen.

    Args:
        candidates: (survival, row) of all that were drawn, in the order that they were drawn.
        verify: seconds of a verification with 0, 1, ... all candidates.
        price: tokens that a second is worth.
    """
    likeliest = sorted(candidates, key=lambda candidate: -candidate[0])
    bare = verify[0]
    tokens, most, best = 0.0, 0.0, 0
    for n, (survival, _) in enumerate(likeliest, start=1):
        tokens += survival
        gain = tokens - price * (verify[n] - bare)
        if gain > most:
            most, best = gain, n
    return likeliest[:best]


def by_row(best: Sequence[tuple[float, int]], rows: int) -> list[int]:
    """How many of the best candidates, (survival, row) each, are of each row."""
    counts = [0] * rows
    for _, row in best:
        counts[row] += 1
    return counts


def best_number(worth: Array, verify: Array, price: float, floor: float = 0.0) -> int:
    """How many nodes of trees are worth verifying: `best_prefixes` for those in order already.

    Args:
        worth: float [n], survival, falling.
        verify: seconds of a verification with 0, 1, ... n of them.
        price: tokens that a second is worth.
        floor: tokens that each place of the verification is worth, at least.
    """
    costs = np.maximum(price * (verify - verify[0]), floor * np.arange(len(verify)))
    gains = np.append(0.0, np.cumsum(worth)) - costs
    return int(gains.argmax())
