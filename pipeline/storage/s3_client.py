"""Connections to S3: one boto3 client for each way to reach it, credentials that are renewed, and
requests that are tried again.

Credentials come from the usual AWS chain (environment, profile, role), looked up on the machine
that needs them. botocore renews those of roles by itself. Those that stand in a file, and a login,
it reads once; so when S3 says that they have expired, `ask` makes a new client, once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from botocore import UNSIGNED
from botocore import exceptions as aws

from pipeline.config.job import S3Config
from pipeline.errors import UserError
from pipeline.storage.patience import explained, patiently
from pipeline.storage.s3_answers import in_words, is_transient, may_have_expired

_CONNECT_SECONDS = 5
"""Seconds for which a connection is waited for; more delays the news of a wrong endpoint."""

_SILENCE_SECONDS = 30
"""Seconds for which a connection may send nothing; fewer takes a busy server for a dead one."""

_CONNECTIONS = 32
"""Connections that a client keeps; planning and counting use 16 threads each."""

T = TypeVar("T")

_lock = threading.Lock()
_clients: dict[S3Config, Any] = {}


def bucket_and_key(url: str) -> tuple[str, str]:
    """Bucket and key of an s3:// URL. The key is taken as it is, without slashes at its end.

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
    return bucket, key.rstrip("/")


def ask(
    url: str,
    s3: S3Config,
    request: Callable[[Any], T],
    passes: Callable[[BaseException], bool] = is_transient,
) -> T:
    """Do something with a client, again while it fails in a way that may pass.

    Args:
        url: what it is about, for messages.
        s3: how to reach it.
        request: what to do with a boto3 client; repeated as a whole.
        passes: whether the request may succeed after this error if it is tried again.

    Raises:
        UserError: it cannot succeed, or did not in time.
    """

    def attempt() -> T:
        client = _client(s3)
        try:
            return request(client)
        except (aws.BotoCoreError, aws.ClientError) as error:
            if not may_have_expired(error):
                raise
        return request(_renewed(s3, client))

    return patiently(url, attempt, passes=passes, in_words=partial(in_words, url, s3))


def _client(s3: S3Config) -> Any:
    # botocore clients are thread-safe; making them is not.
    with _lock:
        if s3 not in _clients:
            _clients[s3] = _new_client(s3)
        return _clients[s3]


def _renewed(s3: S3Config, expired: Any) -> Any:
    """A client that is not the expired one; another thread may have made it already."""
    with _lock:
        if _clients.get(s3) is expired:
            _clients[s3] = _new_client(s3)
        return _clients[s3]


def _new_client(s3: S3Config) -> Any:
    # Not at the top: each process of a job loads this file, and many of them use disks alone.
    import boto3
    from botocore.config import Config

    options: dict[str, Any] = {}
    if s3.endpoint:
        # Some of the servers that speak like S3 refuse the checksums that the SDK adds by itself.
        options = {
            "s3": {"addressing_style": "path"},
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        }
    if s3.anonymous:
        options["signature_version"] = UNSIGNED
    config = Config(
        retries={"mode": "standard", "total_max_attempts": 1},  # `patiently` retries
        connect_timeout=_CONNECT_SECONDS,
        read_timeout=_SILENCE_SECONDS,
        max_pool_connections=_CONNECTIONS,
        **options,
    )
    try:
        session = boto3.Session(profile_name=None if s3.anonymous else s3.profile)
    except aws.ProfileNotFound:
        raise UserError(
            f"s3.profile: no AWS profile named {s3.profile!r} on this machine; "
            "add it to ~/.aws/config or correct the name"
        ) from None
    client = session.client("s3", endpoint_url=s3.endpoint, region_name=s3.region, config=config)
    if s3.requester_pays:
        client.meta.events.register("before-call.s3", _pay)
    return client


def _pay(params: dict[str, Any], **_: Any) -> None:
    params["headers"]["x-amz-request-payer"] = "requester"


def resolved(s3: S3Config) -> S3Config:
    """See `pipeline.storage.folder.resolved`."""
    with explained("s3", partial(in_words, "s3", s3)):
        meta = _client(s3).meta
    custom = s3.endpoint or (None if "amazonaws.com" in meta.endpoint_url else meta.endpoint_url)
    return s3.model_copy(update={"endpoint": custom, "region": meta.region_name})


def check_access(url: str, s3: S3Config) -> None:
    """See `pipeline.storage.folder.check_access`."""
    bucket, _ = bucket_and_key(url)

    def passes(error: BaseException) -> bool:
        # Most likely a wrong endpoint: a job that has not begun loses nothing by stopping.
        return is_transient(error) and not isinstance(error, aws.EndpointConnectionError)

    ask(url, s3, lambda client: client.list_objects_v2(Bucket=bucket, MaxKeys=1), passes)
