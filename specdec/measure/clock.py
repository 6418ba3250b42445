"""Seconds of a round: by phase, and in the parts that a stop policy learns its costs from."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


class PhaseClock:
    """Accumulates seconds by phase name. It never stalls the device.

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


@dataclass(slots=True)
class Lap:
    """A part of a round, and the seconds it took once it is over."""

    seconds: float = 0.0


class RoundTimer:
    """Wall-clock seconds of a round, less those of the parts that are timed apart."""

    def __init__(self) -> None:
        self._began = time.perf_counter()

    @contextmanager
    def apart(self) -> Iterator[Lap]:
        """Time the body by itself, and leave it out of the rest of the round."""
        lap, began = Lap(), time.perf_counter()
        yield lap
        lap.seconds = time.perf_counter() - began
        self._began += lap.seconds

    @property
    def rest(self) -> float:
        """Seconds of the round so far, less what was timed apart."""
        return time.perf_counter() - self._began


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
