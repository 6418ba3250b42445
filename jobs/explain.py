"""`specbatch explain`: the rounds of one row, from a job that kept them."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from jobs.console import explained, out
from pipeline.config import S3Config
from pipeline.errors import UserError
from pipeline.storage import Folder, check_access, is_s3, resolved


def explain(
    output: Annotated[
        str, typer.Argument(metavar="OUT", help="A job's output folder, local or s3://.")
    ],
    row: Annotated[str, typer.Option("--row", help="The row's `row_id` in completions.")],
    limit: Annotated[int, typer.Option(min=1, help="Show so many rounds at most.")] = 100,
    endpoint: Annotated[
        str | None, typer.Option(help="URL of an S3-compatible server.", show_default=False)
    ] = None,
    profile: Annotated[
        str | None, typer.Option(help="AWS profile to use.", show_default=False)
    ] = None,
) -> None:
    """Show what was drafted, predicted, decided and accepted for one row, round by round.

    The job must have run with speculation.trace: true.

    [bold]Example[/]

      specbatch explain out/demo --row part-0.parquet:0:0
    """
    with explained():
        s3 = resolved(S3Config(endpoint=endpoint, profile=profile), used=is_s3(output))
        check_access(output, s3)
        rounds = read_rounds(Folder(output, s3), row)
        out.print(render(rounds[:limit]))
        if len(rounds) > limit:
            out.print(f"{len(rounds) - limit} more rounds; --limit shows them.")


def read_rounds(output: Folder, row: str) -> list[dict[str, Any]]:
    """The rounds of a row, in order.

    Raises:
        UserError: the job kept no rounds, or has no such row.
    """
    import pyarrow.parquet as pq

    files = sorted(output.list("trace"))
    if not files:
        raise UserError(
            f"{output.url}: this job kept no rounds; run it with --set speculation.trace=true "
            "into another output"
        )
    seen: set[str] = set()
    for name in files:
        with output.open(f"trace/{name}") as file:
            table = pq.read_table(file)
        ids = table["row_id"].to_pylist()
        seen.update(ids)
        if row in seen:
            found = [index for index, each in enumerate(ids) if each == row]
            rounds: list[dict[str, Any]] = table.take(found).to_pylist()
            return sorted(rounds, key=lambda each: each["round"])
    near = get_close_matches(row, seen, 3, 0.0)
    raise UserError(f"--row {row}: no rounds of such a row; there are, for example, {near}")


def render(rounds: list[dict[str, Any]]) -> Table:
    """One line per round: accepted candidates green, rejected red, not submitted dim."""
    table = Table("round", "context", "live", "candidates", "predicted", "why no more")
    for each in rounds:
        candidates = Text()
        for i, text in enumerate(each["texts"]):
            accepted, submitted = i < each["accepted"], i < each["submitted"]
            rejected = submitted and i == each["accepted"]
            style = "green" if accepted else "red" if rejected else "dim"
            candidates.append(repr(text)[1:-1], style=style).append("|")
        predicted = " ".join(f"{p:.2f}" for p in each["predicted"])
        numbers = (str(each[name]) for name in ("round", "context", "live"))
        # Text, so that nothing in it is taken for markup.
        table.add_row(*numbers, candidates, predicted, Text(each["reason"]))
    return table
