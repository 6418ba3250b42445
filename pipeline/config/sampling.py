"""The section `sampling` of the job file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, GetJsonSchemaHandler, field_validator, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from pipeline.config.adjustments import Adjustments
from pipeline.config.section import StringList, example
from pipeline.config.structured_outputs import StructuredOutputs
from pipeline.layout import (
    LOGPROBS,
    MESSAGE,
    OUTPUT_TOKEN_IDS,
    PARSED,
    PROMPT_LOGPROBS,
    SCORE,
)
from specdec.request import MOST_LOGPROBS, LogprobsMode, stop_fault

MAX_SAMPLES = 10_000
"""Most samples of one prompt. A unit holds all samples of its rows: lower unit_rows with many."""


LENGTH, _OTHER_LENGTHS = "max_new_tokens", ("max_tokens", "max_completion_tokens")
"""What the most tokens of a row are called here, and elsewhere; all of these names are taken."""


def one_length(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a sampling in which the most tokens of a row have their one name.

    Raises:
        ValueError: two of its names are given, and they disagree.
    """
    given = {name: values[name] for name in (LENGTH, *_OTHER_LENGTHS) if name in values}
    if any(value != next(iter(given.values())) for value in given.values()):
        said = " and ".join(f"{name} {value}" for name, value in given.items())
        raise ValueError(f"{said} are the same setting; give one of them")
    kept = {name: value for name, value in values.items() if name not in _OTHER_LENGTHS}
    return {**kept, LENGTH: next(iter(given.values()))} if given else kept


LATER_SAMPLING = (
    "defaults",
    *Adjustments.model_fields,
    "skip_special_tokens",
    "include_stop_str_in_output",
    "logprobs",
    "prompt_logprobs",
    "logprobs_mode",
    "return_token_ids",
    "structured_outputs",
    "parse_response",
    "return_parsed",
)
"""Keys that outputs of earlier versions do not know."""


def optional_columns(sampling: Mapping[str, Any], source: Mapping[str, Any]) -> tuple[str, ...]:
    """Columns of `completions/` that not every job has.

    Args:
        sampling: the job's, or what its record has of it.
        source: the same of its input. That of OpenAI's lines may ask for most of them.
    """
    of_lines, parsing = source.get("format") is not None, sampling.get("parse_response")
    asked = {
        (LOGPROBS,): of_lines or sampling.get(LOGPROBS) is not None,
        (PROMPT_LOGPROBS,): of_lines or sampling.get(PROMPT_LOGPROBS) is not None,
        (OUTPUT_TOKEN_IDS,): of_lines or sampling.get("return_token_ids"),
        MESSAGE: of_lines if parsing is None else parsing,
        (PARSED,): sampling.get("return_parsed"),
        SCORE: source.get("completion_column") is not None,
    }
    return tuple(name for names, wanted in asked.items() if wanted for name in names)


class SamplingConfig(Adjustments):
    """How each row is sampled; a row's own `sampling_params` column overrides these."""

    model_config = example(
        {"max_new_tokens": 512, "temperature": 0.7, "top_p": 0.95, "stop": ["###"], "n": 4}
    )

    defaults: Literal["model", "none"] | None = Field(
        default=None,
        description="`model`: what the target's `generation_config.json` recommends of "
        "temperature, top_p, top_k, min_p and repetition_penalty, where this section says nothing. "
        "`null`: so if it names no temperature.",
    )
    max_new_tokens: int = Field(default=256, ge=1, description="Most tokens to generate for a row.")
    temperature: float = Field(
        default=1.0,
        ge=0,
        description="Divides the logits: higher is more varied. `0` is greedy, the most likely "
        "token each time.",
    )
    top_p: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Sample from the most likely tokens that together have this probability. "
        "`1`: off.",
    )
    top_k: int = Field(
        default=0, ge=0, description="Sample from this many of the most likely tokens. `0`: off."
    )
    min_p: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Leave out tokens with less than this share of the most likely token's "
        "probability. `0`: off.",
    )
    stop: StringList = Field(
        default=(),
        description="Strings that end a completion. The text is cut before them. They may hold "
        "special tokens, such as `</s>`.",
    )
    stop_token_ids: tuple[int, ...] = Field(
        default=(),
        description="Token ids that end a completion, besides the model's own end of sequence.",
    )
    ignore_eos: bool = Field(
        default=False,
        description="Go on past the end of sequence, up to `max_new_tokens`. For measurements.",
    )
    skip_special_tokens: bool = Field(
        default=True, description="Leave special tokens out of the text of a completion."
    )
    include_stop_str_in_output: bool = Field(
        default=False, description="The text ends with the stop string, not before it."
    )
    logprobs: int | None = Field(
        default=None,
        ge=0,
        le=MOST_LOGPROBS,
        description="A column `logprobs` with the log-probability of each token of a completion, "
        "and with those of so many of the likeliest ones. `null`: none.",
    )
    prompt_logprobs: int | None = Field(
        default=None,
        ge=0,
        le=MOST_LOGPROBS,
        description="A column `prompt_logprobs`, the same of each token of the prompt. Such "
        "prompts are computed whole, and take over nothing from other rows. `null`: none.",
    )
    logprobs_mode: LogprobsMode = Field(
        default="raw_logprobs",
        description="`raw_logprobs`: of the target's own distribution. `processed_logprobs`: of "
        "the one that is drawn from, behind penalties, temperature and the rest.",
    )
    return_token_ids: bool = Field(
        default=False, description="A column `output_token_ids` with the tokens of a completion."
    )
    parse_response: bool | None = Field(
        default=None,
        description="Columns `content`, `reasoning` and `tool_calls`: what a chat's completion "
        "says, as the model marks it. `completion` stays the whole text. `null`: for OpenAI lines.",
    )
    structured_outputs: StructuredOutputs | None = Field(
        default=None,
        description="What each completion must be: JSON of a schema, a choice, … `null`: anything.",
    )
    return_parsed: bool = Field(
        default=False,
        description="A column `parsed` with the JSON of rows whose completion must be JSON, "
        "checked against their schema. What is none, such as a cut-off object, is its row's error.",
    )
    seed: int = Field(
        default=0, description="With the row's id, the key of all random numbers of that row."
    )
    n: int = Field(
        default=1,
        ge=1,
        le=MAX_SAMPLES,
        description="Samples of each prompt, each an output row of its own. With many, lower "
        "`unit_rows`.",
    )

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """With the other names of the most tokens, for editors."""
        schema = handler.resolve_ref_schema(handler(core))
        keys = schema["properties"]
        last = {key: keys[key] for key in (*Adjustments.model_fields, "defaults")}
        keys = {key: value for key, value in keys.items() if key not in last} | last
        other = {**keys[LENGTH], "description": f"Another name of `{LENGTH}`."}
        schema["properties"] = {LENGTH: None, **dict.fromkeys(_OTHER_LENGTHS, other), **keys}
        return schema

    @model_validator(mode="before")
    @classmethod
    def _names_of_others(cls, values: Any) -> Any:
        return one_length(values) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _long_enough(self) -> SamplingConfig:
        if self.min_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_tokens {self.min_tokens} is more than max_new_tokens {self.max_new_tokens}"
            )
        return self

    @field_validator("stop")
    @classmethod
    def _can_be_found(cls, stops: tuple[str, ...]) -> tuple[str, ...]:
        for stop in stops:
            if fault := stop_fault(stop):
                raise ValueError(f"{stop!r} {fault}")
        return stops

    @field_validator("stop_token_ids")
    @classmethod
    def _are_ids(cls, ids: tuple[int, ...]) -> tuple[int, ...]:
        if any(token < 0 for token in ids):
            raise ValueError("holds a negative number, which is no token's id")
        return ids

    @field_validator("temperature")
    @classmethod
    def _hot_or_greedy(cls, temperature: float) -> float:
        if 0 < temperature < 1e-5:
            raise ValueError("must be 0 (greedy) or at least 1e-5")
        return temperature
