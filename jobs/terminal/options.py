"""Arguments and options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

JobFile = Annotated[
    Path, typer.Argument(metavar="FILE", help="The job file (YAML).", show_default=False)
]
Output = Annotated[
    str,
    typer.Argument(
        metavar="OUT", help="A job's output folder, local or `s3://`.", show_default=False
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a key of the job file, as often as needed: `--set sampling.temperature=0`.",
        show_default=False,
    ),
]
Endpoint = Annotated[
    str | None, typer.Option(help="URL of an S3-compatible server.", show_default=False)
]
Profile = Annotated[str | None, typer.Option(help="AWS profile to use.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
TakeOver = Annotated[
    bool,
    typer.Option(
        "--take-over",
        help="Begin even if another run is at work on the output. That one stops, as after Ctrl-C.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar and no table.")]
