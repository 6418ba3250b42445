"""`specbatch distill`: a draft from the outputs of jobs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from jobs.job_file import s3_options
from jobs.terminal.console import err, explained, out
from jobs.terminal.display import Show, progress_bar
from jobs.terminal.options import Endpoint, Profile
from jobs.tuning.common import Threads, absolute, silence_transformers, user_errors
from jobs.tuning.students import DRAFT_VOCAB, FIRST_LAYERS, LR, Kind, begin, kind_of, load_target
from pipeline.errors import UserError

HeldOut = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Figures by draft and group, as in training.json."""

if TYPE_CHECKING:  # torch takes seconds to import, and `--help` needs none of it
    from pipeline.outputs.training_data import JobOutput
    from specdec.loading.pair import ModelPair
    from specdec.training.evaluate import Agreements
    from specdec.training.examples import Example
    from specdec.training.settings import DistillWatch, Moment


def distill(
    outputs: Annotated[
        list[str],
        typer.Argument(metavar="OUT...", help="Output folders of jobs, local or s3://."),
    ],
    folder: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the new draft.", show_default=False)
    ],
    kind: Annotated[
        Kind,
        typer.Option(
            help="model: a small language model. eagle3: a layer over the target's hidden states."
        ),
    ] = Kind.MODEL,
    from_layers: Annotated[
        str | None,
        typer.Option(
            help="Layers of the target to begin with, such as 0,29; -1 is the last. Embedding and "
            "LM head stay the target's. Without --draft: 0,1",
            show_default=False,
        ),
    ] = None,
    draft: Annotated[
        str | None, typer.Option(help="A draft to improve instead.", show_default=False)
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="The target, if not the jobs'.", show_default=False)
    ] = None,
    compare: Annotated[
        str | None, typer.Option(help="Another draft to evaluate beside it.", show_default=False)
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the rows, at most.")] = 3,
    minutes: Annotated[
        float | None,
        typer.Option(
            help="Of training, at most; the target's pass comes before.", show_default=False
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use so many rows at most.", show_default=False)
    ] = None,
    held_out: Annotated[float, typer.Option(help="Share of prompts to evaluate on.")] = 0.05,
    by: Annotated[
        str | None,
        typer.Option(
            help="Input column to report results by, instead of the input file.",
            show_default=False,
        ),
    ] = None,
    top_k: Annotated[
        int, typer.Option(help="Tokens of the target's distribution to learn from.")
    ] = 32,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Highest learning rate. By default 5e-4, with eagle3 2e-3.", show_default=False
        ),
    ] = None,
    ce_weight: Annotated[
        float, typer.Option(help="Weight of the target's own tokens, beside 1 for its top-k.")
    ] = 0.1,
    draft_vocab: Annotated[
        int, typer.Option(min=1, help="eagle3: tokens that it proposes, the most frequent ones.")
    ] = DRAFT_VOCAB,
    rollout: Annotated[
        int, typer.Option(help="eagle3: steps on its own states that it is trained for.")
    ] = 4,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of a step, prompts included.")] = 2000,
    seed: Annotated[int, typer.Option(help="Of the order of the rows.")] = 0,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="Compute in bfloat16; weights stay in float32.")
    ] = False,
    scores: Annotated[
        Path | None,
        typer.Option(
            help="Folder to keep the target's pass in, so that other runs can use it.",
            show_default=False,
        ),
    ] = None,
    threads: Threads = None,
    endpoint: Endpoint = None,
    profile: Profile = None,
) -> None:
    """Make a draft, or improve one, from what a target has generated.

    There are two kinds. `model` is a small language model that reads the text alone. `eagle3` is
    one layer that reads the target's hidden states, too: it guesses better, for this target only.

    Learns from the completions that the jobs have committed so far; a job may still be running. The
    target reads them once, then the draft is trained, evaluated on held-out prompts as it goes, and
    kept at its best. The same command resumes a run that was stopped, with the rows it began with.
    The folder can be named as `models.draft` in a job file.

    For example:

        specbatch distill out/questions --out drafts/two-layers --from-layers 0,29
        specbatch distill out/a out/b --out drafts/better --draft drafts/two-layers --minutes 30
        specbatch distill s3://bucket/out --out drafts/new --compare drafts/old --by kind
        specbatch distill out/questions --out drafts/eagle --kind eagle3 --bf16
    """
    with explained("Run the same command again to resume."), user_errors():
        from pipeline.outputs.training_data import open_job
        from specdec.training.settings import DistillSettings
        from specdec.training.workspace import Workspace

        eagle = kind is Kind.EAGLE3
        if from_layers is not None and draft is not None:
            raise UserError("give --from-layers or --draft, not both")
        if from_layers is not None and eagle:
            raise UserError("--from-layers makes a draft of the kind model; leave it out")
        layers = None
        if draft is None and not eagle:
            layers = _layers(from_layers) if from_layers is not None else list(FIRST_LAYERS)
        settings = DistillSettings(
            epochs=epochs,
            minutes=minutes,
            top_k=top_k,
            lr=LR[kind] if lr is None else lr,
            ce_weight=ce_weight,
            held_out=held_out,
            batch_tokens=batch_tokens,
            bf16=bf16,
            rollout=rollout,
            seed=seed,
        )
        s3 = s3_options(endpoint, profile)
        jobs = [open_job(output, s3) for output in outputs]
        name = target or _common_target(jobs)
        arguments = {
            "outputs": list(map(absolute, outputs)),
            "target": name,
            "kind": kind.value,
            "draft_vocab": draft_vocab if eagle else None,
            "from_layers": layers,
            "draft": draft and (os.path.abspath(draft) if os.path.isdir(draft) else draft),
            "limit": limit,
            "by": by,
            **asdict(settings),
        }
        space = Workspace(folder)
        space.check(arguments)
        if card := space.card():
            out.print("Nothing was missing: this draft is done.")
            out.print(_tables(card["held_out"]))
            return
        import torch

        if threads is not None:
            torch.set_num_threads(threads)
        from pipeline.commit.manifest import versions
        from specdec.training.distill import distill as run

        silence_transformers()
        with progress_bar() as show:
            show("loading models")
            trust = jobs[0].models.trust_remote_code
            pair = load_target(kind, name, trust, bf16=bf16)
            show("reading rows")
            examples = space.examples() or _examples(jobs, pair, limit, by)
            student = begin(
                kind,
                pair,
                examples,
                draft=draft,
                layers=layers or (),
                draft_vocab=draft_vocab,
                trust=trust,
            )
            incumbent = None
            if compare is not None:
                incumbent = begin(kind_of(compare), pair, examples, draft=compare, trust=trust)
            tokens = sum(len(e.output_ids) for e in examples)
            err.print(f"{len(examples):,} rows, {tokens:,} output tokens", highlight=False)
            show("evaluating")
            card = run(
                pair,
                student,
                examples,
                settings,
                space,
                record={"arguments": arguments, "versions": versions()},
                watch=_watch(show),
                incumbent=incumbent,
                scores=scores,
            )
        out.print(_tables(card["held_out"]))
        out.print(f"\nDraft: {escape(str(folder))}", highlight=False, soft_wrap=True)


def _layers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--from-layers {text}: write layer numbers as 0,29") from None


def _common_target(jobs: list[JobOutput]) -> str:
    """The target of all jobs, if it still is what it was.

    Raises:
        UserError: it is not.
    """
    from pipeline.config.model_identity import model_identity

    pins = {job.folder.url: _pin(job.target) for job in jobs}
    if len(set(pins.values())) > 1:
        raise UserError(
            f"the jobs have other targets: {', '.join(job.models.target for job in jobs)}; "
            "give jobs of one target, or --target"
        )
    name = jobs[0].models.target
    if _pin(model_identity(name)) != _pin(jobs[0].target):
        raise UserError(
            f"target {name} is not what wrote {jobs[0].folder.url}; "
            f"give --target {name} to use it all the same"
        )
    return name


def _pin(identity: Mapping[str, str]) -> str:
    return identity.get("digest") or f"{identity['name']}@{identity['revision']}"


def _examples(
    jobs: list[JobOutput], pair: ModelPair, limit: int | None, by: str | None
) -> list[Example]:
    from pipeline.outputs.training_data import read_examples

    examples: list[Example] = []
    for job in jobs:
        left = None if limit is None else limit - len(examples)
        if left != 0:
            examples += read_examples(job, pair.tokenizer, limit=left, by=by)
    return examples


def _watch(show: Show) -> DistillWatch:
    """Shows where a distillation is, and prints what its evaluations find."""
    from specdec.training.evaluate import JUDGED
    from specdec.training.settings import DistillWatch

    def evaluated(name: str, agreements: Agreements) -> None:
        for group, found in agreements.items():
            figures = (
                f"greedy agreement {found.greedy_agreement:.3f}, "
                f"Σ min(p, q) {found.mean_overlap:.3f}, "
                f"tokens a round at k = {JUDGED}: {found.greedy.lengths[JUDGED - 1]:.2f} greedy, "
                f"{found.merit:.2f} sampled"
            )
            label = name if group == next(iter(agreements)) else f"  {group}"
            line = f"{label:<24} {figures}  ({found.tokens:,} tokens)"
            err.print(escape(line), highlight=False, soft_wrap=True)

    return DistillWatch(lambda at: show(at.stage, at.done / at.total, _figures(at)), evaluated)


def _figures(moment: Moment) -> str:
    speed = f"{moment.tokens_per_second:,.0f} tokens/s"
    return speed if moment.loss is None else f"loss {moment.loss:.3f} · {speed}"


def _tables(held_out: HeldOut) -> Group:
    """What each draft does on each group of held-out rows."""
    titles = {
        "length": "Tokens a round with k candidates, the target's own included",
        "acceptance": "Share accepted of the k-th candidates, those before them being accepted",
    }
    return Group(*(_table(held_out, figure, title) for figure, title in titles.items()))


def _table(held_out: HeldOut, figure: str, title: str) -> Table:
    """`greedy_` and `sampled_` of a figure, by group and draft."""
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1), header_style="bold")
    for name in ("rows (tokens)", "draft", ""):
        table.add_column(name)
    for k in range(1, 9):
        table.add_column(f"k={k}", justify="right")
    for group, result in held_out["result"].items():
        label = f"{escape(group)} ({result['tokens']:,})"
        for name in ("start", "incumbent", "result"):
            for way in ("greedy", "sampled") if name in held_out else ():
                shares = (f"{share:.2f}" for share in held_out[name][group][f"{way}_{figure}"])
                table.add_row(label, name if way == "greedy" else "", way, *shares)
                label = ""
    return table
