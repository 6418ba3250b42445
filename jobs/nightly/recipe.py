"""The recipe as data: what a recipe file may say. The names are an interface, as in a job file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo

import jinja2
import jinja2.meta
from cronsim import CronSim, CronSimError
from jinja2.sandbox import SandboxedEnvironment
from pydantic import BeforeValidator, Field, field_validator, model_validator

from jobs.job_file import load_settings, resolve_job_paths
from jobs.nightly.filter_settings import FiltersConfig
from pipeline.config.job import JobConfig
from pipeline.config.locations import Location, Locations
from pipeline.config.model_identity import digest
from pipeline.config.section import Section, StringList, example
from specdec.policies.registry import POLICIES

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""What the dataset and its templates may be called: part of a path in any storage."""

MADE_EACH_NIGHT = ("name", "input", "output")
"""Keys of a job file that a recipe's `job` does not have: the recipe makes them."""

TEMPLATE_VARIABLES = ("completions", "date")
"""What a template may use besides the columns of its seed."""


class SeedsConfig(Section):
    """What conversations are made from: rows of files, as those of a job's input are."""

    model_config = example(
        {"paths": ["seeds.jsonl"], "id_column": "id", "only_new": True, "per_night": 200}
    )

    paths: Locations = Field(
        min_length=1,
        description="Files, folders and globs, local or `s3://`: `.parquet`, `.jsonl`, `.ndjson`, "
        "`.json` (JSON lines, by name or glob), `.csv`, `.tsv`, `.arrow`, `.feather`, and what "
        "`datasets.save_to_disk` wrote. Folders called `key=value` are columns.",
    )
    id_column: str | None = Field(
        default=None,
        description="Column that names a seed. `null`: a digest of the columns that templates use.",
    )
    only_new: bool = Field(
        default=False,
        description="Use only seeds that no published night used under a template, or that have "
        "changed since.",
    )
    per_night: int | None = Field(
        default=None, ge=1, description="Seeds of a night, drawn by its date. `null`: all."
    )
    keep_columns: StringList = Field(
        default=(),
        description="Columns of the seeds that the dataset has too, such as an answer to compare "
        "with.",
    )


class TemplateConfig(Section):
    """A conversation: the user's turns, each one jinja2 over the seed and earlier completions."""

    model_config = example(
        {
            "name": "follow-up",
            "system": "You answer briefly.",
            "turns": [
                "Explain {{ topic }} to {{ audience }}.",
                "You said: {{ completions[0] }} Give one example.",
            ],
        }
    )

    name: str = Field(
        pattern=_NAME,
        max_length=60,
        description="The template's name. It is a column of the dataset.",
    )
    system: str | None = Field(
        default=None,
        description="The system message, a jinja2 template over the seed's columns. `null`: none.",
    )
    turns: StringList = Field(
        min_length=1,
        description="The user's turns, each a jinja2 template over the seed's columns, "
        "`completions` (what the model said so far) and `date`.",
    )

    @field_validator("system", "turns")
    @classmethod
    def _compiles(cls, value: Any) -> Any:
        for text in [value] if isinstance(value, str) else value or ():
            try:
                SandboxedEnvironment().from_string(text)
            except jinja2.TemplateSyntaxError as error:
                raise ValueError(f"is not a valid jinja2 template: {error}") from None
        return value

    @property
    def columns(self) -> list[str]:
        """The seed's columns that the templates use."""
        parse = SandboxedEnvironment().parse
        texts = [*self.turns, *filter(None, [self.system])]
        used = {n for text in texts for n in jinja2.meta.find_undeclared_variables(parse(text))}
        return sorted(used - {*TEMPLATE_VARIABLES})


class SplitConfig(Section):
    """Which conversations are for validation: a hash of the seed decides, for ever."""

    validation: float = Field(
        default=0.05,
        ge=0,
        lt=1,
        description="Share of the seeds whose conversations are for validation.",
    )
    salt: str = Field(default="", description="Another text gives another split.")


class ImproveConfig(Section):
    """After a night its outputs teach the pair; what is not surely better is not adopted."""

    model_config = example({"head": True, "held_out": 0.2})

    head: bool = Field(default=False, description="Train the next acceptance head.")
    draft: bool = Field(default=False, description="Distil the draft further.")
    folder: Location | None = Field(
        default=None,
        description="Local folder of the versions, on a disk that all workers see. `null`: "
        "`models/` beside the dataset's own files, which must then be local.",
    )
    held_out: float = Field(
        default=0.2,
        gt=0,
        lt=1,
        description="Share of prompts that teach nothing: candidates are compared on them.",
    )
    rows: int = Field(default=400, ge=4, description="Completions to learn from, at most.")
    compare_rows: int = Field(default=64, ge=2, description="Held-out rows to compare on, at most.")
    least_gain: float = Field(
        default=0.0,
        ge=0,
        description="Adopt a candidate only if the lower 95% bound of its gain exceeds 1 by more "
        "than this.",
    )
    control_share: float = Field(
        default=0.25,
        gt=0,
        le=0.5,
        description="Share of control rounds when candidate and present pair are run side by side.",
    )
    head_depth: int = Field(default=3, ge=0, description="Residual blocks of the head.")
    head_epochs: int = Field(
        default=20, ge=1, description="Times that the head's training goes through its rows."
    )
    draft_minutes: float = Field(
        default=10.0, gt=0, description="Most minutes of the draft's training."
    )
    draft_epochs: int = Field(
        default=2,
        ge=1,
        description="Times that the draft's training goes through its rows, at most.",
    )
    draft_lr: float = Field(
        default=2e-4, gt=0, description="Learning rate of the draft's training."
    )
    seed: int = Field(default=0, description="Seed of training and of the choice of rows.")


class ScheduleConfig(Section):
    """When a night runs, for the schedules that are rendered; and its dates' time zone."""

    model_config = example({"cron": "0 1 * * *", "timezone": "Europe/Berlin"})

    cron: str = Field(
        default="0 1 * * *", description="When a night runs: minute, hour, day, month, weekday."
    )
    timezone: str = Field(
        default="UTC",
        description="Time zone of the schedule and of the nights' dates, such as `Europe/Berlin`.",
    )

    @field_validator("cron")
    @classmethod
    def _five_fields(cls, cron: str) -> str:
        try:
            if len(cron.split()) != 5:
                raise CronSimError("it has not five fields")
            CronSim(cron, datetime(2026, 1, 1))
        except CronSimError as error:
            raise ValueError(f"is not a schedule such as '0 1 * * *': {error}") from None
        return cron

    @field_validator("timezone")
    @classmethod
    def _known(cls, name: str) -> str:
        try:
            ZoneInfo(name)
        except (KeyError, ValueError, OSError):
            raise ValueError(f"no time zone {name!r}; write one such as Europe/Berlin") from None
        return name


def _job_section(value: object) -> object:
    """The `job` section as a job file: the recipe makes its input and output each night."""
    if not isinstance(value, Mapping):
        return value
    if given := [name for name in MADE_EACH_NIGHT if name in value]:
        raise ValueError(f"{given[0]}: the recipe makes it each night; remove it")
    made = {"input": {"paths": ["-"], "messages_column": "messages"}, "output": "-"}
    return {**value, **made}


class Recipe(Section):
    """One nightly dataset: everything in a recipe file, with defaults filled in."""

    model_config = example(
        {
            "name": "explanations",
            "output": "out/explanations",
            "seeds": {"paths": ["seeds.jsonl"], "per_night": 200},
            "templates": [{"name": "explain", "turns": ["Explain {{ topic }} to {{ audience }}."]}],
            "job": {
                "models": {
                    "target": "Qwen/Qwen2.5-7B-Instruct",
                    "draft": "Qwen/Qwen2.5-0.5B-Instruct",
                },
                "sampling": {"max_new_tokens": 256, "temperature": 0.7},
            },
        }
    )

    name: str = Field(pattern=_NAME, max_length=60, description="The dataset's name.")
    output: Location = Field(min_length=1, description="The dataset's folder, local or `s3://`.")
    seeds: SeedsConfig = Field(description="What conversations are made from.")
    templates: tuple[TemplateConfig, ...] = Field(
        min_length=1,
        description="How a seed becomes a conversation. Each seed goes through each template.",
    )
    job: Annotated[JobConfig, BeforeValidator(_job_section)] = Field(
        description="A job file without `name`, `input` and `output`, which each night makes."
    )
    filters: FiltersConfig = Field(
        default_factory=FiltersConfig, description="What is not published."
    )
    split: SplitConfig = Field(
        default_factory=SplitConfig, description="Which conversations are for validation."
    )
    improve: ImproveConfig = Field(
        default_factory=ImproveConfig, description="What each night's outputs teach draft and head."
    )
    schedule: ScheduleConfig = Field(
        default_factory=ScheduleConfig, description="When a night runs."
    )
    catch_up: int = Field(
        default=3, ge=0, description="Missed nights that a run makes up, at most."
    )
    lock_minutes: float = Field(
        default=15.0,
        gt=0,
        description="A run that shows no sign of life for so many minutes has lost its lock on "
        "the dataset.",
    )
    webhook: str | None = Field(
        default=None,
        description="URL that is told how a run went, or `env:NAME` of a variable that holds it. "
        "`null`: none.",
    )
    webhook_on: Literal["failure", "always"] = Field(
        default="failure",
        description="When the webhook is told: after a run that failed, or after every run.",
    )
    licences: dict[str, str] = Field(
        default_factory=dict,
        description="Licences of the dataset, the models and the seeds, for the dataset card.",
    )
    description: str = Field(default="", description="First words of the dataset card.")

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        names = [template.name for template in self.templates]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"templates: two are called {repeated[0]!r}")
        improve, policy = self.improve, self.job.speculation.policy
        if (improve.head or improve.draft) and self.job.models.draft is None:
            raise ValueError("improve needs job.models.draft")
        if improve.draft and not self.job.speculation.drafts:
            raise ValueError(
                f"improve.draft: job.speculation.policy is {policy}, which uses no draft"
            )
        if improve.head and not POLICIES[policy].estimates:
            serves = " and ".join(name for name, each in POLICIES.items() if each.estimates)
            raise ValueError(f"improve.head: a head serves the policies {serves}, not {policy}")
        if improve.head and self.job.speculation.estimator not in (None, "head"):
            raise ValueError(
                "improve.head: job.speculation.estimator is "
                f"{self.job.speculation.estimator}, which would not use the head; remove it"
            )
        if (improve.head or improve.draft) and improve.folder is None and "://" in self.output:
            raise ValueError("improve.folder: give a local folder, since the output is not local")
        return self

    @property
    def mark(self) -> str:
        """A short digest of what changes the conversations and what is made of them."""
        plain = self.model_dump(
            mode="json", include={"seeds", "templates", "job", "filters", "split"}
        )
        for free in ("actors", "s3", "output_s3", "budget", "prices", "max_error_share"):
            plain["job"].pop(free)
        plain["job"]["input"].pop("s3")
        return digest(plain)

    @property
    def most_turns(self) -> int:
        """Turns of the longest template."""
        return max(len(template.turns) for template in self.templates)


def load_recipe(file: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file; relative paths in it are relative to its folder.

    Raises:
        JobFileError: it cannot be read, is not YAML, or says what it may not.
    """
    return load_settings(file, overrides, Recipe, _resolve_paths)


def _resolve_paths(recipe: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The recipe with absolute paths; what is not of the expected kind is left for the checks."""
    result = dict(recipe)
    for section, path in _paths(recipe):
        value = result[section] if path is None else result[section].get(path)
        if value is None:
            continue
        moved = _moved(value, folder)
        result[section] = moved if path is None else {**result[section], path: moved}
    if isinstance(job := result.get("job"), Mapping):
        result["job"] = resolve_job_paths(job, folder)
    return result


def _paths(recipe: Mapping[str, Any]) -> Iterator[tuple[str, str | None]]:
    if "output" in recipe:
        yield "output", None
    for section, path in (("seeds", "paths"), ("improve", "folder")):
        if isinstance(recipe.get(section), Mapping):
            yield section, path


def _moved(value: Any, folder: Path) -> Any:
    if isinstance(value, list):
        return [_moved(each, folder) for each in value]
    return resolve_job_paths({"output": value}, folder)["output"]
