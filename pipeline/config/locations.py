"""Paths and URLs as users write them; what the code knows of are paths and s3:// URLs."""

from __future__ import annotations

import re
from typing import Annotated
from urllib.parse import unquote

from pydantic import AfterValidator

from pipeline.config.section import StringList, no_null_byte

_S3 = re.compile(r"s3[an]?://", re.IGNORECASE)
_FILE = re.compile(r"file:(?://([^/]*)(?=/|$)|(?=/(?!/)))", re.IGNORECASE)

# Before the bucket; a password may hold slashes. Names of access points have colons, too.
_PASSWORD = re.compile(r"[^/]*@|(?!arn:)[^/]*:.*@")

_URL = re.compile(r"[a-z][a-z0-9+.-]*://|file:/", re.IGNORECASE)


def is_url(text: str) -> bool:
    """Whether this is a URL rather than a path, which may be relative to some folder."""
    return _URL.match(text) is not None


def plain_location(url: str) -> str:
    """A `file:` URL as a path, `s3a://` and `s3n://` as `s3://`; all else as it is.

    A `file:` URL is decoded (`%20` is a space), as URLs are. Keys on S3 are taken as they stand.

    Raises:
        ValueError: a `file:` URL of another machine; or one of S3 with what may be a password.

    >>> plain_location("file:///data/a%20b.jsonl"), plain_location("s3a://bucket/a%20b")
    ('/data/a b.jsonl', 's3://bucket/a%20b')
    """
    if found := _S3.match(url):
        place = url[found.end() :]
        if _PASSWORD.match(place):  # others read job files: in Ray's dashboard, or as a ConfigMap
            raise ValueError(
                f"s3://...@{place.rpartition('@')[2]}: a URL must not hold a user name or "
                "password; use the AWS environment"
            )
        return f"s3://{place}"
    if found := _FILE.match(url):
        host = (found[1] or "").rpartition("@")[2]  # never what may be a password
        if host not in {"", "localhost"}:
            raise ValueError(
                f"file://{host}/ is on another machine; write file:///PATH, or the plain path"
            )
        return unquote(url[found.end() :])
    return url


def _each_plain(urls: tuple[str, ...]) -> tuple[str, ...]:
    if not all(urls):
        raise ValueError("holds an empty path")
    return tuple(plain_location(no_null_byte(url)) for url in urls)


Location = Annotated[str, AfterValidator(no_null_byte), AfterValidator(plain_location)]
"""A path or URL that a user wrote, in the form that `plain_location` gives it."""

Locations = Annotated[StringList, AfterValidator(_each_plain)]
"""A list of them; a single string is a list of one."""
