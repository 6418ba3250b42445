"""The section `input` of the job file."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.locations import Locations
from pipeline.config.s3 import S3Config
from pipeline.config.section import Section, example
from pipeline.config.templates import PromptTemplate

CHAT_ONLY = (
    "chat_template_kwargs",
    "tools",
    "tools_column",
    "add_generation_prompt",
    "continue_final_message",
)
"""Keys that only a chat template has a use for."""


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

    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="Variables of the chat template: `{enable_thinking: false}`. A row's column "
        "`chat_template_kwargs` (a struct or JSON) goes before. One that the template does not "
        "read is refused.",
    )
    tools: list[dict[str, Any]] | None = Field(
        default=None,
        description="Functions that the model may call, in OpenAI's form, for the chat template.",
    )
    tools_column: str | None = Field(
        default=None, description="Column of a row's own tools, a list or JSON text of one."
    )
    add_generation_prompt: bool | None = Field(
        default=None,
        description="Whether the chat template begins an answer. `null`: it does, unless the last "
        "message is continued.",
    )
    continue_final_message: bool = Field(
        default=False,
        description="The last message, the assistant's, is left open and the completion goes on "
        "with it.",
    )
    truncate_prompt_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Of longer prompts, keep so many of the last tokens, with the beginning of "
        "sequence in front of plain ones. `null`: those that leave no room are errors.",
    )

    completion_column: str | None = Field(
        default=None,
        description="Column of given completions. They are scored, and nothing is generated: "
        "columns `logprob_sum`, `perplexity` and `scored_tokens`.",
    )
    escape_special_tokens: bool = Field(
        default=False,
        description="What a row brings is plain text, also where it reads like a special token, "
        "such as `<|im_end|>` in a user's message. Those that the template writes stay what they "
        "are.",
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
            given += [k for k in ("prefix", "completion_column") if getattr(self, k) is not None]
            if given:
                raise ValueError(f"{given[0]} does not go with format {self.format}; remove it")
            return self
        told = [name for name in CHAT_ONLY if getattr(self, name)]
        if told and self.messages_column is None:
            raise ValueError(f"{told[0]} is for chats; give messages_column, or remove it")
        if self.add_generation_prompt and self.continue_final_message:
            raise ValueError("add_generation_prompt and continue_final_message do not go together")
        if len(given) != 1:
            what = f"{' and '.join(given)} are all given" if given else "none is given"
            raise ValueError(
                f"give exactly one of messages_column, prompt_column, template; {what}"
            )
        return self
