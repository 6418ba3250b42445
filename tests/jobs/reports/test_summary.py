from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType

from jobs import explain
from jobs.reports.summary import read_summary, render
from pipeline import layout
from pipeline.commit.stats import summarise
from pipeline.config.job import S3Config


def printed(what: RenderableType, *, color: bool = False) -> str:
    file = io.StringIO()
    Console(file=file, width=160, force_terminal=color, legacy_windows=False).print(what)
    return file.getvalue()


def summary(**changes: Any) -> dict[str, Any]:
    return {**summarise([]), "drafted": 9, **changes}


def calibration(by: str, name: str) -> dict[str, Any]:
    return {"by": by, "name": name, "judged": 10, "predicted": 0.5, "accepted": 0.25, "ece": 0.25}


def test_speedup_with_its_interval() -> None:
    found = {"speedup": 1.21, "speedup_ci": [1.15, 1.27], "speedup_controls": 40}
    text = printed(render(summary(**found)))
    assert "1.21x (95% CI 1.15-1.27, 40 control rounds)" in text
    assert "policy goodput" not in text


def test_speculation_that_loses_says_what_to_do() -> None:
    found = {"speedup": 0.8, "speedup_ci": [0.7, 0.9], "speedup_controls": 40}
    text = printed(render(summary(**found)), color=True)
    assert "\x1b[33m0.80x" in text
    assert "try policy goodput or none" in text
    unclear = {**found, "speedup_ci": [0.7, 1.1]}
    assert "slower" not in printed(render(summary(**unclear)))


def test_speedup_that_was_not_measured() -> None:
    assert "too few control rounds" in printed(render(summary()))
    assert "control rounds" not in printed(render(summary(drafted=0)))


def test_choices_of_the_draft_are_told_where_candidates_branch() -> None:
    node = {"depth": 1, "rank": 0, "drafted": 9, "verified": 9, "judged": 8, "accepted": 6}
    nodes = [node, node | {"depth": 2}, node | {"rank": 1, "judged": 4, "accepted": 1}]
    text = printed(render(summary(nodes=nodes)))
    assert "first choices" in text and "75.0% of 16" in text
    assert "second choices" in text and "25.0% of 4" in text
    assert "choices" not in printed(render(summary()))


def test_candidates_that_were_looked_up_are_told_by_where_they_were_found() -> None:
    found = {"verified_in_prompt": 1000, "accepted_in_prompt": 700, "verified_in_rows": 0}
    text = printed(render(summary(**found)))
    assert "found in its prompt's texts" in text and "70.0% of 1,000" in text
    assert "other rows" not in text
    assert "found in" not in printed(render(summary()))


def test_calibration_table() -> None:
    rows = [calibration("all", ""), calibration("input", "[red]a"), calibration("context", "128")]
    text = printed(render(summary(calibration=rows)))
    assert "context ≤ 128" in text
    # The only input is all of them.
    assert "[red]a" not in text
    inputs = [calibration("input", f"[red]{i}.parquet") for i in range(12)]
    text = printed(render(summary(calibration=[calibration("all", ""), *inputs])))
    assert "[red]9.parquet" in text
    assert "[red]10.parquet" not in text
    assert "2 more inputs: stats/calibration.parquet" in text


def test_a_head_that_was_given_up_is_reported() -> None:
    assert "out of calibration" in printed(render(summary(actors_fell_back=1)))
    assert "out of calibration" not in printed(render(summary()))


def test_a_summary_of_an_older_version(tmp_path: Path) -> None:
    new = {"speedup_controls", "calibration", "actors_fell_back"}
    old = {k: v for k, v in summary(rows=3).items() if k not in new}
    for name, text in (
        (layout.JOB, "{}"),
        (layout.SUCCESS, ""),
        (layout.MANIFEST, json.dumps({"summary": old})),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found, finished = read_summary(str(tmp_path), S3Config())
    assert finished
    assert found["rows"] == 3
    assert found["calibration"] == []
    assert "rows completed" in printed(render(found))


def test_the_sampling_that_was_in_force_and_where_it_is_from(tmp_path: Path) -> None:
    record = {
        "config": {"sampling": {"temperature": 0.6, "top_p": 0.5, "top_k": 0, "stop": ["x"]}},
        "sampling_from": {"temperature": "model", "top_p": "job", "top_k": "default"},
    }
    (tmp_path / layout.JOB).parent.mkdir()
    (tmp_path / layout.JOB).write_text(json.dumps(record))
    found, _ = read_summary(str(tmp_path), S3Config())
    assert found["sampling"]["temperature"] == {"value": 0.6, "from": "model"}
    assert set(found["sampling"]) == set(record["sampling_from"])
    text = printed(render(found))
    for line in ("top_p 0.5 (the job)", "temperature 0.6 (the target's", "top_k 0 (defaults)"):
        assert line in text


# ----------------------------------------------------------------------- explain


def a_round(**changes: Any) -> dict[str, Any]:
    return {
        "round": 0,
        "context": 20,
        "live": 4,
        "texts": [" a", "b", "c", "d"],
        "predicted": [0.9, 0.5, 0.2, 0.1],
        "submitted": 3,
        "accepted": 1,
        "reason": "enough",
        **changes,
    }


def test_accepted_rejected_and_others_are_told_apart() -> None:
    text = printed(explain.render([a_round()]), color=True)
    assert "\x1b[32m a\x1b[0m|\x1b[31mb\x1b[0m|\x1b[2mc\x1b[0m|\x1b[2md" in text
    plain = printed(explain.render([a_round()]))
    for part in (" a|b|c|d", "1 of 3", "0.90 0.50 0.20 0.10", "enough"):
        assert part in plain


def test_a_tree_is_drawn_with_its_path_green_and_what_fell_red() -> None:
    """Of a b after the root b stands, and of c d after b none; d was not submitted."""
    tree = {"parents": [-1, -1, 1, 1, 0], "kept": [0, 1, 2], "path": [1], "texts": [*"abcde"]}
    plain = printed(explain.render([a_round(**tree)]))
    for part in ("│ a  ", "│ └── e", "│ b  ", "│ ├── c", "│ └── d"):
        assert part in plain
    text = printed(explain.render([a_round(**tree)]), color=True)
    for style, tokens in {32: "b", 31: "ac", 2: "de"}.items():
        for token in tokens:
            assert re.search(rf"\x1b\[{style}m{token} *\x1b\[0m", text)


@pytest.mark.parametrize("accepted", [0, 1])
def test_what_a_model_says_is_text(accepted: int) -> None:
    planted = ["\x1b[2J", "[red]x[/]", "\x1b]0;title\x07", "\u202eabc", "a\nb"]
    text = printed(explain.render([a_round(texts=planted, accepted=accepted, reason="[bold]r")]))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "\u202e" not in text
    for part in (r"\x1b[2J", "[red]x[/]", r"\u202eabc", r"a\nb", "[bold]r"):
        assert part in text
