"""Where files lie: one seam for disks and S3, `Folder`, with two backends side by side.

`open_folder` opens one from a path or URL; `pipeline.storage.local` and `pipeline.storage.s3` say
how each keeps the promises below. What storage answers is retried and put into words there: the
rest of the code sees a `UserError`, or a `FileNotFoundError` where it asked for a file.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from pipeline.config.job import S3Config
from pipeline.config.locations import plain_location
from pipeline.errors import UserError
from pipeline.layout import PROBE
from pipeline.storage import local, s3_client
from pipeline.storage import s3 as on_s3
from pipeline.storage.local import LocalFolder
from pipeline.storage.s3 import S3Folder
from pipeline.storage.s3_answers import NO_CONDITIONS
from pipeline.storage.search import Found, Stamp

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*")


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

    def open(self, name: str, size: int | None = None) -> AbstractContextManager[pa.NativeFile]:
        """A file for random access. Reads outlast what goes wrong with S3 for a while.

        Args:
            name: the file.
            size: its bytes, if they are known: S3 is then not asked for them.

        Raises:
            FileNotFoundError: there is none; with `size`, this may show when it is read.
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
    """Whether `url`, as `plain_location` gives it, is a path rather than something on S3."""
    return not url.startswith("s3://")


def plain_url(url: str) -> str:
    """A path or an s3:// URL of what a user wrote.

    Raises:
        UserError: it is neither; the message leaves out secrets that a URL may hold.
    """
    try:
        url = plain_location(url)
    except ValueError as error:
        raise UserError(str(error)) from None
    scheme, separator, rest = url.partition("://")
    if separator and scheme != "s3" and _SCHEME.fullmatch(scheme):
        host, slash, path = rest.partition("?")[0].partition("/")
        shown = f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"
        raise UserError(f"{shown}: {scheme}:// is not supported; use a local path or s3://")
    return url


def open_folder(url: str, s3: S3Config) -> Folder:
    """The folder at a path or URL. It need not exist, and nothing is asked of it yet.

    Args:
        url: local path or s3:// URL.
        s3: how to reach S3.

    Raises:
        UserError: another scheme.
    """
    url = plain_url(url)
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
    """A folder that a file is in, and the file's name there. On S3 that is the bucket."""
    url = plain_url(url)
    if not is_local(url):
        bucket, key = s3_client.bucket_and_key(url)
        return open_folder(f"s3://{bucket}", s3), key
    folder, _, name = url.rpartition("/")
    return open_folder(folder or ("/" if url.startswith("/") else "."), s3), name


def find_files(pattern: str, s3: S3Config) -> Found:
    """What a path or URL names: a file, the files of a folder, or those that match a glob.

    Raises:
        UserError: another scheme, or storage refuses.
    """
    pattern = plain_url(pattern)
    return local.find_files(pattern) if is_local(pattern) else on_s3.find_files(pattern, s3)


def resolved(s3: S3Config, *urls: str) -> S3Config:
    """`s3` with endpoint and region as this machine's AWS settings give them.

    Workers on other machines then talk to the same server; only secrets are looked up there.

    Args:
        s3: the job's settings.
        urls: what is to be reached; if none of it is on S3, `s3` is returned as it is.
    """
    return s3 if all(map(is_local, map(plain_url, urls))) else s3_client.resolved(s3)


def check_access(s3: S3Config, *urls: str) -> None:
    """Ask each bucket of some URLs for one name, so that a wrong setting shows now, in plain words.

    Raises:
        UserError: another scheme, no credentials or wrong ones, no such bucket, or a server that
            is out of reach.
    """
    plain = map(plain_url, urls)
    buckets = {s3_client.bucket_and_key(url)[0]: url for url in plain if not is_local(url)}
    for url in buckets.values():
        s3_client.check_access(url, s3)


def check_conditions(folder: Folder) -> None:
    """Try whether `put_if_absent` and `replace` keep their promises here; leaves nothing behind.

    Not every server that speaks like S3 knows the conditions of a PUT, and some take no notice.
    Disks are not tried: where one lacks a call of the system, `pipeline.storage.local` knows.

    Raises:
        UserError: they do not.
    """
    if is_local(folder.url):
        return
    name = f"{PROBE}-{uuid.uuid4().hex}"
    try:
        kept = folder.put_if_absent(name, b"1") and not folder.put_if_absent(name, b"2")
        _, version = folder.read_version(name)
        kept = kept and folder.replace(name, b"3", version)
        kept = kept and not folder.replace(name, b"4", version)
    finally:
        folder.delete(name)
    if not kept:
        raise UserError(f"{folder.url}: {NO_CONDITIONS}")
