"""What a job did, from its committed files alone: as numbers and as a table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from jobs.reports.cost import committed_seconds, committed_seconds_of, read_cost
from jobs.terminal.amounts import money
from pipeline import layout
from pipeline.commit import manifest
from pipeline.commit.footer import read_records
from pipeline.commit.stats import summarise
from pipeline.config.job import S3Config
from pipeline.config.model_defaults import in_force
from pipeline.config.prices import Prices
from pipeline.observe.error_share import too_many
from pipeline.storage.folder import Folder

_INPUTS_SHOWN = 10
"""Input files in the terminal's table of calibration; the rest are in `stats/`."""


def read_summary(
    url: str, s3: S3Config, prices: Prices | None = None
) -> tuple[dict[str, Any], bool]:
    """A job's summary with its cost, and whether the job is finished.

    Args:
        url: the job's output folder.
        s3: how to reach it, if it is on S3.
        prices: a price table; None: that of the job's last run.

    Raises:
        UserError: there is no job in this folder.
    """
    output = manifest.open_output(url, s3)
    if output.read(layout.SUCCESS) is not None and (data := output.read(layout.MANIFEST)):
        # An older version's summary lacks what it did not measure.
        summary, finished = {**summarise([]), **json.loads(data)["summary"]}, True
        committed = committed_seconds_of(output)
    else:
        records = read_records(output, manifest.committed_ids(output))
        summary, finished = summarise(records), False
        committed = committed_seconds(records)
    cost = read_cost(output, summary, committed, prices)
    sampling = _sampling(json.loads(output.read(layout.JOB) or b"{}"))
    return {**summary, "cost": cost.to_json() if cost else None, "sampling": sampling}, finished


def _sampling(job: Mapping[str, Any]) -> dict[str, dict[str, Any]] | None:
    """Values of a job's sampling and where they are from; None: an older version noted none."""
    found = job.get(manifest.SAMPLING_FROM)
    values = job.get("config", {}).get("sampling", {})
    return found and {key: {"value": values[key], "from": found[key]} for key in found}


def sampling_said(summary: Mapping[str, Any]) -> str | None:
    """The sampling that was in force, and where it was from, in a line; None: it is not known."""
    if not (sampling := summary.get("sampling")):
        return None
    values, found = ({k: each[what] for k, each in sampling.items()} for what in ("value", "from"))
    return in_force(values, found)


def has_failed(output: Folder, summary: Mapping[str, Any]) -> bool:
    """Whether a job without `_SUCCESS` has come to its end, with too many rows in errors.

    Args:
        output: the job's.
        summary: of the units that are committed.
    """
    done = json.loads(output.read(layout.MANIFEST) or b"{}")
    rows, errors = summary["rows"], summary["errors"]
    if (done.get("rows_out"), done.get("rows_in_errors")) != (rows, errors):
        return False
    return too_many(errors, rows, done["config"].get("max_error_share", 1))


KNOWN = {
    "forced by a grammar": "forced",
    "found in its prompt's texts": "in_prompt",
    "found in other rows": "in_rows",
    "found in earlier jobs": "in_corpus",
}
"""Where candidates come from that no draft proposes, and how counts of them are called."""


def render(summary: Mapping[str, Any]) -> RenderableType:
    """The summary as a table for the terminal."""
    totals = Table(show_header=False, box=None, padding=(0, 2))
    totals.add_column(style="bold")
    totals.add_column(justify="right")
    totals.add_row("rows completed", f"{summary['rows']:,}")
    totals.add_row("rows in errors", f"{summary['errors']:,}")
    for name, rows in summary["errors_by_class"].items():
        totals.add_row(f"  {name}", f"{rows:,}", style="yellow")
    totals.add_row("prompt tokens", f"{summary['prompt_tokens']:,}")
    totals.add_row("output tokens", f"{summary['output_tokens']:,}")
    totals.add_row("tokens/s", _number(summary["tokens_per_second"], ",.1f"))
    totals.add_row("block efficiency", _number(summary["block_efficiency"], ".2f"))
    totals.add_row("acceptance rate", _number(summary["acceptance_rate"], ".1%"))
    for name, source in KNOWN.items():
        if verified := summary.get(f"verified_{source}"):
            rate = summary[f"accepted_{source}"] / verified
            totals.add_row(f"  of those {name}", f"{rate:.1%} of {verified:,}")
    for choice, nodes in by_choice(summary.get("nodes") or ()).items():
        if judged := sum(node["judged"] for node in nodes):
            rate = sum(node["accepted"] for node in nodes) / judged
            totals.add_row(f"  of the draft's {choice}", f"{rate:.1%} of {judged:,}")
    totals.add_row("speedup", _speedup(summary))

    if said := sampling_said(summary):
        totals.add_row("sampling", said.replace("; ", "\n"))
    cost = summary["cost"]
    if cost:
        _add_cost(totals, cost)
    parts: list[RenderableType] = [totals]
    if seconds := cost["seconds_by_state"] if cost else summary["phase_seconds"]:
        parts += ["", _states(seconds, cost)]
    if cost and cost["reconciled"]["ok"] is False:
        parts += ["", f"[yellow]{_unreconciled(cost['reconciled'])}[/]"]
    if summary["calibration"]:
        parts += ["", _calibration(summary["calibration"])]
    if fell_back := summary["actors_fell_back"]:
        parts += [
            "",
            f"[yellow]{fell_back} of the actors found the acceptance head out of calibration and "
            "went on with an online estimator; train it again on text like this.[/]",
        ]
    return Group(*parts)


def by_choice(nodes: Sequence[Mapping[str, int]]) -> dict[str, list[dict[str, int]]]:
    """Candidates that branch as positions, by which choice of the draft they were.

    Args:
        nodes: as in `summarise`.
    """
    found: dict[str, list[dict[str, int]]] = {}
    for rank, choice in enumerate(("first", "second", "third", "fourth")):
        own = [{**node, "position": node["depth"]} for node in nodes if node["rank"] == rank]
        if own:
            found[f"{choice} choices"] = own
    return found


def _states(seconds: Mapping[str, float], cost: Mapping[str, Any] | None) -> Table:
    """Where the time went and, if it is known, the money."""
    prices = cost["cost_by_state"] if cost else None
    names = ["state", "seconds", "share", *(["cost"] if prices else [])]
    table = Table(*names, box=None, padding=(0, 2), header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    whole = sum(seconds.values()) or 1.0
    for name, value in sorted(seconds.items(), key=lambda item: -item[1]):
        figures = [f"{value:,.1f}", f"{value / whole:.1%}"]
        if cost and prices:
            figures.append(money(prices[name], cost["currency"]))
        table.add_row(name, *figures)
    return table


def _add_cost(totals: Table, cost: Mapping[str, Any]) -> None:
    """Rows that say what the job cost."""
    if cost["total"] is None:
        unknown = escape(", ".join(cost["unpriced"]))
        totals.add_row("cost", f"[yellow]no price for {unknown}; give --prices FILE[/]")
        return
    shown = partial(money, currency=cost["currency"])
    totals.add_row("cost", shown(cost["total"]))
    totals.add_row("  per million output tokens", shown(cost["per_million_output_tokens"]))
    totals.add_row("  per thousand rows", shown(cost["per_thousand_rows"]))
    if cost["saved"] is not None:
        low, high = map(shown, cost["saved_ci"])
        saved = f"{shown(cost['saved'])} (95% CI {low} to {high})"
        totals.add_row("  saved by speculation", saved)
    totals.add_row("  prices", escape(cost["price_source"]))


def _unreconciled(found: Mapping[str, Any]) -> str:
    return (
        f"The ledger does not add up: it has {found['booked']:,.1f} s of actors, but Ray saw "
        f"{found['held']:,.1f} s ({found['difference']:.1%} apart)."
    )


def _speedup(summary: Mapping[str, Any]) -> str:
    """Measured speedup with its interval; one that loses stands out, with what to do."""
    if summary["speedup"] is None:
        return "– (too few control rounds)" if summary["drafted"] else "–"
    low, high = summary["speedup_ci"]
    text = (
        f"{summary['speedup']:.2f}x (95% CI {low:.2f}-{high:.2f}, "
        f"{summary['speedup_controls']} control rounds)"
    )
    if high >= 1:
        return text
    return f"[yellow]{text}: slower than without; try policy goodput or none[/]"


def _calibration(rows: list[dict[str, Any]]) -> Table:
    """How well acceptance was predicted, by kind of text."""
    table = Table("predicted", "judged", "mean", "accepted", "ECE", box=None, padding=(0, 2))
    table.header_style = "bold"
    for column in table.columns[1:]:
        column.justify = "right"
    inputs = [row["name"] for row in rows if row["by"] == "input"]
    # One input is all of them.
    shown = set(inputs[:_INPUTS_SHOWN] if len(inputs) > 1 else [])
    for row in rows:
        if row["by"] == "input" and row["name"] not in shown:
            continue
        name = {"all": "all", "input": row["name"], "context": f"context ≤ {row['name']}"}
        table.add_row(
            escape(name[row["by"]]),
            f"{row['judged']:,}",
            f"{row['predicted']:.3f}",
            f"{row['accepted']:.3f}",
            f"{row['ece']:.3f}",
        )
    if len(inputs) > _INPUTS_SHOWN:
        table.add_row(f"{len(inputs) - _INPUTS_SHOWN:,} more inputs: stats/calibration.parquet")
    return table


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
