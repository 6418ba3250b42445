"""`specbatch explain`: the rounds of one row, from a job that kept them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Annotated, Any

import typer
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from jobs.job_file import s3_options
from jobs.terminal.console import explained, out
from jobs.terminal.options import Endpoint, Output, Profile


def explain(
    output: Output,
    row: Annotated[
        str, typer.Option(help="The row's `row_id` in completions.", show_default=False)
    ],
    limit: Annotated[int, typer.Option(min=1, help="Show so many rounds at most.")] = 100,
    endpoint: Endpoint = None,
    profile: Profile = None,
) -> None:
    """Show one row round by round: what was drafted, predicted, decided and accepted.

    Accepted candidates are green, the rejected one is red, those that no verdict was given on are
    dim. Candidates that branch are drawn as a tree. The job must have run with
    `speculation.trace: true`.

    For example:

        specbatch explain out/demo --row part-0.parquet:0:0
    """
    with explained():
        from pipeline.commit.manifest import open_output
        from pipeline.outputs.rounds import read_rounds

        rounds = read_rounds(open_output(output, s3_options(endpoint, profile)), row)
        if not rounds:
            out.print("No rounds: the only token of this row came with its prompt.")
            return
        out.print(render(rounds[:limit]))
        if len(rounds) > limit:
            out.print(f"{len(rounds) - limit:,} more rounds: --limit {len(rounds)}")


def render(rounds: Sequence[Mapping[str, Any]]) -> Table:
    """One entry per round: accepted candidates green, rejected ones red, others dim."""
    table = Table("round", "context", "live")
    table.add_column("candidates", min_width=len("candidates"))
    known = any(each.get("sources") for each in rounds)  # else all are a draft's
    for column in (*["from"][:known], "accepted", "predicted", "why no more"):
        table.add_column(column)
    for each in rounds:
        candidates = _tree(each) if each.get("parents") else _chain(each)
        predicted = " ".join(f"{p:.2f}" for p in each["predicted"])
        numbers = (str(each[name]) for name in ("round", "context", "live"))
        # Text, so that nothing in it is taken for markup.
        accepted = f"{each['accepted']} of {each['submitted']}"
        places = [_from(each)][:known]
        table.add_row(*numbers, candidates, *places, accepted, predicted, Text(each["reason"]))
    return table


def _from(one: Mapping[str, Any]) -> str:
    """Where a round's candidates come from, in their order."""
    known = one.get("sources") or []  # jobs of earlier versions have none
    places = [*known, *["draft"] * (len(one["texts"]) - len(known))]
    runs = ((place, len([*same])) for place, same in groupby(places))
    return ", ".join(f"{n} {place}" for place, n in runs)


def _chain(each: Mapping[str, Any]) -> Text:
    candidates = Text()
    for i, text in enumerate(each["texts"]):
        rejected = i == each["accepted"] < each["submitted"]
        style = "green" if i < each["accepted"] else "red" if rejected else "dim"
        candidates.append("|" if i else "").append(_shown(text), style=style)
    return candidates


def _tree(each: Mapping[str, Any]) -> RenderableType:
    """A node for each candidate, below what it follows; siblings in their order."""
    path, kept = {-1, *each["path"]}, {*each["kept"]}
    drawn = {-1: Tree("", hide_root=True)}
    settled = set[int]()  # what the walk has left for a child
    for node, (text, parent) in enumerate(zip(each["texts"], each["parents"], strict=True)):
        judged = parent in path and parent not in settled and node in kept
        style = "green" if node in path else "red" if judged else "dim"
        if node in path:
            settled.add(parent)
        drawn[node] = drawn[parent].add(Text(_shown(text), style=style))
    return drawn[-1]


def _shown(text: str) -> str:
    """A token with control characters as escapes: none may drive the terminal."""
    return repr(text)[1:-1]
