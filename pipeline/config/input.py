"""The section `input` of the job file."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.locations import Locations
from pipeline.config.s3 import S3Config
from pipeline.config.section import Section, example
from pipeline.config.templates import PromptTemplate


class InputConfig(Section):
    """Where the rows are, and which column, or template over columns, is the prompt."""

    model_config = example({"paths": ["prompts/*.parquet"], "messages_column": "messages"})

    paths: Locations = Field(
        min_length=1,
        description="Files, folders and globs, local or `s3://`: `.parquet`, `.jsonl`, `.ndjson`, "
        "`.json` (JSON lines, by name or glob), `.csv`, `.tsv`, `.arrow`, `.feather`, and what "
        "`datasets.save_to_disk` wrote. Folders called `key=value` are columns.",
    )
    s3: S3Config | None = Field(
        default=None,
        description="How to reach the input, if not as the job's `s3` says. What it leaves out it "
        "takes from there. `null`: as `s3` says.",
    )
    format: Literal["openai"] | None = Field(
        default=None,
        description="`openai`: lines of OpenAI's batch API, which bring their prompts and "
        "sampling. `null`: rows with columns; one of the next three keys says what "
        "the prompt is.",
    )
    prefix: str | None = Field(
        default=None,
        min_length=1,
        description="For inputs that another job wrote, its `completions/`: what comes before the "
        "names of the columns that it added. With `draft_`, its `completion` is `draft_completion` "
        "here, its `row_id` `draft_row_id`, and so on.",
    )
    messages_column: str | None = Field(
        default=None,
        description="Column of chat messages, a list of `{role, content}`. The target's chat "
        "template turns them into text.",
    )
    prompt_column: str | None = Field(
        default=None,
        description="Column of plain prompts. They are completed as they are, without a chat "
        "template. The tokenizer's beginning of sequence comes first, unless the prompt begins "
        "with one.",
    )
    template: str | None = Field(
        default=None,
        description="A jinja2 template over the columns, such as `Q: {{ question }}`. Its text "
        "is completed as it is. A row whose text would show a null or a NaN is an error, unless "
        "the template says what stands for it: `{{ x | default('unknown') }}`, "
        "`{% if x is not none %}…{% endif %}`.",
    )

    @field_validator("template")
    @classmethod
    def _template_compiles(cls, template: str | None) -> str | None:
        if template is not None and not PromptTemplate(template).columns:
            raise ValueError("has no column in it; a column is written as {{ question }}")
        return template

    @model_validator(mode="after")
    def _one_prompt_source(self) -> InputConfig:
        given = [
            name
            for name in ("messages_column", "prompt_column", "template")
            if getattr(self, name) is not None
        ]
        if self.format is not None:
            given += ["prefix"] if self.prefix is not None else []
            if given:
                raise ValueError(f"{given[0]} does not go with format {self.format}; remove it")
            return self
        if len(given) != 1:
            what = f"{' and '.join(given)} are all given" if given else "none is given"
            raise ValueError(
                f"give exactly one of messages_column, prompt_column, template; {what}"
            )
        return self
