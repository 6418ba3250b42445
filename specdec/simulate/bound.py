"""The clairvoyant bound: the least time that any stop policy could take over transcripts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from specdec.measure.calibration import Array
from specdec.policies.costs import CostModel, CostTable
from specdec.simulate.transcripts import Transcript


def least_seconds(
    transcripts: Sequence[Transcript], costs: CostModel, live: int = 1, width: int = 1
) -> Array:
    """Seconds that each transcript takes at least: a bound for every policy.

    Who knows which candidates are accepted drafts no other. With one live row, the best lengths are
    found exactly, from the end of the text backwards: k candidates take k D(1) + V(k + 1), where a
    curve that falls somewhere is replaced by the largest curve below it that does not.

    With more live rows this is a bound that no policy need reach, since it ignores that rows wait
    for each other. Take a straight line a + b n below V(n) and one c + d n below D(n), with
    a, b, c, d >= 0. A round has at most `live` rows, and at least as many draft steps as its mean
    row has candidates; so a row with k candidates can be charged at least
    a / live + b (k + 1) + k (c / live + d). Of the lines along the curves' lower convex hulls,
    those that give the most seconds are taken.

    With trees the same holds of longer runs: who knows which of the draft's choices is accepted
    drafts that one, and no sibling of it.

    Args:
        width: choices that there are at each place.

    Returns:
        float [rows]; their sum is the bound.
    """
    most = max((transcript.most for transcript in transcripts), default=1)
    k = np.arange(most + 1)
    if live == 1:
        verify, draft = _rising(costs.verify, most + 1), _rising(costs.draft, most)
        choices = (k * draft[1] + verify[k + 1])[None]
    else:
        verifying = lower_lines(costs.verify, live * (most + 1))
        drafting = lower_lines(costs.draft, live)
        choices = np.array(
            [a / live + b * (k + 1) + k * (c / live + d) for a, b in verifying for c, d in drafting]
        )
    seconds = np.stack([_least(transcript, choices, width) for transcript in transcripts], 1)
    best: Array = seconds[np.argmax(seconds.sum(1))]
    return best


def _least(transcript: Transcript, choices: Array, width: int) -> Array:
    """float [c]: the least cost of the transcript, if k candidates cost choices[c, k]."""
    n, runs = len(transcript.ranks), transcript.runs_within(width)
    best = np.zeros((len(choices), n + 1))
    first = min(transcript.first, n)
    for t in range(n - 1, first - 1, -1):
        most = max(min(int(runs[t]), transcript.most, transcript.limit - t), 0)
        after = np.minimum(np.arange(t + 1, t + most + 2), n)
        best[:, t] = (choices[:, : most + 1] + best[:, after]).min(1)
    cost: Array = best[:, first]
    return cost


def _rising(table: CostTable, tokens: int) -> Array:
    """float [tokens + 1]: the largest curve below the table's that never falls; 0 at 0."""
    seconds: Array = table(np.arange(max(4 * tokens, int(table.tokens[-1])) + 1))
    return np.minimum.accumulate(seconds[::-1])[::-1][: tokens + 1]


def lower_lines(table: CostTable, tokens: int) -> list[tuple[float, float]]:
    """(a, b), both >= 0, of lines a + b n below the table for n in 1..tokens, along its hull."""
    seconds = _rising(table, tokens)
    hull: list[int] = []
    for n in range(1, tokens + 1):
        while len(hull) > 1 and (seconds[hull[-1]] - seconds[hull[-2]]) * (n - hull[-2]) >= (
            seconds[n] - seconds[hull[-2]]
        ) * (hull[-1] - hull[-2]):
            hull.pop()
        hull.append(n)
    counts = np.arange(1, tokens + 1)
    lines = [(0.0, float((seconds[1:] / counts).min()))]
    for left, right in pairwise(hull):
        slope = float((seconds[right] - seconds[left]) / (right - left))
        offset = float(seconds[left] - slope * left)
        if offset >= 0:
            lines.append((offset, slope))
    return lines
