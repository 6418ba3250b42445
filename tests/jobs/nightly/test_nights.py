"""Whole nights with tiny models, in this process."""

from __future__ import annotations

import json
import threading
from collections import Counter
from datetime import date as Date
from pathlib import Path

import pytest
import yaml

from jobs.nightly.archive import Archive
from jobs.nightly.conversations import Generated
from jobs.nightly.nights import Hooks, run_nights
from jobs.nightly.recipe import Recipe
from jobs.nightly.status import Status
from jobs.reports.summary import read_summary
from pipeline.config.job import S3Config
from pipeline.errors import BudgetReached, TooManyErrors, UserError
from pipeline.observe.progress import JobProgress
from tests.conftest import S3Server, TinyModels
from tests.jobs.command_line import call
from tests.jobs.nightly.recipes import rows_of, small_recipe, write_seeds

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]

WORDS = {f"w{i:02d}": f"word number {i}" for i in range(20)}


def make(recipe: Recipe, *days: int, hooks: Hooks | None = None) -> Status:
    return run_nights(recipe, lambda archive: [Date(2026, 11, day) for day in days], hooks)


@pytest.mark.slow
def test_nights_of_new_seeds(tiny_models: TinyModels, tmp_path: Path) -> None:
    """Two turns, a stop in the middle, a failure, a back-fill; no row twice, everything counted."""
    write_seeds(tmp_path, WORDS)
    seeds = {"paths": [str(tmp_path / "seeds.jsonl")], "id_column": "id", "per_night": 6}
    values = small_recipe(
        tiny_models,
        tmp_path,
        seeds={**seeds, "only_new": True, "keep_columns": ["word"]},
        templates=[
            {"name": "ask", "system": "Be brief.", "turns": ["Say {{ word }}."]},
            {"name": "twice", "turns": ["Say {{ word }}.", "You said {{ completions[0] }}: why?"]},
        ],
    )
    values["job"]["sampling"]["n"] = 2
    recipe = Recipe.model_validate(values)
    archive = Archive.of(recipe)

    stop = threading.Event()

    def begun(progress: JobProgress) -> None:
        stop.set()

    stopped = make(recipe, 20, hooks=Hooks(on_turn=lambda turn: begun, stop=stop))
    assert stopped.state == "stopped"
    assert archive.dates() == []
    # What a stopped night uses is settled, whatever becomes of the seeds meanwhile.
    write_seeds(tmp_path, {"new": "a new one", **WORDS})
    assert make(recipe, 20).state == "published"
    first = archive.night("2026-11-20")
    assert first is not None
    assert (first.seeds, first.conversations, first.lost) == (6, 24, {})
    assert first.total_rows == 24
    assert first.summary["rows"] == 36  # twelve conversations have two turns
    assert {row["seed_id"] for row in rows_of(recipe)} == {f"w{i:02d}" for i in range(6)}
    work = Path(recipe.output, f"_nightly/work/2026-11-20-{recipe.mark}")
    ledgers = [read_summary(str(work / f"turn-{n}"), S3Config())[0]["cost"] for n in (1, 2)]
    held = sum(ledger["seconds_held"] for ledger in ledgers)
    assert first.cost == pytest.approx(held / 3600 * 3.6)  # the run that was stopped is in it

    again = make(recipe, 20)
    assert again.state == "unchanged"

    # A night that fails leaves everything as it was, and does not keep the next from being made.
    before = (tmp_path / "dataset/README.md").read_bytes()
    broken = Recipe.model_validate(
        {
            **values,
            "job": {
                **values["job"],
                "models": {"target": tiny_models.target, "draft": tiny_models.other_vocabulary},
            },
        }
    )
    failed = make(broken, 21)
    assert failed.state == "failed"
    assert "vocabular" in failed.message
    assert (tmp_path / "dataset/README.md").read_bytes() == before
    assert json.loads((tmp_path / "dataset/_nightly/status.json").read_text())["state"] == "failed"

    assert make(recipe, 22).state == "published"
    assert make(recipe, 19).state == "published"
    used = [(r["seed_id"], r["sample"]) for r in rows_of(recipe) if r["template"] == "ask"]
    assert len(used) == len(set(used)) == 36

    write_seeds(tmp_path, {"new": "a new one", **WORDS, "w03": "another word"})
    assert make(recipe, 23).state == "published"
    rows = rows_of(recipe)
    assert {r["seed_id"] for r in rows if r["night"] == "2026-11-23"} == {
        "w03",
        "w17",
        "w18",
        "w19",
    }
    assert len({row["id"] for row in rows}) == len(rows) == 24 * 3 + 16
    nothing_left = make(recipe, 24)
    assert nothing_left.state == "published"
    assert archive.night("2026-11-24").total_rows == 0  # type: ignore[union-attr]

    two = next(r for r in rows if r["template"] == "twice")
    assert [m["role"] for m in two["messages"]] == ["user", "assistant"] * 2
    assert two["messages"][1]["content"] in two["messages"][2]["content"]
    assert two["word"] == WORDS[two["seed_id"]]
    one = next(r for r in rows if r["template"] == "ask")
    assert [m["role"] for m in one["messages"]] == ["system", "user", "assistant"]

    import datasets

    loaded = datasets.load_dataset(str(tmp_path / "dataset"), cache_dir=str(tmp_path / "cache"))
    assert sum(part.num_rows for part in loaded.values()) == len(rows)
    assert set(loaded) == {"train", "validation"}
    assert not set(loaded["train"]["seed_id"]) & set(loaded["validation"]["seed_id"])

    card = (tmp_path / "dataset/README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    listed = [path for files in front["configs"][0]["data_files"] for path in files["path"]]
    there = {
        str(p.relative_to(recipe.output)) for p in Path(recipe.output, "data").rglob("*.parquet")
    }
    assert set(listed) == there
    assert "| 2026-11-22 | 6 | 24 |" in card


@pytest.mark.slow
def test_the_same_conversation_is_not_published_twice(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    """Greedy completions of the same seeds: the second night has nothing new."""
    write_seeds(tmp_path, {"a": "one", "b": "two", "c": "ONE"})
    values = small_recipe(tiny_models, tmp_path, seeds={"paths": [str(tmp_path / "seeds.jsonl")]})
    values["job"]["sampling"] = {"max_new_tokens": 8, "temperature": 0}
    recipe = Recipe.model_validate(values)
    make(recipe, 20)
    # An index that is lost, or of other settings, is made anew from what is published.
    for file in Path(recipe.output, "_nightly/index").iterdir():
        file.unlink()
    make(recipe, 21)
    archive = Archive.of(recipe)
    first, second = archive.night("2026-11-20"), archive.night("2026-11-21")
    assert first is not None
    assert second is not None
    assert first.total_rows >= 2
    assert second.total_rows == 0
    removed = {each["name"]: each["removed"] for each in second.filters}
    assert removed["exact duplicate"] == 3


@pytest.mark.slow
def test_seeds_that_another_night_used_meanwhile(tiny_models: TinyModels, tmp_path: Path) -> None:
    write_seeds(tmp_path, {"a": "one", "b": "two"})
    values = small_recipe(tiny_models, tmp_path)
    recipe = Recipe.model_validate({**values, "seeds": {**values["seeds"], "only_new": True}})
    stop = threading.Event()
    stop.set()
    assert make(recipe, 20, hooks=Hooks(stop=stop)).state == "stopped"
    write_seeds(tmp_path, {"b": "two", "c": "three"})
    make(recipe, 21)
    make(recipe, 20)
    assert sorted((r["night"][-2:], r["seed_id"]) for r in rows_of(recipe)) == [
        ("20", "a"),
        ("21", "b"),
        ("21", "c"),
    ]
    late = Archive.of(recipe).night("2026-11-20")
    assert late is not None
    assert late.seeds_skipped == {"used by another night meanwhile": 1}


@pytest.mark.slow
@pytest.mark.s3
def test_a_night_on_s3(tiny_models: TinyModels, tmp_path: Path, s3_env: S3Server) -> None:
    s3_env.client().create_bucket(Bucket="nights")
    write_seeds(tmp_path, {"a": "one", "b": "two"})
    values = small_recipe(tiny_models, tmp_path, output="s3://nights/small")
    values["job"]["s3"] = {"endpoint": s3_env.endpoint}
    recipe = Recipe.model_validate(values)
    assert make(recipe, 20).state == "published"
    assert make(recipe, 20).state == "unchanged"
    archive = Archive.of(recipe)
    night = archive.night("2026-11-20")
    assert night is not None
    assert [archive.table(file["name"]).num_rows for file in night.files] == [
        file["rows"] for file in night.files
    ]
    assert night.total_rows == 2
    assert "2026-11-20" in (archive.folder.read("README.md") or b"").decode()


def test_a_night_that_loses_too_many_conversations_fails_and_one_of_other_columns(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    write_seeds(tmp_path, {"a": "one", "b": "long " * 100, "c": "longer " * 100})
    recipe = small_recipe(tiny_models, tmp_path)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    command = ["nightly", file, "--date", "2026-11-20", "--quiet"]
    assert call(*command).exit_code == 4
    status = json.loads((tmp_path / "dataset/_nightly/status.json").read_text())
    assert status["state"] == "failed"
    lost = "2 of 3 conversations could not be completed, more than job.max_error_share (0.5). "
    assert f"2026-11-20: {lost}Most often it is PromptTooLong (2), as in row " in status["message"]

    made = call(*command, "--set", "job.max_error_share=0.9")
    assert made.exit_code == 0, made.output
    night = Archive.of(Recipe.model_validate(recipe)).night("2026-11-20")
    assert night is not None
    assert (night.conversations, night.lost, night.total_rows) == (3, {"PromptTooLong": 2}, 1)
    told = json.loads((tmp_path / "dataset/_nightly/status.json").read_text())["nights"]
    assert told["2026-11-20"]["message"] == "1 rows of 3 conversations (gone: PromptTooLong 2)"

    recipe["seeds"] = {**recipe["seeds"], "keep_columns": ["word"]}
    refused = make(Recipe.model_validate(recipe), 21)
    assert refused.state == "failed"
    assert "column 'word' is not there in the night of 2026-11-20" in refused.message


def test_a_night_of_which_templates_lose_everything_is_not_published(
    tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then no step is left that would count."""
    write_seeds(tmp_path, {"a": "one", "b": "two"})
    recipe = Recipe.model_validate(small_recipe(tiny_models, tmp_path))
    nothing = Generated([], 2, Counter(TemplateError=2), [], [])
    monkeypatch.setattr("jobs.nightly.night.generate", lambda *_, **__: nothing)
    status = make(recipe, 20)
    assert (status.state, status.end) == ("failed", "errors")
    assert "2 of 2 conversations could not be completed" in status.message
    assert "TemplateError: 2" in status.message
    assert not Archive.of(recipe).nights()


@pytest.mark.parametrize(
    ("errors", "end"),
    [
        ([BudgetReached("x")], "budget"),
        ([TooManyErrors("x"), TooManyErrors("y")], "errors"),
        ([TooManyErrors("x"), RuntimeError("y")], None),
        ([UserError("x")], None),
    ],
)
def test_nights_that_no_retry_can_mend_are_told_apart(
    errors: list[Exception], end: str | None
) -> None:
    status = Status("small")
    status.record_night("2026-11-01", "published", "fine")
    for day, error in enumerate(errors):
        status.record_night(f"2026-11-1{day}", "failed", "no", error)
    status.close()
    assert (status.state, status.end) == ("failed", end)


def test_another_run_is_at_work(tiny_models: TinyModels, tmp_path: Path) -> None:
    from jobs.nightly.lock import locked

    write_seeds(tmp_path, {"a": "one"})
    recipe = Recipe.model_validate(small_recipe(tiny_models, tmp_path))
    with (
        locked(Archive.of(recipe).folder, 60),
        pytest.raises(UserError, match="another run is at work"),
    ):
        make(recipe, 20)
