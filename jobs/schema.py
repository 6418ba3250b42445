"""`specbatch schema`: the JSON Schema of job files and recipes, for editors."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

from pipeline.config.job import JobConfig


def schema(
    nightly: Annotated[
        bool, typer.Option("--nightly", help="The schema of nightly recipes instead.")
    ] = False,
) -> None:
    """Print the JSON Schema of job files, by which editors complete and check what you type.

    Save it, and name it in the first line of a job file:
    `# yaml-language-server: $schema=job.schema.json`. Visual Studio Code (with its YAML extension),
    Neovim and others then show what each key means, and mark what is wrong.

    For example:

        specbatch schema > job.schema.json
        specbatch schema --nightly > recipe.schema.json
    """
    print(schema_text(recipe_schema() if nightly else job_schema()), end="")


def schema_text(schema: dict[str, Any]) -> str:
    """A schema as a file has it."""
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def job_schema() -> dict[str, Any]:
    """What a job file may say (JSON Schema, draft 2020-12)."""
    return _schema(JobConfig, "A job file of specbatch")


def recipe_schema() -> dict[str, Any]:
    """What a recipe of nightly datasets may say (JSON Schema, draft 2020-12)."""
    from jobs.nightly.recipe import MADE_EACH_NIGHT, Recipe

    schema = _schema(Recipe, "A recipe of specbatch nightly")
    job = schema["$defs"]["JobConfig"]
    for key in MADE_EACH_NIGHT:
        del job["properties"][key]
    job["required"] = [key for key in job["required"] if key not in MADE_EACH_NIGHT]
    del job["examples"], schema["$defs"]["InputConfig"]
    return schema


class _Plain(GenerateJsonSchema):
    """Without titles of keys, which only repeat them; examples keep the order of their keys."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def sort(self, value: JsonSchemaValue, parent_key: str | None = None) -> JsonSchemaValue:
        return value


def _schema(model: type[BaseModel], title: str) -> dict[str, Any]:
    schema = model.model_json_schema(schema_generator=_Plain)
    for section in schema["$defs"].values():
        section.pop("title", None)
    return {"$schema": GenerateJsonSchema.schema_dialect, **schema, "title": title}
