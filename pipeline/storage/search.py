"""What a path names: a file, a folder with all that is in it, or the files that match a glob."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import pyarrow.fs as pafs
from fsspec.implementations.arrow import ArrowFSWrapper  # type: ignore[import-untyped]

Kind = Literal["file", "folder", "glob", "nothing"]

Attempt = Callable[[Callable[[], Any]], Any]
"""Calls what it is given, in a backend's own way, and returns what that returned."""


class Stamp(NamedTuple):
    """What tells a file from a later one of the same name.

    Attributes:
        size: bytes.
        modified: nanoseconds since the epoch (whole seconds on S3); 0: not known.
    """

    size: int
    modified: int


@dataclass(frozen=True)
class StoredFile:
    """A file that was found.

    Attributes:
        url: its path or URL.
        name: its path relative to the file's or the searched folder; of a glob, to the folder
            above the first part with a wildcard.
        stamp: its size and time of change.
    """

    url: str
    name: str
    stamp: Stamp


@dataclass(frozen=True)
class Found:
    """What a path or URL names.

    Attributes:
        kind: what it is; "nothing" if it is no glob either.
        files: in no particular order, hidden ones too. A folder is searched at any depth.
    """

    kind: Kind
    files: tuple[StoredFile, ...] = ()


def search(
    fs: pafs.FileSystem, path: str, attempt: Attempt, stored: Callable[[pafs.FileInfo, str], Any]
) -> Found:
    """Find what `path` names on a filesystem.

    Args:
        fs: the filesystem.
        path: on it; may be a glob. A file whose own name looks like a glob is that file.
        attempt: lists a folder for a glob, as often as the backend likes.
        stored: makes a `StoredFile` of pyarrow's account of a file and its relative name.
    """
    kind: Kind
    info = fs.get_file_info(path)
    if info.type == pafs.FileType.File:
        kind, base, infos = "file", os.path.dirname(path), [info]
    elif info.type == pafs.FileType.Directory:
        kind, base = "folder", path
        infos = fs.get_file_info(pafs.FileSelector(path, recursive=True))
    elif any(c in path for c in "*?["):
        kind, base = "glob", _glob_base(path)
        names = _Globbing(fs, attempt).glob(path)
        infos = fs.get_file_info(sorted(names)) if names else []
    else:
        return Found("nothing")
    files = (i for i in infos if i.type == pafs.FileType.File)
    return Found(kind, tuple(stored(i, os.path.relpath(i.path, base)) for i in files))


class _Globbing(ArrowFSWrapper):  # type: ignore[misc]
    """fsspec's globbing, which takes a folder that it fails to list for an empty one.

    So listing must not fail with an OSError: `attempt` makes it succeed, or fail otherwise.
    """

    cachable = False

    def __init__(self, fs: pafs.FileSystem, attempt: Attempt) -> None:
        super().__init__(fs)
        self._attempt = attempt

    def ls(self, path: str, detail: bool = False, **options: Any) -> Any:
        listed = super().ls
        return self._attempt(lambda: listed(path, detail, **options))


def _glob_base(path: str) -> str:
    """The folder above the first part with a wildcard."""
    parts = path.split("/")
    first = next(i for i, part in enumerate(parts) if any(c in part for c in "*?["))
    return "/".join(parts[:first]) or ("/" if path.startswith("/") else "")
