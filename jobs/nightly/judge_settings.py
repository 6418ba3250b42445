"""The sections `judge` and `select` of the recipe: which conversations are good enough."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from jobs.nightly.columns import example_of
from jobs.nightly.expressions import (
    Expression,
    TurnError,
    checked_expression,
    checked_template,
    variables,
)
from jobs.nightly.template_settings import TEMPLATE_VARIABLES
from pipeline.config.job import (
    ActorsConfig,
    JobConfig,
    ModelsConfig,
    SamplingConfig,
    SpeculationConfig,
)
from pipeline.config.section import Section, example

RUBRIC_VARIABLES = (*TEMPLATE_VARIABLES, "messages")
"""What a rubric may use besides the columns of its seed."""

RANKED_BY = ("logprob", "score", "judgement", "completions", "parsed", "output_tokens")
"""What `select.by` may use."""

_POINTS = {
    "type": "object",
    "properties": {"score": {"type": "integer", "minimum": 1, "maximum": 10}},
    "required": ["score"],
    "additionalProperties": False,
}


def _points() -> SamplingConfig:
    return SamplingConfig.model_validate(
        {
            "max_new_tokens": 64,
            "temperature": 0,
            "structured_outputs": {"json_schema": _POINTS},
        }
    )


class JudgeConfig(Section):
    """A model reads each whole conversation and scores it by a rubric."""

    model_config = example(
        {
            "rubric": "How good an answer to {{ messages[-2].content }} is this, from 1 to 10: "
            "{{ completions[-1] }}",
            "threshold": 7,
        }
    )

    rubric: str = Field(
        description="What the judge is asked, a jinja2 template over the seed's columns, "
        "`messages` (the conversation: each has `role` and `content`), `completions`, `parsed` "
        "and `date`."
    )
    system: str | None = Field(
        default=None,
        description="The judge's system message, a template over the same. `null`: none.",
    )
    score: str = Field(
        default="score",
        description="The score, a number: a jinja2 expression over the fields of what the judge "
        "answers, and `judgement`, all of it.",
    )
    threshold: float | None = Field(
        default=None, description="Least score that is published. `null`: none is removed."
    )
    models: ModelsConfig | None = Field(
        default=None, description="The judge's models. `null`: those of the night."
    )
    sampling: SamplingConfig = Field(
        default_factory=_points,
        description="How the judge answers, with `structured_outputs`. Without this section: "
        "greedily, a JSON object with an integer `score` from 1 to 10.",
    )
    speculation: SpeculationConfig | None = Field(
        default=None, description="The judge's speculation. `null`: as `job` says."
    )
    actors: ActorsConfig | None = Field(
        default=None, description="The judge's actors. `null`: as `job` says."
    )

    @field_validator("rubric", "system")
    @classmethod
    def _compiles(cls, text: str | None) -> str | None:
        return None if text is None else checked_template(text)

    @field_validator("score")
    @classmethod
    def _is_an_expression(cls, text: str) -> str:
        return checked_expression(text)

    @model_validator(mode="after")
    def _gives_a_score(self) -> JudgeConfig:
        asked = self.sampling.structured_outputs
        if asked is None:
            raise ValueError(
                "sampling.structured_outputs: say what the judge must answer, such as a "
                "json_schema with an integer score"
            )
        if self.sampling.n != 1:
            raise ValueError("sampling.n: a judge answers once; remove it")
        if asked.schema_of_json is not None or asked.choice:
            try:
                Expression(self.score)(judged(example_of(asked)))
            except TurnError as error:
                raise ValueError(
                    f"score: of an answer such as {example_of(asked)!r}: {error}"
                ) from None
        return self

    @property
    def columns(self) -> list[str]:
        """The seed's columns that the rubric uses."""
        texts = [self.rubric, *filter(None, [self.system])]
        return sorted(variables(texts) - {*RUBRIC_VARIABLES})

    def job(self, night: JobConfig) -> JobConfig:
        """The judge's job, as far as it is not made each night.

        Args:
            night: the job of the night's turns.
        """
        own = {
            name: value
            for name in ("models", "sampling", "speculation", "actors")
            if (value := getattr(self, name)) is not None
        }
        return night.model_copy(update=own)


def judged(answer: Any) -> dict[str, Any]:
    """What the expression of a score may use.

    Args:
        answer: of the judge: JSON as data, or a text.
    """
    fields = answer if isinstance(answer, dict) else {}
    return {**{str(name): value for name, value in fields.items()}, "judgement": answer}


class SelectConfig(Section):
    """The best of the samples of a prompt, among those that pass all filters."""

    model_config = example({"by": "logprob", "keep": 1})

    by: str = Field(
        description="What is best, the higher the better: a jinja2 expression over `logprob` (mean "
        "of the output tokens), `score` and `judgement` (the judge's), `completions`, `parsed` and "
        "`output_tokens`."
    )
    keep: int = Field(default=1, ge=1, description="Conversations of a prompt that are published.")

    @field_validator("by")
    @classmethod
    def _is_known(cls, text: str) -> str:
        if unknown := sorted(Expression(text).names - {*RANKED_BY}):
            raise ValueError(f"there is no {unknown[0]!r} in it; known: {', '.join(RANKED_BY)}")
        return text
