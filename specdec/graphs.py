"""Forwards of few tokens recorded as CUDA graphs: one launch in place of some hundreds.

A draft step takes the GPU less time than the host needs to launch its kernels one by one. What is
recorded has one shape, so the tokens of a forward are padded to one of a few sizes. The padding
repeats the last token in its own place: the same keys and values are written there once more, and
what comes out for it is dropped. Where each token belongs is read from memory that is overwritten
before a replay; with the kernels of specdec/gpu_kernels.py nothing else shapes a forward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specdec.attention import PackedRow, one_token_rows

LARGEST = 512
"""More tokens than this keep a GPU busy for longer than their launches take."""

SAME = 0.01
"""Relative difference between a forward and its replay that may be the order of sums."""

Recorder = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""Takes a computation; gives what repeats it on the same memory and returns the same tensor."""


class RecordingFailed(RuntimeError):
    """A forward cannot be recorded on this GPU; the message says why."""


def padded(tokens: int) -> int:
    """The size that so many tokens are padded to: more by a quarter or by three at most."""
    step = 1 if tokens <= 8 else 4 if tokens <= 32 else 8 if tokens <= 128 else 32
    return -(-tokens // step) * step


def record(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A `Recorder` that captures a CUDA graph; `run` must have run before."""
    graph = torch.cuda.CUDAGraph()
    try:
        # Only this thread is watched: others of the process may use the GPU as they like.
        with torch.cuda.graph(graph, pool=_pool(), capture_error_mode="thread_local"):
            out = run()
    except RuntimeError as error:
        raise RecordingFailed(str(error)) from error

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


@functools.cache
def _pool() -> Any:
    """Graphs never run at the same time, so they share the memory of what they compute on."""
    return torch.cuda.graph_pool_handle()


class RecordedForward:
    """A forward of `size` packed tokens, repeated for whatever tokens and places are given.

    Args:
        run: computes hidden states [size, hidden] of tokens int64 [size] in rows int64 [size, 4],
            one row a token, as kernels take them.
        size: tokens.
        recorder: records it.
        device: of the tensors.
    """

    def __init__(
        self,
        run: Callable[[Tensor, Tensor], Tensor],
        size: int,
        recorder: Recorder,
        device: torch.device,
    ) -> None:
        self._recorder = recorder
        self._tokens = torch.zeros(size, dtype=torch.int64, device=device)
        self._rows = torch.zeros(size, 4, dtype=torch.int64, device=device)
        self._run = functools.partial(run, self._tokens, self._rows)
        self._replay: Callable[[], Tensor] | None = None

    def __call__(self, tokens: Tensor, rows: Sequence[PackedRow]) -> Tensor:
        """Hidden states [N, hidden] of the N <= size tokens of some rows; good until the next call.

        Args:
            tokens: int64 [N], on the device.
            rows: where they belong.

        Raises:
            RecordingFailed: there is no recording, or it does not give what it was made of.
        """
        n, size = len(tokens), len(self._tokens)
        self._tokens[:n].copy_(tokens)
        self._tokens[n:] = tokens[-1:]
        table = np.pad(one_token_rows(rows), ((0, size - n), (0, 0)), mode="edge")
        table[:, 0] = np.arange(size)
        self._rows.copy_(torch.from_numpy(table), non_blocking=True)
        if self._replay is not None:
            return self._replay()[:n]
        hidden = self._run()  # compiles and allocates what must not be recorded
        replay = self._recorder(self._run)
        # Both write the same keys and values to the same places, so it may run twice.
        gap = (replay() - hidden).float().norm() / hidden.float().norm()
        if not gap < SAME:
            raise RecordingFailed(f"a replay differs from what was recorded by {gap:.2g}")
        self._replay = replay
        return hidden[:n]
