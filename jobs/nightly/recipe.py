"""The recipe as data: what a recipe file may say. The names are an interface, as in a job file."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo

import jinja2
import jinja2.meta
from cronsim import CronSim, CronSimError
from jinja2.sandbox import SandboxedEnvironment
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from jobs.job_file import load_settings, resolve_job_paths
from pipeline.config.job import JobConfig, StringList
from pipeline.config.model_identity import digest
from specdec.policies.registry import POLICIES

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
_MADE_HERE = ("name", "input", "output")

TEMPLATE_VARIABLES = ("completions", "date")
"""What a template may use besides the columns of its seed."""


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SeedsConfig(_Settings):
    """What conversations are made from: rows of Parquet or JSONL files."""

    paths: StringList = Field(min_length=1, description="files, folders and globs, as in a job")
    id_column: str | None = Field(
        default=None, description="column that names a seed; null: a digest of what templates use"
    )
    only_new: bool = Field(
        default=False,
        description="use what no published night used, or what has changed since",
    )
    per_night: int | None = Field(default=None, ge=1, description="seeds a night; null: all")
    keep_columns: StringList = Field(
        default=(), description="columns of the seeds that the dataset has too, such as an answer"
    )


class TemplateConfig(_Settings):
    """A conversation: the user's turns, each one jinja2 over the seed and earlier completions."""

    name: str = Field(pattern=_NAME, max_length=60)
    system: str | None = Field(default=None, description="jinja2; the system message")
    turns: StringList = Field(
        min_length=1,
        description="jinja2 each, over the seed's columns, `completions` (those so far) and `date`",
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


class LengthFilter(_Settings):
    """Bounds on a completion's length."""

    min_chars: int = Field(default=1, ge=0)
    max_chars: int | None = Field(default=None, ge=1)
    min_words: int = Field(default=1, ge=0)
    max_words: int | None = Field(default=None, ge=1)


class RepetitionFilter(_Settings):
    """A text that goes round in circles: few different n-grams, or one that compresses well."""

    ngram: int = Field(default=4, ge=1, description="words of an n-gram")
    max_repeated: float = Field(
        default=0.3, ge=0, le=1, description="share of n-grams that occurred before"
    )
    max_compression: float = Field(
        default=5.0, gt=1, description="bytes over zlib's bytes; prose is 1 to 3"
    )


class RegexFilter(_Settings):
    """Patterns that a completion must match somewhere, and that it must not."""

    require: StringList = ()
    forbid: StringList = ()

    @field_validator("require", "forbid")
    @classmethod
    def _patterns(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        return _compiled(patterns)


class LanguageFilter(_Settings):
    """Languages that a completion may be in (py3langid)."""

    allow: StringList = Field(min_length=1, description="ISO 639-1 codes, such as en")
    min_confidence: float = Field(default=0.5, ge=0, le=1)
    min_chars: int = Field(default=40, ge=0, description="shorter texts are not judged")

    @field_validator("allow")
    @classmethod
    def _codes(cls, codes: tuple[str, ...]) -> tuple[str, ...]:
        if bad := [code for code in codes if not re.fullmatch("[a-z]{2,3}", code)]:
            raise ValueError(f"{bad[0]!r} is not a language code such as en or de")
        return codes


class DuplicatesFilter(_Settings):
    """Conversations that are there already, in this night or in one published before."""

    exact: bool = Field(default=True, description="the same messages but for case and white space")
    near: bool = Field(default=True, description="completions that share most of their n-grams")
    threshold: float = Field(default=0.6, gt=0, lt=1, description="Jaccard similarity")
    shingle: int = Field(default=3, ge=1, description="words of an n-gram")
    permutations: int = Field(default=128, ge=16, le=1024, description="of MinHash")
    min_words: int = Field(default=10, ge=1, description="shorter ones are compared exactly only")


class FiltersConfig(_Settings):
    """What is not published. Each completion must pass all; null turns a filter off."""

    finish_reason: StringList | None = Field(default=("stop",), description="those that are kept")
    length: LengthFilter | None = Field(default_factory=LengthFilter)
    repetition: RepetitionFilter | None = Field(default_factory=RepetitionFilter)
    regex: RegexFilter | None = None
    language: LanguageFilter | None = None
    refusals: bool = Field(default=True, description="the model declines instead of answering")
    refusal_patterns: StringList = Field(default=(), description="more regular expressions of it")
    duplicates: DuplicatesFilter | None = Field(default_factory=DuplicatesFilter)

    @field_validator("refusal_patterns")
    @classmethod
    def _patterns(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        return _compiled(patterns)

    @field_validator("finish_reason")
    @classmethod
    def _reasons(cls, reasons: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if bad := [reason for reason in reasons or () if reason not in {"stop", "length"}]:
            raise ValueError(f"{bad[0]!r} is not a finish reason: stop, length")
        return reasons


class SplitConfig(_Settings):
    """Which conversations are for validation: a hash of the seed decides, for ever."""

    validation: float = Field(default=0.05, ge=0, lt=1)
    salt: str = Field(default="", description="another one gives another split")


class ImproveConfig(_Settings):
    """After a night its outputs teach the pair; what is not surely better is not adopted."""

    head: bool = Field(default=False, description="train the next acceptance head")
    draft: bool = Field(default=False, description="distil the draft further")
    folder: str | None = Field(
        default=None,
        description="local folder of the versions, on a disk that all workers see; "
        "null: models/ beside the dataset's own files, which must then be local",
    )
    held_out: float = Field(default=0.2, gt=0, lt=1, description="share of prompts to compare on")
    rows: int = Field(default=400, ge=4, description="completions to learn from, at most")
    compare_rows: int = Field(default=64, ge=2, description="held-out rows to compare on, at most")
    least_gain: float = Field(
        default=0.0, ge=0, description="the lower bound must exceed 1 by more than this"
    )
    control_share: float = Field(
        default=0.25, gt=0, le=0.5, description="share of control rounds when both sides are run"
    )
    head_depth: int = Field(default=3, ge=0)
    head_epochs: int = Field(default=20, ge=1)
    draft_minutes: float = Field(default=10.0, gt=0)
    draft_epochs: int = Field(default=2, ge=1)
    draft_lr: float = Field(default=2e-4, gt=0)
    seed: int = 0


class ScheduleConfig(_Settings):
    """When a night runs, for the schedules that are rendered; and its dates' time zone."""

    cron: str = Field(default="0 1 * * *", description="minute hour day month weekday")
    timezone: str = "UTC"

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


def _compiled(patterns: tuple[str, ...]) -> tuple[str, ...]:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
    return patterns


def _job_section(value: object) -> object:
    """The `job` section as a job file: the recipe makes its input and output each night."""
    if not isinstance(value, Mapping):
        return value
    if given := [name for name in _MADE_HERE if name in value]:
        raise ValueError(f"{given[0]}: the recipe makes it each night; remove it")
    made = {"input": {"paths": ["-"], "messages_column": "messages"}, "output": "-"}
    return {**value, **made}


class Recipe(_Settings):
    """One nightly dataset: everything in a recipe file, with defaults filled in."""

    name: str = Field(pattern=_NAME, max_length=60)
    output: str = Field(min_length=1, description="the dataset's folder, local or s3://")
    seeds: SeedsConfig
    templates: tuple[TemplateConfig, ...] = Field(min_length=1)
    job: Annotated[JobConfig, BeforeValidator(_job_section)] = Field(
        description="models, sampling, speculation, actors, s3, ... as in a job file"
    )
    filters: FiltersConfig = Field(default_factory=FiltersConfig)
    split: SplitConfig = Field(default_factory=SplitConfig)
    improve: ImproveConfig = Field(default_factory=ImproveConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    catch_up: int = Field(default=3, ge=0, description="missed nights that a run makes up, at most")
    lock_minutes: float = Field(
        default=15.0, gt=0, description="a run that shows no sign of life so long has lost its lock"
    )
    webhook: str | None = Field(
        default=None, description="URL that is told of failures, or env:NAME of a variable with it"
    )
    webhook_on: Literal["failure", "always"] = "failure"
    licences: dict[str, str] = Field(
        default_factory=dict, description="of the dataset, the models, the seeds: for the card"
    )
    description: str = Field(default="", description="first words of the dataset card")

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        names = [template.name for template in self.templates]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"templates: two are called {repeated[0]!r}")
        improve = self.improve
        if (improve.head or improve.draft) and self.job.models.draft is None:
            raise ValueError("improve needs job.models.draft")
        if improve.draft and self.job.speculation.policy == "none":
            raise ValueError("improve.draft: job.speculation.policy is none, which uses no draft")
        policy = self.job.speculation.policy
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
        for free in ("actors", "s3", "budget", "prices"):
            plain["job"].pop(free)
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
