"""`specbatch train-head`: an acceptance head for a pair, from prompts or the outputs of jobs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError
from rich.markup import escape

from jobs.job_file import explain, load_job, s3_options
from jobs.terminal.console import err, explained, out
from jobs.terminal.display import Show, progress_bar
from jobs.terminal.options import Endpoint, Profile
from jobs.tuning.common import (
    Threads,
    absolute,
    silence_transformers,
    user_errors,
)
from pipeline.config.job import JobConfig, S3Config
from pipeline.errors import UserError

if TYPE_CHECKING:  # torch takes seconds to import, and `--help` needs none of it
    from jobs.tuning.head_rows import HeadRows
    from pipeline.inputs.sample import Sample
    from specdec.training.head import HeadSettings
    from specdec.training.labels import LabelSettings

_FEW_POSITIONS = 2000
"""Held-out positions below which the head's figures are called rough."""


def train_head(
    folder: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the new head.", show_default=False)
    ],
    target: Annotated[
        str | None, typer.Option(help="The target, if not the job's.", show_default=False)
    ] = None,
    draft: Annotated[
        str | None, typer.Option(help="The draft, if not the job's.", show_default=False)
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            help="Files, folders or globs with prompts such as your jobs'; the "
            "target completes them first.",
            show_default=False,
        ),
    ] = None,
    job: Annotated[
        Path | None,
        typer.Option(
            help="A job file: its models, sampling, verification and prompts.", show_default=False
        ),
    ] = None,
    outputs: Annotated[
        list[str] | None,
        typer.Option(
            help="Output folders of jobs: their completions, instead of prompts to complete.",
            show_default=False,
        ),
    ] = None,
    other_prompts: Annotated[
        list[str] | None,
        typer.Option(
            help="Prompts of another kind: the head is measured on them, not trained.",
            show_default=False,
        ),
    ] = None,
    messages_column: Annotated[
        str | None, typer.Option(help="Column of chat messages.", show_default="messages")
    ] = None,
    prompt_column: Annotated[
        str | None, typer.Option(help="Column of plain prompts.", show_default="prompt")
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="jinja2 over the columns.", show_default=False)
    ] = None,
    rows: Annotated[
        int, typer.Option(min=3, help="Rows, at most; of another kind a fifth as many.")
    ] = 400,
    max_positions: Annotated[
        int, typer.Option(min=100, help="Output positions, at most.")
    ] = 200_000,
    max_new_tokens: Annotated[int | None, typer.Option(show_default="job's, or 256")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy.", show_default="job's, or 1")
    ] = None,
    top_p: Annotated[float | None, typer.Option(show_default="job's, or 1")] = None,
    top_k: Annotated[int | None, typer.Option(show_default="job's, or 0: off")] = None,
    min_p: Annotated[float | None, typer.Option(show_default="job's, or 0: off")] = None,
    verification: Annotated[
        str | None,
        typer.Option(help="rejection or coupled.", show_default="job's, or rejection"),
    ] = None,
    mixing: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Share of draft tokens in training text; of no effect with EAGLE-3."
        ),
    ] = 0.15,
    depth: Annotated[int, typer.Option(min=0, help="Residual blocks.")] = 3,
    reject_weight: Annotated[
        float, typer.Option(min=0.01, help="Weight of rejections in the loss, beside 1.")
    ] = 6.0,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the labels, at most.")] = 20,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    threads: Threads = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="auto, float32, bfloat16 or float16.", show_default="job's, or auto"),
    ] = None,
    quantization: Annotated[
        str | None, typer.Option(help="int8wo or int8, on a CPU.", show_default=False)
    ] = None,
    endpoint: Endpoint = None,
    profile: Profile = None,
) -> None:
    r"""Train a head that predicts, from the draft's state, which candidates the target accepts.

    The target completes the prompts, or a job has. Along its text the draft proposes a candidate at
    every position, and the target judges it. After a fifth of the rows a first look is printed: if
    hardly any candidate is accepted, or what is free to know predicts it well, stop with Ctrl-C. At
    the end the head is measured on rows that it has not seen, beside what needs no training, and
    beside the ceiling: what both models' distributions say, beyond which all is chance. Writes
    head.safetensors, card.json and reliability.png.

    For example:

        specbatch train-head --job job.yaml --out heads/questions
        specbatch train-head --outputs out/questions --other-prompts code.jsonl --out heads/new
        specbatch train-head --target Qwen/Qwen2.5-7B-Instruct --draft Qwen/Qwen2.5-0.5B-Instruct \
            --prompts prompts.parquet --out heads/qwen
    """
    with explained("Nothing was written."):
        inputs_s3, s3 = _s3(job, endpoint, profile)
        config = _config(
            _base(job, outputs or [], s3),
            models={"target": target, "draft": draft, "dtype": dtype, "quantization": quantization},
            sampling={
                "max_new_tokens": max_new_tokens,
                "temperature": temperature,
                "top_p": top_p,
                "top_k": top_k,
                "min_p": min_p,
                "seed": seed,
            },
            verification=verification,
        )
        if not prompts and not outputs and job is None:
            raise UserError("give --prompts, --outputs of a job, or --job")
        columns: dict[str, str | None] = {
            "messages_column": messages_column,
            "prompt_column": prompt_column,
            "template": template,
        }
        if sum(value is not None for value in columns.values()) > 1:
            raise UserError("give one of --messages-column, --prompt-column and --template")
        from pipeline.inputs.sample import sample_rows

        # Prompts come before models, which take longer to load: mistakes should show at once.
        mine: Sample | None = None
        if not outputs:
            own = not prompts and not any(columns.values())
            how = config.input.model_dump(exclude={"paths", "s3"}) if own else columns
            paths = list(map(absolute, prompts)) if prompts else config.input.paths
            mine = sample_rows(paths, how, inputs_s3, rows, seed)
        others: Sample | None = None
        if other_prompts:
            paths = list(map(absolute, other_prompts))
            others = sample_rows(paths, columns, inputs_s3, max(8, rows // 5), seed)

        import torch

        from jobs.tuning.head_rows import HeadRows
        from pipeline.generate.loading import load_models
        from specdec.training.head import HeadSettings
        from specdec.training.labels import LabelSettings

        if threads is not None:
            torch.set_num_threads(threads)
        silence_transformers()
        with progress_bar() as show, user_errors():
            show("loading models")
            pair = load_models(config.models, config.models.device)
            source = HeadRows(pair, config, s3, mine, outputs or [], others, rows, max_positions)
            labelling = LabelSettings(
                source.sampling, config.speculation.verification, mixing
            ).for_draft(pair.draft)
            training = HeadSettings(
                depth=depth, reject_weight=reject_weight, epochs=epochs, seed=seed
            )
            metrics, adjusted = _train(source, labelling, training, folder, show)
        _report(metrics, adjusted, folder)


# ----------------------------------------------------------------- what is asked


def _s3(job: Path | None, endpoint: str | None, profile: str | None) -> tuple[S3Config, S3Config]:
    """How to reach prompts, and outputs of jobs: as the options say, or else the job file."""
    if job is not None and endpoint is None and profile is None:
        loaded = load_job(job)
        return loaded.s3_of_input, loaded.s3_of_output
    given = s3_options(endpoint, profile)
    return given, given


def _base(job: Path | None, outputs: Sequence[str], s3: S3Config) -> dict[str, Any]:
    """The job that the head is for, as in a job file: from the file, from outputs, or empty."""
    if job is not None:
        return load_job(job).model_dump()
    if not outputs:
        return {"input": {"paths": ["(none)"], "prompt_column": "prompt"}}
    from pipeline.outputs.training_data import open_job

    opened = [open_job(output, s3) for output in outputs]
    for other in opened[1:]:
        if other.models.target != opened[0].models.target or other.sampling != opened[0].sampling:
            raise UserError(
                f"{other.folder.url} was made by another target or with other sampling than "
                f"{opened[0].folder.url}; a head is for one of them"
            )
    first = opened[0]
    return {
        "input": first.input.model_dump(),
        "models": first.models.model_dump(),
        "sampling": first.sampling.model_dump(),
    }


def _config(
    base: dict[str, Any],
    models: Mapping[str, Any],
    sampling: Mapping[str, Any],
    verification: str | None,
) -> JobConfig:
    """The job with what the options say; errors name its keys."""
    speculation = {"policy": "none", "verification": "rejection"}
    speculation["verification"] = verification or base.get("speculation", speculation).get(
        "verification"
    )
    merged = {
        **base,
        "output": base.get("output", "(none)"),
        "models": {**base.get("models", {}), **_given(models)},
        "sampling": {**base.get("sampling", {}), **_given(sampling)},
        "speculation": speculation,
    }
    for name in ("target", "draft"):
        if not merged["models"].get(name):
            raise UserError(f"give --{name}: a head is for one target and one draft")
    try:
        return JobConfig.model_validate(merged)
    except ValidationError as error:
        raise UserError("\n".join(explain(error))) from None


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


# --------------------------------------------------------------------- the whole


def _train(
    source: HeadRows, labelling: LabelSettings, training: HeadSettings, folder: Path, show: Show
) -> tuple[dict[str, Any], list[str]]:
    """Label the rows, train a head on them and write its folder.

    Returns:
        What was measured of the head, and which of its two logits were adjusted afterwards.
    """
    from jobs.tuning.head_report import plot
    from jobs.tuning.head_rows import label_all
    from pipeline.commit.manifest import versions
    from specdec.loading.head_files import save_head
    from specdec.training.head import Epoch, calibrate, describe_labels, evaluate_head, train_head
    from specdec.training.labels import Part

    began = time.monotonic()
    labels = label_all(source, labelling, show)
    collected = time.monotonic()
    for part in (Part.TRAIN, Part.TUNE, Part.HELD_OUT):
        if not len(labels.of(part)):
            raise UserError(
                f"no positions for part {part.name.lower()}: give more rows"
                f"{source.explain_left_out()}"
            )
    if source.left_out:
        err.print(f"left out{source.explain_left_out()}", highlight=False, soft_wrap=True)
    curve: list[Epoch] = []

    def trained(epoch: Epoch) -> None:
        curve.append(epoch)
        show("training", epoch.number / training.epochs, f"loss {epoch.tune_loss:.4f}")

    show("training", 0.0)
    head = train_head(labels, training, trained)
    show("measuring the head")
    saved, calibration = calibrate(head, labels)
    metrics = evaluate_head(head, saved, labels)
    sampling = source.config.sampling
    save_head(
        folder,
        saved,
        source.pair,
        {
            "sampling": {
                name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p", "min_p")
            },
            "verification": labelling.verification,
            "mixing": labelling.mixing,
            "training": {**asdict(training), "curve": [asdict(epoch) for epoch in curve]},
            "labels": {
                part.name.lower(): describe_labels(labels.of(part))
                for part in Part
                if len(labels.of(part))
            },
            "rows_left_out": dict(source.left_out),
            "calibration": calibration,
            "metrics": metrics,
            "metrics_notes": "on unmixed text; a candidate counts as accepted with its probability "
            "y and as rejected with 1 - y; ECE over ten bins; log-loss in nats; the ceiling knows "
            "both models' distributions",
            "seconds": {
                "collect": round(collected - began, 1),
                "train": round(time.monotonic() - collected, 1),
            },
            "versions": versions(),
        },
    )
    plot(metrics, folder / "reliability.png")
    return metrics, [name for name, found in calibration.items() if found["applied"]]


def _report(metrics: Mapping[str, Any], adjusted: Sequence[str], folder: Path) -> None:
    """Print what a trained head is worth."""
    from jobs.tuning.head_report import tables, verdict

    held_out = metrics["held_out"]
    for table in tables(metrics):
        out.print(table, "")
    out.print(verdict(metrics), highlight=False, soft_wrap=True)
    if adjusted:
        out.print(
            f"Logits {' and '.join(adjusted)} the draw were scaled and shifted to fit the tuning "
            "rows.",
            highlight=False,
            soft_wrap=True,
        )
    if held_out["positions"] < _FEW_POSITIONS:
        out.print(
            f"[yellow]Only {held_out['positions']:,} positions were held out: these figures are "
            "rough.[/]",
            highlight=False,
            soft_wrap=True,
        )
    out.print(f"Head: {escape(str(folder))}", highlight=False, soft_wrap=True)
