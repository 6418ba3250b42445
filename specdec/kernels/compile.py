"""The library of the CPU kernels: compiled when it is first needed, then kept.

g++ takes two seconds. The library stays in the user's cache folder, under a name that says for what
sources, flags, compiler, processor and torch it was made.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from specdec.atomic import atomic_file
from specdec.user_cache import cache_folder

SOURCE = Path(__file__).with_name("cpu.cpp")
"""What is compiled; it includes every header beside it."""

FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fopenmp"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
)
"""For the compiler. -ffp-contract=off keeps a token's bits the same in any batch: otherwise fused
multiply-adds come and go with the shape of a loop. The last two let loops become vector code."""

COMPILE_SECONDS = 120
"""A compiler that takes longer is stopped, and layers run on torch's operators.

It takes two seconds on an idle machine, so this leaves room for a busy one. If raised, a compiler
that hangs delays the first model for longer.
"""


class CompileFailed(RuntimeError):
    """There is no library; the message says why, as the compiler or the loader put it."""


def find_compiler() -> str | None:
    """$CXX, or g++ if it is installed."""
    return os.environ.get("CXX") or shutil.which("g++")


def load_library(compiler: str) -> ctypes.CDLL:
    """The kernels, compiled if they were not yet.

    Raises:
        CompileFailed: they cannot be compiled or loaded.
    """
    try:
        return ctypes.CDLL(str(compiled(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        raise CompileFailed((getattr(error, "stderr", "") or str(error)).strip()) from error


def compiled(compiler: str) -> Path:
    """The library's file, from the cache folder if it is there.

    Raises:
        OSError, SubprocessError: the compiler does not run, or fails.
    """
    # torch's own OpenMP: a second one would have threads of its own, and each team would spin while
    # the other works.
    runtimes = sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*"))
    openmp = str(runtimes[0]) if runtimes else "-fopenmp"
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        library = folder / f"kernels-{_digest(compiler, openmp)}.so"
        if library.is_file():
            return library
    except (OSError, RuntimeError):  # a home folder that is read-only, or none at all
        library = Path(tempfile.mkdtemp(prefix="specbatch-")) / "kernels.so"
    with atomic_file(library) as fresh:  # several actors of a node may be here at once
        object_file = fresh.with_suffix(".o")
        _run(compiler, *FLAGS, "-fPIC", "-c", str(SOURCE), "-o", str(object_file))
        _run(compiler, "-shared", str(object_file), openmp, "-o", str(fresh))
    return library


def source_files() -> list[Path]:
    """All that is compiled: the source and its headers, by name."""
    return sorted([SOURCE, *SOURCE.parent.glob("*.h")])


def _digest(compiler: str, openmp: str) -> str:
    """Names what the library depends on."""
    sources = [text for file in source_files() for text in (file.name, file.read_text())]
    version = _run(compiler, "--version")
    parts = (*sources, *FLAGS, openmp, torch.__version__, version, _processor())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


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
