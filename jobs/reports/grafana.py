"""`specbatch grafana`: a Grafana dashboard over the live metrics, made here so as to fit them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs.terminal.console import explained, out
from pipeline.errors import UserError
from pipeline.observe.metrics import COUNTERS, GAUGES

_WIDTH, _HEIGHT = 8, 8
_RANGE = "$__rate_interval"
_WHERE = '{job_name=~"$job", actor=~"$actor"}'


def grafana(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="Where to write it; without: standard output."),
    ] = None,
) -> None:
    """Write the Grafana dashboard of the live metrics that actors export through Ray.

    Import it in Grafana (Dashboards, New, Import), with the Prometheus that scrapes your Ray
    cluster as its data source. `specbatch status` shows the same figures without either.

    For example:

        specbatch grafana specbatch-dashboard.json
    """
    with explained():
        text = json.dumps(dashboard(), indent=2)
        if file is None:
            print(text)
            return
        try:
            file.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{file}: {error.strerror or error}") from None
        out.print(f"Wrote {file}", highlight=False, soft_wrap=True)


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana imports it."""
    tokens, cost = _rate("specbatch_output_tokens"), _rate("specbatch_cost")
    accepted, verified = _rate("specbatch_accepted"), _rate("specbatch_verified")
    row_rounds, spent = _rate("specbatch_row_rounds"), _counter("specbatch_cost")
    panels = [
        ("Goodput, tokens/s", "short", {"all actors": f"sum({tokens})"}),
        ("Goodput by actor, tokens/s", "short", {"{{actor}}": _gauge("specbatch_goodput")}),
        (
            "Rows per minute",
            "short",
            {
                "completed": f"60 * sum({_rate('specbatch_rows')})",
                "in errors": f"60 * sum({_rate('specbatch_row_errors')})",
            },
        ),
        (
            "Acceptance rate",
            "percentunit",
            {
                "all actors": f"sum({accepted}) / sum({verified})",
                "{{actor}}": _gauge("specbatch_acceptance_rate"),
            },
        ),
        ("Block efficiency", "short", {"all actors": f"sum({tokens}) / sum({row_rounds})"}),
        (
            "Candidates per row and round (K)",
            "short",
            {
                "verified": f"sum({verified}) / sum({row_rounds})",
                "drafted": f"sum({_rate('specbatch_drafted')}) / sum({row_rounds})",
                "verified, {{actor}}": _gauge("specbatch_candidates_per_round"),
            },
        ),
        ("Live batch", "short", {"{{actor}}": _gauge("specbatch_live_batch")}),
        ("Rounds per second", "short", {"all actors": f"sum({_rate('specbatch_rounds')})"}),
        (
            "Where the time goes, actors",
            "short",
            {"{{phase}}": f"sum by (phase) ({_rate('specbatch_phase_seconds')})"},
        ),
        ("Cost per hour", "short", {"all actors": f"3600 * sum({cost})"}),
        (
            "Cost per million output tokens",
            "short",
            {"all actors": f"1e6 * sum({cost}) / sum({tokens})"},
        ),
        (
            "Spent so far",
            "short",
            {"{{job_name}}": f"sum by (job_name) ({spent})"},
        ),
    ]
    return {
        "title": "specbatch",
        "uid": "specbatch",
        "tags": ["specbatch", "ray"],
        "timezone": "browser",
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_source(), _choice("job", "job_name"), _choice("actor", "actor")]},
        "panels": [_panel(i, *panel) for i, panel in enumerate(panels)],
    }


def exported(name: str) -> str:
    """A metric's name as Prometheus gets it from Ray."""
    if name in COUNTERS:
        return f"ray_{name}_total"
    if name in GAUGES:
        return f"ray_{name}"
    raise KeyError(name)


def _counter(name: str) -> str:
    return f"{exported(name)}{_WHERE}"


def _gauge(name: str) -> str:
    return f"{exported(name)}{_WHERE}"


def _rate(name: str) -> str:
    return f"rate({_counter(name)}[{_RANGE}])"


_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def _panel(index: int, title: str, unit: str, series: dict[str, str]) -> dict[str, Any]:
    stacked = title.startswith("Where")
    custom = {"fillOpacity": 60 if stacked else 8, "showPoints": "never"}
    if stacked:
        custom["stacking"] = {"mode": "normal", "group": "A"}  # type: ignore[assignment]
    return {
        "id": index + 1,
        "type": "timeseries",
        "title": title,
        "datasource": _SOURCE,
        "gridPos": {
            "x": _WIDTH * (index % 3),
            "y": _HEIGHT * (index // 3),
            "w": _WIDTH,
            "h": _HEIGHT,
        },
        "fieldConfig": {"defaults": {"unit": unit, "min": 0, "custom": custom}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}},
        "targets": [
            {"refId": chr(65 + i), "datasource": _SOURCE, "expr": expression, "legendFormat": name}
            for i, (name, expression) in enumerate(series.items())
        ],
    }


def _source() -> dict[str, Any]:
    return {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Source"}


def _choice(name: str, label: str) -> dict[str, Any]:
    query = f"label_values({exported('specbatch_rows')}, {label})"
    return {
        "name": name,
        "type": "query",
        "datasource": _SOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }
