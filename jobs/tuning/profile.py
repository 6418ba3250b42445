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
from pipeline.config.job import JobConfig
from pipeline.config.model_family import refuse_eagle
from pipeline.errors import UserError, nearest

if TYPE_CHECKING:  # torch takes seconds to import, and `--help` needs none of it
    from pipeline.inputs.sample import Sample
    from specdec.loading.pair import ModelPair
    from specdec.policies.base import StopPolicy
    from specdec.policies.costs import CostModel
    from specdec.simulate.transcripts import Text, Transcript

FIXED = range(1, 9)
"""Candidates per round of the policy `fixed` that are tried; each costs a replay per live batch."""

_COST_SECONDS = 20.0
"""Seconds spent on measuring what forwards cost, about. More makes the predictions steadier."""

_FEW_ROWS = 30
"""Rows below which all figures are called rough."""

_LEAST_ROWS = 5
"""Rows of a class below which its acceptance rate is given no interval."""


def profile(
    file: JobFile,
    overrides: Overrides = None,
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

    For example:

        specbatch profile job.yaml --rows 64 --class-column kind
        specbatch profile job.yaml --set models.draft=other/draft --json | jq .recommendation
    """
    with explained("Nothing was written."):
        job = load_job(file, overrides or [])
        if job.models.draft is None:
            raise UserError("models.draft: none is given; a profile tells what a draft is worth")
        refuse_eagle(job.models.draft, "a profile replays what a draft says by itself")
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
            found = _profile(plan.job, sample, class_column, show)
        if as_json:
            print(json.dumps(found, allow_nan=False))
            return
        from jobs.tuning.profile_report import tables

        for title, table in tables(found):
            out.print(f"[bold]{title}[/]", table, "", highlight=False, sep="\n")
        for note in found["notes"]:
            out.print(f"[yellow]{note}[/]", highlight=False, soft_wrap=True)
        out.print("[bold]Recommendation[/]")
        for reason in found["recommendation"]["reasons"]:
            out.print(reason, highlight=False, soft_wrap=True)


def _profile(
    job: JobConfig, sample: Sample, class_column: str | None, show: Show
) -> dict[str, Any]:
    """The whole profile, JSON-able."""
    import torch

    from jobs.tuning.profile_report import recommend
    from pipeline.generate.loading import job_device, load_acceptance_head, load_models
    from specdec.simulate.record import measure_costs, record
    from specdec.simulate.replay import acceptance_by_position

    torch.set_num_threads(max(1, int(job.actors.num_cpus or os.cpu_count() or 1)))
    show("loading models")
    silence_transformers()
    # The draft, too, if the job does not speculate yet.
    pair = load_models(job.models, job_device(job))
    head = load_acceptance_head(job, pair)
    show("completing rows")
    left_out: Counter[str] = Counter()
    texts = _texts(job, pair, sample, class_column, left_out, show)
    if not texts:
        raise UserError(
            f"none of the {len(sample.rows)} rows tried can be completed: {told(left_out)}"
        )
    traces = []
    mode = job.speculation.verification
    show("recording acceptance")
    for trace in record(pair, texts, verification=mode, head=head, most=_most(job)):
        traces.append(trace)
        show("recording acceptance", len(traces) / len(texts))
    if not any(len(trace.accepted) > trace.first for trace in traces):
        raise UserError(
            "the rows tried have outputs of one token: there is nothing to speculate on"
        )
    batches = _batches(job.actors.slots)
    prompt = sum(trace.prompt_tokens for trace in traces) // len(traces)
    show("measuring costs")
    costs = measure_costs(pair, job.actors.slots, prompt, _COST_SECONDS)
    show("replaying policies")
    predictions = []
    for live in batches:
        policies = _policies(job, pair, live, head)
        predictions.append(_predict(traces, policies, costs, live))
        show("replaying policies", len(predictions) / len(batches), f"at {live} live rows")
    return {
        "rows": len(traces),
        "rows_left_out": left_out,
        "output_tokens": sum(len(text.output_ids) for text in texts),
        "models": pair.describe(),
        "verification": mode,
        "acceptance_by_position": [
            {"position": i, "rate": rate.value, "low": rate.low, "high": rate.high, "met": met}
            for i, (rate, met) in enumerate(acceptance_by_position(traces), start=1)
        ],
        "acceptance_by_class": _by_class(traces),
        "costs": costs.points(),
        "predictions": predictions,
        "recommendation": recommend(predictions),
        "notes": list(_notes(len(traces), left_out)),
    }


def _notes(rows: int, left_out: Counter[str]) -> Iterator[str]:
    if rows < _FEW_ROWS:
        yield f"Only {rows} rows were tried: these figures are rough."
    if left_out:
        yield told(left_out)


# --------------------------------------------------------------------------- texts


def _texts(
    job: JobConfig,
    pair: ModelPair,
    sample: Sample,
    class_column: str | None,
    left_out: Counter[str],
    show: Show,
) -> list[Text]:
    """The target's completions of the rows; why rows have none is counted."""
    from pipeline.inputs.requests import RowRequests

    make = RowRequests(job.input, job.sampling, pair.tokenizer, pair.context_length)
    requests = make.first_samples(sample.rows, left_out)
    texts: list[Text] = []
    for text in complete(job, pair, requests, left_out):
        if class_column is not None:
            row = sample.rows[text.request.id]
            text = replace(text, group=str(row.get(class_column)))
        texts.append(text)
        show("completing rows", len(texts) / len(requests), f"{len(texts):,} rows")
    return texts


def _by_class(traces: list[Transcript]) -> list[dict[str, Any]]:
    """How often candidates are accepted at any position, by class, the largest class first."""
    from specdec.simulate.replay import acceptance

    classes: dict[str, list[Transcript]] = {}
    for trace in traces:
        classes.setdefault(trace.group, []).append(trace)
    result = []
    for name, members in sorted(classes.items(), key=lambda item: (-len(item[1]), item[0])):
        rate = acceptance(members)
        result.append(
            {
                "class": name,
                "rows": len(members),
                "positions": sum(len(trace.accepted) for trace in members),
                "rate": rate.value,
                "low": rate.low if len(members) >= _LEAST_ROWS else None,
                "high": rate.high if len(members) >= _LEAST_ROWS else None,
            }
        )
    return result


# -------------------------------------------------------------------- prediction


def _most(job: JobConfig) -> int:
    most: int = max(job.speculation.k_max, *FIXED)
    return most


def _batches(slots: int) -> list[int]:
    """1, 2, 4, ... and the job's own slots."""
    return [*(1 << i for i in range(slots.bit_length()) if 1 << i < slots), slots]


def _policies(job: JobConfig, pair: ModelPair, live: int, head: Any) -> dict[str, StopPolicy]:
    """What is tried, by the names of reports; prepared as an Engine would prepare it."""
    from specdec.policies.registry import POLICIES, make_policy

    ours = job.speculation
    settings: dict[str, Any] = {
        "k": ours.k,
        "k_min": ours.k_min,
        "k_max": ours.k_max,
        "estimator": ours.estimator,
    }
    policies: dict[str, StopPolicy] = {}
    for name, policy in POLICIES.items():
        own = name == ours.policy
        if policy.looks_up and not policy.drafts:
            continue  # a recording of the draft says nothing of it
        if name == "fixed":
            policies |= {f"fixed {k}": make_policy(name, k=k) for k in FIXED}
        elif own or head or not policy.needs_head:
            # A threshold means something to the job's own policy only.
            threshold = ours.threshold if own else None
            policies[name] = make_policy(name, head=head, threshold=threshold, **settings)
    assert pair.draft is not None, "a profile loads the draft"
    for made in policies.values():
        made.prepare(pair.target, pair.draft, live)
    return policies


def _predict(
    traces: list[Transcript], policies: dict[str, StopPolicy], costs: CostModel, live: int
) -> dict[str, Any]:
    """Every policy at one live batch, as it does once it has learned from these rows."""
    from specdec.simulate.bound import least_seconds
    from specdec.simulate.replay import Replay, faster, replay

    results: dict[str, Replay] = {}
    for name, policy in policies.items():
        replay(traces, policy, costs, live)
        results[name] = replay(traces, policy, costs, live, steady=live > 1)
    none = results["none"]
    speeds = {name: result.tokens_per_second for name, result in results.items()}
    speedup = {name: speed / speeds["none"] for name, speed in speeds.items()}
    tokens = sum(max(len(trace.accepted) - trace.first, 0) for trace in traces)
    interval = faster(none, results["goodput"])
    return {
        "live": live,
        "none_tokens_per_second": speeds["none"],
        "speedup": speedup,
        "best_fixed": max((f"fixed {k}" for k in FIXED), key=lambda name: speedup[name]),
        "goodput_interval": [interval.low, interval.high],
        "bound": tokens / float(least_seconds(traces, costs, live).sum()) / speeds["none"],
    }
