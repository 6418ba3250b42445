"""Local disk and S3 behind one small interface: `Folder` for the output, `list_inputs` for inputs.

Reads go through pyarrow.fs. Writes on S3 go through boto3, which alone offers the conditional PUT
that makes a commit atomic. Both use the credentials of the usual AWS chain (environment, profile,
role), looked up on the machine that needs them: a `Folder` can be pickled and holds no secret.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import boto3
import pyarrow.fs as pafs
from botocore import exceptions as aws
from botocore.config import Config
from tenacity import retry, retry_if_exception, stop_after_attempt, wait_random_exponential

from pipeline.config import S3Config
from pipeline.errors import UserError

_STAGING = "_specbatch/staging"
_CREDENTIALS_FIX = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or name a profile of ~/.aws with s3.profile"
)
_DENIED = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied", "403", "ExpiredToken"}
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
    return bucket, key.strip("/")


def check_scheme(url: str) -> None:
    """Refuse what is neither a local path nor s3://.

    Raises:
        UserError: another scheme.
    """
    scheme, separator, _ = url.partition("://")
    if separator and scheme != "s3":
        raise UserError(f"{url}: {scheme}:// is not supported; use a local path or s3://")


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
        retries={"mode": "standard", "max_attempts": 4},
        connect_timeout=5,
        read_timeout=60,
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
        connect_timeout=5,
        request_timeout=60,
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


@contextmanager
def explained(url: str, s3: S3Config) -> Iterator[None]:
    """Turn what S3 or the disk answers into one line that names `url` and the fix."""
    try:
        yield
    except (aws.NoCredentialsError, aws.PartialCredentialsError, aws.TokenRetrievalError):
        raise UserError(f"{url}: no AWS credentials found; {_CREDENTIALS_FIX}") from None
    except (aws.EndpointConnectionError, aws.ConnectTimeoutError, aws.ConnectionClosedError):
        where = s3.endpoint or "AWS S3"
        raise UserError(
            f"{url}: cannot reach {where}; check s3.endpoint and that the server is up"
        ) from None
    except aws.ClientError as error:
        raise UserError(f"{url}: {_client_error(url, error)}") from None
    except PermissionError:
        raise UserError(f"{url}: permission denied; check who owns the folder") from None
    except NotADirectoryError:
        raise UserError(f"{url}: part of this path is a file, not a folder") from None


def _client_error(url: str, error: aws.ClientError) -> str:
    code = str(error.response.get("Error", {}).get("Code", ""))
    if code in _DENIED:
        return f"the server refused these credentials ({code}); {_CREDENTIALS_FIX}"
    if code in {"NoSuchBucket", "404"}:
        return f"no such bucket: {split_s3(url)[0]}; create it or correct the URL"
    if code in {"PermanentRedirect", "AuthorizationHeaderMalformed", "301"}:
        return f"the bucket is in another region ({code}); set s3.region"
    return f"S3 answered {code or 'an error'}: {error.response.get('Error', {}).get('Message')}"


def check_access(url: str, s3: S3Config) -> None:
    """Ask S3 for one name under `url`, so that a wrong setting shows now and in plain words.

    Raises:
        UserError: no credentials or wrong ones, no such bucket, server out of reach.
    """
    check_scheme(url)
    if is_s3(url):
        bucket, _ = split_s3(url)
        with explained(url, s3):
            _client(s3).list_objects_v2(Bucket=bucket, MaxKeys=1)


def _is_conflict(error: BaseException) -> bool:
    # Two conditional PUTs of one name at the same moment: S3 asks one of them to try again.
    return (
        isinstance(error, aws.ClientError)
        and error.response.get("Error", {}).get("Code") == "ConditionalRequestConflict"
    )


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
        with explained(self.join(name), self.s3):
            if is_s3(self.url):
                return self._put_object(name, data, if_absent=True)
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
        with explained(self.join(name), self.s3):
            if is_s3(self.url):
                self._put_object(name, data, if_absent=False)
                return
            target = Path(self.url, name)
            with self._staged(target, data) as staged:
                os.replace(staged, target)

    @retry(
        retry=retry_if_exception(_is_conflict),
        stop=stop_after_attempt(8),
        wait=wait_random_exponential(multiplier=0.1, max=5),
        reraise=True,
    )
    def _put_object(self, name: str, data: bytes, *, if_absent: bool) -> bool:
        bucket, prefix = split_s3(self.url)
        key = f"{prefix}/{name}" if prefix else name
        try:
            if if_absent:
                _client(self.s3).put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
            else:
                _client(self.s3).put_object(Bucket=bucket, Key=key, Body=data)
        except aws.ClientError as error:
            # Also the answer to a repeated PUT whose first answer was lost: the file is there.
            if error.response.get("Error", {}).get("Code") in {"PreconditionFailed", "412"}:
                return False
            raise
        return True

    @contextmanager
    def _staged(self, target: Path, data: bytes) -> Iterator[Path]:
        """A complete, synced copy of `data` on the target's own filesystem."""
        staged = Path(self.url, _STAGING, f"{uuid.uuid4().hex}-{target.name}")
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
        fs, root = filesystem(self.url, self.s3)
        with explained(self.join(name), self.s3):
            try:
                with fs.open_input_stream(f"{root}/{name}", compression=None) as stream:
                    return bytes(stream.read())
            except FileNotFoundError:
                return None

    def open(self, name: str) -> Any:
        """A file for random access (`pyarrow.NativeFile`)."""
        fs, root = filesystem(self.url, self.s3)
        return fs.open_input_file(f"{root}/{name}")

    def list(self, name: str) -> dict[str, int]:
        """Names (relative to `name`) and sizes in bytes of the files directly in a subfolder."""
        fs, root = filesystem(self.url, self.s3)
        selector = pafs.FileSelector(f"{root}/{name}".rstrip("/"), allow_not_found=True)
        with explained(self.join(name), self.s3):
            infos = fs.get_file_info(selector)
        return {i.base_name: i.size for i in infos if i.type == pafs.FileType.File}

    def delete(self, name: str) -> None:
        """Remove a file if it exists."""
        fs, root = filesystem(self.url, self.s3)
        # FileNotFoundError locally; S3 deletes are silent about what is not there.
        try:
            fs.delete_file(f"{root}/{name}")
        except FileNotFoundError:
            return

    def clear_staging(self) -> None:
        """Remove half-written files that killed writers left. S3 never has any."""
        if not is_s3(self.url):
            shutil.rmtree(Path(self.url, _STAGING), ignore_errors=True)


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
