"""Which input files a job has: files, folders and globs, local or on S3, in a stable order."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipeline.config.job import S3Config
from pipeline.config.locations import is_url
from pipeline.errors import UserError
from pipeline.layout import ADDED_COLUMNS, JOB, OPTIONAL_COLUMNS, is_added
from pipeline.storage.folder import check_access, find_files, locate
from pipeline.storage.search import Found, StoredFile

FORMATS = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".arrow": "arrow",
    ".feather": "arrow",
}
_EXTENSIONS = ", ".join(FORMATS)
_COMPRESSED = re.compile(
    rf"\.({'|'.join(name[1:] for name in FORMATS)})\.(gz|gzip|bz2|xz|zst|zstd|lz4|zip|br)$", re.I
)
_NOT_MEANT = re.compile(r"\.json(\.\w+)?$|(^|/)cache-[^/]*\.arrow$", re.I)
"""What a folder may have beside its data: what describes it, and what `datasets` keeps there."""

_MORE_THAN_DATA = {
    re.compile(
        rf"(.*/)?{re.escape(JOB)}"
    ): "the whole output of a job: name its completions/ instead",
    re.compile(r"(.*/)?(_delta_log|\.hoodie)/.*|.*\.metadata\.json"): (
        "a Delta, Hudi or Iceberg table, which keeps files that are no more part of it: export the "
        "version that you want, or name its files"
    ),
}
"""Folders whose files are not all rows that somebody wants, by a file that is in them."""


@dataclass(frozen=True)
class InputFile:
    """One input file.

    Attributes:
        url: local path or s3:// URL.
        name: unique in the job and the same on every machine: the path relative to what was asked
            for. Row ids start with it.
        format: one of `FORMATS`.
        size: bytes.
        modified: nanoseconds since the epoch (whole seconds on S3); 0: not known.
        prefix: what comes before the names of columns that an earlier job added (`read_as`).
    """

    url: str
    name: str
    format: str
    size: int
    modified: int = 0
    prefix: str = ""


def read_as(name: str, prefix: str) -> str:
    """What a job calls a column of an input file.

    Args:
        name: in the file.
        prefix: what comes before the names of columns that an earlier job added; empty: nothing.
    """
    return prefix + name if is_added(name, ADDED_COLUMNS.union(OPTIONAL_COLUMNS)) else name


def list_inputs(
    patterns: Sequence[str], s3: S3Config, prefix: str | None = None
) -> list[InputFile]:
    """All files that the patterns name, each once, ordered by name.

    Folders are searched for files of all formats at any depth, but for .json, which is more often
    something else; files and folders whose names begin with "." or "_" are left out, as everywhere
    in this ecosystem.

    Args:
        patterns: files, folders and globs, local or s3://.
        s3: how to reach files on S3.
        prefix: of the files.

    Raises:
        UserError: a pattern that matches nothing, a file of another kind, S3 out of reach.
    """
    check_access(s3, *patterns)
    found: dict[str, InputFile] = {}
    for pattern in patterns:
        # A file that links lead to, too, is read once, under its own name.
        matching = [(_real(file.url), file) for file in _matches(pattern, s3)]
        for real, file in sorted(matching, key=lambda each: each[0] != each[1].url):
            found.setdefault(real, file)
    shared = {name for name, n in Counter(f.name for f in found.values()).items() if n > 1}
    files = [_distinct(f) if f.name in shared else f for f in found.values()]
    return sorted((replace(f, prefix=prefix or "") for f in files), key=lambda f: f.name)


def _real(url: str) -> str:
    """Where a file is: it, or a folder above it, may be a link."""
    return url if is_url(url) else os.path.realpath(url)


def _distinct(file: InputFile) -> InputFile:
    # Two folders asked for may hold files of the same relative name.
    digest = hashlib.sha256(file.url.encode()).hexdigest()[:8]
    return replace(file, name=f"{file.name}@{digest}")


def _matches(pattern: str, s3: S3Config) -> list[InputFile]:
    found = find_files(pattern, s3)
    if found.kind == "nothing":
        raise UserError(f"input.paths: {pattern}: no such file or folder")
    _check_is_data(pattern, found)
    files = [
        _input_file(file)
        for file in found.files
        if (found.kind == "file" or not _hidden(file.name))
        and (found.kind != "folder" or _is_input(file.url))
    ]
    if not files:
        raise UserError(
            f"input.paths: {pattern}: no files match this {found.kind} (looking for {_EXTENSIONS})"
        )
    return files


def _check_is_data(pattern: str, found: Found) -> None:
    """Check that a folder holds data alone, and that a glob leaves no folder of data out."""
    if found.kind == "folder":
        for file in found.files:
            for sign, what in _MORE_THAN_DATA.items():
                at = sign.fullmatch(file.name)
                if at and not _hidden(at[1] or ""):
                    where = os.path.join(pattern, at[1] or "").rstrip("/")
                    raise UserError(f"input.paths: {where}: is {what}")
    for folder in found.folders:
        if _extension(folder) in FORMATS:
            raise UserError(
                f"input.paths: {pattern}: matches the folder {folder}, and a glob names files; "
                "write /* behind it, or name the folder above"
            )


def _extension(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _is_input(path: str) -> bool:
    """Whether a file of a folder is meant, by its name; one that is compressed is, by mistake."""
    if _NOT_MEANT.search(path):
        return False
    return _extension(path) in FORMATS or _COMPRESSED.search(path) is not None


def _hidden(relative: str) -> bool:
    return any(part.startswith((".", "_")) for part in relative.split("/") if part)


def _input_file(file: StoredFile) -> InputFile:
    if _COMPRESSED.search(file.url):
        raise UserError(
            f"input.paths: {file.url}: compressed files cannot be cut into units; unpack it "
            "(Parquet compresses inside), or name the files to read with a glob"
        )
    extension = _extension(file.url)
    if extension not in FORMATS:
        raise UserError(f"input.paths: {file.url}: not one of {_EXTENSIONS}")
    return InputFile(file.url, file.name, FORMATS[extension], *file.stamp)


def check_unchanged(url: str, size: int, modified: int, s3: S3Config) -> None:
    """Check that an input file is still the one that was planned.

    Args:
        url: the file.
        size: its bytes then.
        modified: when it had been written (`InputFile.modified`); 0: not known, nothing is checked.
        s3: how to reach it, if it is on S3.

    Raises:
        UserError: it is gone or has changed.
    """
    if not modified:
        return
    folder, name = locate(url, s3)
    stamp = folder.stamp(name)
    if stamp != (size, modified):
        what = "has changed" if stamp else "is gone"
        raise UserError(
            f"{url}: this input file {what} since the job was planned; restore it and run the same "
            "command again: what is committed is kept"
        )
