"""The numbers that a stop policy takes, as its own file declares them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar


@dataclass(frozen=True, slots=True)
class Setting:
    """A number that a policy takes.

    Attributes:
        default: the policy's own.
        least, most: its bounds, both allowed.
        meaning: what it does, for help texts.
    """

    default: float
    least: float
    most: float
    meaning: str


Number = TypeVar("Number", int, float)


def setting(default: Number, least: float, most: float, meaning: str) -> Number:
    """A field of a policy's dataclass that is one of its settings; the arguments of `Setting`."""
    declared = Setting(default, least, most, meaning)
    number: Number = field(default=default, metadata={"setting": declared})
    return number
