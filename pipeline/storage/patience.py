"""How long storage is tried, and in what words it fails. Both backends go through here.

This is the one place that tries again: botocore tries once, so that patience does not multiply.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tenacity import (
    RetryError,
    Retrying,
    retry_if_exception,
    stop_before_delay,
    wait_random_exponential,
)

from pipeline.errors import UserError

PATIENCE = 120.0
"""Seconds for which one operation is tried. Longer outlasts longer outages, but a job that cannot
go on says so later. Two minutes cover the restart of a storage server."""

_FIRST_WAIT = 0.2
"""Seconds of which the first wait is a random part; each next wait may be twice as long."""

_LONGEST_WAIT = 10.0
"""Seconds that no wait exceeds. Longer spares a busy server, but notices its return later."""

RESUME = "what is committed is kept, and the same command resumes"

InWords = Callable[[BaseException], str | None]
"""What a backend says of an error and its fix; None if the error is not one of storage."""

T = TypeVar("T")


@contextmanager
def explained(url: str, in_words: InWords) -> Iterator[None]:
    """Turn what storage answers in this block into one line that names `url` and the fix.

    Raises:
        UserError: storage failed. Other errors stay as they are.
    """
    try:
        yield
    except Exception as error:
        words = in_words(error)
        if words is None:
            raise
        raise UserError(f"{url}: {words}") from None


def patiently(
    url: str,
    operation: Callable[[], T],
    *,
    passes: Callable[[BaseException], bool],
    in_words: InWords,
) -> T:
    """Do something again and again while it fails in a way that may pass.

    Args:
        url: what it is about, for messages.
        operation: repeated as a whole.
        passes: whether the operation may succeed after this error if it is tried again.
        in_words: what to say of an error that stays.

    Returns:
        What the operation returned.

    Raises:
        UserError: it cannot succeed, or did not for `PATIENCE` seconds.
    """
    began = time.monotonic()
    attempts = Retrying(
        retry=retry_if_exception(passes),
        stop=stop_before_delay(PATIENCE),
        wait=wait_random_exponential(multiplier=_FIRST_WAIT, max=_LONGEST_WAIT),
    )
    try:
        with explained(url, in_words):
            return attempts(operation)
    except RetryError as error:
        last = error.last_attempt.exception()
        words = in_words(last) if last else None
        seconds, tries = time.monotonic() - began, error.last_attempt.attempt_number
        # Chained to nothing: the causes hold the server's own text.
        raise UserError(
            f"{url}: {words}; gave up after {seconds:.0f} s and {tries} attempts; {RESUME}"
        ) from None
