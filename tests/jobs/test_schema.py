"""What a job file may say is the same for `specbatch validate` and for an editor."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator, FormatChecker
from pydantic import BaseModel
from typer.testing import CliRunner

from jobs.cli import app
from jobs.job_file import load_job
from jobs.schema import job_schema, recipe_schema
from pipeline.config.section import Section
from tests.jobs.test_job_file import GOOD

ROOT = Path(__file__).parents[2]
JOB, RECIPE = (
    Draft202012Validator(schema, format_checker=FormatChecker())
    for schema in (job_schema(), recipe_schema())
)


def plain(text: str) -> Any:
    """YAML as an editor reads it: a date is a string."""
    return json.loads(json.dumps(yaml.safe_load(text), default=str))


def mistakes(validator: Draft202012Validator, value: Any) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(value)]


def yaml_blocks() -> Iterator[tuple[str, Any]]:
    """The YAML in the documentation, each block with where it stands."""
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        text = page.read_text(encoding="utf-8")
        for block in re.finditer(r"^```yaml\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            line = text[: block.start()].count("\n") + 1
            yield f"{page.relative_to(ROOT)}:{line}", plain(block.group(1))


def test_the_command_prints_a_valid_schema() -> None:
    for arguments in (["schema"], ["schema", "--nightly"]):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0
        schema = json.loads(result.stdout)
        assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
        Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize("schema", [job_schema(), recipe_schema()], ids=["job", "recipe"])
def test_every_key_is_described_and_no_other_is_taken(schema: dict[str, Any]) -> None:
    for name, section in {"file": schema, **schema["$defs"]}.items():
        assert section["additionalProperties"] is False, name
        assert section["description"], name
        for key, value in section["properties"].items():
            assert value.get("description") or "$ref" in value, f"{name}.{key}"


def test_the_job_file_and_recipes_of_the_examples() -> None:
    for file in sorted((ROOT / "examples").rglob("*.yaml")):
        text = file.read_text(encoding="utf-8")
        schema = re.match(r"# yaml-language-server: \$schema=(.*)\n", text)
        if schema is None:  # prompts, which are no job
            assert file.name.endswith("prompts.yaml")
            continue
        validator = Draft202012Validator(json.loads((file.parent / schema.group(1)).read_text()))
        assert not mistakes(validator, plain(text)), file


def test_job_files_and_recipes_in_the_documentation() -> None:
    jobs, recipes = 0, 0
    for place, value in yaml_blocks():
        if {"input", "models"} <= set(value):
            jobs += 1
            assert not mistakes(JOB, value), place
        elif {"seeds", "templates"} <= set(value):
            recipes += 1
            assert not mistakes(RECIPE, value), place
    assert jobs
    assert recipes


def test_examples_of_sections_are_taken() -> None:
    """Each is shown in an editor and on a page."""
    shown = 0
    for section in subclasses(Section):
        extra = section.model_config.get("json_schema_extra", {})
        for value in extra.get("examples", ()):
            shown += 1
            section.model_validate(value)
    assert shown > 10


def subclasses(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for each in model.__subclasses__():
        yield each
        yield from subclasses(each)


def in_job(dotted: str, value: Any) -> dict[str, Any]:
    section, _, key = dotted.partition(".")
    return {**GOOD, section: {**GOOD.get(section, {}), key: value} if key else value}


GOOD_VALUES: list[tuple[str, Any]] = [
    ("input.paths", "one.parquet"),
    ("sampling.stop", "###"),
    ("sampling.temperature", 0),
    ("models.device_map", {"": 0}),
    ("actors.groups", {"L4": {"num_gpus": 1}}),
    ("prices", "ours.yaml"),
    ("prices", {"source": "us", "date": "2026-11-01", "gpus": {"L4": 0.8}, "cpu_hour": 0.04}),
    ("budget", None),
    ("sampling.max_tokens", 5),
    ("sampling.max_completion_tokens", 5),
    ("max_error_share", 0),
    ("speculation.threshold", None),
]

BAD_VALUES: list[tuple[str, Any]] = [
    ("outputs", "x"),
    ("unit_rows", "many"),
    ("unit_rows", 0),
    ("output", ""),
    ("name", "../x"),
    ("input.paths", [1]),
    ("input.format", "csv"),
    ("models.dtype", "fp16"),
    ("models.target", None),
    ("sampling", None),
    ("sampling.top_p", 0),
    ("sampling.max_token", 5),
    ("sampling.max_tokens", 0),
    ("max_error_share", 50),
    ("sampling.stop", {"a": 1}),
    ("speculation.policy", "fast"),
    ("speculation.k", 99),
    ("actors.groups", {"L4": {"num_gpu": 1}}),
    ("actors.min", 0),
    ("prices", {"date": "2026-11-01"}),
    ("budget", 20),
]


@pytest.mark.parametrize(("key", "value"), GOOD_VALUES)
def test_what_a_job_file_may_say(tmp_path: Path, key: str, value: Any) -> None:
    job = in_job(key, value)
    assert not mistakes(JOB, job)
    if value != "ours.yaml":
        file = tmp_path / "job.yaml"
        file.write_text(yaml.safe_dump(job))
        load_job(file)


@pytest.mark.parametrize(("key", "value"), BAD_VALUES)
def test_what_a_job_file_may_not_say(key: str, value: Any) -> None:
    assert mistakes(JOB, in_job(key, value))


def test_what_is_required() -> None:
    for key in ("input", "output", "models"):
        assert mistakes(JOB, {name: value for name, value in GOOD.items() if name != key})


def test_a_recipe_makes_input_and_output_itself() -> None:
    recipe = recipe_schema()["examples"][0]
    assert not mistakes(RECIPE, recipe)
    assert mistakes(RECIPE, {**recipe, "job": {**recipe["job"], "output": "out"}})
    assert mistakes(RECIPE, {**recipe, "templates": []})
