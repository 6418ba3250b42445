from __future__ import annotations

import time

import pytest
import torch

from specdec.measure.clock import PhaseClock


def test_seconds_are_booked_by_share_and_add_up() -> None:
    clock = PhaseClock(torch.device("cpu"))
    begin = time.perf_counter()
    with clock.phase({"verify": 0.75, "prefill": 0.25}):
        time.sleep(0.02)
    with clock.phase({"verify": 1.0}):
        time.sleep(0.01)
    elapsed = time.perf_counter() - begin
    clock.settle()
    assert sum(clock.seconds.values()) == pytest.approx(elapsed, abs=0.005)
    assert clock.seconds["prefill"] >= 0.005
    assert clock.seconds["verify"] >= 0.025


def test_settling_twice_books_nothing_twice() -> None:
    clock = PhaseClock(torch.device("cpu"))
    with clock.phase({"draft": 1.0}):
        pass
    clock.settle()
    before = dict(clock.seconds)
    clock.settle()
    assert clock.seconds == before


@pytest.mark.gpu
def test_a_cuda_phase_lasts_as_long_as_its_kernels() -> None:
    clock = PhaseClock(torch.device("cuda"))
    x = torch.randn(4096, 4096, device="cuda")
    begin = time.perf_counter()
    with clock.phase({"verify": 1.0}):
        for _ in range(20):
            x = torch.tanh(x @ x)
    queued = time.perf_counter() - begin
    assert not clock.seconds
    torch.cuda.synchronize()
    clock.settle()
    assert clock.seconds["verify"] > queued
