"""A whole night with structured turns, a judge and the best of several samples, by tiny models."""

from __future__ import annotations

import json
import threading
from collections import Counter
from datetime import date as Date
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.nightly.archive import Archive, Step
from jobs.nightly.nights import Hooks, run_nights
from jobs.nightly.recipe import Recipe
from pipeline.config.job import S3Config
from pipeline.observe.progress import JobProgress
from pipeline.outputs.verify import verify
from tests.conftest import TinyModels
from tests.jobs.command_line import call
from tests.jobs.nightly.recipes import rows_of, small_recipe, write_seeds

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]

WORDS = {f"w{i}": f"word number {i}" for i in range(6)}


def schema(**properties: Any) -> dict[str, Any]:
    asked = {"type": "object", "properties": properties, "required": [*properties]}
    return {"json_schema": {**asked, "additionalProperties": False}}


POINTS = schema(score={"type": "integer", "minimum": 1, "maximum": 3})
PLACE = schema(kind={"enum": ["up", "down"]}, level={"type": "integer", "minimum": 0, "maximum": 9})


def judged(models: TinyModels, root: Path) -> dict[str, Any]:
    values = small_recipe(
        models,
        root,
        templates=[
            {
                "name": "place",
                "turns": [
                    {"text": "Where is {{ word }}?", "structured_outputs": PLACE},
                    {"text": "{{ parsed[0].kind }}: why {{ parsed[0].level }}?", "column": "why"},
                ],
            },
            {"name": "ask", "turns": ["Say {{ word }}."]},
        ],
        judge={
            "rubric": "{{ word }}: {{ messages[-1].content }}. Points?",
            "threshold": 2,
            "sampling": {"max_new_tokens": 24, "temperature": 1, "structured_outputs": POINTS},
        },
        select={"by": "score + logprob / 1000", "keep": 1},
    )
    values["job"]["sampling"] = {"max_new_tokens": 40, "n": 3}
    return values


@pytest.mark.slow
def test_a_night_with_schemas_a_judge_and_a_selection(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    """Stopped while it is judged, then made; all that is gone is counted, nothing is twice."""
    write_seeds(tmp_path, WORDS)
    values = judged(tiny_models, tmp_path)
    recipe = Recipe.model_validate(values)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(values))
    checked = call("nightly", "validate", file, "--date", "2026-11-20")
    assert checked.exit_code == 0, checked.output
    assert "turn 1: 36 completions (place as json_schema)" in checked.stdout
    assert not (tmp_path / "dataset").exists()

    stop = threading.Event()
    steps: list[Step] = []

    def begun(progress: JobProgress) -> None:
        stop.set()

    def on_turn(step: Step) -> Any:
        steps.append(step)
        return begun if step == "judge" else None

    def make(hooks: Hooks | None = None) -> str:
        return run_nights(recipe, lambda archive: [Date(2026, 11, 20)], hooks).state

    assert make(Hooks(on_turn=on_turn, stop=stop)) == "stopped"
    assert steps == [1, 2, "judge"]
    assert make() == "published"
    assert make() == "unchanged"

    night = Archive.of(recipe).night("2026-11-20")
    assert night is not None
    removed = {each["name"]: each["removed"] for each in night.filters}
    assert [*removed] == [
        "refusal",
        "schema",
        "judge",
        "exact duplicate",
        "near duplicate",
        "select",
    ]
    assert removed["judge"] > 0
    assert removed["select"] > 0
    gone = sum(removed.values()) + sum(night.lost.values())
    assert night.conversations == 36 == night.total_rows + gone
    assert night.judge["judged"] == 36 - removed["schema"] - sum(night.lost.values())
    assert 1 <= night.judge["mean_score"] <= 3
    assert night.summary["rows"] == 36 + 18 - removed["schema"] - sum(night.lost.values())
    assert night.cost is not None

    rows = rows_of(recipe)
    assert max(Counter((row["seed_id"], row["template"]) for row in rows).values()) == 1
    for row in rows:
        assert json.loads(row["judgement"]) == {"score": row["score"]}
        assert row["score"] >= 2
        assert row["logprob"] < 0
        said = [message["content"] for message in row["messages"]]
        if row["template"] == "ask":
            assert (row["kind"], row["level"], row["why"]) == (None, None, None)
        else:
            assert json.loads(said[1]) == {"kind": row["kind"], "level": row["level"]}
            assert said[2] == f"{row['kind']}: why {row['level']}?"
            assert said[3] == row["why"]
    assert {row["template"] for row in rows} == {"ask", "place"}

    for step in ("turn-1", "turn-2", "judge"):
        output = Path(recipe.output, f"_nightly/work/2026-11-20-{recipe.mark}/{step}")
        assert not verify(str(output), S3Config()).problems
    card = (tmp_path / "dataset/README.md").read_text()
    assert f"| judge | {removed['judge']} |" in card
    assert "turn 1 (json_schema): Where is {{ word }}?" in card
    assert "| `level` | int64 | of a structured turn |" in card
    report = (tmp_path / "dataset/_nightly/reports/2026-11-20.md").read_text()
    assert "## Judge" in report
    assert f"| select | {removed['select']} |" in report
