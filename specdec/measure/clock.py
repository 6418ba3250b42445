"""Seconds of a round: by phase, and in the parts that a stop policy learns its costs from."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


class PhaseClock:
    """Accumulates seconds by phase name, and says what time it is. It never stalls the device.

    On a CPU a phase is timed as it runs. On CUDA two events are recorded around it on the stream,
    and their distance is read in `settle`, after the round's one synchronisation.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._cuda = device.type == "cuda"
        self._aside = 0.0
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

    def now(self) -> float:
        """Seconds from some moment on, without those that were set aside."""
        return time.perf_counter() - self._aside

    @contextmanager
    def aside(self, name: str) -> Iterator[None]:
        """Book the body as a phase, and stop the clock meanwhile: it is no cost of a round.

        The body must not leave work behind on the device.
        """
        start = self.now()
        yield
        spent = self.now() - start
        self._book({name: 1.0}, spent)
        self._aside += spent

    @property
    def asynchronous(self) -> bool:
        """Whether the device works beside the host."""
        return self._cuda

    def fetch(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Queue a tensor's way to the host; what is queued later will not delay it.

        Returns:
            What gives the tensor on the host. Here the host waits for the device.
        """
        if not self._cuda:
            return lambda: tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        arrived = _event()
        arrived.record()

        def wait() -> Tensor:
            arrived.synchronize()
            return host

        return wait

    def settle(self) -> None:
        """Read the round's events; call when its results are here: then they are over, too."""
        if self._pending:
            *_, (_, _, last) = self._pending
            last.synchronize()
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
    """Seconds of a round on a clock, less those of the parts that are timed apart."""

    def __init__(self, clock: PhaseClock) -> None:
        self._clock, self._began = clock, clock.now()
        self._paused: float | None = None

    def pause(self) -> None:
        """Leave out what passes until the round goes on."""
        self._paused = self._clock.now()

    def go_on(self) -> None:
        """Count again, if it was paused."""
        if self._paused is not None:
            self._began += self._clock.now() - self._paused
            self._paused = None

    @contextmanager
    def apart(self) -> Iterator[Lap]:
        """Time the body by itself, and leave it out of the rest of the round."""
        lap, began = Lap(), self._clock.now()
        yield lap
        lap.seconds = self._clock.now() - began
        self._began += lap.seconds

    def since(self, moment: float) -> float:
        """Seconds since a moment of the clock, which are from now on timed apart."""
        spent = self._clock.now() - moment
        self._began += spent
        return spent

    @property
    def rest(self) -> float:
        """Seconds of the round so far, less what was timed apart."""
        return self._clock.now() - self._began


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
