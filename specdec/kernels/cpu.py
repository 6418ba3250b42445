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

DTYPES = (torch.float32, torch.bfloat16)
"""What cpu.cpp exports each function for."""

PROMPT_TOKENS = {torch.float32: 768, torch.bfloat16: 128}
"""Most tokens of a prompt that `attend` is faster with than torch, by dtype.

A prompt of 150 tokens takes half of the time in float32, one of 600 two thirds, one of 2,400 a
sixth more. Torch has bfloat16 products that go in tiles. Raised, long prompts are read slower.
"""

# The arguments of each function, in cpu.cpp's order.
_ATTEND = [
    *[c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_int64, c_void_p],
    *[c_int64] * 6,
    *[c_float, c_void_p, c_void_p],
]
_ADD_NORM = [*[c_void_p] * 4, c_int64, c_int64, c_float]
_GATE = [c_void_p, c_void_p, c_int64, c_int64]
_ROTATE = [*[c_void_p] * 5, c_float, *[c_void_p] * 3, c_int64, *[c_void_p] * 2, *[c_int64] * 4]
_SCALE = [*[c_void_p] * 3, c_int64, c_int64]
_ARGMAX = [c_void_p, c_int64, c_void_p, *[c_int64] * 2]
_PRODUCT = [*[c_void_p] * 4, *[c_int64] * 3]
_BYTE_PRODUCT = [*[c_void_p] * 5, *[c_int64] * 3]
_SOFTMAX = [c_void_p, c_int64, *[c_void_p] * 2, *[c_int64] * 2]
_RACE = [*[c_void_p] * 3, *[c_int64] * 2]
_TOKEN_SIGNALS = [c_void_p, c_int64, *[c_void_p] * 2, *[c_int64] * 4]


class _Extras(ctypes.Structure):
    """attention.h's struct of this name. Most forwards have none, and each argument takes time."""

    _fields_ = [
        ("chunked", c_int64),
        *((name, c_void_p) for name in ("bases", "masks", "sinks", "bias")),
        ("bias_width", c_int64),
        ("softcap", c_float),
    ]

    @classmethod
    def of(cls, scoring: Scoring, chunked: bool, paths: Tensor | None) -> _Extras:
        """It holds addresses only; it keeps the tensor that is made here."""
        _, softcap, sinks, bias = scoring
        extras = cls(chunked=chunked, softcap=softcap or 0.0)
        if paths is not None:
            extras.bases, extras.masks = (numbers.data_ptr() for numbers in paths)
        if sinks is not None:
            extras.sinks_as_float = sinks.float()
            extras.sinks = extras.sinks_as_float.data_ptr()
        if bias is not None:
            extras.bias, extras.bias_width = bias.data_ptr(), bias.stride(0)
        return extras


class CpuKernels(LayerKernels):
    """The functions of cpu.cpp for one dtype; all tensors are contiguous unless said otherwise.

    Between the matrix products of a forward torch runs dozens of small operators a layer. Its
    batched products reach half of the memory's bandwidth in attention, its argmax a quarter of it.

    Args:
        library: compiled.
        dtype: of activations and caches: one of DTYPES.

    Attributes:
        tiles: whether `byte_product` works here: the processor has AMX, and gives it to us.
        panel: outputs whose weights `product` wants together; 0 where it does not work. In float32
            it takes AVX2, in bfloat16 AMX.
    """

    row_tokens: int | None = None
    prompt_tokens: int

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        def function(name: str, arguments: Sequence[type[Any]]) -> ctypes._NamedFuncPointer:
            found = library[f"{name}_{str(dtype).removeprefix('torch.')}"]
            found.argtypes, found.restype = arguments, None
            return found

        self._attend = function("attend", _ATTEND)
        self._add_norm = function("add_norm", _ADD_NORM)
        self._gate = function("gate", _GATE)
        self._rotate_and_store = function("rotate_and_store", _ROTATE)
        self._scale_rows = function("scale_rows", _SCALE)
        self._argmax = function("argmax", _ARGMAX)
        self._softmax = function("softmax", _SOFTMAX)
        self._token_signals = function("token_signals", _TOKEN_SIGNALS)
        self._product = function("product", _PRODUCT)
        self._byte_product = function("byte_product", _BYTE_PRODUCT)
        if dtype == torch.float32:  # distributions are
            self._race = function("race", _RACE)
        self.prompt_tokens = PROMPT_TOKENS[dtype]
        library.has_tiles.restype, library.panel_outputs.restype = c_bool, c_int64
        self.tiles = bool(library.has_tiles())
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
        extras = None
        if paths is not None or chunked or not scoring.plain:
            extras = _Extras.of(scoring, chunked, paths)
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

    def product(self, x: Tensor, weight: Tensor, bias: Tensor, outputs: int) -> Tensor:
        """y [n, outputs] = x W^T + bias for x [n, inputs].

        Args:
            weight: W, packed as panels.h says in float32, as tiles.h says in bfloat16.
            bias: float32, padded to a multiple of `panel`.
        """
        n, inputs = x.shape
        out = x.new_empty(n, outputs)
        self._product(
            x.data_ptr(), weight.data_ptr(), bias.data_ptr(), out.data_ptr(), n, inputs, outputs
        )
        return out

    def byte_product(
        self, x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor, outputs: int
    ) -> Tensor:
        """y [n, outputs] = x W^T + bias for x [n, inputs], quantized per row in steps of 1/127.

        A row that is not finite gives NaN.

        Args:
            weight: W in bytes, packed for tiles as tiles.h says.
            scales: float32, what a step of each output's weights is worth; 1 where W was padded.
            bias: float32, padded as scales are.
        """
        n, inputs = x.shape
        out = x.new_empty(n, outputs)
        self._byte_product(
            x.data_ptr(), weight.data_ptr(), scales.data_ptr(), bias.data_ptr(),
            out.data_ptr(), n, inputs, outputs,
        )  # fmt: skip
        return out
