"""`specbatch profile`: what a pair would do on a job's own rows, before it goes into production."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.job_file import load_job
from jobs.terminal.console import explained, out
from jobs.terminal.display import Show, progress_bar
from jobs.terminal.options import AsJson, JobFile, Overrides
from jobs.tuning.common import complete, silence_transformers, told
from jobs.tuning.profile_draft import profile_draft
from jobs.tuning.profile_drafts import profile_drafts
from jobs.tuning.profile_report import NONE, comparison, recommend, tables
from pipeline.config.job import JobConfig
from pipeline.errors import UserError, nearest

if TYPE_CHECKING:  # torch takes seconds to import, and `--help` needs none of it
    from pipeline.inputs.sample import Sample
    from specdec.loading.pair import ModelPair
    from specdec.simulate.transcripts import Text

_FEW_ROWS = 30
"""Rows below which all figures are called rough."""


def profile(
    file: JobFile,
    overrides: Overrides = None,
    draft: Annotated[
        list[str] | None,
        typer.Option(
            help="A draft to compare, as in models.draft; may be given several times. Look-ups, "
            "which need no draft, are compared, too; none: nothing but these.",
            show_default="the job's draft alone",
        ),
    ] = None,
    rows: Annotated[int, typer.Option(min=2, help="Rows of the input to try, at most.")] = 64,
    class_column: Annotated[
        str | None,
        typer.Option(help="Column that classes prompts.", show_default="the input file"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the choice of rows.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Predict what speculation will do for a job, from a few of its rows; write nothing.

    The target completes the rows without speculation; then the draft's candidates along these texts
    are recorded, the costs of both models measured, and every policy replayed over the records at
    several live batches. Prints how often candidates are accepted, by position and by class of
    prompt, what forwards cost, the speedup to expect, and what to write in the job file. Needs no
    Ray; runs here, in the time of completing the rows twice and some minutes.

    With --draft, or for a job without a draft, it compares: drafts of either kind, and look-ups in
    what was written before. Prints what each brings at each live batch, and which one to use where.

    For example:

        specbatch profile job.yaml --rows 64 --class-column kind
        specbatch profile job.yaml --draft drafts/small --draft drafts/eagle
        specbatch profile job.yaml --set models.draft=other/draft --json | jq .recommendation
    """
    with explained("Nothing was written."):
        job = load_job(file, overrides or [])
        drafts = draft or ([] if job.models.draft else [NONE])
        for name in set(drafts) - {NONE}:
            load_job(file, [*(overrides or []), f"models.draft={json.dumps(name)}"])
        from pipeline.inputs.sample import sample_rows
        from pipeline.run.plan import plan_job

        # What is wrong with the input should show before models are loaded.
        plan = plan_job(job)
        if class_column is not None:
            for each in plan.files:
                if class_column not in each.schema.names:
                    hint = nearest(class_column, each.schema.names)
                    raise UserError(f"{each.file.url}: no column {class_column!r}; {hint}")
        how = job.input.model_dump(exclude={"paths", "s3"})
        sample = sample_rows(job.input.paths, how, plan.job.s3_of_input, rows, seed)
        with progress_bar() as show:
            found = _profile(plan.job, drafts, sample, class_column, show)
        if as_json:
            print(json.dumps(found, allow_nan=False))
            return
        for title, table in comparison(found) if drafts else tables(found):
            out.print(f"[bold]{title}[/]", table, "", highlight=False, sep="\n")
        for note in found["notes"]:
            out.print(f"[yellow]{note}[/]", highlight=False, soft_wrap=True)
        out.print("[bold]Recommendation[/]")
        for reason in found["recommendation"]["reasons"]:
            out.print(reason, highlight=False, soft_wrap=True)


def _profile(
    job: JobConfig,
    drafts: list[str],
    sample: Sample,
    class_column: str | None,
    show: Show,
) -> dict[str, Any]:
    """The whole profile, JSON-able: of some drafts side by side, or of the job's own."""
    import torch

    from pipeline.generate.loading import job_device, load_acceptance_head, load_models

    torch.set_num_threads(max(1, int(job.actors.num_cpus or os.cpu_count() or 1)))
    silence_transformers()
    left_out: Counter[str] = Counter()

    def complete(pair: ModelPair) -> list[Text]:
        return _texts(job, pair, sample, class_column, left_out, show)

    if drafts:
        found = profile_drafts(job, drafts, complete, show)
    else:
        show("loading models")
        # The draft, too, if the job does not speculate yet.
        pair = load_models(job.models, job_device(job))
        head = load_acceptance_head(job, pair)
        found, _ = profile_draft(job, pair, head, complete(pair), show)
        found["recommendation"] = recommend(found["predictions"])
    found["rows_left_out"] = left_out
    found["notes"] = list(_notes(found["rows"], left_out))
    return found


def _notes(rows: int, left_out: Counter[str]) -> Iterator[str]:
    if rows < _FEW_ROWS:
        yield f"Only {rows} rows were tried: these figures are rough."
    if left_out:
        yield told(left_out)


def _texts(
    job: JobConfig,
    pair: ModelPair,
    sample: Sample,
    class_column: str | None,
    left_out: Counter[str],
    show: Show,
) -> list[Text]:
    """The target's completions of the rows; why rows have none is counted.

    Raises:
        UserError: no row can be completed.
    """
    from pipeline.inputs.requests import RowRequests

    show("completing rows")
    make = RowRequests(job.input, job.sampling, pair.tokenizer, pair.context_length)
    requests = make.first_samples(sample.rows, left_out)
    texts: list[Text] = []
    for text in complete(job, pair, requests, left_out):
        if class_column is not None:
            row = sample.rows[text.request.id]
            text = replace(text, group=str(row.get(class_column)))
        texts.append(text)
        show("completing rows", len(texts) / len(requests), f"{len(texts):,} rows")
    if not texts:
        raise UserError(
            f"none of the {len(sample.rows)} rows tried can be completed: {told(left_out)}"
        )
    return texts
