"""Two jobs side by side: their figures, where their time went, and in what they were set apart."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from jobs.reports import charts
from jobs.reports.history import FIGURES, ReportedJob
from jobs.reports.page import environment

_APART = re.compile(r"(name|output|s3|output_s3|input\.s3)(\.|$)")
"""Settings in which any two jobs may differ."""


@dataclass(frozen=True)
class Line:
    """A figure of both jobs, as text, the ratio b / a, and how it is to be taken."""

    label: str
    a: str
    b: str
    ratio: float | None
    verdict: str = ""

    @property
    def ratio_text(self) -> str:
        """The ratio for people."""
        return "" if self.ratio is None else f"{self.ratio:.2f}×"


@dataclass(frozen=True)
class JobComparison:
    """Two jobs; ratios are b / a."""

    a: ReportedJob
    b: ReportedJob

    def lines(self) -> Iterator[Line]:
        """The figures that either job has."""
        for figure in FIGURES:
            a, b = figure.of(self.a), figure.of(self.b)
            if a is None and b is None:
                continue
            ratio = self._ratio(figure.key)
            verdict = ""
            if ratio is not None and figure.more_is and abs(ratio - 1) >= 0.005:
                verdict = "good" if (ratio > 1) == (figure.more_is == "better") else "bad"
            yield Line(figure.label, figure.text(self.a), figure.text(self.b), ratio, verdict)

    def state_lines(self) -> Iterator[Line]:
        """Seconds by state for a thousand output tokens: comparable for any amount of work."""
        a, b = (per_thousand_tokens(job) for job in (self.a, self.b))
        for state in sorted(a.keys() | b.keys(), key=lambda s: -(a.get(s, 0.0) + b.get(s, 0.0))):
            mine, theirs = a.get(state, 0.0), b.get(state, 0.0)
            ratio = theirs / mine if mine and theirs else None
            yield Line(state, f"{mine:,.3f}", f"{theirs:,.3f}", ratio)

    def settings(self) -> list[tuple[str, str, str]]:
        """Keys of the job files that differ, and both values."""
        a, b = _flat(self.a.config), _flat(self.b.config)
        keys = [key for key in dict.fromkeys([*a, *b]) if not _APART.match(key)]
        return [
            (key, str(a.get(key, "–")), str(b.get(key, "–")))
            for key in keys
            if a.get(key) != b.get(key)
        ]

    def caution(self) -> str | None:
        """Why the ratios do not compare like with like; None if they do."""
        others = []
        for what, *path in (("inputs", "input", "digest"), ("targets", "models", "target")):
            if _at(self.a.fingerprint, path) != _at(self.b.fingerprint, path):
                others.append(what)
        if others:
            return f"The jobs have different {' and '.join(others)}: not the same work."
        if not (self.a.finished and self.b.finished):
            return "Not both jobs are finished: not the same work."
        return None

    def to_json(self) -> dict[str, Any]:
        """Plain data; a ratio is null where it is not known."""
        return {
            "a": self.a.to_json(),
            "b": self.b.to_json(),
            "ratios": {figure.key: self._ratio(figure.key) for figure in FIGURES},
            "seconds_per_thousand_tokens": {
                "a": per_thousand_tokens(self.a),
                "b": per_thousand_tokens(self.b),
            },
            "settings": {key: [a, b] for key, a, b in self.settings()},
            "caution": self.caution(),
        }

    def _ratio(self, key: str) -> float | None:
        (figure,) = (each for each in FIGURES if each.key == key)
        a, b = figure.of(self.a), figure.of(self.b)
        if figure.form == "money" and self.a.currency != self.b.currency:
            return None
        return b / a if a and b is not None and a > 0 else None


def per_thousand_tokens(job: ReportedJob) -> dict[str, float]:
    """Seconds by state that a thousand output tokens took."""
    cost = job.summary["cost"] or {}
    seconds = cost.get("seconds_by_state") or job.summary["phase_seconds"]
    tokens = job.summary["output_tokens"]
    return {state: 1000 * value / tokens for state, value in seconds.items()} if tokens else {}


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _at(data: Mapping[str, Any], path: list[str]) -> Any:
    found: Any = data
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def render(comparison: JobComparison) -> RenderableType:
    """Both jobs as tables for the terminal."""
    styles = {"good": "green", "bad": "red", "": ""}
    figures = _table("", "A", "B", "B / A")
    for line in comparison.lines():
        ratio = f"[{styles[line.verdict]}]{line.ratio_text}[/]" if line.verdict else line.ratio_text
        figures.add_row(line.label, line.a, line.b, ratio)
    phases = _table("s per 1,000 tokens", "A", "B", "B / A")
    for line in comparison.state_lines():
        phases.add_row(line.label, line.a, line.b, line.ratio_text)
    parts: list[RenderableType] = [
        f"A  {escape(comparison.a.url)}",
        f"B  {escape(comparison.b.url)}",
        "",
        figures,
        "",
        phases,
    ]
    if caution := comparison.caution():
        parts += ["", f"[yellow]{caution}[/]"]
    if settings := comparison.settings():
        table = Table("setting", "A", "B", box=None, padding=(0, 2), header_style="bold")
        for row in settings:
            table.add_row(*map(escape, row))
        parts += ["", table]
    return Group(*parts)


def _table(*names: str) -> Table:
    table = Table(*names, box=None, padding=(0, 2), header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def page(comparison: JobComparison) -> str:
    """Both jobs as an HTML page."""
    jobs = {"A": comparison.a, "B": comparison.b}
    drawings = [
        charts.by_actor(
            "Time for a thousand output tokens",
            {name: per_thousand_tokens(job) for name, job in jobs.items()},
            "seconds",
        )
    ]
    positions = {name: job.summary.get("positions") or [] for name, job in jobs.items()}
    if any(positions.values()):
        drawings.append(charts.acceptance_lines(positions))
    return (
        environment()
        .get_template("compare.html")
        .render(comparison=comparison, jobs=jobs, charts=drawings)
    )
