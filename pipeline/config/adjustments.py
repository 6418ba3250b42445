"""What a job or a row may ask of the target's logits: keys of the section `sampling`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator

from pipeline.config.section import Section
from specdec.request import MOST_NGRAM

Bias = Annotated[float, Field(ge=-100, le=100)]
TokenId = Annotated[int, Field(ge=0)]
Words = tuple[str | tuple[TokenId, ...], ...]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Adjustments(Section):
    """What changes the logits of single tokens, before anything is drawn; by vLLM's names."""

    repetition_penalty: float = Field(
        default=1.0,
        gt=0,
        description="Of each token of prompt and output, a positive logit is divided by it and a "
        "negative one multiplied. `1`: off.",
    )
    presence_penalty: float = Field(
        default=0.0,
        ge=-2,
        le=2,
        description="Taken off the logit of each token that the output holds. `0`: off.",
    )
    frequency_penalty: float = Field(
        default=0.0,
        ge=-2,
        le=2,
        description="Taken off the logit of a token as often as the output holds it. `0`: off.",
    )
    logit_bias: dict[int, Bias] = Field(
        default_factory=dict,
        description="Added to the logits of tokens, by their ids: `{1234: -100}` bans one.",
    )
    min_tokens: int = Field(
        default=0,
        ge=0,
        description="Nothing ends a completion before it has so many tokens. The tokens that "
        "would are banned until then, and stop strings are looked for behind them. Only a "
        "structured output that is whole ends all the same.",
    )
    bad_words: Annotated[
        tuple[str | tuple[TokenId, ...], ...],
        BeforeValidator(
            _as_list, json_schema_input_type=str | tuple[str | tuple[TokenId, ...], ...]
        ),
    ] = Field(
        default=(),
        description="Words, or sequences of token ids, that no completion holds. A word is banned "
        "in the tokens that it is at the start of a text and behind a space; others may make it.",
    )
    allowed_token_ids: tuple[TokenId, ...] | None = Field(
        default=None, min_length=1, description="The only tokens of a completion. `null`: all."
    )
    no_repeat_ngram_size: int = Field(
        default=0,
        ge=0,
        le=MOST_NGRAM,
        description="So many tokens follow each other only once in prompt and completion. "
        "`0`: off.",
    )

    @field_validator("bad_words")
    @classmethod
    def _not_empty(cls, words: Words) -> Words:
        for word in words:
            if not (word.strip() if isinstance(word, str) else word):
                raise ValueError("holds an empty word")
        return words
