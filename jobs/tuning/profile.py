"""`specbatch profile`: what a pair would do on a job's own rows, before it goes into production."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.job_file import load_job
from jobs.terminal.console import explained, out
from jobs.terminal.display import Show, stages
from pipeline.config.job import JobConfig
from pipeline.errors import RowError, UserError, nearest

if TYPE_CHECKING:  # torch takes seconds to import, and `--help` needs none of it
    from pipeline.inputs.sample import Sample
    from specdec.loading.pair import ModelPair
    from specdec.policies.base import StopPolicy
    from specdec.policies.costs import CostModel
    from specdec.simulate.record import Text
    from specdec.simulate.replay import Trace

FIXED = range(1, 9)
"""Lengths of `fixed` that are tried."""

_COST_SECONDS = 20.0
"""Spent on the cost curves, about."""

_FEW_ROWS, _LEAST_ROWS = 30, 5
"""Rows below which figures are called rough, and a class is given no interval."""


def profile(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="The job file (YAML).", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Override a key of the job file.", show_default=False
        ),
    ] = None,
    rows: Annotated[int, typer.Option(min=2, help="Rows of the input to try, at most.")] = 64,
    class_column: Annotated[
        str | None,
        typer.Option(help="Column that classes prompts.", show_default="the input file"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the choice of rows.")] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object instead of tables.")
    ] = False,
) -> None:
    """Predict what speculation will do for a job, from a few of its rows; write nothing.

    The target completes the rows without speculation; then the draft's candidates along these texts
    are recorded, the costs of both models measured, and every policy replayed over the records at
    several live batches. Prints how often candidates are accepted, by position and by class of
    prompt, what forwards cost, the speedup to expect, and what to write in the job file. Needs no
    Ray; runs here, in the time of completing the rows twice and some minutes.

    [bold]Examples[/]

      specbatch profile job.yaml --rows 64 --class-column kind

      specbatch profile job.yaml --set models.draft=other/draft --json | jq .recommendation
    """
    with explained("Nothing was written."):
        job = load_job(file, overrides or [])
        if job.models.draft is None:
            raise UserError("models.draft: none is given; a profile tells what a draft is worth")
        from pipeline.inputs.sample import sample_rows
        from pipeline.run.run import plan_job

        # What is wrong with the input should show before models are loaded.
        plan = plan_job(job)
        if class_column is not None:
            for each in plan.files:
                if class_column not in each.schema.names:
                    hint = nearest(class_column, each.schema.names)
                    raise UserError(f"{each.file.url}: no column {class_column!r}; {hint}")
        columns = job.input.model_dump(include={"messages_column", "prompt_column", "template"})
        sample = sample_rows(job.input.paths, columns, plan.job.s3, rows, seed)
        with stages() as show:
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
    from specdec.simulate.record import measure_costs, record
    from specdec.simulate.replay import acceptance_by_position

    torch.set_num_threads(max(1, int(job.actors.num_cpus or os.cpu_count() or 1)))
    show("loading models", 0.0)
    pair = _load(job)
    head = _head(job, pair)
    texts, left_out = _texts(job, pair, sample, class_column, show)
    if not texts:
        raise UserError(f"none of the {len(sample.rows)} rows tried can be completed: {left_out}")
    traces = []
    mode = job.speculation.verification
    for trace in record(pair, texts, verification=mode, head=head, most=_most(job)):
        traces.append(trace)
        show("recording acceptance", len(traces) / len(texts))
    if not any(len(trace.accepted) > trace.first for trace in traces):
        raise UserError(
            "the rows tried have outputs of one token: there is nothing to speculate on"
        )
    batches = _batches(job.actors.slots)
    prompt = sum(trace.prompt_tokens for trace in traces) // len(traces)
    show("measuring costs", 0.0)
    costs = measure_costs(pair, job.actors.slots, prompt, _COST_SECONDS)
    predictions = []
    for number, live in enumerate(batches):
        show(f"replaying policies at {live} live rows", number / len(batches))
        policies = _policies(job, pair, live, head)
        predictions.append(_predict(traces, policies, costs, live))
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


def _notes(rows: int, left_out: Mapping[str, int]) -> Iterator[str]:
    if rows < _FEW_ROWS:
        yield f"Only {rows} rows were tried: these figures are rough."
    if left_out:
        reason, _ = max(left_out.items(), key=lambda item: item[1])
        yield f"{sum(left_out.values())} rows were left out, most often: {reason}"


# --------------------------------------------------------------- models and texts


def _load(job: JobConfig) -> ModelPair:
    from transformers.utils import logging as notices

    from pipeline.generate.loading import load_pair
    from specdec.loading.sources import PairError

    notices.set_verbosity_error()
    notices.disable_progress_bar()
    # A job that does not speculate yet may name a draft to be looked at.
    speculating = job.speculation.model_copy(update={"policy": "fixed"})
    try:
        pair: ModelPair = load_pair(job.model_copy(update={"speculation": speculating}))
    except PairError as error:
        raise UserError(str(error)) from None
    return pair


def _head(job: JobConfig, pair: ModelPair) -> Any:
    """The job's acceptance head, or None."""
    from pipeline.generate.loading import load_acceptance_head
    from specdec.loading.sources import PairError

    try:
        return load_acceptance_head(job, pair)
    except PairError as error:
        raise UserError(str(error)) from None


def _texts(
    job: JobConfig, pair: ModelPair, sample: Sample, class_column: str | None, show: Show
) -> tuple[list[Text], dict[str, int]]:
    """The target's completions of the rows, and why rows were left out, with how many."""
    from pipeline.inputs.prompts import SAMPLING_COLUMN, PromptRenderer, row_sampling
    from specdec.engine.engine import Engine
    from specdec.policies.registry import make_policy
    from specdec.request import Request
    from specdec.simulate.record import Text, write_texts

    renderer = PromptRenderer(job.input, pair.tokenizer)
    left_out: dict[str, int] = {}
    requests, groups = {}, {}
    for name, row in sample.rows.items():
        try:
            sampling = row_sampling(job.sampling, row.get(SAMPLING_COLUMN), name)
            requests[name] = Request(name, renderer.prompt_ids(row), sampling)
        except RowError as error:
            left_out[str(error)] = left_out.get(str(error), 0) + 1
            continue
        groups[name] = str(row.get(class_column)) if class_column else name.rsplit(":", 2)[0]
    memory = job.actors.kv_memory_gb
    engine = Engine(
        pair,
        policy=make_policy("none"),
        verification=job.speculation.verification,
        slots=job.actors.slots,
        kv_memory_bytes=int(memory * 1e9) if memory else None,
        decode=pair.tokenizer.decode,
    )
    texts = {}
    for done, completion in enumerate(write_texts(engine, list(requests.values())), start=1):
        show("completing rows", done / len(requests))
        if completion.error is not None:
            left_out[completion.error] = left_out.get(completion.error, 0) + 1
        elif completion.output_ids:
            name = completion.id
            texts[name] = Text(requests[name], completion.output_ids, groups[name])
    return [texts[name] for name in requests if name in texts], left_out


def _by_class(traces: list[Trace]) -> list[dict[str, Any]]:
    """How often candidates are accepted at any position, by class, the largest class first."""
    from specdec.simulate.replay import acceptance

    classes: dict[str, list[Trace]] = {}
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
    from specdec.policies.registry import make_policy

    ours = job.speculation
    policies = {"none": make_policy("none")}
    policies |= {f"fixed {k}": make_policy("fixed", k=k) for k in FIXED}
    policies["heuristic"] = make_policy("heuristic", k=ours.k, k_min=ours.k_min, k_max=ours.k_max)
    for name in ("confidence", "entropy", *(["head"] if head or ours.policy == "head" else [])):
        own = ours.policy == name
        policies[name] = make_policy(
            name,
            k_min=ours.k_min,
            k_max=ours.k_max,
            threshold=ours.threshold if own else None,
            estimator=ours.estimator if own else None,
            head=head,
        )
    policies["goodput"] = make_policy(
        "goodput", k_max=ours.k_max, estimator=ours.estimator, head=head
    )
    assert pair.draft is not None, "a profile loads the draft"
    for policy in policies.values():
        policy.prepare(pair.target, pair.draft, live)
    return policies


def _predict(
    traces: list[Trace], policies: dict[str, StopPolicy], costs: CostModel, live: int
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
