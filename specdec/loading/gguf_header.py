"""What a GGUF file's weights are stored in, read from its header alone.

The `gguf` package reads the same, but makes a Python object of each token of the vocabulary, which
takes seconds; what is not needed here is skipped. Layout:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from collections import Counter
from pathlib import Path

import torch

_MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a metadata value by its type: integers, floats and booleans."""

_PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
"""Types of tensors that are numbers as they are; all others are quantised."""


def stored_dtype(file: Path) -> torch.dtype | None:
    """The dtype of most of the weights, or None if they are quantised.

    Raises:
        ValueError: it is no GGUF file, or one that cannot be read.
        OSError: it cannot be opened.
    """
    with (
        file.open("rb") as stream,
        mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        try:
            numbers = _Reader(data).numbers_by_type()
        except (struct.error, KeyError) as error:
            raise ValueError(f"its header is damaged: {error}") from error
    if not numbers:
        raise ValueError("it has no tensors")
    return _PLAIN.get(max(numbers, key=lambda kind: numbers[kind]))


class _Reader:
    """Goes through a header once."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at = data, 0

    def numbers_by_type(self) -> Counter[int]:
        """How many numbers the tensors of each type have."""
        if self._data[:4] != _MAGIC:
            raise ValueError("it does not begin as a GGUF file does")
        self._at = 4
        version = self._number("I")
        if version not in (2, 3):
            raise ValueError(f"version {version} of the format is not known")
        tensors, entries = self._number("Q"), self._number("Q")
        for _ in range(entries):
            self._skip_string()
            self._skip_value(self._number("I"))
        found = Counter[int]()
        for _ in range(tensors):
            self._skip_string()
            shape = [self._number("Q") for _ in range(self._number("I"))]
            found[self._number("I")] += math.prod(shape)
            self._number("Q")  # where its data are
        return found

    def _number(self, kind: str) -> int:
        """The next integer, little-endian: I has 32 bits, Q has 64."""
        number: int
        (number,) = struct.unpack_from(f"<{kind}", self._data, self._at)
        self._at += struct.calcsize(f"<{kind}")
        return number

    def _skip_string(self) -> None:
        length = self._number("Q")
        self._at += length

    def _skip_value(self, kind: int) -> None:
        if kind == _STRING:
            self._skip_string()
        elif kind == _ARRAY:
            inner, count = self._number("I"), self._number("Q")
            if inner in _SIZES:
                self._at += count * _SIZES[inner]
            else:
                for _ in range(count):
                    self._skip_value(inner)
        else:
            self._at += _SIZES[kind]
