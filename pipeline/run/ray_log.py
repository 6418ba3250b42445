"""The file for what Ray says while a job runs, which is for who looks for a cause, not for a user.

Ray tells of each process that died with a traceback, of lack of memory with a list of processes,
and its C++ of what went wrong in it. Between the lines of a progress bar nobody finds the one that
matters; in the file it is, and an error that ends the job names the file.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime
from pathlib import Path

from specdec.user_cache import cache_folder

_KEPT = 20
"""Files that are kept, the latest. More use more of the disk."""

_LONGEST = 1_000_000
"""Bytes to which a file is cut when its session ends. What comes first is nearest to the cause."""


class RayLog:
    """A file of its own for one session, readable by its user only.

    Attributes:
        path: where it is. It is removed at the end if nothing was written.
    """

    def __init__(self) -> None:
        self._file, self.path = _new_file()

    def add(self, text: str) -> None:
        """Write what should be known and is too long to be printed."""
        with suppress(OSError):  # a full disk is no reason to lose the error itself
            os.write(self._file, f"{text.rstrip()}\n".encode(errors="backslashreplace"))

    def explain(self, error: BaseException) -> None:
        """Write an error's traceback, and have the error name the file."""
        self.add("".join(traceback.format_exception(error)))
        error.add_note(f"What Ray says of it: {self.path}")

    @contextmanager
    def taking_stderr(self) -> Iterator[None]:
        """Take what is written to file descriptor 2, which is where Ray's C++ writes."""
        kept = os.dup(2)
        os.dup2(self._file, 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)

    @contextmanager
    def taking_loggers(self) -> Iterator[None]:
        """Take what Ray's Python logs."""
        logger = logging.getLogger("ray")
        before = logger.handlers[:], logger.level
        stream = os.fdopen(os.dup(self._file), "a", encoding="utf-8", errors="backslashreplace")
        handler = logging.StreamHandler(stream)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logger.handlers, logger.level = [handler], logging.WARNING
        try:
            yield
        finally:
            logger.handlers, logger.level = before
            stream.close()

    def close(self) -> None:
        """Cut the file, or remove it if it is empty."""
        with suppress(OSError):
            size = os.fstat(self._file).st_size
            if size > _LONGEST:
                os.truncate(self._file, _LONGEST)
            if not size and self.path.is_file():
                self.path.unlink()
        os.close(self._file)


@contextmanager
def ray_log() -> Iterator[RayLog]:
    """A log that takes all that Ray says until the block ends.

    File descriptor 2 is taken only if Python's `sys.stderr` writes elsewhere, as that of the
    command line does; a script that calls `run_job` goes on to see there what it prints itself.
    Ray's C++ is quiet there.
    """
    log = RayLog()
    elsewhere = not _writes_to_2(sys.stderr)
    # Ray's processes log why they die at this level; they inherit it, as a driver of its own does.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "warning" if elsewhere else "fatal")
    try:
        with log.taking_loggers(), log.taking_stderr() if elsewhere else nullcontext():
            yield log
    finally:
        log.close()


def _writes_to_2(stream: object) -> bool:
    try:
        return bool(stream.fileno() == 2)  # type: ignore[attr-defined]
    except (AttributeError, OSError, ValueError):
        return False


def _new_file() -> tuple[int, Path]:
    began = f"ray-{datetime.now():%Y%m%d-%H%M%S}-"
    for folder in (_cache, _scratch):
        with suppress(OSError, RuntimeError):  # RuntimeError: no home
            there = folder()
            there.mkdir(mode=0o700, parents=True, exist_ok=True)
            for old in sorted(there.glob("ray-*.log"))[: 1 - _KEPT]:
                old.unlink(missing_ok=True)
            number, name = tempfile.mkstemp(".log", began, there)
            return number, Path(name)
    path = Path(os.devnull)
    return os.open(path, os.O_WRONLY), path


def _cache() -> Path:
    return cache_folder() / "logs"


def _scratch() -> Path:
    return Path(tempfile.gettempdir(), f"specbatch-logs-{os.getuid()}")
