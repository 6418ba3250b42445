"""Local disk and S3 behind one small interface: `Folder` for the output, `list_inputs` for inputs.

Reads go through pyarrow.fs. Writes on S3 go through boto3, which alone offers the conditional PUT
that makes a commit atomic. Both use the credentials of the usual AWS chain (environment, profile,
role), looked up on the machine that needs them: a `Folder` can be pickled and holds no secret.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.fs as pafs
from botocore import exceptions as aws
from botocore.config import Config

from pipeline.config.job import S3Config
from pipeline.errors import UserError
from pipeline.layout import LOCK, STAGING
from pipeline.storage.patience import CutShort, explained, is_transient, patiently, s3_answer

_CONNECT_SECONDS = 5
_SILENCE_SECONDS = 30  # that a connection may send nothing
_CONDITION_FAILED = {"PreconditionFailed", "412", "NoSuchKey"}  # the last: If-Match of no file
_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS}


def is_s3(url: str) -> bool:
    """Whether `url` names something on S3 rather than a local path."""
    return url.startswith("s3://")


def split_s3(url: str) -> tuple[str, str]:
    """Bucket and key of an s3:// URL.

    Raises:
        UserError: the URL names no bucket.
    """
    bucket, _, key = url.removeprefix("s3://").partition("/")
    if not bucket:
        raise UserError(f"{url}: no bucket in this URL; write s3://BUCKET/PATH")
    if "@" in bucket:
        raise UserError(
            f"s3://...@{bucket.rpartition('@')[2]}: a URL must not hold a user name or password; "
            "use the AWS environment"
        )
    return bucket, key.strip("/")


def shown(url: str) -> str:
    """A URL for messages: without user name, password and query, which may be secrets."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return url
    host, slash, path = rest.partition("?")[0].partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def check_scheme(url: str) -> None:
    """Refuse what is neither a local path nor s3://.

    Raises:
        UserError: another scheme.
    """
    scheme, separator, _ = url.partition("://")
    if separator and scheme != "s3":
        raise UserError(f"{shown(url)}: {scheme}:// is not supported; use a local path or s3://")


@lru_cache(maxsize=16)
def _session(profile: str | None) -> boto3.Session:
    try:
        return boto3.Session(profile_name=profile)
    except aws.ProfileNotFound:
        raise UserError(
            f"s3.profile: no AWS profile named {profile!r} on this machine; "
            "add it to ~/.aws/config or correct the name"
        ) from None


@lru_cache(maxsize=16)
def _client(s3: S3Config) -> Any:
    # botocore clients are thread-safe and refresh their own credentials.
    config = Config(
        retries={"mode": "standard", "total_max_attempts": 1},  # `patiently` retries
        connect_timeout=_CONNECT_SECONDS,
        read_timeout=_SILENCE_SECONDS,
        s3={"addressing_style": "path"} if s3.endpoint else {},
    )
    return _session(s3.profile).client(
        "s3", endpoint_url=s3.endpoint, region_name=s3.region, config=config
    )


@lru_cache(maxsize=16)
def _s3_filesystem(
    endpoint: str | None, region: str | None, key: str, secret: str, token: str | None
) -> pafs.FileSystem:
    return pafs.S3FileSystem(
        access_key=key,
        secret_key=secret,
        session_token=token,
        region=region,
        endpoint_override=endpoint,
        connect_timeout=_CONNECT_SECONDS,
        request_timeout=_SILENCE_SECONDS,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=1),
    )


def filesystem(url: str, s3: S3Config) -> tuple[pafs.FileSystem, str]:
    """The pyarrow filesystem that holds `url`, and the path inside it.

    Call it where the files are used, each time: short-lived credentials are refreshed here, and a
    filesystem that travelled between machines would carry secrets with it.

    Raises:
        UserError: unknown scheme, no credentials, no such profile.
    """
    check_scheme(url)
    if not is_s3(url):
        return pafs.LocalFileSystem(), os.path.abspath(url)
    bucket, key = split_s3(url)
    with explained(url, s3):
        client = _client(s3)
        credentials = _session(s3.profile).get_credentials()
        if credentials is None:
            raise aws.NoCredentialsError
        frozen = credentials.get_frozen_credentials()
        endpoint = client.meta.endpoint_url
        on_aws = endpoint.endswith((".amazonaws.com", ".amazonaws.com.cn"))
        fs = _s3_filesystem(
            None if on_aws else endpoint,
            client.meta.region_name,
            frozen.access_key or "",
            frozen.secret_key or "",
            frozen.token,
        )
    return fs, f"{bucket}/{key}".rstrip("/")


def check_access(url: str, s3: S3Config) -> None:
    """Ask S3 for one name under `url`, so that a wrong setting shows now and in plain words.

    Raises:
        UserError: no credentials or wrong ones, no such bucket, server out of reach.
    """
    check_scheme(url)
    if is_s3(url):
        bucket, _ = split_s3(url)
        patiently(
            url,
            s3,
            lambda: _client(s3).list_objects_v2(Bucket=bucket, MaxKeys=1),
            # Most likely a wrong endpoint: a job that has not begun loses nothing by stopping.
            at_once=(aws.EndpointConnectionError,),
        )


class _PatientFile:
    """A file on S3, for `pyarrow.PythonFile`: each ranged read is repeated until it succeeds."""

    def __init__(self, url: str, s3: S3Config) -> None:
        fs, path = filesystem(url, s3)
        self._file = patiently(url, s3, lambda: fs.open_input_file(path))
        self._url, self._s3 = url, s3
        self._size: int = self._file.size()
        self._position = 0

    @property
    def closed(self) -> bool:
        return bool(self._file.closed)

    def close(self) -> None:
        self._file.close()

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def read(self, size: int | None = None) -> bytes:
        left = max(0, self._size - self._position)
        wanted = left if size is None or size < 0 else min(size, left)

        def read() -> bytes:
            data = bytes(self._file.read_at(wanted, self._position))
            if len(data) != wanted:
                raise CutShort
            return data

        data = patiently(self._url, self._s3, read) if wanted else b""
        self._position += len(data)
        return data


def open_file(url: str, s3: S3Config) -> pa.NativeFile:
    """A file for random access, whose reads outlast what goes wrong with S3 for a while.

    Raises:
        FileNotFoundError: there is none.
        UserError: the storage refuses, now or while the file is read.
    """
    if is_s3(url):
        return pa.PythonFile(_PatientFile(url, s3), mode="r")
    fs, path = filesystem(url, s3)
    with explained(url, s3):
        return fs.open_input_file(path)


@dataclass(frozen=True)
class Folder:
    """An output folder, local or on S3. Names inside it are relative, with slashes.

    Attributes:
        url: local path or s3:// URL of the folder.
        s3: how to reach it, if it is on S3.
    """

    url: str
    s3: S3Config

    def join(self, name: str) -> str:
        """The path or URL of `name` in this folder."""
        return f"{self.url.rstrip('/')}/{name}"

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Write a file in one atomic step unless it exists; an existing file is never touched.

        A reader sees the whole file or none. Of several writers of one name exactly one wins.

        Returns:
            True if this call wrote the file, False if it was there.

        Raises:
            UserError: the storage refuses.
        """
        if is_s3(self.url):
            return self._put_object(name, data, IfNoneMatch="*")
        with explained(self.join(name), self.s3):
            target = Path(self.url, name)
            if target.exists():
                return False
            with self._staged(target, data) as staged:
                return _link(staged, target)

    def put(self, name: str, data: bytes) -> None:
        """Write a file in one atomic step, replacing one that exists.

        Raises:
            UserError: the storage refuses.
        """
        if is_s3(self.url):
            self._put_object(name, data)
            return
        with explained(self.join(name), self.s3):
            target = Path(self.url, name)
            with self._staged(target, data) as staged:
                os.replace(staged, target)

    def read_version(self, name: str) -> tuple[bytes, str]:
        """A file's content, and what `replace` calls this version of it.

        Raises:
            FileNotFoundError: there is none.
            UserError: the storage refuses.
        """
        data, etag = self._content(name)
        return data, etag or hashlib.sha256(data).hexdigest()

    def _content(self, name: str) -> tuple[bytes, str | None]:
        """A file's content, and its ETag if it is on S3; raises as `read_version` does."""
        if not is_s3(self.url):
            with explained(self.join(name), self.s3):
                return Path(self.url, name).read_bytes(), None
        key = self._key(name)

        def get() -> tuple[bytes, str]:
            try:
                answer = _client(self.s3).get_object(**key)
            except _client(self.s3).exceptions.NoSuchKey:
                raise FileNotFoundError(self.join(name)) from None
            return answer["Body"].read(), answer["ETag"]

        return patiently(self.join(name), self.s3, get)

    def replace(self, name: str, data: bytes, version: str) -> bool:
        """Replace a file in one atomic step if it still is this version.

        A reader sees the old file or the new one. Of several writers that have read one version
        exactly one wins. On a disk they take turns by a lock; on S3 the PUT is conditional.

        Returns:
            True if this call replaced the file, False if it was another version or gone.

        Raises:
            UserError: the storage refuses.
        """
        if is_s3(self.url):
            return self._put_object(name, data, IfMatch=version)
        with explained(self.join(name), self.s3):
            target = Path(self.url, name)
            with self._staged(target, data) as staged, self._locked():
                if not target.exists() or self.read_version(name)[1] != version:
                    return False
                os.replace(staged, target)
        return True

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone among all writers of this folder; a writer that dies lets go of it."""
        with Path(self.url, LOCK).open("ab") as lock:
            # A filesystem without locks (some network ones): as good as it gets without.
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _key(self, name: str) -> dict[str, str]:
        bucket, prefix = split_s3(self.url)
        return {"Bucket": bucket, "Key": f"{prefix}/{name}" if prefix else name}

    def _put_object(self, name: str, data: bytes, **condition: str) -> bool:
        options = {**self._key(name), **condition}
        unsure = False  # whether an earlier attempt may have written the file

        def put() -> bool:
            nonlocal unsure
            try:
                _client(self.s3).put_object(**options, Body=data)
            except (aws.BotoCoreError, aws.ClientError) as error:
                answer = s3_answer(error)
                if answer is not None and answer.code in _CONDITION_FAILED:
                    # Either our own PUT whose answer was lost, or another writer's. If the
                    # content is ours, it is true of both that this data is in the file.
                    return unsure and self.read(name) == data
                unsure = unsure or is_transient(error)
                raise
            return True

        return patiently(self.join(name), self.s3, put)

    @contextmanager
    def _staged(self, target: Path, data: bytes) -> Iterator[Path]:
        """A complete, synced copy of `data` on the target's own filesystem."""
        staged = Path(self.url, STAGING, f"{uuid.uuid4().hex}-{target.name}")
        staged.parent.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with staged.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield staged
        finally:
            staged.unlink(missing_ok=True)

    def read(self, name: str) -> bytes | None:
        """The content of a file, or None if there is none."""
        try:
            return self._content(name)[0]
        except FileNotFoundError:
            return None

    def open(self, name: str) -> pa.NativeFile:
        """A file for random access. See `open_file`."""
        return open_file(self.join(name), self.s3)

    def list(self, name: str) -> dict[str, int]:
        """Names (relative to `name`) and sizes in bytes of the files directly in a subfolder."""
        fs, root = filesystem(self.url, self.s3)
        selector = pafs.FileSelector(f"{root}/{name}".rstrip("/"), allow_not_found=True)
        infos = patiently(self.join(name), self.s3, lambda: fs.get_file_info(selector))
        return {i.base_name: i.size for i in infos if i.type == pafs.FileType.File}

    def tree(self, name: str) -> dict[str, int]:
        """Names (relative to `name`) and sizes in bytes of the files at any depth below it."""
        fs, root = filesystem(self.url, self.s3)
        base = f"{root}/{name}".rstrip("/")
        selector = pafs.FileSelector(base, recursive=True, allow_not_found=True)
        infos = patiently(self.join(name), self.s3, lambda: fs.get_file_info(selector))
        files = (i for i in infos if i.type == pafs.FileType.File)
        return {i.path[len(base) + 1 :]: i.size for i in files}

    def folders(self) -> tuple[str, ...]:
        """Names of the folders directly in this one, sorted."""
        fs, root = filesystem(self.url, self.s3)
        selector = pafs.FileSelector(root, allow_not_found=True)
        infos = patiently(self.url, self.s3, lambda: fs.get_file_info(selector))
        return tuple(sorted(i.base_name for i in infos if i.type == pafs.FileType.Directory))

    def delete(self, name: str) -> None:
        """Remove a file if it exists.

        Raises:
            UserError: the storage refuses.
        """
        if is_s3(self.url):
            options = self._key(name)
            patiently(self.join(name), self.s3, lambda: _client(self.s3).delete_object(**options))
            return
        with explained(self.join(name), self.s3):
            Path(self.url, name).unlink(missing_ok=True)

    def clear_staging(self) -> None:
        """Remove half-written files that killed writers left. S3 never has any."""
        if not is_s3(self.url):
            shutil.rmtree(Path(self.url, STAGING), ignore_errors=True)


def _link(staged: Path, target: Path) -> bool:
    """Give the staged file its name unless the name is taken. True if it was free."""
    try:
        os.link(staged, target)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        # A filesystem without hard links: the check and the rename are two steps, so of two
        # writers at the same instant the later one stays. Both hold the same unit.
        if target.exists():
            return False
        os.rename(staged, target)
    return True


def resolved(s3: S3Config, *, used: bool) -> S3Config:
    """`s3` with endpoint and region as this machine's AWS settings give them.

    Workers on other machines then talk to the same server; only secrets are looked up there.
    """
    if not used:
        return s3
    with explained("s3", s3):
        meta = _client(s3).meta
    custom = s3.endpoint or (None if "amazonaws.com" in meta.endpoint_url else meta.endpoint_url)
    return s3.model_copy(update={"endpoint": custom, "region": meta.region_name})


def publish(file: Path, url: str, s3: S3Config) -> None:
    """Put a local file at a path or an s3:// URL in one step, replacing what is there.

    Raises:
        UserError: the storage refuses.
    """
    if is_s3(url):
        bucket, key = split_s3(url)

        def upload() -> None:
            # In parts, if it is large; what is there changes when all have arrived.
            with file.open("rb") as opened:
                _client(s3).upload_fileobj(opened, bucket, key)

        patiently(url, s3, upload)
        return
    target = Path(url)
    with explained(url, s3):
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        try:
            shutil.copyfile(file, staged)
            with staged.open("rb") as copied:
                os.fsync(copied.fileno())
            os.replace(staged, target)
        finally:
            staged.unlink(missing_ok=True)


def remove(url: str, s3: S3Config) -> None:
    """Remove a file, local or on S3, if there is one.

    Raises:
        UserError: the storage refuses.
    """
    folder, _, name = url.rpartition("/")
    Folder(folder or ".", s3).delete(name)
