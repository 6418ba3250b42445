"""The section `sampling` of the job file."""

from __future__ import annotations

from pydantic import Field, field_validator

from pipeline.config.section import Section, StringList, example
from specdec.request import stop_fault

MAX_SAMPLES = 10_000
"""Most samples of one prompt. A unit holds all samples of its rows: lower unit_rows with many."""


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
