"""The backend for S3 and servers that speak like it.

**What is atomic, and why.** An object changes by one PUT. A server that takes it shows it whole; a
PUT that breaks off leaves no object. So there is nothing to stage. Conditions make it a commit:

- `put_if_absent`: `If-None-Match: *`, which fails if the name is taken. Of several writers one
  wins.
- `replace`: `If-Match` with the ETag that was read, which fails if there is another version.
- `put`: no condition; the last writer's object stays.

**A PUT whose answer is lost** may or may not have written. It is repeated; if its condition then
fails, the name is taken by our own PUT or by another writer's. The object's content decides: if it
is what we wanted to write, that is what is there, whoever wrote it.

Writes go through boto3, which alone offers the conditional PUT. Listing and reading go through
pyarrow. Both try once, and `_patiently` tries again. Both use the credentials of the usual AWS
chain (environment, profile, role), looked up on the machine that needs them: an `S3Folder` can be
pickled and holds no secret.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import boto3
import pyarrow as pa
import pyarrow.fs as pafs
from botocore import exceptions as aws
from botocore.config import Config

from pipeline.config.job import S3Config
from pipeline.errors import UserError
from pipeline.storage.patience import explained, patiently
from pipeline.storage.s3_answers import CutShort, in_words, is_transient, s3_answer
from pipeline.storage.search import Found, Stamp, StoredFile, search

_CONNECT_SECONDS = 5
"""Seconds for which a connection is waited for; more delays the news of a wrong endpoint."""

_SILENCE_SECONDS = 30
"""Seconds for which a connection may send nothing; fewer takes a busy server for a dead one."""

_CONDITION_FAILED = {"PreconditionFailed", "412", "NoSuchKey"}  # the last: If-Match of no file

T = TypeVar("T")


def bucket_and_key(url: str) -> tuple[str, str]:
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


# ------------------------------------------------------------------------ connections


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
        retries={"mode": "standard", "total_max_attempts": 1},  # `_patiently` retries
        connect_timeout=_CONNECT_SECONDS,
        read_timeout=_SILENCE_SECONDS,
        s3={"addressing_style": "path"} if s3.endpoint else {},
    )
    return _session(s3.profile).client(
        "s3", endpoint_url=s3.endpoint, region_name=s3.region, config=config
    )


@lru_cache(maxsize=16)
def _filesystem_with(
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
        UserError: no credentials, no such profile.
    """
    bucket, key = bucket_and_key(url)
    with _explained(url, s3):
        client = _client(s3)
        credentials = _session(s3.profile).get_credentials()
        if credentials is None:
            raise aws.NoCredentialsError
        frozen = credentials.get_frozen_credentials()
        endpoint = client.meta.endpoint_url
        on_aws = endpoint.endswith((".amazonaws.com", ".amazonaws.com.cn"))
        fs = _filesystem_with(
            None if on_aws else endpoint,
            client.meta.region_name,
            frozen.access_key or "",
            frozen.secret_key or "",
            frozen.token,
        )
    return fs, f"{bucket}/{key}".rstrip("/")


def _explained(url: str, s3: S3Config) -> AbstractContextManager[None]:
    return explained(url, partial(in_words, url, s3))


def _patiently(
    url: str,
    s3: S3Config,
    operation: Callable[[], T],
    passes: Callable[[BaseException], bool] = is_transient,
) -> T:
    return patiently(url, operation, passes=passes, in_words=partial(in_words, url, s3))


def resolved(s3: S3Config) -> S3Config:
    """See `pipeline.storage.folder.resolved`."""
    with _explained("s3", s3):
        meta = _client(s3).meta
    custom = s3.endpoint or (None if "amazonaws.com" in meta.endpoint_url else meta.endpoint_url)
    return s3.model_copy(update={"endpoint": custom, "region": meta.region_name})


def check_access(url: str, s3: S3Config) -> None:
    """See `pipeline.storage.folder.check_access`."""
    bucket, _ = bucket_and_key(url)

    def passes(error: BaseException) -> bool:
        # Most likely a wrong endpoint: a job that has not begun loses nothing by stopping.
        return is_transient(error) and not isinstance(error, aws.EndpointConnectionError)

    _patiently(url, s3, lambda: _client(s3).list_objects_v2(Bucket=bucket, MaxKeys=1), passes)


# ----------------------------------------------------------------------------- folder


@dataclass(frozen=True)
class S3Folder:
    """A folder in a bucket. See `Folder` for what its methods do.

    Attributes:
        url: its s3:// URL.
        s3: how to reach it.
    """

    url: str
    s3: S3Config

    def join(self, name: str) -> str:
        return f"{self.url.rstrip('/')}/{name}"

    def subfolder(self, name: str) -> S3Folder:
        return S3Folder(self.join(name), self.s3)

    # ------------------------------------------------------------------------- write

    def put_if_absent(self, name: str, data: bytes) -> bool:
        return self._put_object(name, data, IfNoneMatch="*")

    def put(self, name: str, data: bytes) -> None:
        self._put_object(name, data)

    def replace(self, name: str, data: bytes, version: str) -> bool:
        return self._put_object(name, data, IfMatch=version)

    def put_folder(self, name: str, files: Mapping[str, bytes]) -> None:
        for each, data in files.items():
            self.put(f"{name}/{each}", data)
        for each in self.tree(name).keys() - files.keys():
            self.delete(f"{name}/{each}")

    def upload(self, name: str, file: Path) -> None:
        place = self._place(name)

        def upload() -> None:
            # In parts, if it is large; what is there changes when all have arrived.
            with file.open("rb") as opened:
                _client(self.s3).upload_fileobj(opened, place["Bucket"], place["Key"])

        self._patiently(name, upload)

    def delete(self, name: str) -> None:
        place = self._place(name)
        self._patiently(name, lambda: _client(self.s3).delete_object(**place))

    def clear_staging(self) -> None:
        """Nothing to do: there never is a half-written file."""

    def _put_object(self, name: str, data: bytes, **condition: str) -> bool:
        options = {**self._place(name), **condition}
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

        return self._patiently(name, put)

    # -------------------------------------------------------------------------- read

    def read(self, name: str) -> bytes | None:
        try:
            return self.read_version(name)[0]
        except FileNotFoundError:
            return None

    def read_version(self, name: str) -> tuple[bytes, str]:
        place = self._place(name)

        def get() -> tuple[bytes, str]:
            try:
                answer = _client(self.s3).get_object(**place)
            except _client(self.s3).exceptions.NoSuchKey:
                raise FileNotFoundError(self.join(name)) from None
            return answer["Body"].read(), answer["ETag"]

        return self._patiently(name, get)

    @contextmanager
    def open(self, name: str) -> Iterator[pa.NativeFile]:
        with pa.PythonFile(_PatientFile(self.join(name), self.s3), mode="r") as file:
            yield file

    def stamp(self, name: str) -> Stamp | None:
        fs, path = filesystem(self.join(name), self.s3)
        info = self._patiently(name, lambda: fs.get_file_info(path))
        return _stamp(info) if info.type == pafs.FileType.File else None

    def list(self, name: str) -> dict[str, int]:
        infos, _ = self._infos(name)
        return {i.base_name: i.size for i in infos if i.type == pafs.FileType.File}

    def tree(self, name: str) -> dict[str, int]:
        infos, base = self._infos(name, recursive=True)
        files = (i for i in infos if i.type == pafs.FileType.File)
        return {i.path[len(base) + 1 :]: i.size for i in files}

    def folders(self) -> tuple[str, ...]:
        infos, _ = self._infos("")
        return tuple(sorted(i.base_name for i in infos if i.type == pafs.FileType.Directory))

    def _infos(self, name: str, recursive: bool = False) -> tuple[Any, str]:
        fs, base = filesystem(self.join(name), self.s3)
        selector = pafs.FileSelector(base, recursive=recursive, allow_not_found=True)
        return self._patiently(name, lambda: fs.get_file_info(selector)), base

    # ---------------------------------------------------------------- how it is done

    def _patiently(self, name: str, operation: Callable[[], T]) -> T:
        return _patiently(self.join(name), self.s3, operation)

    def _place(self, name: str) -> dict[str, str]:
        """A file's bucket and key, as boto3's calls name them."""
        bucket, prefix = bucket_and_key(self.url)
        return {"Bucket": bucket, "Key": f"{prefix}/{name}" if prefix else name}


class _PatientFile:
    """A file on S3, for `pyarrow.PythonFile`: each ranged read is repeated until it succeeds."""

    def __init__(self, url: str, s3: S3Config) -> None:
        fs, path = filesystem(url, s3)
        self._file = _patiently(url, s3, lambda: fs.open_input_file(path))
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

        data = _patiently(self._url, self._s3, read) if wanted else b""
        self._position += len(data)
        return data


# ----------------------------------------------------------------------------- search


def find_files(pattern: str, s3: S3Config) -> Found:
    """What an s3:// URL names. See `pipeline.storage.folder.find_files`."""
    fs, path = filesystem(pattern, s3)
    attempt = partial(_patiently, pattern, s3)
    return attempt(lambda: search(fs, path, attempt, _stored))


def _stored(info: pafs.FileInfo, name: str) -> StoredFile:
    return StoredFile(f"s3://{info.path}", name, _stamp(info))


def _stamp(info: pafs.FileInfo) -> Stamp:
    # S3 says the time to the second in some answers, more exactly in others.
    return Stamp(info.size, (info.mtime_ns or 0) // 10**9 * 10**9)
