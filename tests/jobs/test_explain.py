"""Rounds of a row as `specbatch explain` shows them."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from jobs.explain import render


def shown(**changes: Any) -> str:
    one = {
        "round": 0,
        "context": 9,
        "live": 2,
        "texts": ["a", "b", "c", "d"],
        "predicted": [],
        "submitted": 4,
        "accepted": 1,
        "reason": "no more",
    }
    console = Console(width=150)
    with console.capture() as capture:
        console.print(render([{**one, **changes}]))
    return capture.get()


def test_candidates_are_told_by_where_they_come_from() -> None:
    assert "1 forced, 2 prompt, 1 draft" in shown(sources=["forced", "prompt", "prompt"])
    assert "draft" not in shown(sources=[])  # all are, and the column is left out
    assert "draft" not in shown()  # a job of an earlier version
    assert "draft" not in shown(texts=[], submitted=0, accepted=0)
