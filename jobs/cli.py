"""The command line. It registers the commands, each of which has a file of its own."""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Callable
from typing import Annotated

import typer
from typer.core import TyperCommand

from jobs.cluster import commands as cluster
from jobs.cluster.ray_job import STOP_VARIABLE, stop_own_job
from jobs.cluster.render import app as render
from jobs.explain import explain
from jobs.nightly.cli import nightly
from jobs.plan import plan
from jobs.reports.command import ReportCommand, report
from jobs.reports.grafana import grafana
from jobs.run import run
from jobs.run_batch import run_batch
from jobs.schema import schema
from jobs.terminal.console import HOPELESS
from jobs.terminal.streams import lasting
from jobs.tuning.distill import distill
from jobs.tuning.profile import profile
from jobs.tuning.train_head import train_head
from jobs.validate import validate
from jobs.verify import verify

app = typer.Typer(
    name="specbatch",
    help="Complete shards of prompts with a language model on Ray, accelerated by lossless "
    "speculative decoding.",
    epilog="Start with `specbatch validate job.yaml`, then `specbatch run job.yaml`.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

_GROUPS: dict[str, dict[str, Callable[..., None]]] = {
    "Run a job": {
        "validate": validate,
        "plan": plan,
        "run": run,
        "run-batch": run_batch,
        "schema": schema,
    },
    "Look at results": {
        "report": report,
        "verify": verify,
        "explain": explain,
        "grafana": grafana,
    },
    "Make it faster": {
        "profile": profile,
        "train-head": train_head,
        "distill": distill,
    },
    "On a cluster": cluster.COMMANDS,
}
"""Commands by the names that users type, in the groups and the order of `specbatch --help`."""

_CLASSES: dict[str, type[TyperCommand]] = {"report": ReportCommand}

for group, commands in _GROUPS.items():
    for name, command in commands.items():
        app.command(name, rich_help_panel=group, cls=_CLASSES.get(name))(command)
app.add_typer(render, name="render", rich_help_panel="On a cluster")
app.add_typer(nightly, name="nightly", rich_help_panel="Every night")


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
    try:
        with lasting():
            app()
    except SystemExit as end:
        if end.code in HOPELESS and STOP_VARIABLE in os.environ:
            stop_own_job()
        raise


if __name__ == "__main__":
    main()
