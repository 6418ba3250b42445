"""Many jobs by date: acceptance, efficiency, speedup, cost and errors over the nights."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC

from rich.markup import escape
from rich.table import Table

from jobs.reports import charts
from jobs.reports.history import FIGURES, ReportedJob
from jobs.reports.page import environment

COLUMNS = (
    "rows",
    "errors",
    "tokens_per_second",
    "acceptance_rate",
    "block_efficiency",
    "speedup",
    "per_million_output_tokens",
    "cost",
)
_LEAST = {"block_efficiency": 1.0, "speedup": 1.0}
"""Where an axis begins at the latest; the others begin at 0."""

TREND_FIGURES = tuple(next(f for f in FIGURES if f.key == key) for key in COLUMNS)


def render(jobs: Sequence[ReportedJob]) -> Table:
    """One line per job, the oldest first."""
    figures = [figure for figure in TREND_FIGURES if figure.key != "cost"]  # 80 columns are few
    labels = [_SHORT.get(figure.key, figure.label) for figure in figures]
    table = Table("date", "job", *labels, box=None, padding=(0, 1), header_style="bold")
    for column in table.columns:
        column.no_wrap = True
    table.columns[1].min_width = 8
    for column in table.columns[2:]:
        column.justify = "right"
    for job in jobs:
        name = escape(job.name) if job.finished else f"{escape(job.name)} [yellow](not finished)[/]"
        texts = [figure.text(job) for figure in figures]
        table.add_row(f"{job.date.astimezone(UTC):%Y-%m-%d}", name, *texts)
    return table


_SHORT = {
    "rows": "rows",
    "errors": "errors",
    "tokens_per_second": "tok/s",
    "acceptance_rate": "accepted",
    "block_efficiency": "eff.",
    "per_million_output_tokens": "per M",
}


def page(jobs: Sequence[ReportedJob]) -> str:
    """The nights as an HTML page."""
    drawings = []
    for figure in TREND_FIGURES:
        values = [figure.of(job) for job in jobs]
        if figure.key == "rows" or all(value is None for value in values):
            continue
        speedup = figure.key == "speedup"
        intervals = [job.summary["speedup_ci"] for job in jobs] if speedup else ()
        currency = next((job.currency for job in jobs if job.currency), None)
        title = f"{figure.label}, {currency}" if figure.form == "money" else figure.label
        drawings.append(
            charts.trend(
                title[0].upper() + title[1:],
                [job.date for job in jobs],
                values,
                intervals,
                _LEAST.get(figure.key, 0.0),
            )
        )
    return (
        environment()
        .get_template("trend.html")
        .render(jobs=jobs, figures=TREND_FIGURES, charts=drawings)
    )
