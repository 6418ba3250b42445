"""What all sections of the job file have in common."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


class Section(BaseModel):
    """A section of a job file or recipe.

    It is frozen, has no keys but its own, and no number that is infinite or NaN.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def example(values: dict[str, Any]) -> ConfigDict:
    """The `model_config` of a section with an example, for its JSON Schema and its page."""
    return ConfigDict(json_schema_extra={"examples": [values]})


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def no_null_byte(text: str) -> str:
    """The text, if it can be a path or a name.

    Raises:
        ValueError: it holds a null byte.
    """
    if "\0" in text:
        raise ValueError("holds a null byte, which no path or name can have")
    return text


StringList = Annotated[
    tuple[str, ...],
    BeforeValidator(_as_list, json_schema_input_type=str | tuple[str, ...]),
]
"""A list of strings; a single string is a list of one."""
