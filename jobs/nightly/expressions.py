"""Templates and expressions of a recipe: jinja2 in its sandbox."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jinja2
import jinja2.meta
from jinja2.sandbox import SandboxedEnvironment


class TurnError(Exception):
    """A template or expression that gives nothing for a seed or conversation; it says why."""


class _Sandbox(SandboxedEnvironment):
    """In which `.` finds an object's fields before Python's methods, such as one called `items`."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        if isinstance(obj, dict) and attribute in obj:
            return obj[attribute]
        return super().getattr(obj, attribute)


def environment() -> SandboxedEnvironment:
    """Where templates run: what is not there is an error."""
    return _Sandbox(undefined=jinja2.StrictUndefined)


def checked_template(text: str) -> str:
    """The text, if it is a template.

    Raises:
        ValueError: it is none; the message says why.
    """
    try:
        environment().from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"is not a valid jinja2 template: {error}") from None
    return text


def variables(texts: Iterable[str]) -> set[str]:
    """What templates use that neither they nor jinja2 set."""
    own = environment()
    found: set[str] = set()
    for text in texts:
        found |= jinja2.meta.find_undeclared_variables(own.parse(text))
    return found - own.globals.keys()


class Expression:
    """A jinja2 expression that gives a number.

    Args:
        text: the expression.

    Attributes:
        names: the variables that it uses.

    Raises:
        ValueError: it is none; the message says why.
    """

    def __init__(self, text: str) -> None:
        try:
            self._value = environment().compile_expression(text, undefined_to_none=False)
            self.names = variables([f"{{{{ ({text}) }}}}"])
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"is not a valid jinja2 expression: {error}") from None

    def __call__(self, values: Mapping[str, Any]) -> float:
        """Its value.

        Args:
            values: of the variables.

        Raises:
            TurnError: it has none, or one that is no number.
        """
        try:
            value = self._value(**values)
            if isinstance(value, jinja2.Undefined):
                bool(value)  # raises, and says what is not there
            number = float(value) if isinstance(value, bool | int | float) else math.nan
        except Exception as error:  # an expression may run into anything that a model wrote
            raise TurnError(f"{type(error).__name__}: {error}") from None
        if not math.isfinite(number):
            raise TurnError(f"it gives {value!r}, which is no number")
        return number


def checked_expression(text: str) -> str:
    """The text, if it is an expression.

    Raises:
        ValueError: it is none; the message says why.
    """
    Expression(text)
    return text
