"""Where files lie: one seam for disks and S3, `Folder`, with two backends side by side.

`open_folder` opens one from a path or URL; `pipeline.storage.local` and `pipeline.storage.s3` say
how each keeps the promises below. What storage answers is retried and put into words there: the
rest of the code sees a `UserError`, or a `FileNotFoundError` where it asked for a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from pipeline.config.job import S3Config
from pipeline.errors import UserError
from pipeline.storage import local
from pipeline.storage import s3 as on_s3
from pipeline.storage.local import LocalFolder
from pipeline.storage.s3 import S3Folder
from pipeline.storage.search import Found, Stamp


class Folder(Protocol):
    """A folder, on a disk or on S3. Names inside it are relative, with slashes.

    Every write of a file is one atomic step: a reader sees the old file or the new one, whole, or
    none. Every method raises a `UserError` that names the file and the fix if storage refuses.
    A folder can be pickled; it holds no secret.
    """

    @property
    def url(self) -> str:
        """Local path or s3:// URL of the folder."""

    @property
    def s3(self) -> S3Config:
        """How S3 is reached from this job."""

    def join(self, name: str) -> str:
        """The path or URL of `name` in this folder."""

    def subfolder(self, name: str) -> Folder:
        """A folder in this one; it need not exist."""

    # ------------------------------------------------------------------------- write

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Write a file unless it exists; an existing file is never touched.

        Of several writers of one name exactly one wins.

        Returns:
            True if this call wrote the file, False if it was there.
        """

    def put(self, name: str, data: bytes) -> None:
        """Write a file, replacing one that exists."""

    def replace(self, name: str, data: bytes, version: str) -> bool:
        """Replace a file if it still is this version (`read_version`).

        Of several writers that have read one version exactly one wins.

        Returns:
            True if this call replaced the file, False if it was another version or gone.
        """

    def put_folder(self, name: str, files: Mapping[str, bytes]) -> None:
        """Make a subfolder hold these files and nothing else.

        On a disk what was there goes first, and then all files appear in one step. On S3 they
        appear one by one, and then what else was there goes.
        """

    def upload(self, name: str, file: Path) -> None:
        """Write a copy of a local file of any size, replacing one that exists."""

    def delete(self, name: str) -> None:
        """Remove a file if it exists."""

    def clear_staging(self) -> None:
        """Remove half-written files that killed writers left. Nobody may be writing meanwhile."""

    # -------------------------------------------------------------------------- read

    def read(self, name: str) -> bytes | None:
        """The content of a file, or None if there is none."""

    def read_version(self, name: str) -> tuple[bytes, str]:
        """A file's content, and what `replace` calls this version of it.

        Raises:
            FileNotFoundError: there is none.
        """

    def open(self, name: str) -> AbstractContextManager[pa.NativeFile]:
        """A file for random access. Reads outlast what goes wrong with S3 for a while.

        Raises:
            FileNotFoundError: there is none.
        """

    def stamp(self, name: str) -> Stamp | None:
        """A file's size and time of change, or None if there is none."""

    def list(self, name: str) -> dict[str, int]:
        """Names (relative to `name`) and sizes in bytes of the files directly in a subfolder."""

    def tree(self, name: str) -> dict[str, int]:
        """Names (relative to `name`) and sizes in bytes of the files at any depth below it."""

    def folders(self) -> tuple[str, ...]:
        """Names of the folders directly in this one, sorted."""


def is_local(url: str) -> bool:
    """Whether `url` is a path on this machine rather than something on S3."""
    return not url.startswith("s3://")


def _check_scheme(url: str) -> None:
    """Refuse what is neither a path nor on S3, without the secrets that a URL may hold."""
    scheme, separator, rest = url.partition("://")
    if separator and scheme != "s3":
        host, slash, path = rest.partition("?")[0].partition("/")
        shown = f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"
        raise UserError(f"{shown}: {scheme}:// is not supported; use a local path or s3://")


def open_folder(url: str, s3: S3Config) -> Folder:
    """The folder at a path or URL. It need not exist, and nothing is asked of it yet.

    Args:
        url: local path or s3:// URL.
        s3: how to reach S3.

    Raises:
        UserError: another scheme.
    """
    _check_scheme(url)
    return LocalFolder(url, s3) if is_local(url) else S3Folder(url, s3)


def reach_folder(url: str, s3: S3Config) -> Folder:
    """As `open_folder`, once S3's settings are complete (`resolved`) and it has answered.

    Raises:
        UserError: see `check_access`.
    """
    s3 = resolved(s3, url)
    check_access(s3, url)
    return open_folder(url, s3)


def locate(url: str, s3: S3Config) -> tuple[Folder, str]:
    """The folder that a file is in, and its name there."""
    folder, _, name = url.rpartition("/")
    return open_folder(folder or ".", s3), name


def find_files(pattern: str, s3: S3Config) -> Found:
    """What a path or URL names: a file, the files of a folder, or those that match a glob.

    Raises:
        UserError: another scheme, or storage refuses.
    """
    _check_scheme(pattern)
    return local.find_files(pattern) if is_local(pattern) else on_s3.find_files(pattern, s3)


def resolved(s3: S3Config, *urls: str) -> S3Config:
    """`s3` with endpoint and region as this machine's AWS settings give them.

    Workers on other machines then talk to the same server; only secrets are looked up there.

    Args:
        s3: the job's settings.
        urls: what is to be reached; if none of it is on S3, `s3` is returned as it is.
    """
    return s3 if all(map(is_local, urls)) else on_s3.resolved(s3)


def check_access(s3: S3Config, *urls: str) -> None:
    """Ask each bucket of some URLs for one name, so that a wrong setting shows now, in plain words.

    Raises:
        UserError: another scheme, no credentials or wrong ones, no such bucket, or a server that
            is out of reach.
    """
    for url in urls:
        _check_scheme(url)
    buckets = {on_s3.bucket_and_key(url)[0]: url for url in urls if not is_local(url)}
    for url in buckets.values():
        on_s3.check_access(url, s3)
