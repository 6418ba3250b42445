"""Which nights a run makes."""

from __future__ import annotations

from collections.abc import Collection
from datetime import date as Date
from datetime import datetime, time, timedelta
from zoneinfo import ZoneInfo

from cronsim import CronSim

from jobs.nightly.recipe import ScheduleConfig
from pipeline.errors import UserError

_DAY = timedelta(days=1)


def parse_date(text: str, option: str = "--date") -> Date:
    """A date as YYYY-MM-DD.

    Raises:
        UserError: it is none, or one to come.
    """
    try:
        date = Date.fromisoformat(text)
    except ValueError:
        raise UserError(f"{option} {text}: write a date as 2026-11-23") from None
    if date > Date.today() + _DAY:
        raise UserError(f"{option} {text}: that night is still to come")
    return date


def today(schedule: ScheduleConfig) -> Date:
    """The date of tonight, in the schedule's time zone."""
    return datetime.now(ZoneInfo(schedule.timezone)).date()


def scheduled(schedule: ScheduleConfig, first: Date, last: Date) -> list[Date]:
    """Dates from `first` to `last` on which the schedule has a night."""
    found: list[Date] = []
    start = datetime.combine(first, time.min) - timedelta(minutes=1)
    for moment in CronSim(schedule.cron, start):
        if moment.date() > last:
            break
        if moment.date() not in found[-1:]:
            found.append(moment.date())
    return found


def due(schedule: ScheduleConfig, published: Collection[str], date: Date, most: int) -> list[Date]:
    """A night, after those before it that were missed.

    Args:
        schedule: says which dates have a night.
        published: dates of nights that there are. Nothing before the first one was missed.
        date: the night.
        most: missed nights at most, the latest ones.

    >>> due(ScheduleConfig(), {"2026-11-20", "2026-11-22"}, Date(2026, 11, 24), 3)
    [datetime.date(2026, 11, 21), datetime.date(2026, 11, 23), datetime.date(2026, 11, 24)]
    """
    if not published or not most:
        return [date]
    first = Date.fromisoformat(min(published))
    missed = [
        each
        for each in scheduled(schedule, first, date - _DAY)
        if each.isoformat() not in published
    ]
    return [*missed[-most:], date]


def between(first: Date, last: Date) -> list[Date]:
    """All dates of a back-fill.

    Raises:
        UserError: they are in the wrong order.
    """
    if last < first:
        raise UserError(f"--from {first} is after --to {last}")
    return [first + n * _DAY for n in range((last - first).days + 1)]
