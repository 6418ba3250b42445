"""What the names of a glob's files are relative to; the rest is tested on both backends."""

from __future__ import annotations

import pytest

from pipeline.storage.search import glob_base


@pytest.mark.parametrize(
    ("glob", "base"),
    [
        ("/in/*.jsonl", "/in/"),
        ("/in/day-*/a[1]/x.jsonl", "/in/"),
        ("/*.jsonl", "/"),
        ("a//*/x", "a//"),
        ("*/x", ""),
    ],
)
def test_names_are_relative_to_what_is_above_the_first_wildcard(glob: str, base: str) -> None:
    assert glob_base(glob) == base
