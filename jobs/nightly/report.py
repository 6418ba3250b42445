"""A night's report, and the trend over nights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jobs.nightly.archive import Night
from jobs.nightly.card import filters_table, nights_table, speedup, table
from jobs.nightly.recipe import Recipe
from jobs.terminal.amounts import money

TREND = (
    "night",
    "rows",
    "kept",
    "accepted",
    "block eff.",
    "speedup",
    "per M tokens",
    "draft",
    "head",
)


def night_report(recipe: Recipe, night: Night, improvement: Mapping[str, Any] | None) -> str:
    """The report as Markdown."""
    parts = [
        f"# {recipe.name}, night of {night.date}",
        f"Published {night.published}.",
        nights_table([night]),
        "## Filters",
        filters_table([night]),
    ]
    if night.judge:
        parts += ["## Judge", _judge(night.judge)]
    if night.seeds_skipped:
        rows = [(reason, f"{count:,}") for reason, count in night.seeds_skipped.items()]
        parts += ["## Seeds left out", table(("why", "seeds"), rows)]
    parts += ["## Speculation", table(TREND, trend_rows([night]))]
    if improvement is not None:
        parts += ["## What the night taught", _improvement(improvement)]
    return "\n\n".join(parts) + "\n"


def _judge(judge: Mapping[str, Any]) -> str:
    mean = _number(judge["mean_score"], ".2f")
    counts = (f"{judge['judged']:,}", mean, f"{judge['output_tokens']:,}")
    return table(("model", "judged", "mean score", "output tokens"), [(judge["target"], *counts)])


def _improvement(record: Mapping[str, Any]) -> str:
    lines = []
    for each in record["candidates"]:
        lines.append(f"**{each['what']}: {each['decision']}.** {each['why']}")
    if not lines:
        lines.append(record.get("why", "Nothing was learned."))
    return "\n\n".join(lines)


def trend_rows(nights: Sequence[Night]) -> list[tuple[str, ...]]:
    """A line for each night, under the names of TREND."""
    rows: list[tuple[str, ...]] = []
    for night in nights:
        found = trend_of(night)
        rows.append(
            (
                night.date,
                f"{found['rows']:,}",
                _number(found["kept"], ".0%"),
                _number(found["acceptance_rate"], ".1%"),
                _number(found["block_efficiency"], ".2f"),
                speedup(night.summary),
                money(night.per_million, night.currency),
                found["draft"] or "–",
                found["head"] or "–",
            )
        )
    return rows


def trend_of(night: Night) -> dict[str, Any]:
    """A night's figures, as plain data."""
    summary = night.summary
    return {
        "night": night.date,
        "rows": night.total_rows,
        "kept": night.total_rows / night.conversations if night.conversations else None,
        "output_tokens": summary["output_tokens"],
        "acceptance_rate": summary["acceptance_rate"],
        "block_efficiency": summary["block_efficiency"],
        "speedup": summary["speedup"],
        "speedup_ci": summary["speedup_ci"],
        "cost": night.cost,
        "currency": night.currency,
        "per_million_output_tokens": night.per_million,
        "draft": night.models["draft"],
        "head": night.models["head"],
    }


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
