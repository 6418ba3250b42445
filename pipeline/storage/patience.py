"""When storage fails: what is tried again, for how long, and what is said in the end.

This is the one place that retries S3: botocore and pyarrow try once, so that patience does not
multiply. Messages carry the server's error code but never its text, into which some servers and
proxies put parts of the request, and with them credentials.
"""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from botocore import exceptions as aws
from botocore.parsers import ResponseParserError
from tenacity import (
    RetryError,
    Retrying,
    retry_if_exception,
    stop_before_delay,
    wait_random_exponential,
)

from pipeline.config.job import S3Config
from pipeline.errors import UserError

PATIENCE = 120.0  # seconds that one operation is tried for
_FIRST_WAIT, _LONGEST_WAIT = 0.2, 10.0  # seconds; a wait is a random part of it

_CREDENTIALS_FIX = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or name a profile of ~/.aws with s3.profile"
)
_RESUME = "what is committed is kept, and the same command resumes"
_DENIED = {
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "AccessDenied",
    "Forbidden",
    "403",
    "ExpiredToken",
    "InvalidToken",
}
_TRANSIENT = {
    "InternalError",
    "InternalFailure",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "RequestTimeout",
    "IncompleteBody",
    # Two conditional PUTs of one name at the same moment: S3 asks one of them to try again.
    "ConditionalRequestConflict",
    "OperationAborted",
}
_TRANSIENT_STATUS = {408, 429, 500, 502, 503, 504}
_NETWORK = (
    aws.ConnectionError,
    aws.HTTPClientError,
    aws.IncompleteReadError,
    ResponseParserError,  # an answer that was cut short
)
# pyarrow says what happened in its message only: a name, for HEAD just the status, and for codes
# that it has no name for, a number of its own.
_ARROW = re.compile(r"AWS Error (\w+|\[code \d+\])(?: \(HTTP status (\d+)\))?")
_CURL = re.compile(r"curlCode: (\d+), ([^;]+)")
_CURL_CERTIFICATE = {"51", "60", "77"}
_DISK = {
    errno.ENOSPC: "no space left on this disk; free some",
    errno.EDQUOT: "the disk quota is used up; free some space or raise it",
    errno.EFBIG: "the file is larger than this file system or `ulimit -f` allows; raise the limit",
    errno.EROFS: "this file system is read-only; mount it writable",
    errno.EIO: "the disk answered with an input/output error; check it",
}

T = TypeVar("T")


class CutShort(OSError):
    """S3 sent fewer bytes than were asked for."""


@dataclass(frozen=True)
class Answer:
    """What S3 answered, or how the connection failed.

    Attributes:
        code: S3's error code or an HTTP status; empty if nothing was answered.
        words: the same for a message.
        transient: whether the same request may succeed later.
    """

    code: str
    words: str
    transient: bool


def s3_answer(error: BaseException) -> Answer | None:
    """What S3 answered, as botocore or pyarrow tells it; None if the error is another one."""
    if isinstance(error, aws.ClientError):
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        return _answered(str(error.response.get("Error", {}).get("Code", "")), status)
    if isinstance(error, aws.SSLError):
        return Answer("", "the server's certificate is not trusted", transient=False)
    if isinstance(error, _NETWORK):
        return Answer("", f"the connection failed ({type(error).__name__})", transient=True)
    if isinstance(error, CutShort):
        return Answer("", "the answer was cut short", transient=True)
    if isinstance(error, OSError) and (found := _ARROW.search(str(error))):
        name, number = found.groups()
        if name == "NETWORK_CONNECTION":
            return _disconnected(str(error))
        named = name != "UNKNOWN" and not name.startswith("[")
        return _answered(_camel(name) if named else "", int(number or 0))
    return None


def _answered(code: str, status: int) -> Answer:
    # A code is one word: anything else is not S3's and may repeat what was sent.
    code = code if re.fullmatch(r"\w{1,60}", code) else ""
    transient = code in _TRANSIENT or status in _TRANSIENT_STATUS
    name = code or (str(status) if status else "an error")
    shown = f"{name} (HTTP {status})" if status and name != str(status) else name
    return Answer(name, f"S3 answered {shown}", transient)


def _disconnected(text: str) -> Answer:
    found = _CURL.search(text)
    if found is None:
        return Answer("", "the connection failed", transient=True)
    number, words = found.groups()
    return Answer("", f"the connection failed ({words})", number not in _CURL_CERTIFICATE)


def _camel(name: str) -> str:
    """ACCESS_DENIED as AccessDenied: pyarrow's name of a code as S3's."""
    return "".join(part.title() for part in name.split("_"))


def is_transient(error: BaseException) -> bool:
    """Whether the operation may succeed if it is tried again."""
    answer = s3_answer(error)
    return answer is not None and answer.transient


def patiently(
    url: str,
    s3: S3Config,
    operation: Callable[[], T],
    *,
    at_once: tuple[type[BaseException], ...] = (),
) -> T:
    """Do something with storage, again and again while S3 answers that it cannot at the moment.

    Args:
        url: what it is about, for messages.
        s3: how S3 is reached, for messages.
        operation: repeated as a whole; on a local disk it is never repeated.
        at_once: errors that are not waited out although they might pass.

    Returns:
        What the operation returned.

    Raises:
        UserError: it cannot succeed, or did not for `PATIENCE` seconds.
    """
    began = time.monotonic()
    attempts = Retrying(
        retry=retry_if_exception(lambda e: is_transient(e) and not isinstance(e, at_once)),
        stop=stop_before_delay(PATIENCE),
        wait=wait_random_exponential(multiplier=_FIRST_WAIT, max=_LONGEST_WAIT),
    )
    try:
        with explained(url, s3):
            return attempts(operation)
    except RetryError as error:
        last = error.last_attempt.exception()
        words = _in_words(url, s3, last) if last else None
        seconds, tries = time.monotonic() - began, error.last_attempt.attempt_number
        # Chained to nothing: the causes hold the server's own text.
        raise UserError(
            f"{url}: {words}; gave up after {seconds:.0f} s and {tries} attempts; {_RESUME}"
        ) from None


@contextmanager
def explained(url: str, s3: S3Config) -> Iterator[None]:
    """Turn what S3 or the disk answers into one line that names `url` and the fix."""
    try:
        yield
    except Exception as error:
        words = _in_words(url, s3, error)
        if words is None:
            raise
        raise UserError(f"{url}: {words}") from None


def _in_words(url: str, s3: S3Config, error: BaseException) -> str | None:
    """What happened and the fix; None if the error is not one of storage."""
    if isinstance(
        error, aws.NoCredentialsError | aws.PartialCredentialsError | aws.TokenRetrievalError
    ):
        return f"no AWS credentials found; {_CREDENTIALS_FIX}"
    if isinstance(error, aws.EndpointConnectionError | aws.ConnectTimeoutError):
        where = s3.endpoint or "AWS S3"
        return f"cannot reach {where}; check s3.endpoint and that the server is up"
    answer = s3_answer(error)
    if answer is not None:
        return _answer_in_words(url, answer)
    if isinstance(error, PermissionError):
        return "permission denied; check who owns the folder"
    if isinstance(error, NotADirectoryError):
        return "part of this path is a file, not a folder"
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return "a name in this path is too long for the file system; shorten it"
    if isinstance(error, OSError) and error.errno in _DISK:
        return f"{_DISK[error.errno]}; {_RESUME}"
    return None


def _answer_in_words(url: str, answer: Answer) -> str:
    if answer.code in _DENIED:
        return f"the server refused these credentials ({answer.code}); {_CREDENTIALS_FIX}"
    if answer.code in {"NoSuchBucket", "404"}:
        bucket = url.removeprefix("s3://").partition("/")[0]
        return f"no such bucket: {bucket}; create it or correct the URL"
    if answer.code in {"PermanentRedirect", "AuthorizationHeaderMalformed", "301"}:
        return f"the bucket is in another region ({answer.code}); set s3.region"
    return answer.words
