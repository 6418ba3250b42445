"""What a forward costs, as measured: seconds by packed tokens.

Cost curves are staircases that differ by machine, precision and kernel (DESIGN.md §3), so they are
profiled when a model is loaded and refined by every round. A round is made of draft steps, D(n)
each, and one verification, V(n), which is all the rest of the round; both include sampling and what
the host does, so that they sum to the round's wall time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from specdec.packed import PackedDecoder

RATE, DRIFT = 0.1, 0.02
"""Share of an observation's error that its neighbours in the table, and the whole table, take."""

CONTEXT = 192
"""Cached positions of each row while profiling; refinement finds the job's own."""


class CostTable:
    """Seconds of one kind of forward by packed tokens; linear between the tokens of the table.

    Args:
        tokens: increasing, from 1.
        seconds: at these.
    """

    def __init__(self, tokens: Sequence[int], seconds: Sequence[float]) -> None:
        self.tokens = np.asarray(tokens, dtype=np.float64)
        self.seconds = np.asarray(seconds, dtype=np.float64)
        self._dense = np.zeros(0)

    def __call__(self, tokens: Any) -> Any:
        """Seconds at integer token counts (a number or an array); beyond the table, in proportion.

        No tokens cost nothing.
        """
        most = int(np.max(tokens)) if np.size(tokens) else 0
        if most >= len(self._dense):
            self._fill(max(2 * most, int(self.tokens[-1])))
        return self._dense[tokens]

    def observe(self, tokens: int, seconds: float) -> None:
        """Move the table towards a measurement; an outlier moves it no more than a factor of 2."""
        error = float(np.clip(np.log(seconds / float(self(tokens))), -0.7, 0.7))
        weights = np.zeros(len(self.tokens))
        above = min(int(np.searchsorted(self.tokens, tokens)), len(self.tokens) - 1)
        below = max(above - 1, 0)
        span = self.tokens[above] - self.tokens[below]
        share = (min(tokens, self.tokens[-1]) - self.tokens[below]) / span if span else 1.0
        weights[below] += 1 - share
        weights[above] += share
        self.seconds = self.seconds * np.exp(error * (DRIFT + RATE * weights))
        self._fill(len(self._dense) - 1)

    def _fill(self, most: int) -> None:
        counts = np.arange(most + 1)
        self._dense = np.interp(counts, self.tokens, self.seconds)
        beyond = counts > self.tokens[-1]
        self._dense[beyond] = self.seconds[-1] * counts[beyond] / self.tokens[-1]
        self._dense[0] = 0.0

    def points(self) -> list[tuple[int, float]]:
        """(tokens, seconds) of the table, for reports."""
        return [(int(n), float(s)) for n, s in zip(self.tokens, self.seconds, strict=True)]


class CostModel:
    """D(n) and V(n) of a pair.

    Attributes:
        draft: seconds of a draft step by packed tokens.
        verify: seconds of the rest of a round by the target's packed tokens.
    """

    def __init__(self, draft: CostTable, verify: CostTable) -> None:
        self.draft, self.verify = draft, verify

    @classmethod
    def profile(
        cls, target: PackedDecoder, draft: PackedDecoder, slots: int, seconds: float = 3.0
    ) -> CostModel:
        """Time forwards of both models on made-up rows.

        Args:
            slots: most rows in a round.
            seconds: when to stop, about; what is larger than was reached is extrapolated.
        """
        return cls(
            _profile(draft, slots, 2 * slots, seconds / 3),
            _profile(target, slots, 9 * slots, seconds * 2 / 3),
        )

    def points(self) -> dict[str, list[tuple[int, float]]]:
        """Both tables, JSON-able."""
        return {"draft": self.draft.points(), "verify": self.verify.points()}


@torch.inference_mode()
def _profile(decoder: PackedDecoder, slots: int, most: int, budget: float) -> CostTable:
    cache = decoder.new_cache(slots, CONTEXT + 16)
    table: list[tuple[int, float]] = []
    began = time.perf_counter()
    _time(decoder, cache, slots, 1)  # the first forward of a shape allocates
    for tokens in _ladder(most):
        best = min(_time(decoder, cache, slots, tokens) for _ in range(3))
        table.append((tokens, best))
        # The next step of the ladder takes about as long as the last two together.
        if time.perf_counter() - began + 6 * best > budget and tokens > 1:
            break
    return CostTable(*zip(*table, strict=True))


def _ladder(most: int) -> Iterator[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, 24, ... up to `most`."""
    step, tokens = 1, 1
    while tokens <= most:
        yield tokens
        if tokens >= 4 * step:
            step *= 2
        tokens += step


def _time(decoder: PackedDecoder, cache: Any, slots: int, tokens: int) -> float:
    """Seconds of one forward of `tokens` tokens over as many rows as there are, logits included."""
    rows = min(slots, tokens)
    feed = [(slot, tokens // rows + (slot < tokens % rows)) for slot in range(rows)]
    cache.lengths = [CONTEXT] * slots
    ids = torch.zeros(tokens, dtype=torch.int64, device=decoder.device)
    start = time.perf_counter()
    chosen = decoder.logits(decoder.forward(cache, feed, ids)).argmax(-1)
    chosen.tolist()  # waits for the device
    return time.perf_counter() - start
