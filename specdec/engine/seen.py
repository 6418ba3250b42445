"""What policies see of draft steps, on its way from the device to the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from specdec.measure.calibration import Array
from specdec.measure.clock import PhaseClock
from specdec.policies.base import DraftStep
from specdec.policies.signals import readable


def on_host(signals: Tensor) -> Array:
    """Signals [n, len(Signal)] as policies read them."""
    return readable(signals.numpy().astype(np.float64))


def later(
    clock: PhaseClock, steps: Sequence[tuple[DraftStep, Tensor]]
) -> Callable[[], Sequence[DraftStep]]:
    """Queue the way of draft steps' signals to the host; they are read when asked for.

    Args:
        clock: fetches them.
        steps: each without its signals, and these on the device, [n, len(Signal)].
    """
    arriving = clock.fetch(torch.cat([signals for _, signals in steps]))

    def read() -> Sequence[DraftStep]:
        ends = np.cumsum([len(step.rows) for step, _ in steps])
        found = np.split(on_host(arriving()), ends[:-1])
        return [
            replace(step, signals=signals) for (step, _), signals in zip(steps, found, strict=True)
        ]

    return read
