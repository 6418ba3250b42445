"""The structs that cpu.cpp's functions take: addresses of tensors, which each keeps alive."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p
from typing import Any

from torch import Tensor

from specdec.kernels.scoring import Scoring


class _Struct(ctypes.Structure):
    """`_keep` has what the addresses are of."""

    _keep: tuple[Any, ...]


class Extras(_Struct):
    """What most forwards have not: attention.h's struct. Each argument of a call takes time."""

    _fields_ = [
        ("chunked", c_int64),
        *((name, c_void_p) for name in ("bases", "masks", "sinks", "bias")),
        ("bias_width", c_int64),
        ("softcap", c_float),
    ]

    @classmethod
    def of(cls, scoring: Scoring, chunked: bool, paths: Tensor | None) -> Extras | None:
        """None if a forward has nothing of it. `chunked`, `paths`: of `LayerKernels.attend`."""
        if paths is None and not chunked and scoring.plain:
            return None
        _, softcap, sinks, bias = scoring
        extras = cls(chunked=chunked, softcap=softcap or 0.0)
        if paths is not None:
            extras.bases, extras.masks = (numbers.data_ptr() for numbers in paths)
        if sinks is not None:
            sinks = sinks.float()
            extras.sinks = sinks.data_ptr()
        if bias is not None:
            extras.bias, extras.bias_width = bias.data_ptr(), bias.stride(0)
        extras._keep = (paths, sinks, bias)
        return extras


class Weights(_Struct):
    """A linear layer, as whole_layer.h has it."""

    _fields_ = [
        *((name, c_void_p) for name in ("numbers", "scales", "bias")),
        *((name, c_int64) for name in ("inputs", "outputs")),
    ]
    inputs: int
    outputs: int

    @classmethod
    def of(
        cls, numbers: Tensor, scales: Tensor | None, bias: Tensor, shape: Sequence[int]
    ) -> Weights:
        """Those of a layer with a weight of `shape` [outputs, inputs].

        Args:
            numbers: the weight, packed: float32 as panels.h says, bfloat16 as tiles.h does, bytes
                as the one or the other; they have scales.
            scales: float32, what a step of each output's bytes is worth.
            bias: float32, padded to whole panels or pairs of tiles, as numbers and scales are.
        """
        outputs, inputs = shape
        weights = cls(
            numbers.data_ptr(), _address(scales), bias.data_ptr(), inputs=inputs, outputs=outputs
        )
        weights._keep = (numbers, scales, bias)
        return weights


class Layer(_Struct):
    """What a decoder layer is made of, as whole_layer.h has it."""

    _fields_ = [
        *((name, Weights) for name in ("qkv", "output", "gate_up", "down")),
        *((name, c_void_p) for name in ("input_norm", "mlp_norm", "query_norm", "key_norm")),
        *((name, c_int64) for name in ("query_heads", "kv_heads", "dim")),
        *((name, c_float) for name in ("epsilon", "scale")),
    ]

    @classmethod
    def of(
        cls,
        weights: Sequence[Weights],
        norms: Sequence[Tensor | None],
        heads: tuple[int, int, int],
        epsilon: float,
        scale: float,
    ) -> Layer:
        """One of these weights and norms, each in the order of the fields.

        Args:
            norms: weights of RMS norms; None: queries, or keys, are not normed.
            heads: of queries, of keys, and their size.
            epsilon: of all norms.
            scale: of products of queries and keys.
        """
        layer = cls(*weights, *map(_address, norms), *heads, epsilon, scale)
        layer._keep = (*weights, *norms)
        return layer


class Forward(_Struct):
    """What all layers of a forward share, as whole_layer.h has it."""

    _fields_ = [
        *((name, c_void_p) for name in ("cos", "sin", "table")),
        ("table_width", c_int64),
        *((name, c_void_p) for name in ("slots", "positions")),
        ("n", c_int64),
        ("rows", c_void_p),
        ("n_rows", c_int64),
        ("extras", ctypes.POINTER(Extras)),
    ]

    @classmethod
    def of(
        cls,
        angles: tuple[Tensor, Tensor],
        table: Tensor,
        slots: Tensor,
        positions: Tensor,
        rows: Tensor,
        extras: Extras | None,
    ) -> Forward:
        """Of n tokens with `angles` [1, n, D]; the rest is as `LayerKernels` says."""
        cos, sin = angles
        forward = cls(
            *map(_address, (cos, sin, table)), table.shape[1],
            *map(_address, (slots, positions)), cos.shape[1], _address(rows), len(rows),
            ctypes.pointer(extras) if extras is not None else None,
        )  # fmt: skip
        forward._keep = (cos, sin, table, slots, positions, rows, extras)
        return forward


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
