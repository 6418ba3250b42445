"""Candidates that are looked up, at the costs of a GPU that is not there.

    python benchmarks/lookups.py record texts.json --work samples --prompts questions.parquet
    python benchmarks/lookups.py replay texts.json --machine h200-8b --live 1,4,16,64,256

`record` lets a target write the texts of a kind of work (benchmarks/suffix.py). `replay` gives them
to the real engine, whose target writes the same texts at a GPU's pace (benchmarks/virtual_gpu.py).
Scheduler, index and policies are the real ones, prompts are read, and samples of a prompt share it.
So a row finds what others have written by then, at the pace that the policy makes of them. What is
not real: the texts are those of a small model, at the costs of a larger one.

Sides are `none`, `suffix` and `goodput`, all without a draft. `goodput` begins cold, with the costs
that a profile would find. Of the second night, which has a corpus, `suffix` runs without it too.
Counted is the whole job: prompts, and the last rows, beside which slots are empty. Rows are at most
`--laps` a slot. Runs have the prompts in other orders; ratios are of the same order.

    in flight   rows of a round, in the mean, without candidates
    / none      tokens/s against `none` where the host takes no time: median, smallest, largest
    host        the same where it takes the processor's time that it takes here, in one run, and
    idle        the share of that run in which the device waits for it

`record` takes some minutes for each kind, and prints how many tokens were written. `replay` takes a
minute or two for each live batch, and prints a row for each side.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from common import (
    PROMPTS,
    TARGET,
    Precision,
    Prompts,
    Repeats,
    Rows,
    Target,
    Threads,
    Tokens,
    console,
    load,
    prepare,
    run,
    spread,
)
from rich.table import Table
from suffix import WITH_CORPUS, night, work_of
from virtual_gpu import SIZES, Machine, costs_of

from pipeline.generate.corpus import corpus_tokens
from pipeline.generate.loading import lasting
from pipeline.texts import Texts
from specdec.drafters.corpus import Corpus, build_corpus
from specdec.engine.engine import Engine
from specdec.policies.costs import CostModel, CostTable
from specdec.policies.profiling import CONTEXT
from specdec.policies.registry import make_policy
from specdec.request import Completion, Request
from specdec.simulate.virtual import VirtualEngine
from specdec.simulate.virtual_device import ForwardCosts, Host, no_host
from specdec.simulate.written import Written

SIDES = ("none", "suffix", "goodput")
SECOND_NIGHT = ("none", "suffix", f"suffix{WITH_CORPUS}", f"goodput{WITH_CORPUS}")


def record_command(
    out: Annotated[Path, typer.Argument(help="the texts, JSON")],
    work: Annotated[str, typer.Option(help="samples, extract, free or night")] = "samples",
    target: Target = TARGET,
    precision: Precision = "int8",
    prompts: Prompts = PROMPTS,
    rows: Rows = 64,
    tokens: Tokens = 96,
    batch: Annotated[int, typer.Option(help="slots")] = 16,
    threads: Threads = 0,
) -> None:
    """Let the target complete the requests of a kind of work.

    Prints how many tokens it wrote. Some minutes.
    """
    prepare(threads)
    pair = load(target, None, precision)

    def write(requests: list[Request]) -> list[Completion]:
        return Engine(pair, policy=make_policy("none"), slots=batch).generate(requests)

    earlier: list[list[int]] = []
    if work == "night":  # what a job makes of the texts of the first one
        requests = night(pair.tokenizer, 0, rows, tokens)
        done, texts = write(requests), Texts(pair.tokenizer)
        completions = [texts.completion(*each) for each in zip(requests, done, strict=True)]
        reasons = [each.finish_reason for each in done]
        earlier = [*corpus_tokens(pair.tokenizer, completions, reasons)]
    requests = work_of(work, pair.tokenizer, prompts, rows, tokens)
    done = write(requests)
    written = [
        [request.prompt_ids, completion.output_ids]
        for request, completion in zip(requests, done, strict=True)
    ]
    about = {"work": work, "target": target, "precision": precision, "tokens": tokens}
    out.write_text(json.dumps({"about": about, "texts": written, "earlier": earlier}))
    many = sum(len(output) for _, output in written)
    console.print(f"{out}: {len(written)} rows, {many:,} tokens, {len(earlier)} earlier texts")


def profiled(costs: ForwardCosts, slots: int) -> CostModel:
    """What `profile_costs` would find on the device."""
    seconds = [costs(n, CONTEXT * min(n, slots)) for n in SIZES]
    verify = CostTable(SIZES, seconds, costs.position, CONTEXT)
    return CostModel(CostTable([1], [0.0]), verify)


@dataclass(frozen=True)
class Job:
    """What one side made of a job.

    Attributes:
        engine: after it.
        seconds: on its clock.
    """

    engine: VirtualEngine
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.engine.stats.counts.committed / self.seconds

    @property
    def idle(self) -> float:
        """Share of the time in which the device had nothing to do."""
        return 1 - self.engine.stream.busy / self.seconds


def job(
    side: str,
    written: Written,
    corpus: Corpus | None,
    machine: Machine,
    slots: int,
    requests: list[Request],
    host: Host,
) -> Job:
    """Let a side do all requests, on a new engine."""
    name, (_, costs) = side.removesuffix(WITH_CORPUS), costs_of(machine)
    options = {"costs": profiled(costs, slots)} if name == "goodput" else {}
    with lasting():  # as in an actor
        engine = VirtualEngine(
            written,
            None,
            costs,
            make_policy(name, **options),
            slots,
            lookup=True,
            corpus=corpus if name != side else None,
            host=host,
        )
        began = engine.clock.now()
        for completion in engine.generate(requests):
            number = int(completion.id)
            first = int(written.first[number])
            right = written.truth[first : first + written.lengths[number]].tolist()
            assert list(completion.output_ids) == right, "every side writes the same texts"
    return Job(engine, engine.clock.now() - began)


def replay_command(
    texts: Annotated[Path, typer.Argument(help="texts that `record` wrote")],
    machine: Annotated[Machine, typer.Option(help="whose costs; see virtual_gpu.py")] = (
        Machine.H200_8B
    ),
    live: Annotated[str, typer.Option(help="live batches, separated by commas")] = "1,4,16,64,256",
    laps: Annotated[int, typer.Option(help="rows a slot, at most")] = 32,
    repeats: Repeats = 3,
) -> None:
    """Race the sides at each live batch.

    Prints a row a side. A minute or two for each live batch.
    """
    prepare(threads=1)
    read = json.loads(texts.read_text())
    written = Written(read["texts"], read["earlier"])
    sides = SECOND_NIGHT if written.earlier else SIDES
    table = Table("live", "in flight", "side", title=f"{read['about']['work']}, {machine}")
    for column in ("tokens/s", "/ none", "verified a token", "accepted", "tokens a round"):
        table.add_column(column, justify="right")
    for column in ("host", "idle"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as folder:
        corpus = None
        if written.earlier:
            path = Path(folder) / "first.corpus"
            build_corpus(written.earlier, path, "")
            corpus = Corpus(path, "")
        for slots in map(int, live.split(",")):
            for line in race(sides, written, corpus, machine, slots, laps, repeats):
                table.add_row(str(slots), *line)
    console.print(table)


def race(
    sides: tuple[str, ...],
    written: Written,
    corpus: Corpus | None,
    machine: Machine,
    slots: int,
    laps: int,
    repeats: int,
) -> list[list[str]]:
    """A line of the table for each side."""
    rows = min(laps * slots, len(written.lengths))
    done: dict[str, list[Job]] = {side: [] for side in sides}
    for turn in range(repeats):
        for side in sides:
            requests = written.requests(rows, turn)
            done[side].append(job(side, written, corpus, machine, slots, requests, no_host))
    beside = {
        side: job(
            side, written, corpus, machine, slots, written.requests(rows, 0), time.thread_time
        )
        for side in sides
    }
    plain, lines = done["none"], []
    for side, jobs in done.items():
        stats, counts = plain[0].engine.stats, jobs[-1].engine.stats.counts
        lines.append(
            [
                f"{stats.live_rows / stats.rounds:.0f}",
                side,
                f"{statistics.median(each.rate for each in jobs):.0f}",
                spread([each.rate / none.rate for each, none in zip(jobs, plain, strict=True)], 3),
                f"{counts.verified / counts.committed:.2f}",
                f"{counts.acceptance_rate or 0:.2f}",
                f"{counts.block_efficiency or 0:.2f}",
                f"{beside[side].rate / beside['none'].rate:.3f}",
                f"{beside[side].idle:.0%}",
            ]
        )
        console.log(f"{slots} live, {side}: {lines[-1]}")
    return lines


if __name__ == "__main__":
    run(__doc__, record_command, replay_command)
