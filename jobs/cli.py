"""The command line: `specbatch run`, `validate`, `report`, `distill`, `train-head`, `profile`."""

from __future__ import annotations

import atexit
import gc
from typing import Annotated

import typer

from jobs.cluster import commands
from jobs.cluster import render as render_commands
from jobs.explain import explain
from jobs.nightly.cli import nightly
from jobs.plan import plan
from jobs.reports.command import ReportCommand, report
from jobs.reports.grafana import grafana
from jobs.run import run
from jobs.run_batch import run_batch
from jobs.tuning.distill import distill
from jobs.tuning.profile import profile as profile_command
from jobs.tuning.train_head import train_head
from jobs.validate import validate
from jobs.verify import verify

app = typer.Typer(
    name="specbatch",
    help="Complete shards of prompts with a language model on Ray, accelerated by lossless "
    "speculative decoding.",
    epilog="Start with: specbatch validate job.yaml, then specbatch run job.yaml",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

app.command()(run)
app.command()(validate)
app.command(cls=ReportCommand)(report)
for name, command in commands.COMMANDS.items():
    app.command(name)(command)
app.add_typer(render_commands.app, name="render")
app.command()(verify)
app.command()(run_batch)
app.command()(plan)
app.command()(explain)
app.command()(distill)
app.command()(grafana)
app.command()(train_head)
app.command()(profile_command)
app.add_typer(nightly)


def _version(value: bool) -> None:
    if value:
        from pipeline.commit.manifest import versions

        print(f"specbatch {versions()['specbatch']}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_version, is_eager=True),
    ] = False,
) -> None:
    pass


def main() -> None:
    """The console script."""
    # Python goes through all objects twice when it ends: a second, with Ray's, for nothing.
    atexit.register(gc.freeze)
    app()


if __name__ == "__main__":
    main()
