"""Mistakes in a recipe, each in a line that names the field and the fix."""

from __future__ import annotations

import json
import threading
from datetime import date as Date
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from jobs.cli import app
from jobs.job_file import JobFileError
from jobs.nightly.recipe import Recipe, load_recipe
from jobs.nightly.seeds import Templates, TurnError, pick
from jobs.nightly.status import Status, notify
from pipeline.errors import UserError
from tests.conftest import TinyModels
from tests.jobs.nightly.recipes import small_recipe, write_seeds


@pytest.fixture
def values(tiny_models: TinyModels, tmp_path: Path) -> dict[str, Any]:
    write_seeds(tmp_path, {"a": "one", "b": "two", "c": ""})
    return small_recipe(tiny_models, tmp_path)


def changed(values: dict[str, Any], dotted: str, value: Any) -> dict[str, Any]:
    key, _, rest = dotted.partition(".")
    return {**values, key: changed(values.get(key, {}), rest, value) if rest else value}


MISTAKES = [
    ("seeds.per_nigth", 3, "seeds.per_nigth: unknown key; did you mean 'per_night'?"),
    ("templates", [{"name": "a", "turn": ["x"]}], "did you mean 'turns'?"),
    ("templates", [{"name": "a", "turns": ["{{ x"]}], "not a valid jinja2 template"),
    ("templates", [{"name": "a", "turns": "{{ w }}"}] * 2, "two are called 'a'"),
    ("job.output", "out", "job: output: the recipe makes it each night; remove it"),
    ("job.models.dtype", "int4", "job.models.dtype: input should be"),
    ("filters.regex", {"forbid": "("}, "is not a regular expression"),
    ("filters.language", {"allow": ["English"]}, "is not a language code"),
    ("filters.finish_reason", ["end"], "is not a finish reason"),
    ("filters.duplicates.threshold", 1.5, "filters.duplicates.threshold"),
    ("schedule.cron", "0 1 * *", "is not a schedule"),
    ("schedule.cron", "0 99 * * *", "is not a schedule"),
    ("schedule.timezone", "Mars", "no time zone 'Mars'"),
    ("improve.head", True, "improve.head: a head serves the policies head and goodput"),
]


@pytest.mark.parametrize(("key", "value", "message"), MISTAKES)
def test_mistakes(
    values: dict[str, Any], tmp_path: Path, key: str, value: Any, message: str
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(changed(values, key, value)))
    result = CliRunner().invoke(app, ["nightly", str(file), "--date", "2026-11-20"])
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert message in result.stderr
    assert not (tmp_path / "dataset").exists()


def test_paths_are_relative_to_the_recipe(values: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "sub/recipe.yaml"
    file.parent.mkdir()
    values["seeds"]["paths"] = "../*.jsonl"
    file.write_text(yaml.safe_dump({**values, "output": "out"}))
    recipe = load_recipe(file)
    assert recipe.output == str(tmp_path / "sub/out")
    assert recipe.seeds.paths == (str(tmp_path / "*.jsonl"),)
    assert load_recipe(file, ["seeds.per_night=2"]).seeds.per_night == 2
    with pytest.raises(JobFileError, match="no such job file"):
        load_recipe(tmp_path / "gone.yaml")


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        (["{{ wrod }}"], "has no column 'wrod'; did you mean 'word'?"),
        (["{{ word }}{{ completions[1] }}", "x"], "templates.ask: turn 1: UndefinedError"),
        (["{{ ''.__class__.__mro__ }}{{ word }}"], "templates.ask: turn 1: SecurityError"),
        (["always the same"], "templates: none uses a column of the seeds"),
    ],
)
def test_templates_that_cannot_be_used(
    values: dict[str, Any], turns: list[str], message: str
) -> None:
    values["seeds"] = {"paths": values["seeds"]["paths"]}
    recipe = Recipe.model_validate({**values, "templates": [{"name": "ask", "turns": turns}]})
    with pytest.raises(UserError) as caught:
        pick(recipe, Date(2026, 11, 20), {})
    assert message in str(caught.value)


def test_pick(values: dict[str, Any]) -> None:
    def ids(day: int, used: dict[tuple[str, str], str], **seeds: Any) -> list[str]:
        recipe = Recipe.model_validate({**values, "seeds": {**values["seeds"], **seeds}})
        return [prompt.seed_id for prompt in pick(recipe, Date(2026, 11, day), used).prompts]

    assert ids(1, {}, per_night=None) == ["a", "b", "c"]
    nights = [ids(day, {}, per_night=2) for day in range(1, 9)]
    assert nights == [ids(day, {}, per_night=2) for day in range(1, 9)]
    assert len({tuple(night) for night in nights}) > 1  # the date draws
    assert all(len(set(night)) == 2 for night in nights)
    recipe = Recipe.model_validate(values)
    used = {(p.template, p.seed_id): p.digest for p in pick(recipe, Date(2026, 11, 1), {}).prompts}
    assert ids(1, used, only_new=True) == []
    assert ids(1, {**used, ("ask", "b"): "other"}, only_new=True) == ["b"]


def test_turns(values: dict[str, Any]) -> None:
    turns = ["Say {{ word }} on {{ date }}.", "{{ completions[-1] }} again"]
    template = {"name": "ask", "system": "Be {{ word }}.", "turns": turns}
    recipe = Recipe.model_validate({**values, "templates": [template]})
    templates = Templates(recipe, Date(2026, 11, 20))
    messages = templates.messages("ask", {"word": "kind"}, ["{{ word }}"])
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user"]
    assert [m["content"] for m in messages] == [
        "Be kind.",
        "Say kind on 2026-11-20.",
        "{{ word }}",
        "{{ word }} again",  # what the target says is data, and no template
    ]
    with pytest.raises(TurnError, match="renders to nothing"):
        Templates(
            Recipe.model_validate({**values, "templates": [{"name": "t", "turns": "{{ word }}"}]}),
            Date(2026, 11, 20),
        ).messages("t", {"word": " "}, [])


def test_the_webhook_is_told(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, Any]] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HOOK", f"http://127.0.0.1:{server.server_port}/secret")
    recipe = Recipe.model_validate({**values, "webhook": "env:HOOK"})
    status = Status("small")
    status.record_night("2026-11-20", "failed", "no seeds")
    status.close()
    assert notify(recipe, status) is None
    assert told[0]["text"] == "specbatch nightly small: failed: 2026-11-20: no seeds"
    fine = Status("small")
    fine.record_night("2026-11-20", "published", "2 rows")
    fine.close()
    assert notify(recipe, fine) is None
    assert len(told) == 1
    server.shutdown()
    server.server_close()
    failure = notify(recipe, status)
    assert failure is not None
    assert "secret" not in failure
    monkeypatch.delenv("HOOK")
    assert notify(recipe, status) == "webhook: the environment variable HOOK is not set"
