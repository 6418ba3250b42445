"""Which kernels a tensor gets, by its dtype and device; None where torch's operators must do.

The results are the same up to rounding, so that a machine without a compiler or without Triton only
runs slower. A warning says so once, unless the kernels were switched off.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from collections.abc import Iterable

import torch
from torch import Tensor

from specdec.kernels.base import HEAD_STEP, LayerKernels
from specdec.kernels.compile import CompileFailed, find_compiler, load_library
from specdec.kernels.cpu import DTYPES, CpuKernels

SWITCH = "SPECBATCH_KERNELS"
"""Environment variable that turns the kernels off if it is 0."""

log = logging.getLogger(__name__)


@functools.cache
def cpu_kernels(dtype: torch.dtype, device: torch.device) -> CpuKernels | None:
    """The kernels for tensors of this dtype on this device, if it is a CPU that has them."""
    if device.type != "cpu" or dtype not in DTYPES or not _wanted():
        return None
    library = _library()
    return CpuKernels(library, dtype) if library is not None else None


def kernels_over(logits: Tensor) -> CpuKernels | None:
    """The kernels that can read logits [n, V], or None: the numbers of a row must be contiguous."""
    return cpu_kernels(logits.dtype, logits.device) if logits.stride(1) == 1 else None


def layer_kernels(
    dtype: torch.dtype,
    device: torch.device,
    head_sizes: Iterable[int],
    stored: torch.dtype | None = None,
) -> LayerKernels | None:
    """The kernels for decoder layers whose attention heads have these sizes, on CPUs and GPUs.

    `stored` is the dtype of keys and values if it is another; none read those on a CPU.
    """
    if any(size % HEAD_STEP for size in head_sizes):
        return None
    if device.type == "cuda":
        return _gpu_kernels(dtype, device) if _wanted() else None
    return cpu_kernels(dtype, device) if stored in (None, dtype) else None


def _wanted() -> bool:
    return os.environ.get(SWITCH, "1") != "0"


@functools.cache
def _gpu_kernels(dtype: torch.dtype, device: torch.device) -> LayerKernels | None:
    try:
        from specdec.kernels import gpu  # Triton comes with torch for GPUs only
    except ImportError:
        log.warning("no Triton: GPU layers run on torch's operators, which are slower")
        return None
    return gpu.GpuKernels(device) if dtype in gpu.DTYPES else None


@functools.cache
def _library() -> ctypes.CDLL | None:
    compiler = find_compiler()
    if compiler is None:
        log.info("no C++ compiler: CPU layers run on torch's operators, which are slower")
        return None
    try:
        return load_library(compiler)
    except CompileFailed as error:
        log.warning(
            "%s did not compile the CPU kernels, so layers run on torch's operators, which are "
            "slower; %s=0 silences this. %s",
            compiler, SWITCH, str(error)[-500:],
        )  # fmt: skip
        return None
