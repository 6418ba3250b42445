"""Forwards of few tokens recorded as CUDA graphs: one launch in place of some hundreds.

A draft step takes the GPU less time than the host needs to launch its kernels one by one. What is
recorded has one shape, so the tokens of a forward are padded to one of a few sizes. The padding
repeats the last token in its own place: the same keys and values are written there once more, and
what comes out for it is dropped. Where each token belongs is read from memory that is overwritten
before a replay; with the kernels of specdec/kernels/gpu.py nothing else shapes a forward.

A recording holds the addresses of a cache's tensors, so it is good for these tensors alone. The
decoder has one `Recordings`, which knows over which cache each was made.
"""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specdec.model.cache import SlotCache
from specdec.model.packing import GRID_TOKENS
from specdec.model.rows import PackedRow, Row, cut_rows, packed_rows

LARGEST = 512
"""Most tokens of a forward that is recorded; more keep a GPU busy for longer than their launches.

Raised, more sizes are recorded, for forwards that gain little.
"""

SAME = 0.01
"""Relative difference between a forward and its replay that may be the order of sums.

Raised, a recording that computes something else is more likely to pass.
"""

Recorder = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""Takes a computation; gives what repeats it on the same memory and returns the same tensor."""


class RecordingFailed(RuntimeError):
    """A forward cannot be recorded on this GPU; the message says why."""


_alive = weakref.WeakSet[torch.cuda.CUDAGraph]()
"""What was recorded and is still there."""


def padded(tokens: int) -> int:
    """The size that so many tokens are padded to: more by a quarter or by three at most."""
    step = 1 if tokens <= 8 else 4 if tokens <= 32 else 8 if tokens <= 128 else 32
    return -(-tokens // step) * step


def record(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A `Recorder` that captures a CUDA graph; `run` must have run before."""
    graph = torch.cuda.CUDAGraph()
    # Graphs never run at the same time, so they share the memory of what they compute on. It is
    # gone for good with the last of them.
    pool = next((each.pool() for each in _alive), None)
    collects = gc.isenabled()
    gc.disable()  # a graph that is destroyed meanwhile, say an old engine's, spoils this one
    try:
        # Only this thread is watched: others of the process may use the GPU as they like.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            out = run()
    except RuntimeError as error:
        _alive.clear()  # their pool may be left as one that is recorded into
        raise RecordingFailed(str(error)) from error
    finally:
        if collects:
            gc.enable()
    _alive.add(graph)

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


class RecordedForward:
    """A forward of `size` packed tokens, repeated for whatever tokens and places are given.

    Args:
        size: tokens.
        row_tokens: most tokens of a row, as kernels take them.
        recorder: records it.
        device: of the tensors.
    """

    def __init__(
        self, size: int, row_tokens: int, recorder: Recorder, device: torch.device
    ) -> None:
        self._size, self._row_tokens, self._recorder = size, row_tokens, recorder
        # What a replay reads: tokens, their slots and positions, and the table of rows.
        self._inputs = torch.zeros(7 * size, dtype=torch.int64, device=device)
        self._replay: Callable[[], Tensor] | None = None

    def __call__(
        self,
        run: Callable[[Tensor, Tensor, Tensor], Tensor],
        tokens: Tensor,
        rows: Sequence[PackedRow],
    ) -> Tensor:
        """Hidden states [N, hidden] of the N <= size tokens of some rows; good until the next call.

        Args:
            run: computes hidden states [size, hidden] of tokens int64 [size] at places (slot,
                position) int64 [2, size] in rows int64 [size, 4], where some have no tokens; the
                first time it is recorded.
            tokens: int64 [N], on the device.
            rows: where they belong.

        Raises:
            RecordingFailed: there is no recording, or it does not give what it was made of.
        """
        n, size = len(tokens), self._size
        ids, places, table = torch.split(self._inputs, [size, 2 * size, 4 * size])
        ids[:n].copy_(tokens)
        ids[n:] = tokens[-1:]
        self._inputs[size:].copy_(torch.from_numpy(self._layout(rows, n)), non_blocking=True)
        if self._replay is not None:
            return self._replay()[:n]
        inputs = ids, places.view(2, size), table.view(size, 4)
        hidden = run(*inputs)  # compiles and allocates what must not be recorded
        replay = self._recorder(functools.partial(run, *inputs))
        # Both write the same keys and values to the same places, so it may run twice.
        gap = (replay() - hidden).float().norm() / hidden.float().norm()
        if not gap < SAME:
            raise RecordingFailed(f"a replay differs from what was recorded by {gap:.2g}")
        self._replay = replay
        return hidden[:n]

    def _layout(self, rows: Sequence[PackedRow], n: int) -> NDArray[np.int64]:
        """int64 [6 * size]: slots, positions and rows, with those of the padding."""
        last = rows[-1]
        place = (last.slot, last.start + last.tokens - 1)
        padding = (PackedRow(at, 1, *place) for at in range(n, self._size))
        table = np.array([*rows, *padding])
        cut = cut_rows(table, self._row_tokens)
        flat = np.zeros(6 * self._size, dtype=np.int64)
        flat[: 2 * self._size] = cut_rows(table, 1)[:, 2:].T.ravel()
        flat[2 * self._size :][: cut.size] = cut.ravel()
        return flat


class _OverCache(NamedTuple):
    """What was recorded over one cache: by size, all for the tensors of one generation."""

    generation: int
    by_size: dict[int, RecordedForward]


class Recordings:
    """A decoder's recorded forwards: one for each cache and size.

    They go with the cache, and when the cache takes other tensors. Nothing refers to a cache from
    here, and no cache refers to its recordings: they are gigabytes, and may not wait for the
    garbage collector, which would destroy them while others are made.

    Args:
        recorder: makes them.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._by_cache = weakref.WeakKeyDictionary[SlotCache, _OverCache]()

    def over(self, cache: SlotCache) -> dict[int, RecordedForward]:
        """What was recorded over the tensors that the cache has now, by size; add to it."""
        found = self._by_cache.get(cache)
        if found is None or found.generation != cache.generation:
            found = self._by_cache[cache] = _OverCache(cache.generation, {})
        return found.by_size

    def forward(
        self,
        run: Callable[[SlotCache, Tensor, Tensor, Tensor], Tensor],
        cache: SlotCache,
        rows: Sequence[Row],
        tokens: Tensor,
    ) -> Tensor | None:
        """Hidden states [N, hidden] of the rows' tokens, or None if such a forward is not recorded.

        They are good until the next call.

        Args:
            run: as `RecordedForward` runs it, given a cache.
            cache: where the rows' tokens go; its lengths stay as they are.
            rows: (slot, number of tokens).
            tokens: int64 [N], on the device.

        Raises:
            RecordingFailed: see `RecordedForward`.
        """
        kernels = cache.kernels
        if kernels is None or len(tokens) > LARGEST:
            return None
        if max(count for _, count in rows) > GRID_TOKENS:
            return None
        size, recorded = padded(len(tokens)), self.over(cache)
        if size not in recorded:
            most = kernels.row_tokens or GRID_TOKENS
            recorded[size] = RecordedForward(size, most, self._recorder, cache.device)
        places = packed_rows(cache.lengths, rows)
        return recorded[size](functools.partial(run, cache), tokens, places)
