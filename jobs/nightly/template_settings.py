"""The section `templates` of the recipe."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator

from jobs.nightly.expressions import checked_template, variables
from pipeline.config.section import Section, example
from pipeline.config.structured_outputs import StructuredOutputs

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""What the dataset and its templates may be called: part of a path in any storage."""

TEMPLATE_VARIABLES = ("completions", "parsed", "date")
"""What a template may use besides the columns of its seed."""


class TurnConfig(Section):
    """A turn of the user, where its text alone does not say all; and what must be answered."""

    model_config = example(
        {
            "text": "Write a question about {{ topic }} and its answer, as JSON.",
            "structured_outputs": {
                "json_schema": {
                    "type": "object",
                    "properties": {"question": {"type": "string"}, "answer": {"type": "string"}},
                    "required": ["question", "answer"],
                }
            },
        }
    )

    text: str = Field(description="What the user says, a template as any turn.")
    structured_outputs: StructuredOutputs | None = Field(
        default=None,
        description="What the completion must be. The properties of a JSON object are columns of "
        "the dataset. `null`: as `job.sampling` says.",
    )
    column: str | None = Field(
        default=None,
        min_length=1,
        description="Column of the dataset that has the turn's completion. `null`: none.",
    )

    @field_validator("text")
    @classmethod
    def _compiles(cls, text: str) -> str:
        return checked_template(text)


def _as_turns(value: object) -> object:
    turns = [value] if isinstance(value, str | dict) else value
    if not isinstance(turns, list | tuple):
        return turns
    return [{"text": each} if isinstance(each, str) else each for each in turns]


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
        pattern=NAME,
        max_length=60,
        description="The template's name. It is a column of the dataset.",
    )
    system: str | None = Field(
        default=None,
        description="The system message, a jinja2 template over the seed's columns. `null`: none.",
    )
    turns: Annotated[
        tuple[TurnConfig, ...],
        BeforeValidator(
            _as_turns, json_schema_input_type=str | TurnConfig | tuple[str | TurnConfig, ...]
        ),
    ] = Field(
        min_length=1,
        description="The user's turns, each a jinja2 template over the seed's columns, "
        "`completions` (what the model said so far), `parsed` (the same of structured turns, as "
        "data) and `date`.",
    )

    @field_validator("system")
    @classmethod
    def _compiles(cls, system: str | None) -> str | None:
        return None if system is None else checked_template(system)

    @property
    def texts(self) -> list[str]:
        """All that is rendered."""
        return [*(turn.text for turn in self.turns), *filter(None, [self.system])]

    @property
    def columns(self) -> list[str]:
        """The seed's columns that the templates use."""
        return sorted(variables(self.texts) - {*TEMPLATE_VARIABLES})

    def mark(self) -> dict[str, Any]:
        """What changes conversations, in the form that it had before turns had more than texts."""
        turns = [
            turn.text if turn == TurnConfig(text=turn.text) else turn.model_dump(mode="json")
            for turn in self.turns
        ]
        return {"name": self.name, "system": self.system, "turns": turns}
