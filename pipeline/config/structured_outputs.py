"""What a completion must be: a JSON Schema, an expression, a choice or a grammar."""

from __future__ import annotations

import functools
import json
from typing import Any

from pydantic import Field, model_validator

from pipeline.config.section import Section, example

_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As `json.dumps` writes it. Where white space is free, small models write it until they are cut
off; and what is fixed is known without asking the model."""


class StructuredOutputs(Section):
    """What each completion must be; exactly one key. It ends where this does."""

    model_config = example(
        {
            "json_schema": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            }
        }
    )

    json_schema: dict[str, Any] | None = Field(
        default=None,
        description="A JSON Schema. Objects are written with `, ` and `: `, on one line.",
    )
    json_object: bool = Field(default=False, description="Any JSON object.")
    regex: str | None = Field(
        default=None, min_length=1, description="A regular expression for the whole completion."
    )
    choice: tuple[str, ...] | None = Field(
        default=None, min_length=1, description="One of these texts."
    )
    grammar: str | None = Field(
        default=None, min_length=1, description="A grammar in Lark's form, from its rule `start`."
    )

    @model_validator(mode="after")
    def _one_that_compiles(self) -> StructuredOutputs:
        given = self._given
        if len(given) != 1:
            names = ", ".join(type(self).model_fields)
            raise ValueError(f"give exactly one of {names}; got {' and '.join(given) or 'none'}")
        self.text()
        return self

    @property
    def kind(self) -> str:
        """The key that is given."""
        return self._given[0]

    @property
    def _given(self) -> list[str]:
        """The keys that are given; `{}` is a schema, too, of any JSON."""
        fields = type(self).model_fields
        return [name for name in fields if getattr(self, name) not in (None, False)]

    @property
    def schema_of_json(self) -> dict[str, Any] | None:
        """The JSON Schema of what completions are; None: they need not be JSON."""
        return {"type": "object"} if self.json_object else self.json_schema

    def text(self) -> str:
        """The grammar, as `SamplingParams.grammar` has it.

        Raises:
            ValueError: it cannot be compiled; the message says why.
        """
        return _compiled(self.model_dump_json(exclude_none=True))


@functools.lru_cache(1024)
def _compiled(asked: str) -> str:
    from llguidance import LLMatcher

    kinds = json.loads(asked)
    schema = kinds.get("json_schema")
    if kinds.get("json_object"):
        schema = {"type": "object"}
    if schema is not None:
        made = LLMatcher.grammar_from_json_schema(schema, _JSON_STYLE)  # type: ignore[arg-type]
    elif "regex" in kinds:
        made = LLMatcher.grammar_from_regex(kinds["regex"])
    elif "choice" in kinds:
        texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in kinds["choice"])
        made = LLMatcher.grammar_from_lark(f"start: {texts}")
    else:
        made = LLMatcher.grammar_from_lark(kinds["grammar"])
    failed, (*said,) = LLMatcher.validate_grammar_with_warnings(made)
    if failed:
        raise ValueError(f"cannot be compiled: {' '.join(said).splitlines()[0]}")
    return made
