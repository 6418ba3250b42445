"""The clock of a device that is not there, beside the host's own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.measure.clock import PhaseClock
from specdec.policies.costs import CostTable

TRANSFER = 15e-6
"""Seconds from the end of a device's work until the host has its result: an estimate."""

MADE_UP = "made up"
"""The phase of what a device would do."""

CPU = torch.device("cpu")

Host = Callable[[], float]
"""The seconds that the host has taken, from some moment on."""


def no_host() -> float:
    """Of a host that takes no time: runs repeat exactly."""
    return 0.0


class VirtualDevice(PhaseClock):
    """A stream of work that runs beside the host, and the clock of both.

    The clock stands while the host makes up what the device would compute. Where the host waits for
    the device it goes on at once, and so does the clock.

    Args:
        host: by default all that passes; `time.thread_time` leaves out what other processes take.

    Attributes:
        busy: seconds of work so far.
    """

    def __init__(self, host: Host = time.perf_counter) -> None:
        super().__init__(CPU)
        self.busy, self._idle_from, self._waited, self._host = 0.0, 0.0, 0.0, host

    def now(self) -> float:
        return self._host() + self._waited - self._aside

    def wait(self, until: float) -> None:
        """Let the host wait for a moment of the clock, if it is yet to come."""
        self._waited += max(until - self.now(), 0.0)

    def launch(self, seconds: float) -> None:
        """Queue work behind what is there."""
        self._idle_from = max(self._idle_from, self.now()) + seconds
        self.busy += seconds

    @property
    def asynchronous(self) -> bool:
        return True

    @contextmanager
    def aside(self, name: str) -> Iterator[None]:
        busy = self.busy
        with super().aside(name):
            yield
        if name != MADE_UP:  # whatever was queued has ended meanwhile
            self.busy, self._idle_from = busy, min(self._idle_from, self.now())

    def fetch(self, tensor: Tensor) -> Callable[[], Tensor]:
        ends = max(self._idle_from, self.now()) + TRANSFER

        def wait() -> Tensor:
            self.wait(ends)
            return tensor

        return wait


@dataclass(frozen=True, slots=True)
class ForwardCosts:
    """What a forward takes the device.

    Attributes:
        seconds: by packed tokens, whatever the context.
        position: seconds of each cached position that is read.
    """

    seconds: CostTable
    position: float

    def __call__(self, tokens: int, context: int) -> float:
        """Seconds of a forward of so many tokens, whose rows have `context` positions together."""
        return float(self.seconds(tokens)) + self.position * context
