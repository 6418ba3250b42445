"""What a profile found, for people: tables and a recommendation in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

PAYS = 1.03
"""A speedup below this is not worth a second model."""

CLEARLY = 1.02
"""How much faster another policy must be than `goodput` before it is recommended instead."""


LOOK_UPS = "look-ups"
"""What needs no draft: candidates that followed the same tokens before."""

NONE = "none"
"""What stands for no draft, and for no speculation."""


def tables(found: Mapping[str, Any]) -> Iterator[tuple[str, Table]]:
    """Titles and tables: acceptance by position and class, cost curves, predicted speedups."""
    yield (
        "P(candidate i is accepted | those before it are)",
        _positions(found["acceptance_by_position"]),
    )
    yield "Acceptance by class of prompt", _classes(found["acceptance_by_class"])
    costs = found["costs"]
    curves = {"draft step": costs["draft"], "verification": costs["verify"]}
    yield "Milliseconds by packed tokens", _curves(curves)
    yield (
        "Predicted speedup over no speculation; 95%: of goodput, over rows",
        _speedups(found["predictions"]),
    )


def _table(*columns: str) -> Table:
    table = Table(*columns, box=None, padding=(0, 1), collapse_padding=True, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _interval(low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None else f"{low:.2f}-{high:.2f}"


def _positions(positions: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("i", "accepted", "95%", "met")
    for each in positions:
        interval = _interval(each["low"], each["high"])
        table.add_row(str(each["position"]), f"{each['rate']:.2f}", interval, f"{each['met']:,}")
    return table


def _classes(classes: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("class", "rows", "positions", "accepted", "95%")
    for each in classes:
        counts = (f"{each['rows']:,}", f"{each['positions']:,}", f"{each['rate']:.2f}")
        table.add_row(escape(each["class"]), *counts, _interval(each["low"], each["high"]))
    return table


def _curves(curves: Mapping[str, Sequence[tuple[int, float]]]) -> Table:
    """Costs by tokens; a curve a column, in order."""
    table = _table("tokens", *map(escape, curves))
    columns = [dict(curve) for curve in curves.values()]
    for tokens in sorted({tokens for column in columns for tokens in column}):
        cells = (f"{1000 * c[tokens]:.1f}" if tokens in c else "" for c in columns)
        table.add_row(str(tokens), *cells)
    return table


def _speedups(predictions: Sequence[Mapping[str, Any]]) -> Table:
    names = list(predictions[0]["speedup"])
    adaptive = [name for name in names if name not in ("none", "goodput") and " " not in name]
    table = _table("live", "none t/s", "fixed (k)", *adaptive, "goodput", "95%", "bound")
    for each in predictions:
        best, speedup = each["best_fixed"], each["speedup"]
        table.add_row(
            str(each["live"]),
            f"{each['none_tokens_per_second']:.1f}",
            f"{speedup[best]:.2f} ({best.split()[1]})",
            *(f"{speedup[name]:.2f}" for name in adaptive),
            f"{speedup['goodput']:.2f}",
            _interval(*each["goodput_interval"]),
            f"{each['bound']:.2f}",
        )
    return table


def comparison(found: Mapping[str, Any]) -> Iterator[tuple[str, Table]]:
    """Titles and tables of drafts side by side: what each proposes, costs and brings."""
    drafts = found["drafts"]
    if drafts:
        yield "P(candidate i is accepted | those before it are)", _proposals(drafts)
        curves = {f"step of {name}": each["costs"]["draft"] for name, each in drafts.items()}
        curves["verification"] = found["costs"]["verify"]
        yield "Milliseconds by packed tokens", _curves(curves)
    yield "What look-ups propose", _looked_up(found["look_ups"])
    yield (
        "Predicted speed over none: a draft's with goodput, and 95% over rows; look-ups' by suffix",
        _by_live(found["by_live"]),
    )


def _proposals(drafts: Mapping[str, Any]) -> Table:
    most = max(len(each["acceptance_by_position"]) for each in drafts.values())
    table = _table("draft", *(f"i={i}" for i in range(1, most + 1)))
    for name, each in drafts.items():
        rates = (f"{at['rate']:.2f}" for at in each["acceptance_by_position"])
        table.add_row(escape(name), *rates)
    return table


def _looked_up(found: Mapping[str, Any]) -> Table:
    table = _table("candidates a round", "accepted", "tokens a round")
    rate = found["acceptance_rate"]
    table.add_row(
        f"{found['candidates_a_round']:.2f}",
        "-" if rate is None else f"{rate:.2f}",
        f"{found['tokens_a_round']:.2f}",
    )
    return table


def _by_live(by_live: Sequence[Mapping[str, Any]]) -> Table:
    names = list(by_live[0]["speedup"])
    table = _table("live", "none t/s", *map(escape, names), "use")
    for at in by_live:
        cells = []
        for name in names:
            interval = at["interval"].get(name)
            said = f" ({_interval(*interval)})" if interval else ""
            cells.append(f"{at['speedup'][name]:.2f}{said}")
        speed = f"{at['none_tokens_per_second']:.1f}"
        table.add_row(str(at["live"]), speed, *cells, escape(at["use"]))
    return table


def which_draft(by_live: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Which draft to use at which live batch, in sentences.

    Args:
        by_live: in rising order, with what to `use` at each `live` batch.
    """
    runs: list[list[Mapping[str, Any]]] = []
    for at in by_live:
        if not runs or runs[-1][0]["use"] != at["use"]:
            runs.append([])
        runs[-1].append(at)
    parts = []
    for number, run in enumerate(runs, start=1):
        name = run[0]["use"]
        said = name if name != NONE else "no draft"
        if name != NONE:
            speeds = [f"{at['speedup'][name]:.2f}" for at in run]
            ends = dict.fromkeys([speeds[0], speeds[-1]])
            said += f" ({' to '.join(ends)} times the speed of none)"
        if number < len(runs):
            last = run[-1]["live"]
            said += f" up to {last} live row{'s' if last > 1 else ''}"
        parts.append(said)
    uses = {run[0]["use"] for run in runs}
    if uses == {NONE}:
        yield "Do not speculate: models.draft: null and policy: none."
        return
    yield f"Use {', then '.join(parts)}."
    if LOOK_UPS in uses:
        yield "look-ups: models.draft: null. In a whole job they find more than in a few rows."


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
        others = [each for each in at["speedup"] if each not in ("none", "goodput")]
        best = max(others, key=lambda each: at["speedup"][each])
        reasons.append(
            f"Do not speculate at {at['live']} live rows: {best}, the best of the other policies, "
            f"would be {at['speedup'][best]:.2f} times as fast as none. goodput switches "
            "speculation off by itself where it does not pay, and would reach "
            f"{at['speedup']['goodput']:.2f}."
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
