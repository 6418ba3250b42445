"""A few rows of a job really generated, to tell what all of them will take. Writes nothing."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any

from pipeline.config.job import JobConfig
from pipeline.errors import RowError, UserError
from pipeline.generate.loading import load_acceptance_head, load_pair, make_engine
from pipeline.inputs.openai_requests import REQUEST, request_cells
from pipeline.inputs.prompts import SAMPLING_COLUMN, PromptRenderer, row_sampling, sample_count
from specdec.request import Request


@dataclass(frozen=True)
class Round:
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
    rounds: tuple[Round, ...]
    live: float
    left_out: Mapping[str, int]


def rehearse(job: JobConfig, rows: Mapping[str, Mapping[str, Any]]) -> Rehearsal:
    """Complete rows as an actor of the job would.

    A job's slots are full nearly all the time, and those of a small sample are not, so when the
    sample runs out its rows are begun again, until the last one of the first turn is completed.

    Args:
        job: the job.
        rows: some of its rows, by row id.

    Raises:
        UserError: the models do not fit, or none of the rows can be completed.
    """
    import torch

    from specdec.loading.sources import PairError

    torch.set_num_threads(max(1, int(job.actors.cores)))
    began = time.monotonic()
    try:
        pair = load_pair(job)
        head = load_acceptance_head(job, pair)
    except PairError as error:
        raise UserError(str(error)) from None
    engine = make_engine(job, pair, head, pair.tokenizer.decode)
    load = time.monotonic() - began

    left_out: Counter[str] = Counter()
    requests = []
    for request in _requests(job, pair, rows, left_out):
        engine.submit(request)
        if engine.rejected:
            left_out[str(engine.rejected.pop().error)] += 1
        else:
            requests.append(request)
    if not requests:
        why = left_out.most_common(1)[0][0] if left_out else "there are none"
        raise UserError(f"none of the {len(rows)} rows tried can be completed: {why}")

    wanted = {request.id for request in requests}
    prompts = {request.id: len(request.prompt_ids) for request in requests}
    outputs: dict[str, int] = {}
    rounds: list[Round] = []
    again = enumerate(cycle(requests))
    fed = live = 0
    while len(outputs) < len(requests):
        while not engine.waiting:
            number, request = next(again)
            engine.submit(replace(request, id=f"{request.id}:{number}"))
            prompts[f"{request.id}:{number}"] = len(request.prompt_ids)
        before, spent = engine.stats.counts.committed, dict(engine.stats.seconds)
        there, started = set(engine.live_ids), time.monotonic()
        completions = engine.step()
        whole = time.monotonic() - started
        took = {name: s - spent.get(name, 0.0) for name, s in engine.stats.seconds.items()}
        rounds.append(
            Round(
                whole - took.get("profile", 0.0),
                took.get("prefill", 0.0),
                engine.stats.counts.committed - before,
            )
        )
        ended = [completion.id for completion in completions]
        fed += sum(prompts[name] for name in {*engine.live_ids, *ended} - there)
        live += engine.live + len(ended)
        for completion in completions:
            if completion.id in wanted:
                outputs[completion.id] = len(completion.output_ids)
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


def _requests(
    job: JobConfig, pair: Any, rows: Mapping[str, Mapping[str, Any]], left_out: Counter[str]
) -> Iterator[Request]:
    """Requests of the rows' samples; why others are none is counted."""
    renderer = PromptRenderer(job.input, pair.tokenizer, pair.context_length)
    for name, row in rows.items():
        count = job.sampling.n
        try:
            cells = request_cells(row[REQUEST]) if job.input.format else row
            override = cells.get(SAMPLING_COLUMN)
            count = sample_count(job.sampling, override)
            prompt = renderer.prompt_ids(cells)
            for number in range(count):
                sample = f"{name.rpartition(':')[0]}:{number}"
                yield Request(sample, prompt, row_sampling(job.sampling, override, sample, number))
        except RowError as error:
            left_out[str(error)] += count
