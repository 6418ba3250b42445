"""The streams of the command line: whatever becomes of its terminal or pipe, a command goes on.

A reader that has seen enough (`| head`), a terminal that is closed, a stream that was never open
and an encoding that lacks a character are no failure of a job.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

_GONE = frozenset({errno.EPIPE, errno.EIO, errno.EBADF})
"""What writing raises when there is nobody to read: a closed pipe, a closed terminal."""


class _Lasting(io.FileIO):
    """A file descriptor to write to. Once that fails, what is written goes nowhere.

    Attributes:
        failed: why it failed; None if it did not, or if only nobody reads it.
    """

    failed: str | None = None

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            if error.errno not in _GONE:
                self.failed = error.strerror
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self.fileno())
            return len(data)


@contextmanager
def lasting() -> Iterator[None]:
    """Give this process standard streams that last as long as it does.

    `sys.stderr` gets a descriptor of its own: from then on 2 is what C++ writes to, which can be
    led elsewhere without what Python prints.

    Raises:
        SystemExit: at the end, if what was printed could not be written.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # closed, and the next file that is opened would be taken for it
            os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError):  # None if it was closed
            stream.flush()
    raw = _Lasting(1, "w")
    sys.stdout = _text(raw, sys.stdout)
    sys.stderr = _text(_Lasting(os.dup(2), "w"), sys.stderr)
    try:
        yield
    finally:
        sys.stdout.flush()
        if raw.failed:
            raise SystemExit(f"failed: standard output: {raw.failed}")


def _text(raw: _Lasting, before: TextIO | None) -> TextIO:
    """A stream like the one before; what its encoding lacks is written as an escape."""
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=getattr(before, "encoding", None),
        errors="backslashreplace",
        line_buffering=raw.isatty() or before is sys.stderr,
    )
