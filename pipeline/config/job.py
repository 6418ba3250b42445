"""The job as data: what a job file may say, checked as far as it can be without reading input.

Everything here is frozen and plain, so a job can be validated, hashed, sent to workers and
recorded. The names are an interface: add to them, do not rename them.

Each section has a file of its own in this room. All are imported from here.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from pipeline.config.actors import ActorsConfig
from pipeline.config.input import InputConfig
from pipeline.config.locations import Location
from pipeline.config.models import ModelsConfig
from pipeline.config.prices import Prices
from pipeline.config.s3 import S3Config
from pipeline.config.sampling import MAX_SAMPLES, SamplingConfig, optional_columns
from pipeline.config.section import Section, example
from pipeline.config.speculation import (
    Estimator,
    Policy,
    SpeculationConfig,
)
from pipeline.layout import ADDED_COLUMNS
from specdec.policies.registry import POLICIES, without_draft

__all__ = [
    "MAX_SAMPLES",
    "ActorsConfig",
    "BudgetConfig",
    "Estimator",
    "InputConfig",
    "JobConfig",
    "ModelsConfig",
    "Policy",
    "S3Config",
    "SamplingConfig",
    "SpeculationConfig",
]


_OF_GENERATED = (
    *("n", "prompt_logprobs", "return_token_ids", "structured_outputs"),
    *("parse_response", "return_parsed"),
)
"""Keys of `sampling` that a job has no use for whose completions are given. What is left out is in
many job files, such as a temperature, and does no harm."""


def _or_a_file(schema: dict[str, Any]) -> None:
    """A job file may name a price table's file; `jobs.job_file` puts the table in its place."""
    schema["anyOf"].insert(0, {"type": "string"})


class BudgetConfig(Section):
    """What a job may spend, all its runs together; it stops before it spends more."""

    model_config = example({"dollars": 20, "hours": 8})

    dollars: float | None = Field(
        default=None, gt=0, description="Money, in the currency of the price table. `null`: no cap."
    )
    hours: float | None = Field(
        default=None, gt=0, description="Hours of running, all runs together. `null`: no cap."
    )


class JobConfig(Section):
    """One job: everything in a job file, with defaults filled in."""

    model_config = example(
        {
            "name": "questions",
            "input": {"paths": ["prompts/*.parquet"], "messages_column": "messages"},
            "output": "out/questions",
            "models": {"target": "Qwen/Qwen2.5-7B-Instruct", "draft": "Qwen/Qwen2.5-0.5B-Instruct"},
            "sampling": {"max_new_tokens": 256, "temperature": 0.7},
            "actors": {"max": 4, "num_gpus": 1},
        }
    )

    name: str = Field(
        default="job",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=100,
        description="The job's name, in lists, reports and metrics.",
    )
    input: InputConfig = Field(description="Where the rows are, and what the prompt is.")
    output: Location = Field(
        min_length=1,
        description="Folder of the results, local or `s3://`. Running the job again resumes it; "
        "another job's folder is refused.",
    )
    s3: S3Config = Field(
        default_factory=S3Config,
        description="How to reach `s3://` paths, those of the input and the output.",
    )
    output_s3: S3Config | None = Field(
        default=None,
        description="How to reach the output, if not as `s3` says. What it leaves out it takes "
        "from `s3`. `null`: as `s3` says.",
    )
    models: ModelsConfig = Field(description="The target and its draft.")
    sampling: SamplingConfig = Field(
        default_factory=SamplingConfig, description="How each row is sampled."
    )
    speculation: SpeculationConfig = Field(
        default_factory=SpeculationConfig,
        description="When to stop drafting, and how candidates are verified.",
    )
    actors: ActorsConfig = Field(
        default_factory=ActorsConfig, description="The pool of workers, and what each may use."
    )
    unit_rows: int = Field(
        default=256,
        ge=1,
        description="Rows that are committed together, about: a *unit*, which is one output file. "
        "Large files are cut into units, small ones share them.",
    )
    max_error_share: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Largest share of rows in `errors/` with which the job succeeds. A job in "
        "which no row was completed never does.",
    )
    budget: BudgetConfig | None = Field(
        default=None, description="What the job may spend. `null`: no cap."
    )
    prices: Prices | None = Field(
        default=None,
        json_schema_extra=_or_a_file,
        description="A price table, or the path of a YAML file that holds one. `null`: the "
        "packaged list prices of AWS.",
    )

    @model_validator(mode="before")
    @classmethod
    def _sections_inherit(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(shared := values.get("s3"), dict):
            return values
        inherited = dict(values)
        if isinstance(own := values.get("output_s3"), dict):
            inherited["output_s3"] = {**shared, **own}
        if isinstance(given := values.get("input"), dict) and isinstance(given.get("s3"), dict):
            inherited["input"] = {**given, "s3": {**shared, **given["s3"]}}
        return inherited

    @model_validator(mode="after")
    def _draft_if_speculating(self) -> JobConfig:
        policy = POLICIES[self.speculation.policy]
        if self.models.draft is None and self.drafts:
            if not policy.looks_up:
                *others, last = without_draft()
                raise ValueError(
                    f"speculation.policy {policy.name} needs models.draft; give a draft, or set "
                    f"speculation.policy to {', '.join(others)} or {last}"
                )
            if self.speculation.lookup is False:
                raise ValueError(
                    "speculation.lookup is false and models.draft is null, so that nothing can be "
                    "proposed; remove lookup, or set speculation.policy to none"
                )
            for name in ("head", "estimator"):
                if getattr(self.speculation, name) is not None:
                    raise ValueError(
                        f"speculation.{name} judges what a draft proposes, and models.draft is "
                        f"null; give a draft, or remove {name}"
                    )
        return self

    @model_validator(mode="after")
    def _nothing_is_generated(self) -> JobConfig:
        if self.input.completion_column is not None:
            for name in _OF_GENERATED:
                if getattr(self.sampling, name) != SamplingConfig.model_fields[name].default:
                    raise ValueError(
                        f"sampling.{name} does not go with input.completion_column, whose "
                        "completions are given; remove one of them"
                    )
        return self

    @model_validator(mode="after")
    def _messages_of_chats(self) -> JobConfig:
        chats = self.input.messages_column is not None or self.input.format is not None
        if self.sampling.parse_response and not chats:
            raise ValueError(
                "sampling.parse_response is for chats; give input.messages_column, or remove it"
            )
        return self

    @property
    def generates(self) -> bool:
        """Whether completions are generated, not given to be scored."""
        return self.input.completion_column is None

    @property
    def drafts(self) -> bool:
        """Whether a draft proposes tokens."""
        return self.generates and self.speculation.drafts

    @property
    def s3_of_input(self) -> S3Config:
        """How the input is reached."""
        return self.input.s3 or self.s3

    @property
    def s3_of_output(self) -> S3Config:
        """How the output is reached, and all else that the job writes."""
        return self.output_s3 or self.s3

    @property
    def optional_columns(self) -> tuple[str, ...]:
        """Columns of `completions/` that not every job has."""
        return optional_columns(self.sampling.model_dump(), self.input.model_dump())

    @property
    def added_columns(self) -> frozenset[str]:
        """Names that no input column may have."""
        return ADDED_COLUMNS | set(self.optional_columns)

    def in_group(self, name: str) -> JobConfig:
        """The job as an actor of this group sees it: `actors` are the group's settings."""
        return self.model_copy(update={"actors": self.actors.pools[name]})
