from __future__ import annotations

from datetime import date as Date

import pytest

from jobs.nightly.dates import between, due, parse_date, scheduled
from jobs.nightly.recipe import ScheduleConfig
from pipeline.errors import UserError

NIGHTLY, WORKDAYS = ScheduleConfig(), ScheduleConfig(cron="0 1 * * 1-5")
PUBLISHED = {"2026-11-16", "2026-11-18", "2026-11-20"}


def days(found: list[Date]) -> list[int]:
    return [date.day for date in found]


def test_due() -> None:
    date = Date(2026, 11, 24)
    assert days(due(NIGHTLY, [], date, 3)) == [24]
    assert days(due(NIGHTLY, PUBLISHED, date, 0)) == [24]
    assert days(due(NIGHTLY, PUBLISHED, date, 3)) == [21, 22, 23, 24]
    assert days(due(NIGHTLY, PUBLISHED, date, 99)) == [17, 19, 21, 22, 23, 24]
    # A weekend without a night was not missed.
    assert days(due(WORKDAYS, PUBLISHED, date, 99)) == [17, 19, 23, 24]
    assert days(due(NIGHTLY, PUBLISHED, Date(2026, 11, 10), 3)) == [10]


def test_a_schedule_with_several_runs_a_day_has_one_night_a_day() -> None:
    often = ScheduleConfig(cron="0 */6 * * *")
    assert days(scheduled(often, Date(2026, 11, 1), Date(2026, 11, 3))) == [1, 2, 3]


def test_between() -> None:
    assert days(between(Date(2026, 11, 29), Date(2026, 12, 1))) == [29, 30, 1]
    with pytest.raises(UserError, match="is after --to"):
        between(Date(2026, 12, 1), Date(2026, 11, 1))


def test_parse_date() -> None:
    assert parse_date("2026-11-23") == Date(2026, 11, 23)
    with pytest.raises(UserError, match="write a date as 2026-11-23"):
        parse_date("23.11.2026")
    with pytest.raises(UserError, match="--to 2999-01-01: that night is still to come"):
        parse_date("2999-01-01", "--to")
