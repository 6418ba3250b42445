"""Profiles a pair: times forwards of both models on made-up rows, before the first round."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch

from specdec.lossless.sampling import greedy_choice
from specdec.measure.calibration import Array
from specdec.model.decoder import PackedDecoder
from specdec.policies.costs import CostModel, CostTable

CONTEXT = 192
"""Cached positions of each row while profiling: about a prompt and half an output.

Raised, attention seems to cost more from the start; rounds find the job's own.
"""

FAR = 4 * CONTEXT
"""Cached positions of a row at which it is seen what further ones cost.

Raised, that is told more surely, over fewer rows: the cache is as large as for all at CONTEXT.
"""

PROMPT = 256
"""Tokens that the draft is profiled up to: one it has not followed must read the row's prompt.

Raised, the profile takes longer and says more of long prompts.
"""

REPEATS = 7
"""Timings of each number of tokens, if there is time: their median counts.

Raised, a table is truer and a profile longer.
"""

ENOUGH = 3
"""Timings of each number of tokens for which there must be time; where there is not, a table has
fewer numbers. A policy decides by differences between them, which single timings drown in noise.

Raised, differences are truer, and the tables of slow models coarser.
"""

FEW_MORE = 12
"""Usual numbers of tokens end with a candidate for each row, or with so many candidates.

Raised, few rows with many candidates have truer costs, and others are timed less often.
"""

STEPS = 0.03
"""What a number of tokens differs by from a smooth curve, relative: kernels work on tiles.

Raised, noise is taken for steps; lowered, steps for noise, where timings differ by as much.
"""

BENDS = 1.5
"""How far apart places of that curve tell of each other, in the logarithm of tokens: 4.5 times.

Raised, a curve is taken to be straighter, and less is left of what its parts were measured at.
"""

NORMAL = 1.4826
"""What the median of deviations is times smaller than a normal distribution's spread."""

LEAST_POINTS = 4
"""Numbers of tokens that are tried even if there is no time: a curve needs both ends and a middle.

Raised, a slow model is profiled beyond its time.
"""


def profile_costs(
    target: PackedDecoder, draft: PackedDecoder | None, slots: int, seconds: float = 4.0
) -> CostModel:
    """Time forwards of both models on made-up rows; without a draft its steps cost nothing.

    Args:
        target, draft: the models.
        slots: most rows in a round.
        seconds: for both, about; the fewer forwards fit into it, the coarser the tables.
    """
    if draft is None:
        return CostModel(CostTable([1], [0.0]), _profile(target, slots, 9 * slots, seconds))
    return CostModel(
        _profile(draft, slots, max(2 * slots, PROMPT), seconds / 3),
        _profile(target, slots, 9 * slots, seconds * 2 / 3),
    )


@torch.inference_mode()
def _profile(decoder: PackedDecoder, slots: int, most: int, budget: float) -> CostTable:
    cache = decoder.new_cache(slots, CONTEXT + max(most // slots + 1, 16))
    ladder = sorted({*_ladder(most), slots, 2 * slots})
    n = sum(tokens <= max(2 * slots, slots + FEW_MORE) for tokens in ladder)
    usual = [ladder[i] for i in _coarse_to_fine(n, ladder.index(slots))]
    larger = ladder[: n - 1 : -1]
    timed = _Sweeps(decoder, cache, slots, budget)
    timed.add(usual[:LEAST_POINTS])
    due = timed.expected(usual).cumsum()
    usual = usual[: max(int((ENOUGH * due < budget).sum()), LEAST_POINTS)]
    timed.add(usual[LEAST_POINTS:])
    usual.sort()
    for _ in range(ENOUGH - 1):
        timed.add(usual)
    timed.add(larger)
    for _ in range(REPEATS - ENOUGH):
        timed.add([*usual, *larger])
    position = _position(decoder, slots) if timed.in_time else 0.0
    return CostTable(*timed.typical(), position, CONTEXT)


class _Sweeps:
    """Forwards of one size after another, again and again, as far as there is time.

    Args:
        decoder, cache, slots: as for `_time`.
        budget: seconds from now on.
    """

    def __init__(self, decoder: PackedDecoder, cache: Any, slots: int, budget: float) -> None:
        self._run = functools.partial(_time, decoder, cache, slots)
        self._cold = decoder.device.type == "cuda"
        self._sweeps: list[dict[int, float]] = []
        self._ends = time.perf_counter() + budget
        self._run(1)  # the first forward of a shape allocates

    @property
    def in_time(self) -> bool:
        """Whether there is time left."""
        return time.perf_counter() < self._ends

    @property
    def sizes(self) -> list[int]:
        """Numbers of tokens that were timed so far."""
        return sorted({*chain(*self._sweeps)})

    def add(self, several: Sequence[int]) -> None:
        """Time forwards of so many tokens each, as one sweep."""
        known, sweep = {*self.sizes}, dict[int, float]()
        for tokens in several:
            if not self.in_time and len(known) >= LEAST_POINTS:
                break
            if self._cold and tokens not in known:
                self._ends += self._run(tokens)  # compiling and recording come once
            known.add(tokens)
            sweep[tokens] = self._run(tokens)
        if sweep:
            self._sweeps.append(sweep)

    def expected(self, several: Sequence[int]) -> Array:
        """Seconds of forwards between those that were timed, as far as is known."""
        found: Array = np.interp(several, *self.typical())
        return found

    def typical(self) -> tuple[Sequence[int], Sequence[float]]:
        """Sizes, and seconds of each: the median of its timings, as far as noise lets these differ.

        What else the machine does slows a whole sweep. So all count as at the same speed.
        """
        sizes = self.sizes
        logs = np.array([[np.log(each.get(n, np.nan)) for n in sizes] for each in self._sweeps])
        logs -= np.nanmedian(logs - np.nanmedian(logs, axis=0), axis=1, keepdims=True)
        median = np.nanmedian(logs, axis=0)
        timings = np.isfinite(logs).sum(0)
        # Of a usual timing: a pause of the machine is no more than one that is off.
        several = np.abs(logs - median)[:, timings > 1]
        noise = NORMAL * np.nanmedian(several) if several.size else 0.0
        return sizes, np.exp(_smooth(np.log(sizes), median, noise / np.sqrt(timings))).tolist()


def _smooth(x: Array, y: Array, errors: Array) -> Array:
    """The likeliest curve through y [n] at x, measured with `errors`: smooth but for STEPS.

    A Gaussian process: the differences that a policy decides by are small, and single timings are
    off by more. Where errors are small nothing changes.
    """
    curve = np.exp(-(((x[:, None] - x) / BENDS) ** 2) / 2) + STEPS**2 * np.eye(len(x))
    found: Array = y.mean() + curve @ np.linalg.solve(curve + np.diag(errors**2), y - y.mean())
    return found


def _position(decoder: PackedDecoder, slots: int) -> float:
    """Seconds of each cached position of a row beyond CONTEXT; 0 where noise hides them."""
    rows = max(slots * CONTEXT // FAR, 1)
    cache = decoder.new_cache(rows, FAR + 1)
    pairs = []
    for _ in range(REPEATS):
        near, far = (_time(decoder, cache, rows, rows, context) for context in (CONTEXT, FAR))
        pairs.append((far - near) / (rows * (FAR - CONTEXT)))
    least = sorted(pairs)[1]  # noise makes some negative: all but one must say so
    return float(np.median(pairs)) if least > 0 else 0.0


def _coarse_to_fine(n: int, first: int) -> Iterator[int]:
    """0..n-1: both ends and `first`, then what halves the gaps: any beginning covers it all."""
    yield from sorted({0, n - 1, first})
    gaps = [(0, first), (first, n - 1)]
    while gaps:
        low, high = gaps.pop(0)
        if high - low > 1:
            middle = (low + high) // 2
            yield middle
            gaps += [(low, middle), (middle, high)]


def _ladder(most: int) -> Iterator[int]:
    """1, 2, 3, 4, 6, 8, 9, 12, 16, 17, 24, 25, 32, 33, 48, ... up to `most`.

    Kernels work on tiles of 8 or more tokens: a curve jumps behind one, not halfway to the next.
    """
    step, tokens = 1, 1
    while tokens <= most:
        yield tokens
        if tokens % 8 == 0 and tokens < most:
            yield tokens + 1
        if tokens >= 4 * step:
            step *= 2
        tokens += step


def _time(
    decoder: PackedDecoder, cache: Any, slots: int, tokens: int, context: int = CONTEXT
) -> float:
    """Seconds of one forward of `tokens` tokens over as many rows as there are, logits included."""
    rows = min(slots, tokens)
    feed = [(slot, tokens // rows + (slot < tokens % rows)) for slot in range(rows)]
    cache.pretend(context)
    ids = torch.zeros(tokens, dtype=torch.int64, device=decoder.device)
    start = time.perf_counter()
    chosen = greedy_choice(decoder.logits(decoder.forward(cache, feed, ids)))
    chosen.tolist()  # waits for the device
    return time.perf_counter() - start
