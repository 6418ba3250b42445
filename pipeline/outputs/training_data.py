"""A job's output as something to learn from: token ids of prompts and of the target's outputs.

Completions are stored as text. Requests are made of the input columns again, as the job made them.
Completions are tokenized, which may seldom cut a text into other tokens than it was made of.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from pipeline import layout
from pipeline.commit import manifest
from pipeline.config.job import InputConfig, ModelsConfig, S3Config, SamplingConfig
from pipeline.errors import RowError, UserError, nearest
from pipeline.inputs.requests import RowRequests
from pipeline.inputs.row_ids import ROW_ID, parse_row_id
from pipeline.storage.folder import Folder
from pipeline.texts import Texts
from specdec.request import NO_CHARACTER
from specdec.training.examples import Example


@dataclass(frozen=True)
class JobOutput:
    """The output folder of a job, finished or not.

    Attributes:
        folder: the folder.
        input: which columns were the prompt, and how.
        models: the job's target and draft.
        sampling: the job's sampling.
        target: what pins the target's content (`model_identity`).
    """

    folder: Folder
    input: InputConfig
    models: ModelsConfig
    sampling: SamplingConfig
    target: dict[str, str]


def open_job(output_url: str, s3: S3Config) -> JobOutput:
    """The job that wrote an output folder.

    Args:
        output_url: the folder, local or s3://.
        s3: how to reach it, if it is on S3.

    Raises:
        UserError: there is no job in this folder, or none that this version can read.
    """
    folder = manifest.open_output(output_url, s3)
    try:
        record = json.loads(folder.read(layout.JOB) or b"")
        config = record["config"]
        return JobOutput(
            folder,
            InputConfig.model_validate(config["input"]),
            ModelsConfig.model_validate(config["models"]),
            SamplingConfig.model_validate(config["sampling"]),
            record["fingerprint"]["models"]["target"],
        )
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{folder.join(layout.JOB)} is not what this version writes: {reason}"
        ) from None


def read_examples(
    job: JobOutput, tokenizer: Any, *, limit: int | None = None, by: str | None = None
) -> list[Example]:
    """The rows that a job has committed so far, as token ids, in the order of its units.

    A completion that the target ended itself has the end-of-sequence token at its end. One that a
    stop string or token of the job may have ended has none: which it was is not recorded.

    Args:
        job: the job.
        tokenizer: the target's (transformers).
        limit: most examples.
        by: the input column that an example's group is taken from; None: the input file's name.

    Raises:
        UserError: nothing is committed yet, a column is missing, or the tokenizer does not fit.
    """
    requests, texts = RowRequests(job.input, job.sampling, tokenizer), Texts(tokenizer)
    examples: list[Example] = []
    for row in _rows(job, requests, by):
        if len(examples) == limit:
            break
        name = row[ROW_ID]
        try:
            request = requests.sample(row, name)
        except RowError as error:
            raise UserError(f"{job.folder.url}: row {name} was completed, but: {error}") from None
        text = row["completion"]
        if row["finish_reason"] == "length":
            # Bytes that became no character cannot be made into tokens again.
            text = text.rstrip(NO_CHARACTER)
        output = texts.output_ids(request.prompt_ids, text)
        sampling = request.sampling
        custom_stop = sampling.stop or sampling.stop_token_ids or sampling.ignore_eos
        if row["finish_reason"] == "stop" and not custom_stop:
            output += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        if output:
            group = str(row[by]) if by else parse_row_id(name).file
            examples.append(Example(name, request.prompt_ids, tuple(output), group, sampling))
    if not examples:
        raise UserError(
            f"{job.folder.url}: the job has not committed a completion yet; wait for its first unit"
        )
    return examples


def _rows(job: JobOutput, requests: RowRequests, by: str | None) -> Iterator[Mapping[str, Any]]:
    """The committed rows, with the columns that are needed."""
    needed = [ROW_ID, "completion", "finish_reason", *requests.required]
    needed += [by] if by else []
    for unit in sorted(manifest.committed_ids(job.folder)):
        name = layout.completions(unit)
        try:
            with job.folder.open(name) as file, pq.ParquetFile(file) as parquet:
                there = parquet.schema_arrow.names
                for column in needed:
                    if column not in there:
                        raise UserError(
                            f"{job.folder.join(name)}: no column {column!r}; "
                            f"{nearest(column, there)}"
                        )
                columns = list(dict.fromkeys([*needed, *requests.columns]))
                rows = parquet.read([c for c in columns if c in there]).to_pylist()
        except pa.ArrowInvalid as error:
            raise UserError(f"{job.folder.join(name)} cannot be read: {error}") from None
        yield from rows
