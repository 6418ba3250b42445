"""What the draft's own probabilities allow: the rate of a policy that knows these, and no verdict.

Who knows which choices are accepted is clairvoyant (specdec/simulate/bound.py), and far from all
that a policy can be. This one knows how likely they are.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from itertools import count

import numpy as np

from specdec.measure.calibration import Array
from specdec.policies.base import MOST_CANDIDATES, Indices
from specdec.policies.costs import CostModel
from specdec.policies.estimators import online_estimator
from specdec.policies.siblings import given_parent, sibling_estimator, sibling_evidence
from specdec.simulate.bound import lower_lines
from specdec.simulate.growth import ROOT, Growth
from specdec.simulate.transcripts import Signals, Transcript

HALVINGS = 40
"""Steps of the search for the rate. More find it more exactly than anybody reads it."""


def allowed_rate(
    transcripts: Sequence[Transcript], costs: CostModel, live: int = 1, width: int = 1
) -> float:
    """Tokens per second of a policy that knows how likely each choice of the draft is accepted.

    It judges by what the draft says of a choice and of the better ones, with weights that fit these
    transcripts. All that the draft could be asked for is known to it before it is drawn. Rows do
    not wait for each other, and costs are those of `least_seconds`. A real policy may pass it a
    little by what it learns of single rows.

    The rate is the price of a second at which a round gains nothing, in the mean over all places
    (specdec/policies/objective.py).

    Args:
        width: choices that are known at each place.
    """
    nodes = [
        _likeliest(transcript, t, width, given)
        for transcript, given in zip(transcripts, _acceptance(transcripts, width), strict=True)
        for t in range(transcript.first, len(transcript.ranks))
    ]
    survival, depth = (np.stack(each) for each in zip(*nodes, strict=True))
    levels = np.arange(max(transcript.most for transcript in transcripts) + 1)
    shape = len(survival), len(levels)
    at = (np.arange(shape[0])[:, None] * shape[1] + depth).astype(np.int64).ravel()

    def gain(price: float, fixed: float, token: float, step: float) -> float:
        """Mean gain of a round, with seconds of a row's part of it, of a node and of a level."""
        worth = np.maximum(survival - price * token, 0.0)
        of_level = np.bincount(at, worth.ravel(), shape[0] * shape[1]).reshape(shape)
        best = (of_level.cumsum(1) - price * step * levels).max(1)
        return float(best.mean()) + 1 - price * (fixed + token)

    places = live * (MOST_CANDIDATES + 1)
    return min(
        _root(lambda price, each=(a / live, b, c / live + d): gain(price, *each))  # type: ignore[misc]
        for a, b in lower_lines(costs.verify, places)
        for c, d in lower_lines(costs.draft, live)
    )


def _acceptance(transcripts: Sequence[Transcript], width: int) -> list[tuple[Array, Array]]:
    """P(a choice is accepted | what it follows is), at the places of texts and of branches."""
    first, others = online_estimator("confidence"), sibling_estimator()
    typical = [float(np.mean(transcript.accepted)) for transcript in transcripts]
    for transcript, rate in zip(transcripts, np.clip(typical, 0.02, 0.98), strict=True):
        ranks, signals = transcript.ranks, transcript.signals[:, :width].astype(np.float64)
        rates = np.full(len(ranks), rate)
        first.learn(signals[:, 0], rates, ranks == 0)
        of = np.tile(np.arange(signals.shape[1]), len(ranks))
        evidence = sibling_evidence(signals.reshape(len(of), -1), of)
        judged = (of > 0) & (of <= ranks.repeat(signals.shape[1]))
        stood = of == ranks.repeat(signals.shape[1])
        others.learn(evidence[judged], rates.repeat(signals.shape[1])[judged], stood[judged])

    def given(signals: Signals, rate: float) -> Array:
        *shape, columns = signals.shape
        flat = signals.astype(np.float64).reshape(-1, columns)
        ranks: Indices = np.tile(np.arange(shape[-1]), len(flat) // shape[-1])
        rates, chances = np.full(len(flat), rate), np.empty(len(flat))
        best = ranks == 0
        chances[best] = first.predict(flat[best], rates[best])[1]
        if not best.all():
            evidence = sibling_evidence(flat, ranks)[~best]
            chances[~best] = others.predict(evidence, rates[~best])[1]
        return given_parent(chances, ranks).reshape(shape)

    return [
        (given(transcript.signals[:, :width], rate), given(transcript.branches[:, :, :width], rate))
        for transcript, rate in zip(transcripts, np.clip(typical, 0.02, 0.98), strict=True)
    ]


def _likeliest(
    transcript: Transcript, at: int, width: int, given: tuple[Array, Array]
) -> tuple[Array, Array]:
    """Survival and depth of the MOST_CANDIDATES likeliest nodes behind a place, padded with 0."""
    tree, order = Growth(transcript, at), count()
    survival, depth = np.zeros((2, MOST_CANDIDATES))
    # What was not taken yet: survival, the parent and rank of the node, and its depth.
    heap: list[tuple[float, int, int, int, int]] = []

    def expand(node: int, reached: float, deep: int) -> None:
        if deep >= min(transcript.most, transcript.limit - at):
            return
        place, wrong = tree.place(node)
        row = given[0][place] if place <= wrong else given[1][_behind(transcript, place, wrong)]
        for rank, chance in enumerate(row[:width].tolist()):
            heapq.heappush(heap, (-reached * chance, next(order), node, rank, deep + 1))

    expand(ROOT, 1.0, 0)
    for i in range(MOST_CANDIDATES):
        if not heap:
            break
        less, _, parent, rank, deep = heapq.heappop(heap)
        survival[i], depth[i] = -less, deep
        expand(tree.add(parent, rank), -less, deep)
    return survival, depth


def _behind(transcript: Transcript, place: int, wrong: int) -> tuple[int, int]:
    return int(transcript.branch_of[wrong]), place - wrong - 1


def _root(gain: Callable[[float], float]) -> float:
    """Where a gain that falls with the price is 0."""
    low, high = 0.0, 1.0
    while gain(high) > 0:
        low, high = high, 2 * high
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if gain(middle) > 0 else (low, middle)
    return high
