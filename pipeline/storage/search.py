"""What a path names: a file, a folder with all that is in it, or the files that match a glob."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from fsspec.utils import glob_translate  # type: ignore[import-untyped]

from pipeline.errors import UserError

Kind = Literal["file", "folder", "glob", "nothing"]

_WILDCARD = re.compile(r"[*?\[]")


class Stamp(NamedTuple):
    """What tells a file from a later one of the same name.

    Attributes:
        size: bytes.
        modified: nanoseconds since the epoch (whole seconds on S3); 0: not known.
    """

    size: int
    modified: int


class Entry(NamedTuple):
    """What a folder holds.

    Attributes:
        path: from the root of the tree; of a folder, with a slash at its end.
        stamp: of a file; None: it is a folder.
    """

    path: str
    stamp: Stamp | None


class Tree(Protocol):
    """Folders and files, by paths from a root. A backend has one for `search`."""

    def stamp(self, path: str) -> Stamp | None:
        """A file's stamp, or None if there is no such file."""

    def is_folder(self, path: str) -> bool:
        """Whether there is such a folder; without a slash at its end."""

    def list(self, folder: str, *, deep: bool) -> Iterable[Entry]:
        """What is in a folder, which is given with a slash at its end; the root may be empty.

        Args:
            folder: its path.
            deep: files at any depth rather than what is directly in it.
        """


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
        folders: URLs of those that a glob without ** matches.
    """

    kind: Kind
    files: tuple[StoredFile, ...] = ()
    folders: tuple[str, ...] = ()


def search(tree: Tree, path: str, url: Callable[[str], str]) -> Found:
    """Find what `path` names in a tree.

    Args:
        tree: where to look.
        path: in it; may be a glob. A file whose own name looks like a glob is that file.
        url: the URL of a path.

    Raises:
        UserError: a glob that is none.
    """
    kind: Kind
    folders = list[str]()
    stamp = tree.stamp(path)
    if stamp is not None:
        kind, base, entries = "file", _above(path), iter([Entry(path, stamp)])
    elif tree.is_folder(path):
        kind, base = "folder", path if path in {"", "/"} else f"{path}/"
        entries = iter(tree.list(base, deep=True))
    elif _WILDCARD.search(path):
        kind, base = "glob", glob_base(path)
        entries = iter(found := list(_matches(tree, path, base)))
        folders = [url(each.path.rstrip("/")) for each in found if each.stamp is None]
    else:
        return Found("nothing")
    return Found(
        kind,
        tuple(
            StoredFile(url(each.path), each.path[len(base) :], each.stamp)
            for each in entries
            if each.stamp is not None
        ),
        tuple(folders),
    )


def glob_pattern(glob: str) -> re.Pattern[str]:
    """The paths that a glob matches.

    Raises:
        UserError: it is none.
    """
    try:
        return re.compile(glob_translate(glob))
    except (ValueError, re.error):
        raise UserError(
            f"{glob}: not a glob: ** stands for whole folders, as in a/**/x.parquet"
        ) from None


def glob_base(glob: str) -> str:
    """The folder above the first part with a wildcard, with a slash at its end; may be empty."""
    found = _WILDCARD.search(glob)
    return _above(glob[: found.start()] if found else glob)


def _above(path: str) -> str:
    return path[: path.rfind("/") + 1]


def _matches(tree: Tree, glob: str, base: str) -> Iterator[Entry]:
    pattern = glob_pattern(glob)
    deep = "**" in glob
    folders = [(base, glob[len(base) :].count("/"))]  # how many folders deep the files are
    while folders:
        folder, depth = folders.pop()
        for entry in tree.list(folder, deep=deep):
            if entry.stamp is not None and pattern.match(entry.path):
                yield entry
            elif entry.stamp is None and depth and not deep:
                folders.append((entry.path, depth - 1))
            elif entry.stamp is None and not deep and pattern.match(entry.path.rstrip("/")):
                yield entry
