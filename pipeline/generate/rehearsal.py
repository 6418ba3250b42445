"""A few rows of a job really generated, to tell what all of them will take. Writes nothing."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import cycle
from typing import TYPE_CHECKING

from pipeline.config.job import JobConfig
from pipeline.errors import RowError, UserError
from pipeline.generate.loading import load_acceptance_head, load_pair, make_engine
from pipeline.inputs.requests import Row, RowRequests
from specdec.request import Completion, Request

if TYPE_CHECKING:
    from specdec.engine.engine import Engine


@dataclass(frozen=True)
class TimedRound:
    """A round: its seconds, those of them for prompts, and the tokens that it committed."""

    seconds: float
    prefill: float
    tokens: int


@dataclass(frozen=True)
class Rehearsal:
    """What some rows took in an engine whose slots were always full.

    With several samples per row, each counts as a row of its own.

    Attributes:
        rows: rows of the input that were tried.
        load, profile: seconds before the first round: models, and measuring forwards.
        prompt_tokens, output_tokens: of each row that was completed.
        fed_tokens: prompt tokens that were fed in the rounds, those of rows that only kept the
            slots full included.
        rounds: the rounds until the last of the rows was completed.
        live: mean rows in slots.
        left_out: rows that cannot be completed, by why.
    """

    rows: int
    load: float
    profile: float
    prompt_tokens: tuple[int, ...]
    output_tokens: tuple[int, ...]
    fed_tokens: int
    rounds: tuple[TimedRound, ...]
    live: float
    left_out: Mapping[str, int]


def rehearse(job: JobConfig, rows: Mapping[str, Row]) -> Rehearsal:
    """Complete rows as an actor of the job would.

    A job's slots are full nearly all the time, and those of a small sample are not. So when the
    sample runs out its rows are begun again, until each was completed once.

    Args:
        job: the job.
        rows: some of its rows, by row id.

    Raises:
        UserError: the models do not fit, or none of the rows can be completed.
    """
    import torch

    torch.set_num_threads(max(1, int(job.actors.cores)))
    began = time.monotonic()
    pair = load_pair(job)
    engine = make_engine(job, pair, load_acceptance_head(job, pair))
    load = time.monotonic() - began
    left_out: Counter[str] = Counter()
    make = RowRequests(job.input, job.sampling, pair.tokenizer, pair.context_length)
    requests = _submitted(engine, make, rows, left_out)
    if not requests:
        why = left_out.most_common(1)[0][0] if left_out else "there are none"
        raise UserError(f"none of the {len(rows)} rows tried can be completed: {why}")

    wanted = {request.id for request in requests}
    prompts = {request.id: len(request.prompt_ids) for request in requests}
    outputs: dict[str, int] = {}
    rounds: list[TimedRound] = []
    again = enumerate(cycle(requests))
    fed = live = 0
    while len(outputs) < len(requests):
        while not engine.waiting:
            number, request = next(again)
            name = f"{request.id}:{number}"
            prompts[name] = len(request.prompt_ids)
            engine.submit(replace(request, id=name))
        before = set(engine.live_ids)
        measured, completions = _round(engine)
        rounds.append(measured)
        ended = {completion.id: len(completion.output_ids) for completion in completions}
        fed += sum(prompts[name] for name in {*engine.live_ids, *ended} - before)
        live += engine.live + len(ended)
        outputs |= {name: tokens for name, tokens in ended.items() if name in wanted}
    return Rehearsal(
        len(rows),
        load,
        engine.stats.seconds.get("profile", 0.0),
        tuple(prompts[name] for name in outputs),
        tuple(outputs.values()),
        fed,
        tuple(rounds),
        live / len(rounds),
        dict(left_out),
    )


def _submitted(
    engine: Engine, make: RowRequests, rows: Mapping[str, Row], left_out: Counter[str]
) -> list[Request]:
    """The requests that the engine has taken; why samples are not among them is counted."""
    taken = []
    for row_id, row in rows.items():
        try:
            requests = make.of(row, row_id)
        except RowError as error:
            left_out[str(error)] += make.count(row)
            continue
        for request in requests:
            engine.submit(request)
            if engine.completed:
                left_out[str(engine.completed.pop().error)] += 1
            else:
                taken.append(request)
    return taken


def _round(engine: Engine) -> tuple[TimedRound, list[Completion]]:
    """One round, measured, and what it completed."""
    tokens, seconds = engine.stats.counts.committed, dict(engine.stats.seconds)
    began = time.monotonic()
    completions = engine.step()
    whole = time.monotonic() - began
    took = {name: s - seconds.get(name, 0.0) for name, s in engine.stats.seconds.items()}
    measured = TimedRound(
        whole - took.get("profile", 0.0),
        took.get("prefill", 0.0),
        engine.stats.counts.committed - tokens,
    )
    return measured, completions
