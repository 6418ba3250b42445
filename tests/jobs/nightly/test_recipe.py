"""Mistakes in a recipe, each in a line that names the field and the fix."""

from __future__ import annotations

import json
import re
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
from jobs.nightly.expressions import TurnError
from jobs.nightly.recipe import Recipe, load_recipe
from jobs.nightly.seeds import Templates, pick
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


def turn(*properties: str, name: str = "t", **more: Any) -> dict[str, Any]:
    """A template of one turn with a schema of these properties, texts."""
    schema = {"type": "object", "properties": {each: {"type": "string"} for each in properties}}
    asked = {"text": "{{ word }}", "structured_outputs": {"json_schema": schema}}
    return {"name": name, "turns": [asked | more]}


WHOLE = {"json_schema": {"type": "object", "properties": {"a": {"type": "integer"}}}}
FREE = {"max_new_tokens": 5}
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
    ("improve.kind", "eagle", "improve.kind: input should be 'model' or 'eagle3'"),
    (
        "templates",
        [{"name": "t", "turns": [{"text": "{{ word }}", "structured_outputs": {"regex": "("}}]}],
        "templates.0.turns.0.structured_outputs: cannot be compiled",
    ),
    ("templates", [turn("a", colum="b")], "turns.0.colum: unknown key; did you mean 'column'?"),
    ("templates", [turn("Messages")], "templates.t: turn 1: 'Messages' is a column that the"),
    ("templates", [turn("a", column="night")], "turn 1: 'night' is a column that the"),
    (
        "templates",
        [{"name": "t", "turns": turn("a")["turns"] * 2}],
        "turn 2: 'a' is in turn 1, too",
    ),
    (
        "templates",
        [turn("a"), turn(name="u", structured_outputs=WHOLE)],
        "templates.u: turn 1: 'a' is int64, and string in template t; give one another name",
    ),
    ("judge", {}, "judge.rubric: required, but not given"),
    ("judge", {"rubric": "{% if %}"}, "judge.rubric: is not a valid jinja2 template"),
    ("judge", {"rubric": "x", "score": "a +"}, "judge.score: is not a valid jinja2 expression"),
    (
        "judge",
        {"rubric": "x", "score": "points"},
        "judge: score: of an answer such as {'score': 1}",
    ),
    ("judge", {"rubric": "x", "treshold": 3}, "judge.treshold: unknown key; did you mean"),
    ("judge", {"rubric": "x", "sampling": FREE}, "judge: sampling.structured_outputs: say what"),
    (
        "judge",
        {"rubric": "x", "sampling": {"n": 2, "structured_outputs": WHOLE}},
        "judge: sampling.n",
    ),
    (
        "judge",
        {"rubric": "x", "models": {"target": "m"}, "speculation": {"policy": "fixed"}},
        "judge: speculation.policy fixed needs models.draft",
    ),
    ("select", {"by": "score", "keep": 0}, "select.keep"),
    ("select", {"by": "scores"}, "select.by: there is no 'scores' in it; known: logprob, score"),
    (
        "select",
        {"by": "logprob"},
        "select.keep: 1 of 1 samples leaves none out; raise job.sampling",
    ),
]

SELECTIONS = [
    ({}, "score", "select.by: score is a judge's; add the section judge"),
    ({}, "parsed[0].b", "select.by: of template t: UndefinedError: "),
    ({}, "completions[0]", "it gives '(a completion)', which is no number"),
    ({"judge": {"rubric": "x"}}, "judgement.score + parsed[0].a | length", None),
]


@pytest.mark.parametrize(("more", "by", "message"), SELECTIONS)
def test_what_samples_are_selected_by(
    values: dict[str, Any], more: dict[str, Any], by: str, message: str | None
) -> None:
    job = changed(values["job"], "sampling.n", 3)
    values = {**values, **more, "job": job, "templates": [turn("a")], "select": {"by": by}}
    if message is None:
        Recipe.model_validate(values)
        return
    with pytest.raises(ValueError, match=re.escape(message)):
        Recipe.model_validate(values)


def test_the_mark_of_a_recipe_of_texts_stays(values: dict[str, Any]) -> None:
    """A night that an earlier version began goes on."""
    recipe = Recipe.model_validate(values)
    plain = recipe.model_dump(mode="json", include={"templates"})
    assert [*plain["templates"][0]] == ["name", "system", "turns"]
    assert recipe.templates[0].mark()["turns"] == ["Say {{ word }}."]
    marks = {recipe.mark}
    for change in ({"judge": {"rubric": "x"}}, {"templates": [turn("a")]}):
        marks.add(Recipe.model_validate({**values, **change}).mark)
    assert len(marks) == 3


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


@pytest.mark.parametrize("name", ["recipe.yaml", "quiz.yaml"])
def test_the_examples_can_be_made(name: str) -> None:
    recipe = load_recipe(Path(__file__).parents[3] / "examples/nightly" / name)
    assert pick(recipe, Date(2026, 11, 20), {}).seeds == recipe.seeds.per_night


def test_paths_are_relative_to_the_recipe(values: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "sub/recipe.yaml"
    file.parent.mkdir()
    values["seeds"]["paths"] = "../*.jsonl"
    values["judge"] = {"rubric": "x", "models": {"target": "./judge", "draft": "./draft"}}
    file.write_text(yaml.safe_dump({**values, "output": "out"}))
    recipe = load_recipe(file)
    assert recipe.output == str(tmp_path / "sub/out")
    assert recipe.seeds.paths == (str(tmp_path / "*.jsonl"),)
    assert recipe.judge is not None
    assert recipe.judge.job(recipe.job).models.target == str(tmp_path / "sub/judge")
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
        ([*turn("a")["turns"], "{{ parsed[0].b }}"], "templates.ask: turn 2: UndefinedError"),
    ],
)
def test_templates_that_cannot_be_used(
    values: dict[str, Any], turns: list[Any], message: str
) -> None:
    values["seeds"] = {"paths": values["seeds"]["paths"]}
    recipe = Recipe.model_validate({**values, "templates": [{"name": "ask", "turns": turns}]})
    with pytest.raises(UserError) as caught:
        pick(recipe, Date(2026, 11, 20), {})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("rubric", "message"),
    [
        ("{{ wrod }}", "judge.rubric: "),
        ("{{ messages[4].content }}", "judge.rubric: of template t: UndefinedError"),
        ("{{ parsed[0].b }}", "judge.rubric: of template t: UndefinedError"),
        ("{{ parsed[0].a }} {{ messages[1].content }} {{ word }} {{ date }}", None),
    ],
)
def test_rubrics_are_tried(values: dict[str, Any], rubric: str, message: str | None) -> None:
    values = {**values, "templates": [turn("a")], "judge": {"rubric": rubric}}
    recipe = Recipe.model_validate(values)
    if message is None:
        assert len(pick(recipe, Date(2026, 11, 20), {}).prompts) == 3
        return
    with pytest.raises(UserError, match=re.escape(message)):
        pick(recipe, Date(2026, 11, 20), {})


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
    data = Templates(
        Recipe.model_validate(
            {**values, "templates": [{**template, "turns": ["x", "{{ parsed }}"]}]}
        ),
        Date(2026, 11, 20),
    )
    said = data.messages("ask", {"word": "kind"}, ["{}"], [{"a": 1}])
    assert said[3]["content"] == "[{'a': 1}]"
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
