"""A job's report as one HTML file: no script, no network, everything escaped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from jobs.reports import charts
from jobs.reports.charts import Chart
from jobs.reports.findings import Findings, gather
from jobs.reports.summary import by_choice, sampling_said
from jobs.terminal.amounts import amount, moment, money, number, percent, short
from pipeline import layout
from pipeline.commit import manifest
from pipeline.config.job import S3Config
from pipeline.config.prices import Prices

_OVER_TIME = (
    ("Goodput over time", "tokens per second", "goodput", 0.0),
    ("Block efficiency over time", "tokens per row and round", "block_efficiency", 0.95),
    ("Acceptance rate over time", "accepted / verified", "acceptance_rate", 0.0),
)
"""Title, axis, property of `Steps`, and where the axis begins."""


@dataclass(frozen=True)
class Headline:
    """A headline number: what it is, how much, what belongs to it, and whether it is bad news."""

    label: str
    value: str
    detail: str = ""
    bad: bool = False


@dataclass(frozen=True)
class StateShare:
    """A state of actors: the seconds and the money that went into it, as text, and its share."""

    state: str
    seconds: str
    share: str
    cost: str


def write_page(url: str, s3: S3Config, prices: Prices | None = None) -> str:
    """Write a job's page into its output folder. Returns its path or URL.

    Raises:
        UserError: there is no job in this folder.
    """
    page = job_page(gather(url, s3, prices))
    output = manifest.open_output(url, s3)
    output.put(layout.REPORT, page.encode())
    return output.join(layout.REPORT)


def environment() -> Environment:
    """Templates of pages. All that is put into them is escaped."""
    result = Environment(
        loader=PackageLoader("jobs.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    result.filters |= {"number": number, "percent": percent, "short": short, "moment": moment}
    return result


def job_page(findings: Findings) -> str:
    """The HTML of a job's report."""
    summary = findings.summary
    return (
        environment()
        .get_template("job.html")
        .render(
            job=findings,
            summary=summary,
            cost=summary["cost"],
            headline=headline(summary),
            states=state_shares(summary),
            state_charts=_state_charts(findings),
            speculation_charts=_speculation_charts(findings),
            calibration_charts=_calibration_charts(findings),
            actor_names=_actor_names(findings),
            sampling=sampling_said(summary),
            config=yaml.safe_dump(
                findings.job.get("config", {}), sort_keys=False, allow_unicode=True
            ),
            money=money,
        )
    )


# --------------------------------------------------------------------- numbers


def headline(summary: Mapping[str, Any]) -> list[Headline]:
    """The numbers on top of a job's page."""
    rows, errors = summary["rows"], summary["errors"]
    error_share = errors / (rows + errors) if errors else 0.0
    figures = [
        Headline("rows completed", f"{rows:,}", f"in {summary['units']:,} units"),
        Headline(
            "rows in errors", f"{errors:,}", f"{error_share:.2%}" if errors else "", bool(errors)
        ),
        Headline(
            "tokens per second",
            number(summary["tokens_per_second"], ",.1f"),
            f"{summary['output_tokens']:,} output, {summary['prompt_tokens']:,} prompt tokens",
        ),
        _speedup(summary),
        Headline(
            "acceptance rate",
            percent(summary["acceptance_rate"]),
            f"{summary['accepted']:,} of {summary['verified']:,} candidates",
        ),
        Headline(
            "block efficiency",
            number(summary["block_efficiency"]),
            "tokens per row and target forward",
        ),
    ]
    return figures + (_cost_figures(summary["cost"]) if summary["cost"] else [])


def _speedup(summary: Mapping[str, Any]) -> Headline:
    if summary["speedup"] is None:
        return Headline("speedup", "–", "too few control rounds" if summary["drafted"] else "")
    low, high = summary["speedup_ci"]
    detail = f"95% interval {low:.2f}–{high:.2f}, {summary['speedup_controls']:,} control rounds"
    if high < 1:
        detail += "; slower than without: try policy goodput or none"
    return Headline("measured speedup", f"{summary['speedup']:.2f}×", detail, high < 1)


def _cost_figures(cost: Mapping[str, Any]) -> list[Headline]:
    in_money = partial(money, currency=cost["currency"])

    unpriced = f"no price for {', '.join(cost['unpriced'])}" if cost["unpriced"] else ""
    runs = f" in {len(cost['by_run'])} runs" if len(cost["by_run"]) > 1 else ""
    time = f"{amount(cost['seconds_held'], 's')} of actors{runs}"
    saved, interval = cost["saved"], cost["saved_ci"]
    detail = "the speedup was not measured"
    if saved is not None and interval:
        detail = f"against no speculation; 95% interval {' to '.join(map(in_money, interval))}"
    return [
        Headline("cost of the job", in_money(cost["total"]), unpriced or time),
        Headline("per million output tokens", in_money(cost["per_million_output_tokens"])),
        Headline("per thousand rows", in_money(cost["per_thousand_rows"])),
        Headline("saved", in_money(saved), detail, saved is not None and saved < 0),
    ]


def state_shares(summary: Mapping[str, Any]) -> list[StateShare]:
    """Seconds and money by state, the largest first."""
    cost = summary["cost"] or {}
    seconds = cost.get("seconds_by_state") or summary["phase_seconds"]
    prices = cost.get("cost_by_state") or {}
    whole = sum(seconds.values()) or 1.0
    return [
        StateShare(
            state,
            f"{value:,.1f}",
            f"{value / whole:.1%}",
            money(prices.get(state), cost.get("currency", "")),
        )
        for state, value in sorted(seconds.items(), key=lambda item: -item[1])
        if value > 0
    ]


# ---------------------------------------------------------------------- charts


def _actor_names(findings: Findings) -> dict[str, str]:
    """What to call actors, the busiest first: numbers, since ids say nothing to people."""
    return {each["actor"]: f"actor {i + 1}" for i, each in enumerate(findings.actors)}


def _state_charts(findings: Findings) -> list[Chart]:
    cost, names = findings.summary["cost"] or {}, _actor_names(findings)
    seconds = cost.get("seconds_by_state") or findings.summary["phase_seconds"]
    if not seconds:
        return []
    result = [charts.shares("Time by state", _positive(seconds))]
    if priced := cost.get("cost_by_state"):
        result.append(charts.shares("Money by state", _positive(priced), cost["currency"]))
    by_process = {names[a["actor"]]: _positive(a["phase_seconds"]) for a in findings.actors}
    if holders := cost.get("by_actor"):
        by_process = dict(_seconds_by_process(holders, names))
    result.append(charts.by_actor("Time by actor", by_process, "seconds"))
    return result


def _seconds_by_process(
    holders: Iterable[Mapping[str, Any]], names: Mapping[str, str]
) -> Iterator[tuple[str, dict[str, float]]]:
    """Every process that held resources, with its seconds by state; restarted actors by number."""
    lives = Counter[str]()
    for holder in holders:
        actor = holder["actor"]
        lives[actor] += 1
        life = f" ({lives[actor]})" if lives[actor] > 1 else ""
        name = f"{names.get(actor, short(actor))}{life}{_ending(holder['end'])}"
        yield name, _positive(holder["seconds_by_state"])


def _ending(end: str) -> str:
    return "" if end in ("done", "stopped") else f", {end}"


def _positive(parts: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in parts.items() if value > 0}


def _speculation_charts(findings: Findings) -> list[Chart]:
    line, names = findings.timeline, _actor_names(findings)
    result: list[Chart] = []
    if positions := findings.summary["positions"]:
        result.append(charts.acceptance_by_position(positions))
    if nodes := findings.summary.get("nodes"):
        result.append(charts.acceptance_lines(by_choice(nodes), "Acceptance by the draft's choice"))
    if findings.actors:
        result += [
            charts.over_time(title, ylabel, figure, line, names, least)
            for title, ylabel, figure, least in _OVER_TIME
        ]
    if findings.rounds:
        result.append(charts.candidates(findings.rounds))
    if any(control for _, _, control in findings.speeds):
        result.append(charts.speed_by_batch(findings.speeds))
    return result


def _calibration_charts(findings: Findings) -> list[Chart]:
    curves = findings.reliability
    inputs = {name: bins for (by, name), bins in curves.items() if by == "input"}
    contexts = {f"context ≤ {name}": bins for (by, name), bins in curves.items() if by == "context"}
    everything = curves.get(("all", ""))
    result = [charts.reliability("All candidates", {"all": everything})] if everything else []
    if len(inputs) > 1:
        most = sorted(inputs, key=lambda name: -sum(row[0] for row in inputs[name]))
        result.append(charts.reliability("By input", {name: inputs[name] for name in most}))
    if len(contexts) > 1:
        result.append(charts.reliability("By length of the context", contexts))
    return result
