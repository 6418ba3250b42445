"""What a profile found, for people: tables and a recommendation in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

PAYS = 1.03
"""A speedup below this is not worth a second model."""

CLEARLY = 1.02
"""How much faster another policy must be than `goodput` before it is recommended instead."""


def tables(found: Mapping[str, Any]) -> Iterator[Table]:
    """Acceptance by position and class, cost curves, predicted speedups."""
    yield _positions(found["acceptance_by_position"])
    yield _classes(found["acceptance_by_class"])
    yield _curves(found["costs"])
    yield _speedups(found["predictions"])


def _table(title: str, *columns: str) -> Table:
    table = Table(*columns, title=title, title_justify="left", box=None, padding=(0, 2))
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _positions(positions: Sequence[Mapping[str, Any]]) -> Table:
    table = _table(
        "P(candidate i is accepted | those before it are)", "i", "accepted", "95%", "met"
    )
    for each in positions:
        interval = f"{each['low']:.2f}-{each['high']:.2f}"
        table.add_row(str(each["position"]), f"{each['rate']:.2f}", interval, f"{each['met']:,}")
    return table


def _classes(classes: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("Acceptance by prompt class", "class", "rows", "positions", "accepted", "95%")
    for each in classes:
        interval = f"{each['low']:.2f}-{each['high']:.2f}"
        counts = (f"{each['rows']:,}", f"{each['positions']:,}")
        table.add_row(each["class"], *counts, f"{each['rate']:.2f}", interval)
    return table


def _curves(costs: Mapping[str, Sequence[tuple[int, float]]]) -> Table:
    table = _table("Milliseconds by packed tokens", "tokens", "draft step", "verification")
    draft, verify = dict(costs["draft"]), dict(costs["verify"])
    for tokens in sorted({*draft, *verify}):
        cells = (f"{1000 * c[tokens]:.1f}" if tokens in c else "" for c in (draft, verify))
        table.add_row(str(tokens), *cells)
    return table


def _speedups(predictions: Sequence[Mapping[str, Any]]) -> Table:
    names = list(predictions[0]["speedup"])
    adaptive = [name for name in names if name != "none" and not name.startswith("fixed")]
    table = _table(
        "Predicted speedup over no speculation",
        "live rows",
        "none, tokens/s",
        "best fixed",
        *adaptive,
        "goodput, 95%",
        "bound",
    )
    for each in predictions:
        best, speedup = each["best_fixed"], each["speedup"]
        low, high = each["goodput_interval"]
        table.add_row(
            str(each["live"]),
            f"{each['none_tokens_per_second']:.1f}",
            f"{speedup[best]:.2f} (k = {best.split()[1]})",
            *(f"{speedup[name]:.2f}" for name in adaptive),
            f"{low:.2f}-{high:.2f}",
            f"{each['bound']:.2f}",
        )
    return table


def recommend(predictions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What to write in the job file, and why.

    Args:
        predictions: by live batch, in rising order.

    Returns:
        speculate, policy, k (of fixed), slots, speedup, tokens_per_second, and reasons: sentences.
    """

    def speed(at: Mapping[str, Any], name: str) -> float:
        return float(at["none_tokens_per_second"] * at["speedup"][name])

    def choice(at: Mapping[str, Any]) -> str:
        best: str = max(at["speedup"], key=lambda name: at["speedup"][name])
        if at["speedup"][best] < PAYS:
            return "none"
        return best if speed(at, best) > CLEARLY * speed(at, "goodput") else "goodput"

    at = max(predictions, key=lambda each: speed(each, choice(each)))
    name, largest = choice(at), predictions[-1]["live"]
    policy, _, k = name.partition(" ")
    reasons = []
    if name == "none":
        best = max(at["speedup"], key=lambda each: at["speedup"][each])
        reasons.append(
            f"Do not speculate at {at['live']} live rows: the fastest policy would be {best}, at "
            f"{at['speedup'][best]:.2f} times the speed of none. goodput would switch speculation "
            f"off by itself, and reach {at['speedup']['goodput']:.2f}."
        )
    else:
        reasons.append(
            f"Speculate with policy {policy}{f', k: {k}' if k else ''}: {at['speedup'][name]:.2f} "
            f"times the speed of none at {at['live']} live rows."
        )
        best = at["best_fixed"]
        if policy == "goodput":
            reasons.append(
                f"The best fixed length there, {best.split()[1]}, would reach "
                f"{at['speedup'][best]:.2f}; goodput finds its own lengths, and switches "
                "speculation off by itself where it does not pay."
            )
        else:
            reasons.append(
                f"goodput, the usual choice, would reach {at['speedup']['goodput']:.2f}. {policy} "
                "does not switch itself off where it does not pay."
            )
    pays = [each["live"] for each in predictions if choice(each) != "none"]
    if pays and len(pays) < len(predictions):
        reasons.append(
            f"Speculation pays at {', '.join(map(str, pays))} live rows, of those tried."
        )
    reasons.append(
        f"slots: {at['live']} is the fastest of the live batches tried, "
        f"{speed(at, name):.1f} tokens/s."
        + (" More than the job's slots were not tried." if at["live"] == largest else "")
    )
    return {
        "speculate": name != "none",
        "policy": policy,
        "k": int(k) if k else None,
        "slots": at["live"],
        "speedup": at["speedup"][name],
        "tokens_per_second": speed(at, name),
        "reasons": reasons,
    }
