"""The backend for S3 and servers that speak like it.

**What is atomic, and why.** An object changes by one PUT. A server that takes it shows it whole; a
PUT that breaks off leaves no object. So there is nothing to stage. Conditions make it a commit:

- `put_if_absent`: `If-None-Match: *`, which fails if the name is taken. Of several writers one
  wins.
- `replace`: `If-Match` with the ETag that was read, which fails if there is another version.
- `put`: no condition; the last writer's object stays.

Some servers do not know these conditions; `pipeline.storage.folder.check_conditions` finds out.

**A PUT whose answer is lost** may or may not have written. It is repeated; if its condition then
fails, the name is taken by our own PUT or by another writer's. The object's content decides: if it
is what we wanted to write, that is what is there, whoever wrote it.

Keys are used as they are: nothing in them is decoded, and `a//b` is not `a/b`. All requests go
through `s3_client.ask`. An `S3Folder` can be pickled and holds no secret.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
from botocore import exceptions as aws

from pipeline.config.job import S3Config
from pipeline.errors import UserError
from pipeline.storage.s3_answers import NO_CONDITIONS, CutShort, is_transient, s3_answer
from pipeline.storage.s3_client import ask, bucket_and_key
from pipeline.storage.search import Entry, Found, Stamp, search

_CONDITION_FAILED = {"PreconditionFailed", "412", "NoSuchKey"}  # the last: If-Match of no file
_UNKNOWN_CONDITION = {"NotImplemented", "501"}
_NOT_THERE = {"NoSuchKey", "404"}  # the last: HEAD's answer, which has no code
_CHANGED = {"InvalidRange", "416"}

T = TypeVar("T")


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

        def upload(client: Any) -> None:
            # In parts, if it is large; what is there changes when all have arrived.
            with file.open("rb") as opened:
                client.upload_fileobj(opened, place["Bucket"], place["Key"])

        self._ask(name, upload)

    def delete(self, name: str) -> None:
        place = self._place(name)
        self._ask(name, lambda client: client.delete_object(**place))

    def clear_staging(self) -> None:
        """Nothing to do: there never is a half-written file."""

    def _put_object(self, name: str, data: bytes, **condition: str) -> bool:
        options = {**self._place(name), **condition}
        unsure = False  # whether an earlier attempt may have written the file

        def put(client: Any) -> bool:
            nonlocal unsure
            try:
                client.put_object(**options, Body=data)
            except (aws.BotoCoreError, aws.ClientError) as error:
                code = _code(error)
                if code in _CONDITION_FAILED:
                    # Either our own PUT whose answer was lost, or another writer's. If the
                    # content is ours, it is true of both that this data is in the file.
                    return unsure and self.read(name) == data
                if condition and code in _UNKNOWN_CONDITION:
                    raise UserError(f"{self.url}: {NO_CONDITIONS}") from None
                unsure = unsure or is_transient(error)
                raise
            return True

        return self._ask(name, put)

    # -------------------------------------------------------------------------- read

    def read(self, name: str) -> bytes | None:
        try:
            return self.read_version(name)[0]
        except FileNotFoundError:
            return None

    def read_version(self, name: str) -> tuple[bytes, str]:
        place = self._place(name)

        def get(client: Any) -> tuple[bytes, str]:
            with _missing(self.join(name)):
                answer = client.get_object(**place)
            return answer["Body"].read(), answer["ETag"]

        return self._ask(name, get)

    @contextmanager
    def open(self, name: str, size: int | None = None) -> Iterator[pa.NativeFile]:
        if size is None:
            stamp = self.stamp(name)
            if stamp is None:
                raise FileNotFoundError(self.join(name))
            size = stamp.size
        with pa.PythonFile(_RangedFile(self, name, size), mode="r") as file:
            yield file

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """So many bytes (at least one) of a file, from `start` on.

        Raises:
            FileNotFoundError: there is none.
        """
        place = {**self._place(name), "Range": f"bytes={start}-{start + length - 1}"}

        def get(client: Any) -> bytes:
            try:
                with _missing(self.join(name)):
                    data: bytes = client.get_object(**place)["Body"].read()
            except aws.ClientError as error:
                if _code(error) not in _CHANGED:
                    raise
                raise UserError(
                    f"{self.join(name)}: has become shorter while it was read; leave it as it is, "
                    "and run the same command again"
                ) from None
            if len(data) != length:
                raise CutShort
            return data

        return self._ask(name, get)

    def stamp(self, name: str) -> Stamp | None:
        return _Bucket(self.url, self.s3).stamp(self._place(name)["Key"])

    def list(self, name: str) -> dict[str, int]:
        return self._files(name, deep=False)

    def tree(self, name: str) -> dict[str, int]:
        return self._files(name, deep=True)

    def folders(self) -> tuple[str, ...]:
        prefix = self._prefix("")
        entries = _Bucket(self.url, self.s3).list(prefix, deep=False)
        return tuple(sorted(e.path[len(prefix) : -1] for e in entries if e.stamp is None))

    def _files(self, name: str, *, deep: bool) -> dict[str, int]:
        prefix = self._prefix(name)
        entries = _Bucket(self.url, self.s3).list(prefix, deep=deep)
        return {e.path[len(prefix) :]: e.stamp.size for e in entries if e.stamp is not None}

    # ---------------------------------------------------------------- how it is done

    def _ask(self, name: str, request: Callable[[Any], T]) -> T:
        return ask(self.join(name), self.s3, request)

    def _place(self, name: str) -> dict[str, str]:
        """A file's bucket and key, as boto3's calls name them."""
        bucket, prefix = bucket_and_key(self.url)
        return {"Bucket": bucket, "Key": f"{prefix}/{name}" if prefix else name}

    def _prefix(self, name: str) -> str:
        """What the keys of all files in a subfolder begin with."""
        key = self._place(name)["Key"].rstrip("/")
        return f"{key}/" if key else ""


def _code(error: BaseException) -> str | None:
    answer = s3_answer(error)
    return answer.code if answer is not None else None


@contextmanager
def _missing(url: str) -> Iterator[None]:
    """Turn the answer that there is no such object into FileNotFoundError."""
    try:
        yield
    except aws.ClientError as error:
        if _code(error) not in _NOT_THERE:
            raise
        raise FileNotFoundError(url) from None


class _RangedFile:
    """A file on S3, for `pyarrow.PythonFile`: each read is a request of its own."""

    def __init__(self, folder: S3Folder, name: str, size: int) -> None:
        self._folder, self._name, self._size = folder, name, size
        self._position = 0
        self.closed = False

    def close(self) -> None:
        self.closed = True

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
        if not wanted:
            return b""
        data = self._folder.read_range(self._name, self._position, wanted)
        self._position += len(data)
        return data


# ----------------------------------------------------------------------------- search


def find_files(pattern: str, s3: S3Config) -> Found:
    """What an s3:// URL names. See `pipeline.storage.folder.find_files`."""
    bucket, key = bucket_and_key(pattern)
    return search(_Bucket(pattern, s3), key, lambda path: f"s3://{bucket}/{path}")


class _Bucket:
    """The keys of a bucket as a tree, for `search`.

    Args:
        url: of anything in it; messages name it.
        s3: how to reach it.
    """

    def __init__(self, url: str, s3: S3Config) -> None:
        self._url, self._s3 = url, s3
        self._bucket, _ = bucket_and_key(url)

    def stamp(self, path: str) -> Stamp | None:
        def head(client: Any) -> Stamp | None:
            try:
                with _missing(path):
                    answer = client.head_object(Bucket=self._bucket, Key=path)
            except FileNotFoundError:
                return None
            return _stamp(answer["ContentLength"], answer)

        return ask(self._url, self._s3, head) if path else None

    def is_folder(self, path: str) -> bool:
        return not path or bool(self._page(f"{path}/", MaxKeys=1).get("KeyCount"))

    def list(self, folder: str, *, deep: bool) -> Iterator[Entry]:
        options: dict[str, Any] = {} if deep else {"Delimiter": "/"}
        while True:
            page = self._page(folder, **options)
            for each in page.get("CommonPrefixes", []):
                yield Entry(each["Prefix"], None)
            for each in page.get("Contents", []):
                # Consoles make empty objects whose keys end in a slash, to show a folder.
                if not each["Key"].endswith("/"):
                    yield Entry(each["Key"], _stamp(each["Size"], each))
            if not page.get("IsTruncated"):
                return
            options["ContinuationToken"] = page["NextContinuationToken"]

    def _page(self, prefix: str, **options: Any) -> dict[str, Any]:
        return ask(
            self._url,
            self._s3,
            lambda client: client.list_objects_v2(Bucket=self._bucket, Prefix=prefix, **options),
        )


def _stamp(size: int, answer: Mapping[str, Any]) -> Stamp:
    # S3 says the time to the second in some answers, more exactly in others.
    return Stamp(size, int(answer["LastModified"].timestamp()) * 10**9)
