"""What a trained head is worth, for people: a first look, a table and a plot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.table import Table

PARTS = {"held_out": "held-out rows", "other": "rows of another kind of text"}

_HEADS = {
    "as trained": "head, as trained",
    "de-biased": "head, de-biased",
    "head": "head, as saved",
}

_OUTPUTS = {"after": "candidate known", "before": "before the draw"}

_FIGURES = ("auc", "ece", "log_loss")

_CEILING = "ceiling: both models known"


def early_lines(look: Mapping[str, Any], share: float) -> Iterator[str]:
    """The first look at the labels (`specdec.training.head.early_look`), in a few lines."""
    yield (
        f"First look, after {share:.0%} of the rows ({look['positions']:,} positions): "
        f"{look['acceptance_rate']:.0%} of the candidates are accepted"
    )
    classes = look["by_first_position"]
    starts = [*classes, None]
    parts = [
        f"{_range(first, after)}: {classes[first]['acceptance_rate']:.0%}"
        for first, after in pairwise(starts)
        if first is not None
    ]
    yield f"  by output position  {' · '.join(parts)}"
    known = " · ".join(f"{name} {_number(auc)}" for name, auc in look["auc"].items())
    most = _number(look["ceiling"])
    yield f"  AUC without a head  {known}  (0.5: knows nothing, {most}: knows both models)"


def tables(metrics: Mapping[str, Any]) -> Iterator[Table]:
    """Every estimator's figures, and their ceiling: on held-out rows and another kind of text."""
    for part in PARTS:
        if part not in metrics:
            continue
        found = metrics[part]
        table = Table("estimator", "looks", "AUC", "ECE", "log-loss", box=None, padding=(0, 2))
        table.title = (
            f"{PARTS[part]}: {found['rows']:,}, {found['positions']:,} positions, "
            f"{found['acceptance_rate']:.0%} accepted"
        )
        table.title_justify = "left"
        for column in table.columns[2:]:
            column.justify = "right"
        for name, outputs in found["estimators"].items():
            for output, looks in _OUTPUTS.items():
                figures = [_number(outputs[output][key]) for key in _FIGURES]
                style = "bold" if name == "head" else None
                table.add_row(_label(name), looks, *figures, style=style)
        for output, looks in _OUTPUTS.items():
            figures = [_number(found["ceiling"][output][key]) for key in _FIGURES]
            table.add_row(_CEILING, looks, *figures, style="dim")
        yield table


def verdict(metrics: Mapping[str, Any]) -> str:
    """Whether the head knows more than what is free, and of how much that could be."""
    estimators = metrics["held_out"]["estimators"]
    losses = {
        name: each["after"]["log_loss"] for name, each in estimators.items() if name not in _HEADS
    }
    best = min(losses, key=lambda name: losses[name])
    head, free = estimators["head"]["after"]["log_loss"], losses[best]
    least = metrics["held_out"]["ceiling"]["after"]["log_loss"]
    if head < free:
        return (
            f"The head's log-loss is {1 - head / free:.1%} lower than that of {best}, the best of "
            f"the free estimators. Who knew both models would have {1 - least / free:.1%} less."
        )
    return (
        f"The head's log-loss is not lower than that of {best}, which is free ({head:.3f} and "
        f"{free:.3f}): it brings nothing here, or needs more rows."
    )


def plot(metrics: Mapping[str, Any], path: Path) -> None:
    """The reliability curves as a picture: predicted against observed acceptance."""
    from matplotlib.figure import Figure  # without pyplot there is no window system to ask for

    figure = Figure(figsize=(10, 5), layout="constrained")
    for axes, (output, looks) in zip(figure.subplots(1, 2), _OUTPUTS.items(), strict=True):
        axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
        for part, name, style in (
            ("held_out", "as trained", {"color": "tab:gray", "linestyle": ":"}),
            ("held_out", "de-biased", {"color": "tab:orange", "linestyle": "--"}),
            ("held_out", "head", {"color": "tab:blue"}),
            ("held_out", "confidence", {"color": "tab:green", "linestyle": "-."}),
            ("other", "head", {"color": "tab:red"}),
        ):
            if part not in metrics:
                continue
            measured = metrics[part]["estimators"][name][output]
            bins = [each for each in measured["bins"] if each[0] > 0]
            label = f"{_label(name)}, ECE {_number(measured['ece'])}"
            axes.plot(
                [predicted / count for count, predicted, _ in bins],
                [accepted / count for count, _, accepted in bins],
                marker="o",
                markersize=3,
                label=label if part == "held_out" else f"{label}, {PARTS[part]}",
                **style,
            )
        held_out = metrics["held_out"]
        axes.set(
            title=f"{looks}  ({held_out['positions']:,} positions of {held_out['rows']:,} rows)",
            xlabel="predicted acceptance",
            ylabel="observed acceptance",
            xlim=(0, 1),
            ylim=(0, 1),
        )
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def _label(name: str) -> str:
    return _HEADS.get(name, f"{name} (free)")


def _range(first: str, after: str | None) -> str:
    return f"{first}–{int(after) - 1}" if after is not None else f"{first}–"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
