"""Seconds per phase of a round, read once per round so that timing never stalls the device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class PhaseClock:
    """Accumulates seconds by phase name.

    On a CPU a phase is timed as it runs. On CUDA two events are recorded around it on the stream,
    and their distance is read in `settle`, after the round's one synchronisation.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._cuda = device.type == "cuda"
        self._pending: list[tuple[dict[str, float], torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def phase(self, shares: dict[str, float]) -> Iterator[None]:
        """Time the body and count it for phases by their shares, which sum to 1."""
        if self._cuda:
            begin, end = _event(), _event()
            begin.record()
            yield
            end.record()
            self._pending.append((shares, begin, end))
        else:
            start = time.perf_counter()
            yield
            self._book(shares, time.perf_counter() - start)

    def settle(self) -> None:
        """Read the round's events; call after the device has been synchronised."""
        for shares, begin, end in self._pending:
            self._book(shares, begin.elapsed_time(end) / 1000)
        self._pending.clear()

    def _book(self, shares: dict[str, float], seconds: float) -> None:
        for name, share in shares.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + share * seconds


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
