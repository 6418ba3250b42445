"""Files and folders that appear whole: a reader finds what was there before, or all of the new.

What is written goes to a scratch folder beside its place, of a name that no other writer has, and
is renamed at the end. A writer that raises takes its scratch away. One that is killed leaves a
folder `.NAME-XXXXXXXX`, which nobody reads. There is no fsync: a machine that loses power may lose
what was renamed last.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Give a path to write to, and move that file to `target` when the block ends.

    A file that is there is replaced: of several writers the last one wins. The path has the name of
    `target` and a folder to itself, so files that are only needed meanwhile may lie beside it.

    Args:
        target: its folder must exist.
    """
    with _scratch(target) as fresh:
        yield fresh
        fresh.replace(target)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Give a folder to fill, and move it to `target` when the block ends.

    A folder that is there by then stays, if anything is in it: of several writers the first one
    wins, so all must write the same.

    Args:
        target: its own folder must exist.
    """
    with _scratch(target) as fresh:
        fresh.mkdir()
        yield fresh
        try:
            fresh.rename(target)
        except OSError:
            if not target.is_dir():
                raise


def write_bytes(target: Path, data: bytes) -> None:
    """Write a file in one step, in place of the one that is there."""
    with atomic_file(target) as fresh:
        fresh.write_bytes(data)


@contextmanager
def _scratch(target: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as folder:
        yield Path(folder) / target.name
