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
from collections.abc import Callable, Hashable, Sequence
from itertools import chain
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from specdec.model.cache import SlotCache
from specdec.model.packing import GRID_TOKENS
from specdec.model.rows import PackedRow, Row, packed_rows
from specdec.model.trees import Trees, lay_out, longest

LARGEST = 512
"""Most tokens of a forward that is recorded; more keep a GPU busy for longer than their launches.

Raised, more sizes are recorded, for forwards that gain little.
"""

SAME = 0.01
"""Relative difference between a forward and its replay that may be the order of sums.

Raised, a recording that computes something else is more likely to pass.
"""

Run = Callable[[], Any]
"""A computation that returns tensors."""

Recorder = Callable[[Run], Run]
"""Takes a computation; gives what repeats it on the same memory and returns the same tensors."""

Out = TypeVar("Out", covariant=True)


class Tail(Protocol[Out]):
    """What is computed of a forward's hidden states, and recorded with it.

    Attributes:
        recordable: whether `key` and `inputs` say all of it.
        key: all of it that is no tensor. What has the same key computes the same.
        inputs: tensors that it reads besides, all of them with a first dimension of one size: that
            of what it returns. Without any, that is the number of tokens.
    """

    @property
    def recordable(self) -> bool: ...

    @property
    def key(self) -> Hashable: ...

    @property
    def inputs(self) -> tuple[Tensor, ...]: ...

    def __call__(self, hidden: Tensor, *inputs: Tensor) -> Out:
        """A tensor, or a tuple of tensors and None, of states [N, hidden]."""


class _Hidden:
    """The tail that returns the states."""

    recordable = True
    key: Hashable = None
    inputs: tuple[Tensor, ...] = ()

    def __call__(self, hidden: Tensor, *inputs: Tensor) -> Tensor:
        return hidden


HIDDEN: Tail[Tensor] = _Hidden()
"""Nothing but the states."""


class RecordingFailed(RuntimeError):
    """A forward cannot be recorded on this GPU; the message says why."""


_alive = weakref.WeakSet[torch.cuda.CUDAGraph]()
"""What was recorded and is still there."""


def padded(tokens: int) -> int:
    """The size that so many tokens are padded to: 1, 2, 4, 8, then more by a quarter at most.

    Sizes are few because each is recorded once, and small ones take as long as one token does.
    """
    if tokens <= 8:
        return 1 << (tokens - 1).bit_length()
    step = 4 if tokens <= 32 else 8 if tokens <= 128 else 32
    return -(-tokens // step) * step


def record(run: Run) -> Run:
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

    def replay() -> Any:
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
        branches: whether rows may end in trees.
    """

    def __init__(
        self,
        size: int,
        row_tokens: int,
        recorder: Recorder,
        device: torch.device,
        *,
        branches: bool = False,
    ) -> None:
        self._size, self._row_tokens, self._recorder = size, row_tokens, recorder
        # What a replay reads: tokens, where they belong as `Packing.of_places` takes it, and rows.
        width = 5 if branches else 2
        inputs = torch.zeros((5 + width) * size, dtype=torch.int64, device=device)
        self._ids, self._layout = inputs[:size], inputs[size:]
        self._places = self._layout[: width * size].view(width, size)
        self._rows = self._layout[width * size :].view(size, 4)
        self._more: list[Tensor] = []  # and what the tail does
        self._replay: Run | None = None

    def __call__(
        self,
        run: Callable[[Tensor, Tensor, Tensor], Tensor],
        tokens: Tensor,
        rows: Sequence[PackedRow],
        trees: Trees,
        tail: Tail[Out],
    ) -> Out:
        """What the tail makes of the hidden states of N <= size tokens of some rows.

        Args:
            run: computes hidden states [size, hidden] of tokens int64 [size] at places int64
                [2, size] or, of `branches`, [5, size] (`Packing.of_places`) in rows int64
                [size, 4], where some have no tokens; the first time it is recorded.
            tokens: int64 [N], on the device.
            rows: where they belong.
            trees: of each row, if it `branches`.
            tail: each time of the same key.

        Raises:
            RecordingFailed: there is no recording, or it does not give what it was made of.
        """
        n, size = len(tokens), self._size
        if n < size:
            self._ids[n:] = tokens[-1:]
        _first(self._ids, n).copy_(tokens)
        layout = torch.from_numpy(np.array(self._lay_out(rows, trees, n)))
        self._layout.copy_(layout, non_blocking=True)
        if self._replay is None:
            self._more = [each[:1].expand(size, *each.shape[1:]).clone() for each in tail.inputs]
        for into, given in zip(self._more, tail.inputs, strict=True):
            _first(into, len(given)).copy_(given)
        wanted = len(tail.inputs[0]) if tail.inputs else n
        if self._replay is not None:
            again: Out = _leading(self._replay()[1], wanted)
            return again

        places, more = (self._ids, self._places, self._rows), self._more

        def both() -> tuple[Tensor, Any]:  # without `self`, which keeps what comes of it
            hidden = run(*places)
            return hidden, tail(hidden, *more)

        hidden, out = both()  # compiles and allocates what must not be recorded
        replay = self._recorder(both)
        # Both write the same keys and values to the same places, so it may run twice.
        gap = (replay()[0] - hidden).float().norm() / hidden.float().norm()
        if not gap < SAME:
            raise RecordingFailed(f"a replay differs from what was recorded by {gap:.2g}")
        self._replay = replay
        first: Out = _leading(out, wanted)
        return first

    def _lay_out(self, rows: Sequence[PackedRow], trees: Trees, n: int) -> list[int]:
        """Places and rows of `size` tokens, with those of the padding.

        In plain Python, which is as fast for a hundred rows, and for a few much faster than arrays.
        """
        size, most = self._size, self._row_tokens
        slots: list[int] = []
        stored: list[int] = []
        table: list[int] = []
        for begin, tokens, slot, start in rows:
            slots += [slot] * tokens
            stored += range(start, start + tokens)
            for done in range(0, tokens, most):
                table += (begin + done, min(tokens - done, most), slot, start + done)
        for at in range(n, size):
            table += (at, 1, slots[-1], stored[-1])
        places = [slots, stored]
        if trees is not None:
            positions, bases, masks = lay_out(rows, trees)
            places = [slots, positions, stored, bases, masks]
        for numbers in places:
            numbers += numbers[-1:] * (size - n)
        return [*chain.from_iterable(places), *table, *[0] * (4 * size - len(table))]


def _first(tensor: Tensor, n: int) -> Tensor:
    """tensor[:n]; an operator costs the host more than the question whether it is needed."""
    return tensor if len(tensor) == n else tensor[:n]


def _leading(out: Any, n: int) -> Any:
    """The first n of what a tail returned."""
    if isinstance(out, Tensor):
        return _first(out, n)
    return tuple(None if each is None else _first(each, n) for each in out)


_Key = tuple[int, Hashable, bool]
"""Size, tail, and whether rows may end in trees."""


class _OverCache(NamedTuple):
    """What was recorded over one cache, all for the tensors of one generation."""

    generation: int
    by_key: dict[_Key, RecordedForward]


class Recordings:
    """A decoder's recorded forwards: one for each cache, size and tail, with trees or without.

    They go with the cache, and when the cache takes other tensors. Nothing refers to a cache from
    here, and no cache refers to its recordings: they are gigabytes, and may not wait for the
    garbage collector, which would destroy them while others are made.

    Args:
        recorder: makes them.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._by_cache = weakref.WeakKeyDictionary[SlotCache, _OverCache]()

    def over(self, cache: SlotCache) -> dict[_Key, RecordedForward]:
        """What was recorded over the tensors that the cache has now; add to it."""
        found = self._by_cache.get(cache)
        if found is None or found.generation != cache.generation:
            found = self._by_cache[cache] = _OverCache(cache.generation, {})
        return found.by_key

    def lacks(self, cache: SlotCache, rows: Sequence[Row], trees: Trees, tail: Tail[Any]) -> bool:
        """Whether the next forward of such rows, (slot, number of tokens), would be recorded."""
        size = self._size(cache, rows, trees)
        return size is not None and (size, tail.key, trees is not None) not in self.over(cache)

    def _size(self, cache: SlotCache, rows: Sequence[Row], trees: Trees) -> int | None:
        """The size that a forward of rows has, or None if such a forward is not recorded."""
        tokens = sum([count for _, count in rows])
        if cache.kernels is None or tokens > LARGEST or longest(rows, trees) > GRID_TOKENS:
            return None
        return padded(tokens)

    def forward(
        self,
        run: Callable[[SlotCache, Tensor, Tensor, Tensor], Tensor],
        cache: SlotCache,
        rows: Sequence[Row],
        tokens: Tensor,
        trees: Trees,
        tail: Tail[Out],
    ) -> Out | None:
        """What the tail makes of the rows' tokens, or None if such a forward is not recorded.

        Args:
            run: as `RecordedForward` runs it, given a cache.
            cache: where the rows' tokens go; its lengths stay as they are.
            rows: (slot, number of tokens).
            tokens: int64 [N], on the device.
            trees: of each row; None: there are none.
            tail: a single tensor that it returns is good until the next call.

        Raises:
            RecordingFailed: see `RecordedForward`.
        """
        kernels, size = cache.kernels, self._size(cache, rows, trees)
        if kernels is None or size is None:
            return None
        key, recorded = (size, tail.key, trees is not None), self.over(cache)
        if key not in recorded:
            most = kernels.row_tokens or GRID_TOKENS
            recorded[key] = RecordedForward(
                size, most, self._recorder, cache.device, branches=trees is not None
            )
        packed = packed_rows(cache.lengths, rows)
        return recorded[key](functools.partial(run, cache), tokens, packed, trees, tail)
