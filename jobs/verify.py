"""`specbatch verify`: is everything there, once, and as it was written?"""

from __future__ import annotations

import json
from dataclasses import asdict

import typer
from rich.markup import escape

from jobs.job_file import s3_options
from jobs.terminal.console import FAILURE, explained, out
from jobs.terminal.display import progress_bar
from jobs.terminal.options import AsJson, Endpoint, Output, Profile

_PROBLEMS_SHOWN = 100
"""Problems that a terminal shows; --json has all."""


def verify(
    output: Output,
    as_json: AsJson = False,
    endpoint: Endpoint = None,
    profile: Profile = None,
) -> None:
    """Read a job's output again and check it: every row there once, every file as written.

    Reads all that the job committed: rows in = rows completed + rows in errors, row ids against the
    plan, counts and checksums, the manifest against the files, and files that belong to no unit.
    Exits with 1 and names each problem if there is one.

    For example:

        specbatch verify out/demo
        specbatch verify s3://bucket/out --endpoint http://s3.example.com --json | jq .problems
    """
    with explained():
        s3 = s3_options(endpoint, profile)
        from pipeline.outputs.verify import verify as check

        with progress_bar() as show:
            found = check(
                output,
                s3,
                lambda done, units: show("checking units", done / units, f"{done:,}/{units:,}"),
            )
        if as_json:
            print(json.dumps({"ok": found.ok, **asdict(found)}))
        else:
            for problem in found.problems[:_PROBLEMS_SHOWN]:
                line = f"[red]{problem.kind}[/] {escape(problem.file)}: {escape(problem.message)}"
                out.print(line, highlight=False, soft_wrap=True)
            if (more := found.problems_found - _PROBLEMS_SHOWN) > 0:
                out.print(f"and {more:,} more: --json lists them")
            rows = f"{found.rows_out:,} completed + {found.rows_in_errors:,} in errors"
            read = f"{found.units:,} units, {found.files:,} files, {found.bytes / 1e6:,.1f} MB read"
            line = f"rows: {found.rows_in:,} in, {rows}; {read}"
            out.print(line, highlight=False, soft_wrap=True)
            verdict = "[green]ok[/]" if found.ok else f"[red]{found.problems_found:,} problems[/]"
            out.print(f"{verdict}: {escape(found.output)}", highlight=False, soft_wrap=True)
    if not found.ok:
        raise typer.Exit(FAILURE)
