"""Mistakes in where a job reads and writes that can be seen before anything is read."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from pipeline import layout
from pipeline.errors import UserError
from pipeline.storage.folder import is_local
from pipeline.storage.search import glob_pattern

_WRITTEN = (layout.COMPLETIONS, layout.ERRORS, layout.STATS, layout.TRACE)
_WILDCARDS = re.compile(r"[*?\[]")


def check_output(output: str, patterns: Sequence[str]) -> None:
    """Check that the output can be a folder, and that none of its files would be read as input.

    Args:
        output: the output folder, local or s3://.
        patterns: the job's input paths.

    Raises:
        UserError: names the output and the fix.
    """
    if is_local(output):
        _check_folder(Path(output))
    for pattern in patterns:
        if is_local(pattern) == is_local(output) and _reads(_plain(pattern), _plain(output)):
            raise UserError(
                f"output: {output} lies in the input {pattern}, so that the job would read what "
                "it has written; choose a folder outside of it"
            )


def _check_folder(output: Path) -> None:
    existing = next(each for each in (output, *output.parents) if os.path.lexists(each))
    if not existing.is_dir():
        raise UserError(f"output: {output}: part of this path is a file, not a folder: {existing}")


def _plain(url: str) -> str:
    return os.path.realpath(url) if is_local(url) else url.rstrip("/")


def _reads(pattern: str, output: str) -> bool:
    """Whether a pattern names files that the output folder will hold."""
    if not _WILDCARDS.search(pattern):
        inside = f"{output}/".removeprefix(f"{pattern}/")
        return inside != f"{output}/" and not re.search(r"(^|/)[._]", inside)
    names = glob_pattern(pattern)
    return any(names.match(f"{output}/{folder}/x.parquet") for folder in _WRITTEN)
