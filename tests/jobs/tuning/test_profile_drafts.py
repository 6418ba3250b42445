"""Drafts of either kind and look-ups, side by side."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner, Result

import jobs.tuning.profile_draft
import jobs.tuning.profile_drafts
from jobs.cli import app
from jobs.tuning.profile_report import comparison, which_draft
from tests.conftest import TinyModels


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["profile", *map(str, arguments)])


@pytest.fixture
def job(
    tiny_models: TinyModels,
    write_rows: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    for module in (jobs.tuning.profile_draft, jobs.tuning.profile_drafts):
        monkeypatch.setattr(module, "COST_SECONDS", 0.2)
    write_rows("in/prompts.jsonl", [{"prompt": f"say {i} times {i * 7}"} for i in range(8)])
    file = tmp_path / "job.yaml"
    models = {"target": tiny_models.target, "draft": tiny_models.draft}
    values: dict[str, Any] = {
        "input": {"paths": "in", "prompt_column": "prompt"},
        "output": "out",
        "models": models,
        "sampling": {"max_new_tokens": 12, "temperature": 0.8},
        "actors": {"slots": 2},
    }
    file.write_text(yaml.safe_dump(values))
    return file


def test_drafts_of_either_kind_are_compared(
    job: Path, tiny_models: TinyModels, tiny_eagle: str
) -> None:
    names = [tiny_models.target, tiny_eagle]  # the target drafts for itself: all is accepted
    words = [word for name in ["none", *names] for word in ("--draft", name)]
    result = call(job, *words, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert list(found["drafts"]) == names
    target, eagle = found["drafts"].values()
    assert target["acceptance_by_position"][0]["rate"] > 0.9
    assert 0 < eagle["acceptance_by_position"][0]["rate"] < 0.9
    assert all(each["costs"]["verify"] == found["costs"]["verify"] for each in (target, eagle))
    assert found["look_ups"]["tokens_a_round"] >= 1
    assert [at["live"] for at in found["by_live"]] == [1, 2]
    for at, of_target in zip(found["by_live"], target["predictions"], strict=True):
        assert list(at["speedup"]) == ["look-ups", *names]
        assert at["speedup"][names[0]] == of_target["speedup"]["goodput"]
        assert at["none_tokens_per_second"] == pytest.approx(of_target["none_tokens_per_second"])
        low, high = at["interval"][names[1]]
        assert low <= at["speedup"][names[1]] <= high
        best = max(at["speedup"].values())
        if at["use"] == "none":
            assert best < 1.03
        else:
            assert at["speedup"][at["use"]] >= best / 1.02
    assert found["recommendation"]["reasons"] == [*which_draft(found["by_live"])]

    # The same as tables.
    titles = [title for title, _ in comparison(found)]
    assert len(titles) == 4 and titles[0].startswith("P(candidate i is accepted")
    console = Console(width=400, record=True, file=io.StringIO())
    for _, table in comparison(found):
        console.print(table)
    said = console.export_text()
    assert f"step of {names[1]}" in said and "tokens a round" in said
    line = [line for line in said.splitlines() if line.startswith("2 ")][-1]
    low, high = found["by_live"][1]["interval"][names[1]]
    assert f"({low:.2f}-{high:.2f})" in line and line.rstrip().endswith(found["by_live"][1]["use"])


def test_a_job_without_a_draft_is_told_of_look_ups(job: Path) -> None:
    result = call(job, "--set", "models.draft=null", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["drafts"] == {}
    assert {tuple(at["speedup"]) for at in found["by_live"]} == {("look-ups",)}
    result = call(job, "--draft", "none")
    assert result.exit_code == 0, result.output
    assert "What look-ups propose" in result.stdout


def test_an_eagle_draft_alone_is_profiled_like_any(job: Path, tiny_eagle: str) -> None:
    result = call(job, "--set", f"models.draft={tiny_eagle}", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert "fixed 3" in found["predictions"][0]["speedup"] and found["recommendation"]["policy"]


def test_what_cannot_be_loaded_is_one_line(job: Path, tiny_models: TinyModels) -> None:
    result = call(job, "--draft", tiny_models.other_vocabulary)
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert "vocabularies differ" in result.stderr.splitlines()[-1]


def test_look_ups_count_what_repeats(job: Path) -> None:
    """Greedy rows of one prompt repeat each other: most candidates stand."""
    rows = [{"prompt": "say it again"}] * 8
    (job.parent / "in/prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    alone = ("--draft", "none", "--set", "sampling.temperature=0", "--set", "actors.slots=1")
    result = call(job, *alone, "--json")
    assert result.exit_code == 0, result.output
    (at,) = (found := json.loads(result.stdout))["by_live"]
    looked_up = found["look_ups"]
    assert looked_up["acceptance_rate"] > 0.5 and looked_up["tokens_a_round"] > 1.2
    curve = dict(found["costs"]["verify"])
    assert at["none_tokens_per_second"] == pytest.approx(1 / curve[1], rel=1e-6)


def at(live: int, use: str, speed: float) -> dict[str, Any]:
    return {"live": live, "use": use, "speedup": {use: speed}}


@pytest.mark.parametrize(
    ("by_live", "said"),
    [
        (
            [at(1, "a", 2.1), at(2, "a", 1.9), at(4, "b", 1.5), at(8, "none", 1)],
            "Use a (2.10 to 1.90 times the speed of none) up to 2 live rows, then b (1.50 times "
            "the speed of none) up to 4 live rows, then no draft.",
        ),
        ([at(1, "a", 2), at(2, "none", 1)], "Use a (2.00 times the speed of none) up to 1 live "
         "row, then no draft."),
        ([at(1, "a", 2), at(2, "a", 1.5)], "Use a (2.00 to 1.50 times the speed of none)."),
        ([at(1, "none", 1)], "Do not speculate: models.draft: null and policy: none."),
    ],
)  # fmt: skip
def test_which_one_to_use_where(by_live: list[dict[str, Any]], said: str) -> None:
    assert " ".join(which_draft(by_live)) == said
