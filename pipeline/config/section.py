"""What all sections of the job file have in common."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationInfo, field_validator


class Section(BaseModel):
    """A section of a job file or recipe.

    It is frozen, has no keys but its own, and no number that is infinite, NaN or a truth value.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value_is_a_number(cls, value: object, info: ValidationInfo) -> object:
        if isinstance(value, bool) and info.field_name is not None:
            kinds = [*_kinds(cls.model_fields[info.field_name].annotation)]
            if bool not in kinds and (int in kinds or float in kinds):
                off = ", or `null` for none" if type(None) in kinds else ""
                raise ValueError(f"write a number{off}, not {str(value).lower()}")
        return value


def _kinds(annotation: object) -> Iterator[object]:
    """The types that an annotation is made of."""
    yield annotation
    for each in get_args(annotation):
        yield from _kinds(each)


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
