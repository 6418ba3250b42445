"""What can be foreseen of acceptance: by cheap signals, by the draft's state, by the target's too.

    python benchmarks/foresight.py collect parts --target T --draft D --prompts gsm8k_train.parquet
    python benchmarks/foresight.py collect parts … --held-out --prompts gsm8k_test.parquet --rows 48
    python benchmarks/foresight.py judge parts
    python benchmarks/foresight.py worth parts

`collect` lets the target write, at temperature 1, and reads the text once with both models. It
keeps its work in parts of 16 rows: run it again, and it goes on. A part has, of every place, the
draft's state, the target's, candidates y ~ q with alpha = min(1, p(y) / q(y)), and beta, the sum of
min(p, q). Of held-out rows it has transcripts, too.

`judge` fits estimators to the parts and judges them on held-out rows. Of each it prints the AUC,
with ECE and log-loss (nats), after the draw and before it. All are networks of one hidden layer,
but for the cheap ones, which are linear. "lag d" is the distance to the last place that the target
has verified: candidate d of a round is judged with the target's state d places behind. The last
line is the ceiling: who knows p and q.

`worth` replays held-out transcripts at `--costs gpu` of simulate.py with `goodput`, whose
probabilities come from each estimator in turn: tokens per second against the online estimator.
Each has seen the rows once before. The ceiling knows alpha and beta along the text.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from common import (
    DRAFT,
    PROMPTS,
    TARGET,
    Batches,
    Draft,
    Precision,
    Prompts,
    Rows,
    Target,
    Threads,
    console,
    interval,
    load,
    prepare,
    read_prompts,
    run,
)
from foreseeing import DRAWS, ESTIMATORS, LAGS, Examples, Net, Numbered, Places, fitted, write
from rich.table import Table
from simulate import gpu_costs
from torch import Tensor

from specdec.policies.base import Signal
from specdec.policies.registry import make_policy
from specdec.request import Request, SamplingParams
from specdec.simulate.record import record
from specdec.simulate.replay import Replay, faster, replay
from specdec.simulate.transcripts import Signals, Text, Transcript
from specdec.training.reliability import reliability, sigmoid

MOST = 12
"""Most candidates of a round that is replayed."""

PART_ROWS = 16
"""Rows that the target completes at once, and of a part."""

Folder = Annotated[Path, typer.Argument(help="of the parts")]


def collect_command(
    folder: Folder,
    target: Target = TARGET,
    draft: Draft = DRAFT,
    prompts: Prompts = PROMPTS,
    held_out: Annotated[bool, typer.Option(help="to judge by, not to fit to")] = False,
    rows: Rows = 240,
    tokens: Annotated[int, typer.Option(help="new tokens per prompt, at most")] = 160,
    precision: Precision = "int8",
    threads: Threads = 0,
) -> None:
    """Let the target write, and keep what both models say of it.

    Prints a line for each part of 16 rows, which takes some minutes.
    """
    prepare(threads)
    pair = load(target, draft, precision)
    folder.mkdir(parents=True, exist_ok=True)
    asked = read_prompts(pair.tokenizer, prompts, rows)
    for begin in range(0, len(asked), PART_ROWS):
        part = asked[begin : begin + PART_ROWS]
        path = folder / f"{'held' if held_out else 'train'}-{begin:05}.pickle"
        if path.exists():
            continue
        seed = 2 * begin + held_out
        found = write(pair, part, tokens, seed * 1000)
        texts = [
            Text(Request(str(i), ids, SamplingParams(tokens, 1.0)), tuple(row.text.tolist()))
            for i, (ids, row) in enumerate(zip(part, found, strict=True), begin)
        ]
        numbered: Any = Numbered()
        traces = list(record(pair, texts, head=numbered, most=MOST)) if held_out else []
        content = found, traces, torch.cat(numbered.kept) if held_out else None
        path.with_suffix(".new").write_bytes(pickle.dumps(content))
        path.with_suffix(".new").rename(path)
        alpha = torch.cat([each.alpha for each in found]).mean()
        console.log(f"{path.name}: {sum(len(each.beta) for each in found)} places, {alpha:.1%}")


def read_parts(folder: Path, kind: str) -> list[Any]:
    """What `collect` kept of some rows."""
    return [pickle.loads(path.read_bytes()) for path in sorted(folder.glob(f"{kind}-*.pickle"))]


def fit_all(folder: Path) -> dict[str, Net]:
    """Every estimator, fitted to the parts for that, if it was not before."""
    parts = read_parts(folder, "train")
    rows = [row for part in parts for row in part[0] if len(row.beta) > LAGS]
    tune, train = rows[::6], [row for i, row in enumerate(rows) if i % 6]
    places = sum(len(row.beta) for row in rows)
    console.print(f"fitted to {len(rows)} rows, {places} places, {DRAWS} candidates at each")
    nets = {}
    for number, (name, sees) in enumerate(ESTIMATORS.items()):
        path = folder / f"net-{number}-{len(parts)}.pickle"
        if not path.exists():
            path.write_bytes(pickle.dumps(fitted(sees, train, tune)))
        nets[name] = pickle.loads(path.read_bytes())
    return nets


def judge_command(folder: Folder, threads: Threads = 0) -> None:
    """Fit every estimator, and judge it on held-out rows by lag.

    Prints a table of AUC, ECE and log-loss, in some minutes.
    """
    prepare(threads)
    nets = fit_all(folder)
    rows = [row for part in read_parts(folder, "held") for row in part[0] if len(row.beta) > LAGS]
    places = sum(len(row.beta) for row in rows)
    for index, when in ((1, "after the draw"), (0, "before it")):
        lags = [1, 2, 3, 4, 5, 8]
        table = Table("sees", title=f"{when}: AUC, {len(rows)} held-out rows, {places} places")
        for name in (*(f"lag {lag}" for lag in lags), "ECE", "log-loss"):
            table.add_column(name, justify="right")
        found: dict[str, list[dict[str, Any]]] = {}
        for lag in lags:
            held = Examples.of(rows, lag)
            alpha = held.alpha.double().numpy()
            for name, net in nets.items():
                said = sigmoid(net(held)[:, index].double().numpy())
                found.setdefault(name, []).append(reliability(said, alpha))
            most = (held.beta, held.alpha)[index].double().numpy()
            found.setdefault("ceiling: p and q", []).append(reliability(most, alpha))
        for name, each in found.items():
            means = (np.mean([one[key] for one in each]) for key in ("ece", "log_loss"))
            table.add_row(
                name, *(f"{one['auc']:.3f}" for one in each), *(f"{m:.3f}" for m in means)
            )
        console.print(table)


# ------------------------------------------------------------------------------ worth


@dataclass(frozen=True, eq=False)
class ByRound(Transcript):
    """A transcript of which each candidate's signals are known by round: [n, MOST, 5]."""

    told: Signals | None = None

    def seen(self, at: int, index: int) -> Signals:
        assert self.told is not None
        signals: Signals = self.told[at, index]
        return signals


def told(transcript: Transcript, row: Places, kept: Tensor, net: Net, known: bool) -> ByRound:
    """What an estimator says of each candidate of each round.

    Args:
        kept: states by the numbers in the head's columns.
        known: say alpha and beta of candidates along the text.
    """
    n = len(transcript.ranks)
    rounds = [(t, i) for t in range(1, n) for i in range(MOST)]
    raw = np.stack([transcript.seen(t, i) for t, i in rounds])
    number = torch.from_numpy(raw[:, Signal.HEAD_AFTER]).long()
    t, i = (torch.tensor(x) for x in zip(*rounds, strict=True))
    signals = torch.from_numpy(raw[:, :3])
    nothing = torch.zeros(len(t))
    own = Examples(kept[number], row.target[t - 1], signals, i + 1, nothing, nothing)
    said = torch.cat([net(own.where(part)) for part in torch.arange(len(t)).split(4096)])
    if known:
        along = (i < torch.from_numpy(transcript.runs)[t] + 1) & (t + i < n)
        place = (t + i).clamp(max=n - 1)
        alpha = torch.where(torch.from_numpy(transcript.accepted), row.stands, row.falls)
        truth = torch.stack([row.beta[place], alpha[place]], -1).clamp(1e-5, 1 - 1e-5).logit()
        said = torch.where(along[:, None], truth, said)
    raw[:, [Signal.HEAD_BEFORE, Signal.HEAD_AFTER]] = said.numpy()
    table = np.zeros((n, MOST, raw.shape[1]), np.float32)
    table[1:] = raw.reshape(n - 1, MOST, -1)
    own_fields = {f.name: getattr(transcript, f.name) for f in fields(Transcript) if f.init}
    return ByRound(**own_fields, told=table)


def worth_command(folder: Folder, live: Batches = "1,4,16,64,256", threads: Threads = 0) -> None:
    """Replay held-out rows with `goodput`, by estimator.

    Prints tokens per second against the online estimator, in some minutes.
    """
    prepare(threads)
    nets = fit_all(folder)
    held = [
        (trace, row, part[2])
        for part in read_parts(folder, "held")
        for row, trace in zip(part[0], part[1], strict=True)
        if len(row.beta) > LAGS
    ]
    sides = {name: [told(*each, net, False) for each in held] for name, net in nets.items()}
    best = nets["draft's, target's middle and last"]
    sides["ceiling: p and q"] = [told(*each, best, True) for each in held]
    plain = [trace for trace, _, _ in held]
    table = Table("goodput with", title=f"tokens/s against the online estimator, {len(held)} rows")
    columns: dict[str, list[str]] = {}

    def say(name: str, other: Replay) -> None:
        found = faster(online, other)
        cell = interval(found.value, found.low, found.high, digits=3)
        columns.setdefault(name, []).append(cell)

    for rows_live in map(int, live.split(",")):
        table.add_column(f"{rows_live} live", justify="right")
        online = played(plain, rows_live, "confidence")
        lengths = (played(plain, rows_live, None, k) for k in range(9))
        fixed = max(lengths, key=lambda each: each.tokens_per_second)
        say("best fixed length", fixed)
        for name, rows in sides.items():
            say(name, played(rows, rows_live, "head"))
    for name, cells in columns.items():
        table.add_row(name, *cells)
    console.print(table)


def played(rows: list[Any], live: int, estimator: str | None, k: int = 0) -> Replay:
    """`goodput` with an estimator, by whom the rows were seen once before; None: `fixed`."""
    steady, costs = live > 1, gpu_costs(live)
    if estimator is None:
        return replay(rows, make_policy("fixed", k=k), costs, live, steady=steady)
    head: Any = object() if estimator == "head" else None
    policy = make_policy("goodput", estimator=estimator, head=head, costs=gpu_costs(live), width=1)
    replay(rows, policy, costs, live)
    return replay(rows, policy, costs, live, steady=steady)


if __name__ == "__main__":
    run(__doc__, collect_command, judge_command, worth_command)
