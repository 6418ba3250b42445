"""Numbers as people read them."""

from __future__ import annotations

import math
from datetime import UTC, datetime


def number(value: float | None, form: str = ",.2f") -> str:
    """A number as text; a dash for what is not known."""
    return "–" if value is None else format(value, form)


def percent(value: float | None) -> str:
    """A share as text."""
    return number(value, ".1%")


def short(name: str) -> str:
    """The beginning of a long id."""
    return name[:8]


def moment(time: str | datetime) -> str:
    """A date and time as people write it, in UTC."""
    found = datetime.fromisoformat(time) if isinstance(time, str) else time
    return f"{found.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def amount(value: float, unit: str) -> str:
    """A number with its unit, in as many digits as people read: 12 s, $0.0042."""
    if unit == "s":
        return f"{value:,.1f} s" if value < 1000 else f"{value / 3600:,.2f} h"
    return money(value, unit)


def money(value: float | None, currency: str) -> str:
    """An amount of money, small ones with three digits; a dash for what is not known."""
    if value is None:
        return "–"
    sign, value = ("−", -value) if value < 0 else ("", value)
    digits = 2 if value >= 1 or value == 0 else min(8, 2 - math.floor(math.log10(value)))
    figure = f"{value:,.{digits}f}"
    return f"{sign}${figure}" if currency == "USD" else f"{sign}{figure} {currency}"
