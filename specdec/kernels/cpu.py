"""The kernels for CPUs: bindings of the functions that cpu.cpp exports."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from ctypes import c_bool, c_float, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from specdec.kernels.base import LayerKernels
from specdec.kernels.scoring import Scoring
from specdec.kernels.stored import Scales
from specdec.kernels.structs import Extras, Forward, Layer, Weights

DTYPES = (torch.float32, torch.bfloat16)
"""What cpu.cpp exports each function for."""

PROMPT_TOKENS = {torch.float32: 4096, torch.bfloat16: 128}
"""Most tokens of a prompt that `attend` is faster with than torch, by dtype.

A prompt of 600 tokens takes half of the time in float32, one of 2,400 three quarters, one of 4,800
as long. Torch has bfloat16 products that go in tiles. Raised, long prompts are read slower.
"""

# The arguments of each function, in cpu.cpp's order.
_ATTEND = [
    *[c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_int64, c_void_p],
    *[c_int64] * 6,
    *[c_float, c_void_p, c_void_p],
]
_ADD_NORM = [*[c_void_p] * 4, c_int64, c_int64, c_float]
_NORM_BESIDE = [*[c_void_p] * 5, *[c_float] * 2, c_void_p, *[c_int64] * 2]
_GATE = [c_void_p, c_void_p, c_int64, c_int64]
_ROTATE = [*[c_void_p] * 5, c_float, *[c_void_p] * 3, c_int64, *[c_void_p] * 2, *[c_int64] * 4]
_SCALE = [*[c_void_p] * 3, c_int64, c_int64]
_ARGMAX = [c_void_p, c_int64, c_void_p, *[c_int64] * 2]
_PRODUCT = [*[c_void_p] * 3, c_int64]
_WHOLE_LAYER = [*[c_void_p] * 6, c_int64]
_SOFTMAX = [c_void_p, c_int64, *[c_void_p] * 2, *[c_int64] * 2]
_RACE = [*[c_void_p] * 3, *[c_int64] * 2]
_TOKEN_SIGNALS = [c_void_p, c_int64, *[c_void_p] * 2, *[c_int64] * 4]


class CpuKernels(LayerKernels):
    """The functions of cpu.cpp for one dtype; all tensors are contiguous unless said otherwise.

    Between the matrix products of a forward torch runs dozens of small operators a layer. Its
    batched products reach half of the memory's bandwidth in attention, its argmax a quarter of it.

    Args:
        library: compiled.
        dtype: of activations and caches: one of DTYPES.

    Attributes:
        tiles: whether `product` takes bytes in tiles: the processor has AMX, and gives it to us.
        byte_panel: outputs whose weights it wants together if it takes bytes in panels, which is
            for AVX2 without AMX; else 0.
        panel: the same in this dtype: in float32 for AVX2, in bfloat16 for AMX.
    """

    row_tokens: int | None = None
    prompt_tokens: int
    keys_by_dimension = True

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        def function(name: str, arguments: Sequence[type[Any]]) -> ctypes._NamedFuncPointer:
            found = library[f"{name}_{str(dtype).removeprefix('torch.')}"]
            found.argtypes, found.restype = arguments, None
            return found

        self._attend = function("attend", _ATTEND)
        self._add_norm = function("add_norm", _ADD_NORM)
        self._norm_beside = function("norm_beside", _NORM_BESIDE)
        self._gate = function("gate", _GATE)
        self._rotate_and_store = function("rotate_and_store", _ROTATE)
        self._scale_rows = function("scale_rows", _SCALE)
        self._argmax = function("argmax", _ARGMAX)
        self._softmax = function("softmax", _SOFTMAX)
        self._token_signals = function("token_signals", _TOKEN_SIGNALS)
        self._product = function("product", _PRODUCT)
        self._whole_layer = function("whole_layer", _WHOLE_LAYER)
        if dtype == torch.float32:  # distributions are
            self._race = function("race", _RACE)
        self.prompt_tokens = PROMPT_TOKENS[dtype]
        library.has_tiles.restype = c_bool
        library.panel_outputs.restype = library.byte_panel_outputs.restype = c_int64
        self.tiles, self.byte_panel = bool(library.has_tiles()), library.byte_panel_outputs()
        in_tiles = 32 if self.tiles else 0
        self.panel = library.panel_outputs() if dtype == torch.float32 else in_tiles

    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        table: Tensor,
        rows: Tensor,
        scoring: Scoring,
        window: int | None,
        out: Tensor,
        *,
        scales: Scales | None = None,
        chunked: bool = False,
        paths: Tensor | None = None,
    ) -> None:
        assert scales is None, "no kernels for CPUs read eight bits"
        _, kv_heads, _, dim = keys.shape
        extras = Extras.of(scoring, chunked, paths)
        self._attend(
            query.data_ptr(), query.stride(0), query.stride(1),
            keys.data_ptr(), values.data_ptr(), table.data_ptr(), table.shape[1],
            rows.data_ptr(), len(rows), kv_heads, query.shape[1] // kv_heads, dim, values.shape[3],
            window or 0, scoring.scale, ctypes.byref(extras) if extras is not None else None,
            out.data_ptr(),
        )  # fmt: skip

    def add_norm(self, x: Tensor, y: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        out, width = torch.empty_like(x), x.shape[-1]
        more = y.data_ptr() if y is not None else None
        self._add_norm(
            x.data_ptr(), more, weight.data_ptr(), out.data_ptr(), x.numel() // width, width, eps
        )
        return out

    def norm_beside(
        self, embeddings: Tensor, tokens: Tensor, states: Tensor, norms: Sequence[Any]
    ) -> Tensor:
        """Normed embeddings and normed states side by side: [n, 2 * width].

        Args:
            embeddings: [V, width].
            tokens: int64 [n].
            states: [n, width].
            norms: RMS norms of embeddings and of states, as transformers has them.
        """
        n, width = states.shape
        out = states.new_empty(n, 2 * width)
        self._norm_beside(
            embeddings.data_ptr(), tokens.data_ptr(), states.data_ptr(),
            *(norm.weight.data_ptr() for norm in norms),
            *(norm.variance_epsilon for norm in norms), out.data_ptr(), n, width,
        )  # fmt: skip
        return out

    def gate(self, gate_up: Tensor) -> Tensor:
        width = gate_up.shape[-1] // 2
        out = gate_up.new_empty(*gate_up.shape[:-1], width)
        self._gate(gate_up.data_ptr(), out.data_ptr(), out.numel() // width, width)
        return out

    def rotate_and_store(
        self,
        heads: Tensor,
        cos: Tensor,
        sin: Tensor,
        norms: tuple[Tensor, Tensor, float] | None,
        keys: Tensor,
        values: Tensor,
        table: Tensor,
        slots: Tensor,
        positions: Tensor,
        scales: Scales | None = None,
    ) -> None:
        assert scales is None, "no kernels for CPUs store eight bits"
        n, all_heads, dim = heads.shape
        kv_heads = keys.shape[1]
        query_norm, key_norm, eps = norms or (None, None, 0.0)
        self._rotate_and_store(
            heads.data_ptr(), cos.data_ptr(), sin.data_ptr(),
            query_norm.data_ptr() if query_norm is not None else None,
            key_norm.data_ptr() if key_norm is not None else None, eps,
            keys.data_ptr(), values.data_ptr(), table.data_ptr(), table.shape[1],
            slots.data_ptr(), positions.data_ptr(), n, all_heads - 2 * kv_heads, kv_heads, dim,
        )  # fmt: skip

    def scale_rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [n, width] over each row's largest magnitude, and these [n, 1], both in float32."""
        n, width = x.shape
        out, largest = (torch.empty(n, m, dtype=torch.float32) for m in (width, 1))
        self._scale_rows(x.data_ptr(), out.data_ptr(), largest.data_ptr(), n, width)
        return out, largest

    def argmax(self, x: Tensor) -> Tensor:
        """Where the largest of each row of x [n, width] stands, the first of equals: int64 [n].

        -1 where it is infinite, or a number of the row is NaN. Only the numbers of a row must be
        contiguous.
        """
        n, width = x.shape
        found = torch.empty(n, dtype=torch.int64)
        self._argmax(x.data_ptr(), x.stride(0), found.data_ptr(), n, width)
        return found

    def token_signals(
        self, logits: Tensor, tokens: Tensor, out: Tensor, wanted: Iterable[int] = range(3)
    ) -> None:
        """What the softmax of each row says of its token, in nats.

        Args:
            logits: [n, V], each row contiguous.
            tokens: int64 [n].
            out: float32 [n, 3 or more]; the first three are for the logarithms of the token's
                probability (of 1e-38, if it is less) and of the likeliest one's, and the entropy.
            wanted: which of these to write.
        """
        self._token_signals(
            logits.data_ptr(), logits.stride(0), tokens.data_ptr(),
            out.data_ptr(), *logits.shape, out.shape[1], sum(1 << column for column in wanted),
        )  # fmt: skip

    def softmax(self, logits: Tensor, temperature: Tensor) -> Tensor:
        """The softmax of each row of logits over its temperature: float32 [n, V]; NaN without one.

        Only the numbers of a row must be contiguous. `temperature` is float32 [n].
        """
        (n, vocab), temperature = logits.shape, temperature.contiguous()
        out = torch.empty(n, vocab, dtype=torch.float32)
        self._softmax(
            logits.data_ptr(), logits.stride(0), temperature.data_ptr(), out.data_ptr(), n, vocab
        )
        return out

    def race(self, p: Tensor, keys: Tensor) -> Tensor:
        """Which token of each row has the highest p / E, with noise E ~ Exp(1): int64 [n].

        Args:
            p: float32 [n, V], contiguous; no NaN.
            keys: int64 [n], what a row's noise is made of.
        """
        n, vocab = p.shape
        found = torch.empty(n, dtype=torch.int64)
        self._race(p.data_ptr(), keys.data_ptr(), found.data_ptr(), n, vocab)
        return found

    def product(self, x: Tensor, weights: Weights) -> Tensor:
        """y [n, outputs] = x W^T + bias for x [n, inputs].

        Where weights are bytes, x is quantized per row, in tiles in steps of 1/127 of its largest
        magnitude, in panels in finer ones. A row that is not finite gives NaN.
        """
        out = x.new_empty(len(x), weights.outputs)
        self._product(x.data_ptr(), ctypes.byref(weights), out.data_ptr(), len(x))
        return out

    def whole_layer(
        self,
        layer: Layer,
        forward: Forward,
        x: Tensor,
        normed: Tensor | None,
        keys: Tensor,
        values: Tensor,
        window: int | None,
    ) -> None:
        """Make of x [.., N, hidden], in place, what a decoder layer makes of it.

        Args:
            normed: [N, width], what its attention reads; None: the input norm of x.
            keys, values, window: as `attend` has them.
        """
        self._whole_layer(
            ctypes.byref(layer), ctypes.byref(forward), x.data_ptr(),
            normed.data_ptr() if normed is not None else None,
            keys.data_ptr(), values.data_ptr(), window or 0,
        )  # fmt: skip
