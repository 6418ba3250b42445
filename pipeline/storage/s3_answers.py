"""What S3 answers, as botocore tells it: whether it may pass, and how to say it.

Messages carry the server's error code but never its text, into which some servers and proxies put
parts of the request, and with them credentials.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from botocore import exceptions as aws
from botocore.parsers import ResponseParserError

from pipeline.config.job import S3Config
from pipeline.storage.patience import RESUME

_CREDENTIALS_FIX = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or name a profile of ~/.aws with s3.profile"
)
_RENEW = (
    "log in again (such as `aws sso login`), or put new ones where the old ones stand; " + RESUME
)
_DENIED = {
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "AccessDenied",
    "Forbidden",
    "403",
}
_EXPIRED = {
    "ExpiredToken",
    "ExpiredTokenException",
    "InvalidToken",
    "RequestExpired",
    "TokenRefreshRequired",
    "400",  # HEAD's answer has no code, and hardly another reason for this status
}
_REPLACED = {"InvalidAccessKeyId", "InvalidClientTokenId"}
"""What is answered to keys that are taken out of use when they are replaced."""

_LOGIN = (aws.SSOError, aws.TokenRetrievalError, aws.CredentialRetrievalError)
"""A login that has expired, or a program or role that gives no credentials any more."""

NO_CONDITIONS = (
    "this store does not keep the conditions of a PUT (If-None-Match, If-Match), by which exactly "
    "one of several writers wins, so that rows could be lost; use a store that does, such as AWS "
    "S3, Cloudflare R2, or a current MinIO or SeaweedFS, or a disk"
)
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
    """What S3 answered, as botocore tells it; None if the error is another one."""
    if isinstance(error, aws.ClientError):
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        return _answered(str(error.response.get("Error", {}).get("Code", "")), status)
    if isinstance(error, aws.SSLError):
        return Answer("", "the server's certificate is not trusted", transient=False)
    if isinstance(error, _NETWORK):
        return Answer("", f"the connection failed ({type(error).__name__})", transient=True)
    if isinstance(error, CutShort):
        return Answer("", "the answer was cut short", transient=True)
    return None


def _answered(code: str, status: int) -> Answer:
    # A code is one word: anything else is not S3's and may repeat what was sent.
    code = code if re.fullmatch(r"\w{1,60}", code) else ""
    transient = code in _TRANSIENT or status in _TRANSIENT_STATUS
    name = code or (str(status) if status else "an error")
    shown = f"{name} (HTTP {status})" if status and name != str(status) else name
    return Answer(name, f"S3 answered {shown}", transient)


def is_transient(error: BaseException) -> bool:
    """Whether the operation may succeed if it is tried again."""
    answer = s3_answer(error)
    return answer is not None and answer.transient


def may_have_expired(error: BaseException) -> bool:
    """Whether the operation may succeed with credentials that are looked up again."""
    answer = s3_answer(error)
    return isinstance(error, _LOGIN) or (answer is not None and answer.code in _EXPIRED | _REPLACED)


def in_words(url: str, s3: S3Config, error: BaseException) -> str | None:
    """What happened and the fix; None if the error is not one of S3."""
    if isinstance(error, aws.NoCredentialsError | aws.PartialCredentialsError):
        return f"no AWS credentials found; {_CREDENTIALS_FIX}"
    if isinstance(error, _LOGIN):
        return f"the AWS credentials cannot be had any more ({type(error).__name__}); {_RENEW}"
    if isinstance(error, aws.EndpointConnectionError | aws.ConnectTimeoutError):
        where = s3.endpoint or "AWS S3"
        return f"cannot reach {where}; check s3.endpoint and that the server is up"
    if isinstance(error, aws.ParamValidationError):
        return "no bucket or file can have this name; correct the URL"
    answer = s3_answer(error)
    if answer is not None:
        return _answer_in_words(url, answer)
    if isinstance(error, aws.BotoCoreError):
        # Its text may hold anything; the kind of error says which setting it is.
        return f"AWS's settings on this machine do not work ({type(error).__name__}); check ~/.aws"
    return None


def _answer_in_words(url: str, answer: Answer) -> str:
    if answer.code in _EXPIRED:
        return f"the AWS credentials have expired ({answer.code}); {_RENEW}"
    if answer.code in _DENIED:
        return f"the server refused these credentials ({answer.code}); {_CREDENTIALS_FIX}"
    if answer.code in {"NoSuchBucket", "404"}:
        bucket = url.removeprefix("s3://").partition("/")[0]
        return f"no such bucket: {bucket}; create it or correct the URL"
    if answer.code in {"PermanentRedirect", "AuthorizationHeaderMalformed", "301"}:
        return f"the bucket is in another region ({answer.code}); set s3.region"
    return answer.words
