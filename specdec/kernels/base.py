"""What a set of kernels does for a decoder layer, whatever device it is for."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from specdec.kernels.scoring import Scoring
from specdec.kernels.stored import Scales

HEAD_STEP = 16
"""Sizes of attention heads must be multiples of this: the kernels read a head in whole vectors.

Models with other heads run on torch's operators. It is the length of an AVX-512 vector in float32,
so a smaller step would not do on such a CPU.
"""


class LayerKernels(Protocol):
    """Kernels for the parts of a layer between its matrix products, in one dtype on one device.

    All tensors are contiguous unless said otherwise. N is the number of packed tokens.
    """

    row_tokens: int | None
    """Most tokens of a row that `attend` takes; None: any number."""

    prompt_tokens: int
    """Most tokens of a prompt with which `attend` is faster than torch's operators row by row."""

    keys_by_dimension: bool
    """Whether a cache's keys are to lie in memory as [pages, Hkv, D, PAGE]."""

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
        """Attention of the tokens of some rows, each to its own slot up to itself.

        A token in a tree attends to what is before its base and to its path, in this order, as if
        its path were stored right behind what is before the base (specdec/model/trees.py).

        Args:
            query: [N, H, D] with D contiguous.
            keys: [pages, Hkv, PAGE, D], by dimension if wanted; values: [pages, Hkv, PAGE, Dv].
            table: int64 [slots, width], the pages of each slot.
            rows: int64 [R, 4]: first packed token, number of tokens, slot, where the first is
                stored. A row may have no tokens.
            scoring: how products become weights.
            window: positions a token may look back, itself included; None: all.
            out: [N, H, Dv]; the rows' tokens are written.
            scales: of keys and values, if these are numbers of eight bits.
            chunked: whether a token looks back to the last multiple of `window` instead.
            paths: int64 [2, N], bases and masks of all packed tokens, if there are trees.
        """

    def add_norm(self, x: Tensor, y: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        """Add y to x in place, if there is one; return weight * x / rms(x). x, y: [..., width]."""

    def gate(self, gate_up: Tensor) -> Tensor:
        """silu(g) * u of [..., 2 * width], g and u its halves: [..., width]."""

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
        """Rotate query and key heads; queries stay in place, keys and values go to their slots.

        Args:
            heads: [N, H + 2 Hkv, D], changed in place.
            cos, sin: [N, D], the same numbers in both halves.
            norms: weights [D] of a norm of queries and one of keys, and their epsilon.
            keys, values: a layer's cache, as `attend` has them.
            table: int64 [slots, width], the pages of each slot.
            slots, positions: int64 [N].
            scales: of keys and values, if these are to be numbers of eight bits.
        """
