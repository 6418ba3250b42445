"""Charts as inline SVG: small, without scripts, in the page's own colours, light or dark."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jobs.reports.timeline import Array, Timeline
from jobs.terminal.amounts import amount

# A chart is as wide as a phone, so that its letters keep their size there.
_WIDTH, _HEIGHT = 5.0, 3.4
_INK = "#010203"
"""Stands for the page's text colour until the SVG is written."""

_COLOURS = ("#3b82f6", "#f59e0b", "#10b981", "#ef4444", "#8b5cf6", "#06b6d4", "#ec4899", "#84cc16")
_GREY = "#9ca3af"
STATE_COLOURS = {
    "verify": "#3b82f6",
    "draft": "#10b981",
    "prefill": "#8b5cf6",
    "control": "#06b6d4",
    "sample": "#84cc16",
    "decide": "#ec4899",
    "host": "#f97316",
    "load": "#f59e0b",
    "profile": "#eab308",
    "warmup": "#ca8a04",
    "start": "#a16207",
    "idle": "#9ca3af",
    "lost": "#ef4444",
}
_STYLE: Any = {  # matplotlib types its keys one by one
    "svg.fonttype": "none",  # text stays text: small, sharp, to be searched
    "svg.hashsalt": "specbatch",
    "text.parse_math": False,  # a file may be called $x$
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 11.5,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.6,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "legend.fontsize": 10.5,
    "axes.labelsize": 11,
    "legend.handlelength": 1.2,
    "legend.columnspacing": 1.2,
}
_MOST_LINES = 8
"""Lines in one chart: as many as there are colours, and as eyes can tell apart."""

_FEW = 30
"""Fewer candidates than this say little about a position."""


@dataclass(frozen=True)
class Chart:
    """A chart on a page.

    Attributes:
        title: its heading.
        svg: the drawing.
        note: how to read it.
    """

    title: str
    svg: Markup
    note: str = ""


class _Drawing:
    """One pair of axes in the page's style; `chart` ends it."""

    def __init__(self, height: float = _HEIGHT) -> None:
        self._height = height

    def __enter__(self) -> _Drawing:
        self._context = matplotlib.rc_context(_STYLE)
        self._context.__enter__()
        self.figure = Figure(figsize=(_WIDTH, self._height), layout="constrained")
        self.axes: Axes = self.figure.subplots()
        return self

    def __exit__(self, *error: object) -> None:
        self._context.__exit__(None, None, None)

    def chart(self, title: str, note: str = "") -> Chart:
        """The drawing as inline SVG."""
        file = io.StringIO()
        with warnings.catch_warnings():
            # The reader's fonts may have what this machine's lack.
            warnings.filterwarnings("ignore", "Glyph .* missing from")
            self.figure.savefig(
                file, format="svg", transparent=True, metadata={"Date": None, "Title": title}
            )
        svg = file.getvalue()
        svg = svg[svg.index("<svg") :]
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
        # Ids that nothing refers to, and which every chart of a page would repeat.
        svg = re.sub(r' id="[a-z]+_[\d_]+"', "", svg)
        svg = svg.replace(_INK, "currentColor")
        svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
        label = f'<svg role="img" aria-label="{escape(title)}" '
        return Chart(title, Markup(svg.replace("<svg ", label, 1)), note)


# ------------------------------------------------------------- time and money


def shares(title: str, seconds: Mapping[str, float], unit: str = "s") -> Chart:
    """What a whole was spent on: one bar for each part, the largest on top."""
    parts = sorted(seconds.items(), key=lambda part: part[1])
    whole = sum(seconds.values()) or 1.0
    with _Drawing(0.7 + 0.28 * len(parts)) as drawing:
        axes = drawing.axes
        names, values = [name for name, _ in parts], [value / whole for _, value in parts]
        colours = [STATE_COLOURS.get(name, _GREY) for name in names]
        bars = axes.barh(names, [100 * value for value in values], color=colours)
        figures = [f"{amount(value, unit)} · {value / whole:.1%}" for _, value in parts]
        axes.bar_label(bars, figures, padding=3, fontsize=10.5)
        axes.set(xlim=(0, 100 * max(values, default=1.0) * 1.65 + 1e-9), xlabel="% of the whole")
        axes.grid(axis="y", visible=False)
        return drawing.chart(title)


def by_actor(title: str, actors: Mapping[str, Mapping[str, float]], xlabel: str) -> Chart:
    """Stacked bars: for each actor, what its time or money was spent on."""
    shown = list(reversed(list(actors.items())[:12]))
    parts = sorted(
        {part for _, spent in shown for part in spent},
        key=lambda part: -sum(spent.get(part, 0.0) for _, spent in shown),
    )
    with _Drawing(1.6 + 0.35 * len(shown) + 0.2 * (len(parts) // 4)) as drawing:
        axes = drawing.axes
        names = [name for name, _ in shown]
        left = np.zeros(len(shown))
        for part in parts:
            values = np.array([spent.get(part, 0.0) for _, spent in shown])
            axes.barh(names, values, left=left, color=STATE_COLOURS.get(part, _GREY), label=part)
            left += values
        axes.set(xlabel=xlabel)
        axes.grid(axis="y", visible=False)
        if parts:
            drawing.figure.legend(loc="outside upper left", ncols=4)
        more = len(actors) - len(shown)
        return drawing.chart(title, f"{more:,} more actors are not drawn." if more else "")


# ------------------------------------------------------------------ speculation


def acceptance_by_position(positions: Sequence[Mapping[str, Any]]) -> Chart:
    """Acceptance rate of the first, second, ... candidate, with 95% intervals."""
    at = np.array([row["position"] for row in positions])
    judged = np.array([row["judged"] for row in positions], float)
    accepted = np.array([row["accepted"] for row in positions], float)
    rate = accepted / judged
    low, high = _wilson(rate, judged)
    with _Drawing() as drawing:
        axes = drawing.axes
        few = judged < _FEW
        axes.bar(at[~few], rate[~few], color=_COLOURS[0], alpha=0.85)
        axes.bar(at[few], rate[few], color=_COLOURS[0], alpha=0.25)
        errors = [np.maximum(rate - low, 0), np.maximum(high - rate, 0)]
        axes.errorbar(at, rate, errors, fmt="none", ecolor=_INK, elinewidth=0.9, capsize=2)
        axes.set(
            ylim=(0, 1), xlabel="position of the candidate in its round", ylabel="accepted / judged"
        )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="x", visible=False)
        note = (
            "Of the candidates at a position whose predecessors were all accepted, the share that "
            f"was accepted, with 95% intervals. Judged: {_list(judged)}"
            + (f"; pale: fewer than {_FEW}." if few.any() else ".")
        )
        return drawing.chart("Acceptance by position", note)


def acceptance_lines(
    sides: Mapping[str, Sequence[Mapping[str, Any]]], title: str = "Acceptance by position"
) -> Chart:
    """Acceptance by position of several jobs, or choices of the draft, as lines."""
    with _Drawing() as drawing:
        axes = drawing.axes
        for (name, positions), colour in zip(sides.items(), _COLOURS, strict=False):
            known = [row for row in positions if row["judged"] >= _FEW]
            at = [row["position"] for row in known]
            rate = [row["accepted"] / row["judged"] for row in known]
            axes.plot(at, rate, color=colour, marker="o", markersize=4, label=name)
        axes.set(ylim=(0, 1), xlabel="position of the candidate", ylabel="accepted / judged")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        drawing.figure.legend(loc="outside upper left", ncols=4)
        note = f"Positions at which at least {_FEW} candidates were judged."
        return drawing.chart(title, note)


def candidates(rounds: Mapping[int, int]) -> Chart:
    """How many candidates rounds verified.

    Args:
        rounds: rounds of rows by candidates verified.
    """
    at = np.array(sorted(rounds))
    whole = sum(rounds.values()) or 1
    with _Drawing() as drawing:
        axes = drawing.axes
        axes.bar(at, [100 * rounds[k] / whole for k in at], color=_COLOURS[4], alpha=0.85)
        axes.set(xlabel="candidates verified", ylabel="% of rounds")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="x", visible=False)
        mean = sum(k * n for k, n in rounds.items()) / whole
        return drawing.chart("Candidates per round", f"On average {mean:.2f} for each row.")


def speed_by_batch(speeds: Sequence[tuple[int, float | None, float | None]]) -> Chart:
    """Tokens per second by live batch, with speculation and without.

    Args:
        speeds: class of live batch, tokens per second with, and in control rounds without; None
            where there were none.
    """
    at = np.arange(len(speeds))
    with _Drawing() as drawing:
        axes = drawing.axes
        for i, (label, colour) in enumerate(
            (("with speculation", _COLOURS[0]), ("control rounds", _GREY))
        ):
            values = [speed[1 + i] or 0.0 for speed in speeds]
            axes.bar(at + (i - 0.5) * 0.38, values, width=0.36, color=colour, label=label)
        names = [f"{k // 2 + 1}–{k}" if k > 2 else str(k) for k, _, _ in speeds]
        axes.set_xticks(at, names)
        axes.set(xlabel="live batch", ylabel="tokens per second")
        axes.grid(axis="x", visible=False)
        drawing.figure.legend(loc="outside upper left", ncols=2)
        return drawing.chart("Speed by live batch", "Rounds in which no prompt was being read.")


def _wilson(rate: Array, n: Array, z: float = 1.96) -> tuple[Array, Array]:
    """Wilson's interval of a proportion."""
    middle = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return middle - half, middle + half


def _list(numbers: Array) -> str:
    shown = ", ".join(f"{number:,.0f}" for number in numbers[:8])
    return f"{shown}, …" if len(numbers) > 8 else shown


def over_time(
    title: str, ylabel: str, figure: str, line: Timeline, names: Mapping[str, str], least: float = 0
) -> Chart:
    """A figure over the job's time: of all actors together and of each of the busiest.

    Args:
        title: of the chart.
        ylabel: of its axis.
        figure: a property of `Steps`.
        line: the timeline.
        names: what to call each actor, the busiest first.
        least: where the axis begins.
    """
    shown = [actor for actor in names if len(line.actors) > 1][:_MOST_LINES]
    with _Drawing() as drawing:
        axes, scale, unit = drawing.axes, *_time_scale(line)
        x, values = line.edges / scale, getattr(line.total, figure)
        axes.stairs(values, x, baseline=None, color=_COLOURS[0], lw=2.2, label="all")
        for actor, colour in zip(shown, (*_COLOURS[1:], _GREY), strict=False):
            of_actor = getattr(line.actors[actor], figure)
            axes.stairs(of_actor, x, baseline=None, color=colour, label=names[actor])
            values = np.concatenate([values, of_actor])
        if shown:
            drawing.figure.legend(loc="outside upper left", ncols=3)
        for pause in line.pauses:
            axes.axvline(pause / scale, color=_GREY, linestyle=":", linewidth=1)
        top = np.nanmax(values, initial=least)
        axes.set(
            ylim=(least, least + 1.08 * (top - least) if top > least else least + 1),
            xlabel=f"working time, {unit}",
            ylabel=ylabel,
        )
        more = len(line.actors) - len(shown) if shown else 0
        notes = ["A unit's tokens are spread evenly over its time."]
        notes += ["Dotted: stopped, and resumed later."] if line.pauses else []
        notes += [f"{more:,} less busy actors are not drawn."] if more else []
        return drawing.chart(title, " ".join(notes))


def _time_scale(line: Timeline) -> tuple[float, str]:
    total = float(line.edges[-1])
    return (3600.0, "hours") if total > 7200 else (60.0, "minutes") if total > 180 else (1.0, "s")


def reliability(title: str, curves: Mapping[str, Sequence[Sequence[float]]]) -> Chart:
    """Reliability curves: predicted against observed acceptance, in tenths of the prediction.

    Args:
        title: of the chart.
        curves: for each name, rows of (judged, sum of predictions, accepted).
    """
    with _Drawing() as drawing:
        axes = drawing.axes
        axes.plot([0, 1], [0, 1], color=_GREY, linewidth=1, linestyle="--")
        for (name, rows), colour in zip(list(curves.items())[:_MOST_LINES], _COLOURS, strict=False):
            bins = np.array([row for row in rows if row[0] > 0]).reshape(-1, 3)
            predicted, accepted = bins[:, 1] / bins[:, 0], bins[:, 2] / bins[:, 0]
            axes.plot(predicted, accepted, color=colour, linewidth=1.2, label=_tail(name))
            sizes = 6 + 60 * bins[:, 0] / bins[:, 0].max(initial=1)
            axes.scatter(predicted, accepted, s=sizes, color=colour, alpha=0.8)
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="predicted acceptance", ylabel="observed")
        if len(curves) > 1:
            drawing.figure.legend(loc="outside upper left", ncols=2)
        more = len(curves) - _MOST_LINES
        return drawing.chart(title, f"{more:,} more are not drawn." if more > 0 else "")


def _tail(name: str, most: int = 28) -> str:
    """The end of a file's name, where names differ."""
    return name if len(name) <= most else f"…{name[-most:]}"


# ----------------------------------------------------------------------- trends


def trend(
    title: str,
    dates: Sequence[datetime],
    values: Sequence[float | None],
    intervals: Sequence[Sequence[float] | None] = (),
    least: float | None = None,
) -> Chart:
    """A figure over nights, with intervals where they are known.

    Args:
        title: of the chart.
        dates: one per job.
        values: one per job; None where it is not known.
        intervals: [low, high] for each job.
        least: where the axis begins at the latest.
    """
    points = np.array([np.nan if value is None else value for value in values], float)
    with _Drawing(2.8) as drawing:
        axes = drawing.axes
        x = np.array([date.astimezone(UTC).replace(tzinfo=None) for date in dates], "datetime64[s]")
        axes.plot(x, points, color=_COLOURS[0], marker="o", markersize=4, clip_on=False)
        if any(intervals):
            low, high = np.array([i or (np.nan, np.nan) for i in intervals], float).T
            errors = [np.maximum(points - low, 0), np.maximum(high - points, 0)]
            axes.errorbar(x, points, errors, fmt="none", ecolor=_COLOURS[0], capsize=2)
        if least is not None and np.isfinite(points).any():
            bottom = min(least, float(np.nanmin(points)))
            top = max(axes.get_ylim()[1], float(np.nanmax(points)) + 0.05 * abs(bottom) + 1e-9)
            axes.set_ylim(bottom, top + 0.06 * (top - bottom))
        day = np.timedelta64(12, "h")
        axes.set_xlim(x.min() - day, x.max() + day)
        locator = AutoDateLocator(minticks=2, maxticks=6)  # type: ignore[no-untyped-call]
        axes.xaxis.set_major_locator(locator)
        form = ConciseDateFormatter(locator)  # type: ignore[no-untyped-call]
        axes.xaxis.set_major_formatter(form)
        return drawing.chart(title)
