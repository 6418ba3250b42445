"""`specbatch plan`: what a job will take and cost, from a few of its rows, before it is run."""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from jobs.job_file import load_job, load_prices
from jobs.terminal.amounts import money
from jobs.terminal.console import explained, note, out
from jobs.terminal.display import duration, progress_bar
from jobs.terminal.options import AsJson, JobFile, Overrides
from pipeline.config.job import JobConfig
from pipeline.config.model_family import eagle
from pipeline.config.prices import Hardware, Priced, Prices, default_prices, price
from pipeline.errors import UserError

if TYPE_CHECKING:  # torch takes seconds to import, and `--help` needs none of it
    from jobs.terminal.display import Show
    from pipeline.generate.rehearsal import Rehearsal, TimedRound
    from pipeline.run.plan import JobPlan

_BLOCKS = 8
"""Groups of rounds whose speeds are compared, to know how sure the speed is."""

_FEW_ROWS = 16
"""Rows below which an estimate is called rough."""


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% interval."""

    value: float
    low: float
    high: float

    def times(self, factor: float, plus: float = 0.0) -> Estimate:
        """The same of a multiple, and something certain added."""
        return Estimate(*(factor * x + plus for x in (self.value, self.low, self.high)))


@dataclass(frozen=True)
class Done:
    """What an existing output already has: rows, tokens, money (None: unknown) and hours."""

    rows: int = 0
    units: int = 0
    output_tokens: int = 0
    dollars: float | None = 0.0
    hours: float = 0.0


@dataclass(frozen=True)
class Plan:
    """What `specbatch plan --json` prints. Of what is left to do, unless it says otherwise.

    Attributes:
        files, rows, units: of the whole input.
        done: what an existing output already has.
        rows_left: rows to generate.
        sample_rows: rows that were tried to tell.
        left_out: share of them that cannot be completed.
        prompt_tokens, output_tokens: in all, with 95% intervals.
        actors: actors that the estimate reckons with.
        tokens_per_second: output tokens, of one actor whose slots are full.
        hours: of running, with its interval.
        dollars: money, with its interval; None without a price.
        currency, hardware, market, price_per_hour, price_source: of an actor.
        budget: the job's, if it has one.
        notes: what the reader should know.
    """

    files: int
    rows: int
    units: int
    done: Done
    rows_left: int
    sample_rows: int
    left_out: float
    prompt_tokens: Estimate
    output_tokens: Estimate
    actors: int
    tokens_per_second: float
    hours: Estimate
    dollars: Estimate | None
    currency: str
    hardware: str
    market: str
    price_per_hour: float | None
    price_source: str
    budget: dict[str, float | None] | None = None
    notes: list[str] = field(default_factory=list)


def plan(
    file: JobFile,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=2, help="Rows of the input to generate, at most.")] = 32,
    seed: Annotated[int, typer.Option(help="Seed of the choice of rows.")] = 0,
    prices: Annotated[
        Path | None,
        typer.Option(help="A price table (YAML).", show_default="the job's, or the packaged one"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tell what a job will take and cost, from a sample of its rows. Writes nothing.

    Generates a sample of rows as an actor of the job would, with its slots full, and reckons from
    it: tokens, hours and money with 95% intervals, for what an existing output does not have yet.
    It runs on what an actor asks for: of the Ray cluster at `RAY_ADDRESS`, or of a local one.

    For example:

        specbatch plan job.yaml
        specbatch plan job.yaml --rows 128 --json | jq .dollars
    """
    with explained("Nothing was written."):
        job = load_job(file, overrides or [])
        table = load_prices(prices) if prices else job.prices or default_prices()
        from pipeline.run.plan import check_begun, plan_job

        planned = plan_job(job)
        check_begun(planned)
        note(planned.sampling_said)
        with progress_bar() as show:
            found = make_plan(planned, table, rows, seed, show)
        if as_json:
            print(json.dumps(bounded(asdict(found)), allow_nan=False))
            return
        out.print(render(found))


def make_plan(planned: JobPlan, prices: Prices, count: int, seed: int, show: Show) -> Plan:
    """Rehearse some rows and reckon from them.

    Raises:
        UserError: no row can be completed, or the models do not fit.
    """
    from pipeline.commit import manifest
    from pipeline.inputs.sample import choose_rows

    job = planned.job
    finished = manifest.committed(planned.output, planned.units)
    left = [unit for unit in planned.units if unit.id not in finished]
    done = _done(planned, finished, prices)
    sample = choose_rows(left or planned.units, planned.table, job.s3_of_input, count, seed)
    # Of several kinds of actors, the first in the job file.
    group = next(iter(job.actors.pools))
    own = job.in_group(group)
    tried, start, hardware = _rehearse(own, sample, show)

    rows_left = sum(unit.rows for unit in left)
    good, bad = len(tried.output_tokens), sum(tried.left_out.values())
    completed = rows_left * good / tried.rows
    actors = max(1, min(job.actors.max_actors, len(left)))
    work = seconds_per_row(tried)
    fixed = start + tried.load + tried.profile
    # At the end the slots run empty: half of the last rows' time, about, is nobody's.
    tail = work.value * tried.live / 2
    actor_seconds = work.times(completed, plus=actors * (fixed + tail if rows_left else 0.0))
    priced = price(hardware, prices)
    return Plan(
        files=len(planned.files),
        rows=planned.rows,
        units=len(planned.units),
        done=done,
        rows_left=rows_left,
        sample_rows=tried.rows,
        left_out=bad / (good + bad),
        prompt_tokens=mean(tried.prompt_tokens).times(completed),
        output_tokens=mean(tried.output_tokens).times(completed),
        actors=actors,
        tokens_per_second=_speed(tried.rounds),
        hours=actor_seconds.times(1 / actors / 3600),
        dollars=None if priced.per_hour is None else actor_seconds.times(priced.per_hour / 3600),
        currency=prices.currency,
        hardware=priced.hardware,
        market=priced.market,
        price_per_hour=priced.per_hour,
        price_source=prices.described,
        budget=job.budget.model_dump() if job.budget else None,
        notes=list(_notes(job, tried, priced)),
    )


def _done(planned: JobPlan, units: set[str], prices: Prices) -> Done:
    from pipeline.commit.footer import read_records
    from pipeline.observe.budget import spent
    from pipeline.observe.ledger import read_ledger

    records = read_records(planned.output, units)
    before = spent(read_ledger(planned.output), prices)
    return Done(
        rows=sum(record.rows for record in records),
        units=len(records),
        output_tokens=sum(record.results.output_tokens for record in records),
        dollars=before.dollars,
        hours=before.hours,
    )


def _notes(job: JobConfig, tried: Rehearsal, priced: Priced) -> Iterable[str]:
    if job.drafts and job.models.draft is not None and (line := eagle(job.models.draft)):
        yield f"models.draft: {line}."
    if len(tried.output_tokens) < _FEW_ROWS:
        yield f"Only {len(tried.output_tokens)} rows were generated: these figures are rough."
    if tried.left_out:
        reason, number = max(tried.left_out.items(), key=lambda item: item[1])
        yield f"{sum(tried.left_out.values())} rows cannot be completed, {number} of them: {reason}"
    if job.actors.groups:
        name = next(iter(job.actors.groups))
        yield f"All actors are taken to be of the group {name}."
    if not os.environ.get("RAY_ADDRESS"):
        yield "Measured on this machine; RAY_ADDRESS names a cluster to measure on."
    if priced.per_hour is None:
        yield f"There is no price for {priced.hardware} ({priced.market}); give --prices FILE."


# ---------------------------------------------------------------------- measuring


def _rehearse(job: JobConfig, rows: Any, show: Show) -> tuple[Rehearsal, float, Hardware]:
    """The rehearsal, the seconds in which its process started, and what it had.

    In a task that asks Ray for what an actor would: threads, cores and their contention are an
    actor's then, too.
    """
    import ray

    from pipeline.generate.pool import actor_options, check_resources
    from pipeline.run.ray_session import connected

    show("starting Ray")
    with connected():
        nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        actors = job.actors.on([node["Resources"].get("CPU", 0.0) for node in nodes])
        check_resources(actors, [node["Resources"] for node in nodes])
        job = job.model_copy(update={"actors": actors})
        show(f"generating {len(rows)} rows")
        options = {name: value for name, value in actor_options(job.actors).items() if value}
        task = ray.remote(**options, max_retries=0)(_rehearse_there)
        try:
            found: tuple[Rehearsal, float, Hardware] = ray.get(task.remote(job, rows, time.time()))
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise UserError(str(error.cause)) from None
            raise
        return found


def _rehearse_there(job: JobConfig, rows: Any, wanted: float) -> tuple[Rehearsal, float, Hardware]:
    """In a process like an actor's, which was asked for at `wanted`."""
    from pipeline.generate.rehearsal import rehearse
    from pipeline.observe.ledger import process_age, this_hardware

    start = min(process_age(), max(0.0, time.time() - wanted))
    return rehearse(job, rows), start, this_hardware()


# ---------------------------------------------------------------------- reckoning


def mean(values: Sequence[float]) -> Estimate:
    """The mean of a population, from a sample of it."""
    center = statistics.fmean(values)
    if len(values) < 2:
        return Estimate(center, 0.0, math.inf)
    spread = _t(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(center, max(0.0, center - spread), center + spread)


def seconds_per_row(tried: Rehearsal) -> Estimate:
    """Seconds of an actor with full slots for one row of the job.

    Prompt tokens and output tokens are charged at what they took in the rehearsal. How sure that
    is depends on how much rows differ, and on how much the speed did.
    """
    feeding = sum(r.prefill for r in tried.rounds) / max(1, tried.fed_tokens)
    decoding = _decoding(tried.rounds)
    rows = [
        feeding * prompt + decoding * output
        for prompt, output in zip(tried.prompt_tokens, tried.output_tokens, strict=True)
    ]
    center = statistics.fmean(rows)
    size = min(_BLOCKS, len(tried.rounds))
    cuts = [len(tried.rounds) * i // size for i in range(size + 1)]
    blocks = [_decoding(tried.rounds[a:b]) for a, b in pairwise(cuts)]
    speed = statistics.stdev(blocks) / math.sqrt(size) / decoding if size > 1 else 0.0
    differing = statistics.stdev(rows) / math.sqrt(len(rows)) / center if len(rows) > 1 else 0.0
    freedom = max(1, min(len(rows), size) - 1)
    spread = _t(freedom) * math.hypot(speed, differing)
    return Estimate(center, center * math.exp(-spread), center * math.exp(spread))


def _decoding(rounds: Sequence[TimedRound]) -> float:
    """Seconds per output token, those for prompts apart."""
    tokens = sum(r.tokens for r in rounds)
    return sum(r.seconds - r.prefill for r in rounds) / max(1, tokens)


def _speed(rounds: Sequence[TimedRound]) -> float:
    return sum(r.tokens for r in rounds) / sum(r.seconds for r in rounds)


def _t(freedom: int) -> float:
    """The 97.5% quantile of Student's t."""
    from scipy.special import stdtrit  # half a second to import, which --help does not need

    return float(stdtrit(freedom, 0.975))


def bounded(value: Any) -> Any:
    """What JSON can have: `null` for a bound that one row does not tell."""
    if isinstance(value, dict):
        return {key: bounded(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ------------------------------------------------------------------------- showing


def render(found: Plan) -> RenderableType:
    """The plan as a table for the terminal."""
    shown = partial(money, currency=found.currency)
    table = Table(show_header=False, box=None, padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(style="dim")
    table.add_row("input files", f"{found.files:,}")
    table.add_row("rows", f"{found.rows:,}", f"{found.units:,} units")
    done = found.done
    if done.units or done.hours:
        cost = f", {shown(done.dollars)}" if done.dollars is not None else ""
        what = f"{done.units:,} units, {done.output_tokens:,} output tokens{cost}"
        table.add_row("  done already", f"{done.rows:,}", what)
        table.add_row("  left", f"{found.rows_left:,}")
    of = f"from {found.sample_rows:,} rows generated"
    table.add_row("prompt tokens", *_range(found.prompt_tokens, "{:,.0f}"))
    table.add_row("output tokens", *_range(found.output_tokens, "{:,.0f}"))
    table.add_row("tokens/s of an actor", f"{found.tokens_per_second:,.1f}", of)
    actors = "actor" if found.actors == 1 else "actors"
    low, high = (duration(3600 * hours) for hours in (found.hours.low, found.hours.high))
    table.add_row(
        f"time with {found.actors} {actors}",
        duration(3600 * found.hours.value),
        f"95% CI {low} to {high}",
    )
    if found.dollars is not None and found.price_per_hour is not None:
        low, high = shown(found.dollars.low), shown(found.dollars.high)
        table.add_row("cost", shown(found.dollars.value), f"95% CI {low} to {high}")
        rate = f"{shown(found.price_per_hour)} per hour and actor"
        table.add_row("  price", rate, escape(f"{found.hardware}, {found.price_source}"))
    for key, cap in (found.budget or {}).items():
        if cap is not None:
            table.add_row(f"budget.{key}", f"{cap:g}", _against(found, key, cap))
    notes = [f"[yellow]{escape(note)}[/]" for note in found.notes]
    return Group(table, *(["", *notes] if notes else []))


def _range(estimate: Estimate, form: str) -> tuple[str, str]:
    low, high = form.format(estimate.low), form.format(estimate.high)
    return form.format(estimate.value), f"95% CI {low} to {high}"


def _against(found: Plan, key: str, cap: float) -> str:
    """Whether the rest fits the budget."""
    need = found.dollars if key == "dollars" else found.hours
    used = found.done.dollars if key == "dollars" else found.done.hours
    if need is None or used is None:
        return "unknown without a price"
    if not need.value:
        return "enough: nothing is left to do"
    if used + need.high <= cap:
        return "enough"
    if used + need.low > cap:
        return f"[yellow]not enough: about {(cap - used) / need.value:.0%} of what is left[/]"
    return "[yellow]may not be enough[/]"
