"""`specbatch nightly`: a dataset every night."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from jobs.terminal.console import (
    FAILURE,
    INTERRUPTED,
    OVER_BUDGET,
    TOO_MANY_ERRORS,
    err,
    explained,
    out,
    stop_signals,
)
from jobs.terminal.options import Quiet
from pipeline.errors import UserError, nearest

if TYPE_CHECKING:  # These import Ray, which takes seconds, and `--help` needs none of it.
    from jobs.nightly.nights import Dates, Hooks
    from jobs.nightly.recipe import Recipe
    from jobs.nightly.status import Status

_COLOURS = {"published": "green", "unchanged": "dim", "stopped": "yellow", "failed": "bold red"}

_CODES: dict[str | None, int] = {"budget": OVER_BUDGET, "errors": TOO_MANY_ERRORS}
"""Exit codes of runs whose missing nights all ended in one way of `jobs.nightly.status.ENDS`."""


class _RunByDefault(TyperGroup):
    """`specbatch nightly recipe.yaml` is `specbatch nightly run recipe.yaml`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


nightly = typer.Typer(
    name="nightly",
    cls=_RunByDefault,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Make a dataset every night: seeds and templates to clean, documented conversations.\n\n"
    "`specbatch nightly recipe.yaml` makes tonight's partition, and those of nights that were "
    "missed (the command `run`, which may be left out).",
)

RecipeFile = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="The recipe file (YAML).", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a key of the recipe: `--set seeds.per_night=20`.",
        show_default=False,
    ),
]


@nightly.command()
def run(
    file: RecipeFile,
    overrides: Overrides = None,
    date: Annotated[
        str | None,
        typer.Option(
            help="The night, YYYY-MM-DD, and no other.", show_default="tonight, after missed ones"
        ),
    ] = None,
    first: Annotated[
        str | None, typer.Option("--from", help="First night of a back-fill.", show_default=False)
    ] = None,
    last: Annotated[
        str | None, typer.Option("--to", help="Its last night.", show_default="tonight")
    ] = None,
    catch_up: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Missed nights to make up before, at most.",
            show_default="recipe's; with --date: 0",
        ),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Publish a night's partition, unless it is published.

    A night is published as a whole or not at all. A run that was killed goes on where it was when
    the same command is given again. Two runs never work on one dataset at a time. How the last run
    went is in `_nightly/status.json` of the dataset's folder; the exit code is 0 if all nights are
    published, 1 if one failed, 2 for a mistake in the recipe, 3 if all that is missing stopped at
    its budget, 4 if it lost too many conversations, 130 if it was stopped.

    For example:

        specbatch nightly recipe.yaml
        specbatch nightly recipe.yaml --date 2026-11-23
        specbatch nightly recipe.yaml --from 2026-11-01 --to 2026-11-20
    """
    with explained("What is published stays; the same command goes on from here."):
        from jobs.nightly.recipe import load_recipe

        recipe = load_recipe(file, overrides or [])
        dates = _dates(recipe, date, first, last, catch_up)
        from jobs.nightly.nights import run_nights

        with stop_signals() as stop, _hooks(stop, quiet) as hooks:
            status = run_nights(recipe, dates, hooks)
        if not quiet:
            _show(recipe, status)
    if status.state in ("failed", "stopped"):
        usual = FAILURE if status.state == "failed" else INTERRUPTED
        raise typer.Exit(_CODES.get(status.end, usual))


def _dates(
    recipe: Recipe, date: str | None, first: str | None, last: str | None, catch_up: int | None
) -> Dates:
    """Which nights the options ask for."""
    from jobs.nightly.dates import between, due, parse_date, today

    if date is not None and (first is not None or last is not None):
        raise UserError("give --date, or --from and --to, not both")
    if last is not None and first is None:
        raise UserError("--to needs --from")
    if catch_up is not None and first is not None:
        raise UserError("give --catch-up, or --from, which names all nights itself; not both")
    tonight = today(recipe.schedule)
    if first is not None:
        end = parse_date(last, "--to") if last is not None else tonight
        nights = between(parse_date(first, "--from"), end)
        return lambda archive: nights
    the_night = parse_date(date) if date is not None else tonight
    usual = recipe.catch_up if date is None else 0
    most = usual if catch_up is None else catch_up
    return lambda archive: due(recipe.schedule, archive.dates(), the_night, most)


@contextmanager
def _hooks(stop: Any, quiet: bool) -> Iterator[Hooks]:
    from jobs.nightly.nights import Hooks
    from jobs.terminal.display import progress_bar

    if quiet:
        yield Hooks(stop=stop)
        return
    with progress_bar() as show:
        yield Hooks(
            on_night=lambda date: err.print(f"night of {date}", highlight=False),
            on_turn=lambda turn: show.job,
            on_learning=show,
            stop=stop,
        )


def _show(recipe: Recipe, status: Status) -> None:
    for date, night in status.nights.items():
        colour = _COLOURS[night["state"]]
        text = f"{date}  [{colour}]{night['state']}[/]  {escape(night['message'])}"
        out.print(text, highlight=False, soft_wrap=True)
        if night.get("learned"):
            out.print(f"            {escape(night['learned'])}", highlight=False, soft_wrap=True)
    if status.not_told:
        err.print(f"[yellow]{escape(status.not_told)}[/]", highlight=False, soft_wrap=True)
    out.print(f"\nDataset: {escape(recipe.output)}", highlight=False, soft_wrap=True)


@nightly.command()
def validate(
    file: RecipeFile,
    overrides: Overrides = None,
    date: Annotated[
        str | None, typer.Option(help="The night, YYYY-MM-DD.", show_default="tonight")
    ] = None,
) -> None:
    """Check a recipe, its seeds, templates and models, and say what a night would be.

    Prints what each turn and the judge would be asked, and the columns of the dataset, or what is
    wrong. Templates are tried on a few seeds. No model is loaded, and nothing is written.

    For example:

        specbatch nightly validate recipe.yaml
    """
    with explained():
        from jobs.nightly.dates import parse_date, today
        from jobs.nightly.recipe import load_recipe

        recipe = load_recipe(file, overrides or [])
        night = parse_date(date) if date is not None else today(recipe.schedule)
        from jobs.nightly.check import check_night

        lines = list(check_night(recipe, night))
        out.print(f"[green]valid[/]: {escape(str(file))}", highlight=False, soft_wrap=True)
        for line in lines:
            out.print(escape(line), highlight=False, soft_wrap=True)


@nightly.command()
def trend(
    file: RecipeFile,
    overrides: Overrides = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON array instead of a table.")
    ] = False,
) -> None:
    """Show how acceptance, block efficiency, speedup and cost went from night to night.

    For example:

        specbatch nightly trend recipe.yaml
    """
    with explained():
        from jobs.nightly.archive import Archive
        from jobs.nightly.recipe import load_recipe
        from jobs.nightly.report import TREND, trend_of, trend_rows

        nights = Archive.of(load_recipe(file, overrides or [])).nights()
        if as_json:
            print(json.dumps([trend_of(night) for night in nights]))
            return
        # A log or a pipe has no width; what is cut there is lost.
        wide = out if out.is_terminal else Console(width=200, emoji=False)
        wide.print(_table(TREND, trend_rows(nights)))


@nightly.command()
def status(file: RecipeFile, overrides: Overrides = None) -> None:
    """Print how the last run went, as JSON.

    For example:

        specbatch nightly status recipe.yaml | jq -r .message
    """
    with explained():
        from jobs.nightly.archive import ROOT, Archive
        from jobs.nightly.recipe import load_recipe

        recipe = load_recipe(file, overrides or [])
        found = Archive.of(recipe).folder.read(f"{ROOT}/status.json")
        if found is None:
            raise UserError(f"{recipe.output}: no run yet; begin with specbatch nightly {file}")
        out.print_json(found.decode())


@nightly.command()
def versions(file: RecipeFile, overrides: Overrides = None) -> None:
    """List the drafts and heads that were adopted, and the one in use.

    For example:

        specbatch nightly versions recipe.yaml
    """
    with explained():
        from jobs.nightly.recipe import load_recipe
        from jobs.nightly.versions import listed, read_versions

        found = read_versions(load_recipe(file, overrides or []))
        out.print(_table(("version", "draft", "head", "night", "why"), listed(found)))


@nightly.command()
def rollback(
    file: RecipeFile,
    overrides: Overrides = None,
    to: Annotated[
        int | None,
        typer.Option(help="Number of a version; 0: the recipe's own.", show_default="before"),
    ] = None,
) -> None:
    """Go back to the draft and head that were in use before; the next night runs with them.

    For example:

        specbatch nightly rollback recipe.yaml
        specbatch nightly rollback recipe.yaml --to 0
    """
    with explained("Nothing has changed."):
        from jobs.nightly.recipe import load_recipe
        from jobs.nightly.versions import roll_back

        version, number = roll_back(load_recipe(file, overrides or []), to)
        out.print(
            f"version {number} is in use: draft {version.draft}, head {version.head or 'none'}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


@nightly.command()
def render(
    kind: Annotated[
        str, typer.Argument(help="cron, airflow, kuberay or kubernetes", show_default=False)
    ],
    file: RecipeFile,
    overrides: Overrides = None,
    image: Annotated[
        str | None,
        typer.Option(help="Container image that has specbatch and Ray.", show_default=False),
    ] = None,
    secret: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="A Secret for the pods' environment.", show_default=False
        ),
    ] = None,
    volume: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CLAIM:/PATH", help="A volume claim to mount in every pod.", show_default=False
        ),
    ] = None,
    memory: Annotated[
        str, typer.Option(help="Memory of a worker, which holds one actor.")
    ] = "16Gi",
) -> None:
    """Print the recipe's schedule for what runs it; install nothing.

    cron: a line for crontab. airflow: a DAG. kuberay: a RayCronJob, which brings up a Ray cluster
    for each night. kubernetes: the same by a CronJob, where RayCronJobs are not enabled. For pods,
    the recipe's paths are `s3://` or on a mounted volume.

    For example:

        specbatch nightly render cron recipe.yaml
        specbatch nightly render kuberay recipe.yaml --image my/image:1 --secret s3-keys
    """
    with explained():
        from jobs.cluster.manifests import Pods, parse_volume
        from jobs.nightly.recipe import load_recipe
        from jobs.nightly.schedule import KINDS, Scheduled
        from jobs.nightly.schedule import render as rendered

        if kind not in KINDS:
            raise UserError(f"{kind}: {nearest(kind, KINDS)}")
        if kind in ("kuberay", "kubernetes") and image is None:
            raise UserError("--image: give the container image that has specbatch and Ray")
        recipe = load_recipe(file, overrides or [])
        pods = Pods(
            image=image or "",
            secrets=tuple(secret or []),
            volumes=tuple(map(parse_volume, volume or [])),
            memory=memory,
            overrides=tuple(overrides or []),
            recipe=file.read_text(encoding="utf-8"),
        )
        print(rendered(kind, Scheduled(recipe, file, pods)), end="")


def _table(names: Any, rows: Any) -> Table:
    table = Table(*names, box=None, padding=(0, 2), header_style="bold")
    for row in rows:
        table.add_row(*map(escape, row))
    return table
