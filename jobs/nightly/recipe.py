"""The recipe as data: what a recipe file may say. The names are an interface, as in a job file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError
from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from jobs.job_file import load_settings, resolve_job_paths
from jobs.nightly.columns import JUDGEMENT, LOGPROB, OWN_COLUMNS, SCORE, Fields, Kind, example_of
from jobs.nightly.expressions import Expression, TurnError
from jobs.nightly.filter_settings import FiltersConfig
from jobs.nightly.improve_settings import ImproveConfig
from jobs.nightly.judge_settings import JudgeConfig, SelectConfig
from jobs.nightly.template_settings import NAME, TemplateConfig
from pipeline.config.job import JobConfig
from pipeline.config.locations import Location, Locations
from pipeline.config.model_identity import digest
from pipeline.config.section import Section, StringList, example
from pipeline.config.structured_outputs import StructuredOutputs
from specdec.policies.registry import POLICIES

MADE_EACH_NIGHT = ("name", "input", "output")
"""Keys of a job file that a recipe's `job` does not have: the recipe makes them."""


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


class SplitConfig(Section):
    """Which conversations are for validation: a hash of the seed decides, for ever."""

    validation: float = Field(
        default=0.05,
        ge=0,
        lt=1,
        description="Share of the seeds whose conversations are for validation.",
    )
    salt: str = Field(default="", description="Another text gives another split.")


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

    name: str = Field(pattern=NAME, max_length=60, description="The dataset's name.")
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
    judge: JudgeConfig | None = Field(
        default=None, description="Who scores conversations that pass the filters. `null`: nobody."
    )
    select: SelectConfig | None = Field(
        default=None,
        description="Which of a prompt's samples are published. `null`: all that pass.",
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

    @model_validator(mode="after")
    def _turns_fit(self) -> Recipe:
        self.fields()
        if self.judge is not None:
            _check_judge(self.judge, self.job)
        if self.select is not None:
            self._check_selection(self.select)
        return self

    def _check_selection(self, select: SelectConfig) -> None:
        if select.keep >= self.job.sampling.n:
            raise ValueError(
                f"select.keep: {select.keep} of {self.job.sampling.n} samples leaves none out; "
                "raise job.sampling.n, or lower it"
            )
        by = Expression(select.by)
        if self.judge is None and (asked := sorted(by.names & {SCORE, JUDGEMENT})):
            raise ValueError(f"select.by: {asked[0]} is a judge's; add the section judge")
        for template in self.templates:
            turns = range(1, len(template.turns) + 1)
            values = {
                "logprob": -1.0,
                "score": 1.0,
                "judgement": self.judge and example_of(self.judge.sampling.structured_outputs),
                "completions": ["(a completion)" for _ in turns],
                "parsed": [example_of(self.asked(template.name, turn)) for turn in turns],
                "output_tokens": 1,
            }
            try:
                by(values)
            except TurnError as error:
                raise ValueError(f"select.by: of template {template.name}: {error}") from None

    def template(self, name: str) -> TemplateConfig:
        """The template of this name."""
        return next(template for template in self.templates if template.name == name)

    def asked(self, template: str, turn: int) -> StructuredOutputs | None:
        """What completions of a template's turn, counted from 1, must be; None: anything."""
        own = self.template(template).turns[turn - 1].structured_outputs
        return own or self.job.sampling.structured_outputs

    def fields(self) -> dict[str, Kind]:
        """The columns that turns bring, in order.

        Raises:
            ValueError: two turns bring one, or its name is taken.
        """
        found = Fields((*OWN_COLUMNS, *self.chosen))
        for template in self.templates:
            for number, turn in enumerate(template.turns, start=1):
                found.add(template.name, number, self.asked(template.name, number), turn.column)
        return found.kinds

    @property
    def structured(self) -> bool:
        """Whether a turn's completions must be something."""
        turns = ((t.name, turn) for t in self.templates for turn in range(1, len(t.turns) + 1))
        return any(self.asked(*each) is not None for each in turns)

    @property
    def chosen(self) -> tuple[str, ...]:
        """Columns of what conversations are chosen by."""
        by_logprob = self.select is not None and LOGPROB in Expression(self.select.by).names
        by_judge = (SCORE, JUDGEMENT) if self.judge is not None else ()
        return (*([LOGPROB] if by_logprob else []), *by_judge)

    @property
    def mark(self) -> str:
        """A short digest of what changes the conversations and what is made of them."""
        plain = self.model_dump(
            mode="json", include={"seeds", "templates", "job", "filters", "split"}
        )
        plain["templates"] = [template.mark() for template in self.templates]
        for name in ("judge", "select"):
            if (section := getattr(self, name)) is not None:
                plain[name] = section.model_dump(mode="json")
        for free in ("actors", "s3", "output_s3", "budget", "prices", "max_error_share"):
            plain["job"].pop(free)
        plain["job"]["input"].pop("s3")
        return digest(plain)

    @property
    def most_turns(self) -> int:
        """Turns of the longest template."""
        return max(len(template.turns) for template in self.templates)


def _check_judge(judge: JudgeConfig, night: JobConfig) -> None:
    """Make sure that a judge's job is one.

    Raises:
        ValueError: it is none; the message says why.
    """
    if judge.models is not None and judge.speculation is None and night.speculation.head:
        raise ValueError(
            "judge.speculation: give it, since job.speculation.head knows another pair than "
            "judge.models"
        )
    try:
        JobConfig.model_validate(judge.job(night).model_dump())
    except ValidationError as error:
        said = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ValueError(f"judge: {said}") from None


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
    for section in ("job", "judge"):
        if isinstance(job := result.get(section), Mapping):
            result[section] = resolve_job_paths(job, folder)
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
