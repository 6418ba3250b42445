"""The section `sampling` of the job file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, GetJsonSchemaHandler, field_validator, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from pipeline.config.section import Section, StringList, example
from specdec.request import stop_fault

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


class SamplingConfig(Section):
    """How each row is sampled; a row's own `sampling_params` column overrides these."""

    model_config = example(
        {"max_new_tokens": 512, "temperature": 0.7, "top_p": 0.95, "stop": ["###"], "n": 4}
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
        other = {**keys[LENGTH], "description": f"Another name of `{LENGTH}`."}
        schema["properties"] = {LENGTH: None, **dict.fromkeys(_OTHER_LENGTHS, other), **keys}
        return schema

    @model_validator(mode="before")
    @classmethod
    def _names_of_others(cls, values: Any) -> Any:
        return one_length(values) if isinstance(values, dict) else values

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
