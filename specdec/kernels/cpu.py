"""Kernels for CPUs, compiled from kernels.cpp when they are first needed.

Between the matrix products of a forward torch runs dozens of small operators a layer, its batched
products reach half of the memory's bandwidth in attention, and its argmax a quarter of it. g++
turns kernels.cpp into a library in two seconds, which is kept in the user's cache folder. Without a
compiler everything runs on torch's operators, with the same results up to rounding.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from ctypes import c_float, c_int64, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from specdec.user_cache import cache_folder

if TYPE_CHECKING:
    from specdec.kernels.gpu import GpuKernels

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fopenmp"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
)
COMPILE_SECONDS = 120

HEAD_STEP = 16
"""Sizes of attention heads must be multiples of this."""

SWITCH = "SPECBATCH_KERNELS"
"""Environment variable that turns the kernels off if it is 0."""

_ATTEND = [
    *[c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_void_p],
    *[c_int64] * 7,
    *[c_float, c_void_p],
]
_ADD_NORM = [*[c_void_p] * 4, c_int64, c_int64, c_float]
_GATE = [c_void_p, c_void_p, c_int64, c_int64]
_ROTATE = [*[c_void_p] * 5, c_float, *[c_void_p] * 4, *[c_int64] * 5]
_SCALE = [*[c_void_p] * 3, c_int64, c_int64]
_ARGMAX = [c_void_p, c_int64, c_void_p, *[c_int64] * 2]
_TOKEN_SIGNALS = [c_void_p, c_int64, *[c_void_p] * 2, *[c_int64] * 4]

log = logging.getLogger(__name__)


class Kernels:
    """The functions of kernels.cpp for one dtype; all tensors are contiguous unless said otherwise.

    Args:
        library: compiled.
        dtype: of activations and caches: float32 or bfloat16.
    """

    row_tokens: int | None = None
    """Most tokens of a row that `attend` takes; None: any number."""

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
        self._token_signals = function("token_signals", _TOKEN_SIGNALS)

    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        rows: Tensor,
        scale: float,
        window: int | None,
        out: Tensor,
    ) -> None:
        """Attention of the tokens of some rows, each to its own slot up to itself.

        Args:
            query: [N, H, D] with D contiguous.
            keys: [slots, Hkv, capacity, D]; values: [slots, Hkv, capacity, Dv].
            rows: int64 [R, 4]: first packed token, number of tokens, slot, position of the first.
            window: positions a token may look back, itself included; None: all.
            out: [N, H, Dv]; the rows' tokens are written.
        """
        _, kv_heads, capacity, dim = keys.shape
        self._attend(
            query.data_ptr(), query.stride(0), query.stride(1),
            keys.data_ptr(), values.data_ptr(), rows.data_ptr(), len(rows),
            kv_heads, query.shape[1] // kv_heads, capacity, dim, values.shape[3],
            window or 0, scale, out.data_ptr(),
        )  # fmt: skip

    def add_norm(self, x: Tensor, y: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        """Add y to x in place, if there is one; return weight * x / rms(x). x, y: [..., width]."""
        out, width = torch.empty_like(x), x.shape[-1]
        more = y.data_ptr() if y is not None else None
        self._add_norm(
            x.data_ptr(), more, weight.data_ptr(), out.data_ptr(), x.numel() // width, width, eps
        )
        return out

    def gate(self, gate_up: Tensor) -> Tensor:
        """silu(g) * u of [..., 2 * width], g and u its halves: [..., width]."""
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
        slots: Tensor,
        positions: Tensor,
    ) -> None:
        """Rotate query and key heads; queries stay in place, keys and values go to their slots.

        Args:
            heads: [N, H + 2 Hkv, D], changed in place.
            cos, sin: [N, D], the same numbers in both halves.
            norms: weights [D] of a norm of queries and one of keys, and their epsilon.
            keys, values: a layer's cache, [slots, Hkv, capacity, D].
            slots, positions: int64 [N].
        """
        n, all_heads, dim = heads.shape
        kv_heads, capacity = keys.shape[1], keys.shape[2]
        query_norm, key_norm, eps = norms or (None, None, 0.0)
        self._rotate_and_store(
            heads.data_ptr(), cos.data_ptr(), sin.data_ptr(),
            query_norm.data_ptr() if query_norm is not None else None,
            key_norm.data_ptr() if key_norm is not None else None, eps,
            keys.data_ptr(), values.data_ptr(), slots.data_ptr(), positions.data_ptr(),
            n, all_heads - 2 * kv_heads, kv_heads, dim, capacity,
        )  # fmt: skip

    def scale_rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [n, width] over each row's largest magnitude, and these [n, 1], both in float32."""
        n, width = x.shape
        out, largest = (torch.empty(n, m, dtype=torch.float32) for m in (width, 1))
        self._scale_rows(x.data_ptr(), out.data_ptr(), largest.data_ptr(), n, width)
        return out, largest

    def argmax(self, x: Tensor) -> Tensor:
        """Where the largest of each row of x [n, width] stands, the first of equals: int64 [n].

        Only the numbers of a row must be contiguous.
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


LayerKernels: TypeAlias = "Kernels | GpuKernels"
"""What has kernels for decoder layers: `attend`, `add_norm`, `gate` and `rotate_and_store`."""


@functools.cache
def kernels_for(dtype: torch.dtype, device: torch.device) -> Kernels | None:
    """The kernels for tensors of this dtype on this device, or None if there are none here."""
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return None
    library = _library() if _wanted() else None
    return Kernels(library, dtype) if library is not None else None


def kernels_over(logits: Tensor) -> Kernels | None:
    """The kernels that can read logits [n, V], or None: the numbers of a row must be contiguous."""
    return kernels_for(logits.dtype, logits.device) if logits.stride(1) == 1 else None


def layer_kernels(dtype: torch.dtype, device: torch.device) -> LayerKernels | None:
    """As `kernels_for`, for decoder layers, which have kernels on GPUs, too."""
    if device.type == "cuda" and _wanted():
        return _gpu_kernels(dtype, device)
    return kernels_for(dtype, device)


@functools.cache
def _gpu_kernels(dtype: torch.dtype, device: torch.device) -> GpuKernels | None:
    try:
        from specdec.kernels.gpu import DTYPES, GpuKernels
    except ImportError:
        log.warning("no Triton: GPU layers run on torch's operators, which are slower")
        return None
    return GpuKernels(device) if dtype in DTYPES else None


def _wanted() -> bool:
    return os.environ.get(SWITCH, "1") != "0"


@functools.cache
def _library() -> ctypes.CDLL | None:
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        log.info("no C++ compiler: CPU layers run on torch's operators, which are slower")
        return None
    try:
        return ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", "") or str(error)
        log.warning(
            "%s did not compile the CPU kernels, so layers run on torch's operators, which are "
            "slower; %s=0 silences this. %s",
            compiler, SWITCH, reason.strip()[-500:],
        )  # fmt: skip
        return None


def _compiled(compiler: str) -> Path:
    """The library for this source, compiler and processor, from the cache folder if it is there."""
    version = _run(compiler, "--version")
    # torch's own OpenMP: a second one would have threads of its own, and each team would spin while
    # the other works.
    runtimes = sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*"))
    openmp = str(runtimes[0]) if runtimes else "-fopenmp"
    parts = (SOURCE.read_text(), *FLAGS, openmp, torch.__version__, version, _processor())
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        library = folder / f"kernels-{digest}.so"
        if library.is_file():
            return library
    except (OSError, RuntimeError):  # a home folder that is read-only, or none at all
        library = Path(tempfile.mkdtemp(prefix="specbatch-")) / "kernels.so"
    # Several actors of a node may do this at once; each renames a whole file into place.
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        object_file, fresh = Path(scratch) / "kernels.o", Path(scratch) / library.name
        _run(compiler, *FLAGS, "-fPIC", "-c", str(SOURCE), "-o", str(object_file))
        _run(compiler, "-shared", str(object_file), openmp, "-o", str(fresh))
        fresh.replace(library)
    return library


def _run(*command: str) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=COMPILE_SECONDS
    )
    return done.stdout


def _processor() -> str:
    """What -march=native depends on: a home folder may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "CPU part", "Features")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
