"""Which input files a job has: files, folders and globs, local or on S3, in a stable order."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow.fs as pafs
from fsspec.implementations.arrow import ArrowFSWrapper  # type: ignore[import-untyped]

from pipeline.config.job import S3Config
from pipeline.errors import UserError
from pipeline.storage.folder import check_access, check_scheme, filesystem, is_s3, split_s3
from pipeline.storage.patience import patiently

FORMATS = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl"}
_EXTENSIONS = ", ".join(FORMATS)
_COMPRESSED = re.compile(r"\.(parquet|jsonl|ndjson)\.(gz|gzip|bz2|xz|zst|zstd|lz4|zip|br)$", re.I)


@dataclass(frozen=True)
class InputFile:
    """One input file.

    Attributes:
        url: local path or s3:// URL.
        name: unique in the job and the same on every machine: the path relative to what was asked
            for. Row ids start with it.
        format: "parquet" or "jsonl".
        size: bytes.
        modified: nanoseconds since the epoch (whole seconds on S3); 0: not known.
    """

    url: str
    name: str
    format: str
    size: int
    modified: int = 0


def list_inputs(patterns: Sequence[str], s3: S3Config) -> list[InputFile]:
    """All files that the patterns name, each once, ordered by name.

    Folders are searched for .parquet, .jsonl and .ndjson files at any depth; files and folders
    whose names begin with "." or "_" are left out, as everywhere in this ecosystem.

    Raises:
        UserError: a pattern that matches nothing, a file of another kind, S3 out of reach.
    """
    for url in {f"s3://{split_s3(p)[0]}" for p in patterns if is_s3(p)}:
        check_access(url, s3)
    found: dict[str, InputFile] = {}
    for pattern in patterns:
        for file in _matches(pattern, s3):
            found.setdefault(file.url, file)
    shared = {name for name, n in Counter(f.name for f in found.values()).items() if n > 1}
    files = [_distinct(f) if f.name in shared else f for f in found.values()]
    return sorted(files, key=lambda f: f.name)


def _distinct(file: InputFile) -> InputFile:
    # Two folders asked for may hold files of the same relative name.
    digest = hashlib.sha256(file.url.encode()).hexdigest()[:8]
    return replace(file, name=f"{file.name}@{digest}")


def _matches(pattern: str, s3: S3Config) -> list[InputFile]:
    check_scheme(pattern)
    fs, path = filesystem(pattern, s3)
    infos, base, what = patiently(pattern, s3, lambda: _look(fs, path, pattern, s3))
    files = [
        _input_file(i, base, pattern)
        for i in infos
        if i.type == pafs.FileType.File
        and (what == "file" or not _hidden(i.path[len(base) :]))
        and (what != "folder" or _extension(i.path) in FORMATS or _COMPRESSED.search(i.path))
    ]
    if not files:
        raise UserError(
            f"input.paths: {pattern}: no files match this {what} (looking for {_EXTENSIONS})"
        )
    return files


def _look(
    fs: pafs.FileSystem, path: str, pattern: str, s3: S3Config
) -> tuple[list[pafs.FileInfo], str, str]:
    """What a pattern names, the folder that names are relative to, and what the pattern is."""
    info = fs.get_file_info(path)
    if info.type == pafs.FileType.File:
        return [info], os.path.dirname(path), "file"
    if info.type == pafs.FileType.Directory:
        return fs.get_file_info(pafs.FileSelector(path, recursive=True)), path, "folder"
    if any(c in path for c in "*?["):
        names = _PatientGlob(fs, pattern, s3).glob(path)
        return fs.get_file_info(sorted(names)) if names else [], _glob_base(path), "glob"
    raise UserError(f"input.paths: {pattern}: no such file or folder")


class _PatientGlob(ArrowFSWrapper):  # type: ignore[misc]
    """fsspec's globbing, which takes a folder that it fails to list for an empty one."""

    cachable = False

    def __init__(self, fs: pafs.FileSystem, pattern: str, s3: S3Config) -> None:
        super().__init__(fs)
        self._pattern, self._s3 = pattern, s3

    def ls(self, path: str, detail: bool = False, **options: Any) -> Any:
        listed = super().ls
        return patiently(self._pattern, self._s3, lambda: listed(path, detail, **options))


def _glob_base(path: str) -> str:
    """The folder above the first part with a wildcard."""
    parts = path.split("/")
    first = next(i for i, part in enumerate(parts) if any(c in part for c in "*?["))
    return "/".join(parts[:first])


def _extension(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _hidden(relative: str) -> bool:
    return any(part.startswith((".", "_")) for part in relative.split("/") if part)


def _input_file(info: pafs.FileInfo, base: str, pattern: str) -> InputFile:
    if _COMPRESSED.search(info.path):
        raise UserError(
            f"input.paths: {info.path}: compressed files cannot be cut into units; unpack it "
            "(Parquet compresses inside), or name the files to read with a glob"
        )
    extension = _extension(info.path)
    if extension not in FORMATS:
        raise UserError(f"input.paths: {info.path}: not one of {_EXTENSIONS}")
    url = f"s3://{info.path}" if is_s3(pattern) else info.path
    name = os.path.relpath(info.path, base)
    return InputFile(url, name, FORMATS[extension], info.size, _modified(info, pattern))


def _modified(info: pafs.FileInfo, url: str) -> int:
    """When a file was written. S3 says it to the second in some answers, more exactly in others."""
    modified = info.mtime_ns or 0
    return modified // 10**9 * 10**9 if is_s3(url) else modified


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
    fs, path = filesystem(url, s3)
    info = patiently(url, s3, lambda: fs.get_file_info(path))
    there = info.type == pafs.FileType.File
    if not there or (info.size, _modified(info, url)) != (size, modified):
        what = "has changed" if there else "is gone"
        raise UserError(
            f"{url}: this input file {what} since the job was planned; restore it and run the same "
            "command again: what is committed is kept"
        )
