"""What the output looks like: the columns of completions and errors. An interface; see CHANGELOG.

Input columns keep their names, and come in the order and types of the job's one table
(`pipeline.inputs.job_table`), so that all files together are one, too. Counts are stored; the two
ratios are derived from them by `specdec.request.Counts`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa

from pipeline.conventions import Message
from pipeline.errors import RowError, UserError
from pipeline.inputs.blocks import UnitRows
from pipeline.inputs.columns import plain, taken
from pipeline.inputs.jsonl import RAW_LINE
from pipeline.inputs.row_ids import ROW_ID
from pipeline.inputs.units import FilePlan
from pipeline.layout import (
    CONTENT,
    LOGPROB_SUM,
    LOGPROBS,
    OUTPUT_TOKEN_IDS,
    PARSED,
    PERPLEXITY,
    PROMPT_LOGPROBS,
    REASONING,
    REASONING_TOKENS,
    SCORED_TOKENS,
    TOOL_CALLS,
    is_added,
)
from specdec.request import Completion, TokenLogprob

COMPLETION_COLUMNS: dict[str, pa.DataType] = {
    "completion": pa.string(),
    "finish_reason": pa.string(),
    "prompt_tokens": pa.int64(),
    "output_tokens": pa.int64(),
    "rounds": pa.int64(),
    "drafted": pa.int64(),
    "verified": pa.int64(),
    "accepted": pa.int64(),
    "acceptance_rate": pa.float64(),
    "block_efficiency": pa.float64(),
}
"""Columns of `completions/`, after `row_id` and the input columns."""

_TOLD = pa.struct({"token": pa.string(), "token_id": pa.int64(), "logprob": pa.float64()})
_TOLD_ALL = pa.list_(pa.struct([*_TOLD, pa.field("top", pa.list_(_TOLD))]))
_FUNCTION = pa.struct({"name": pa.string(), "arguments": pa.string()})
OPTIONAL_COLUMNS: dict[str, pa.DataType] = {
    LOGPROBS: _TOLD_ALL,
    PROMPT_LOGPROBS: _TOLD_ALL,
    OUTPUT_TOKEN_IDS: pa.list_(pa.int64()),
    CONTENT: pa.string(),
    REASONING: pa.string(),
    TOOL_CALLS: pa.list_(
        pa.struct({"id": pa.string(), "type": pa.string(), "function": _FUNCTION})
    ),
    REASONING_TOKENS: pa.int64(),
    PARSED: pa.string(),
    LOGPROB_SUM: pa.float64(),
    PERPLEXITY: pa.float64(),
    SCORED_TOKENS: pa.int64(),
}
"""Columns of `completions/` that a job may ask for, behind the others."""

ERROR_COLUMNS: dict[str, pa.DataType] = {
    "error_class": pa.string(),
    "error_message": pa.string(),
    "attempts": pa.int64(),
    RAW_LINE: pa.string(),
}
"""Columns of `errors/`, after `row_id` and the input columns."""


@dataclass(frozen=True)
class Finished:
    """A row that was completed.

    Attributes:
        text: the completion, cut before a stop string, without special tokens.
        completion: what the engine returned.
        message: what the text says, of a chat whose job asks for that.
        parsed: the text as JSON of the row's schema, where its job asks for that.
    """

    text: str
    completion: Completion
    message: Message | None = None
    parsed: str | None = None


@dataclass(frozen=True)
class Failed:
    """A row that was not completed, and how often it was tried."""

    error: RowError
    attempts: int


Outcome = Finished | Failed

Outcomes = Sequence[Sequence[Outcome]]
"""What became of a unit: for each row that was to be completed, an outcome per sample."""


def check_reserved(plans: Iterable[FilePlan], added: frozenset[str]) -> None:
    """Check that no input column has the name of an output column.

    Args:
        plans: the input.
        added: the job's output columns.

    Raises:
        UserError: names the column, the file and the fix.
    """
    for plan in plans:
        for name in plan.schema.names:
            if is_added(name, added):
                raise UserError(
                    f"{plan.file.url}: column {name!r} has the name of an output column "
                    "(capitals do not count); rename it in the input, or, if another job wrote it, "
                    f"set input.prefix: with input_ it is read as {'input_' + name!r}"
                )


def by_sample(outcomes: Outcomes) -> Iterator[tuple[int, int, Outcome]]:
    """Index of the row, index of the sample, and its outcome, in this order."""
    for index, samples in enumerate(outcomes):
        for sample, outcome in enumerate(samples):
            yield index, sample, outcome


def completions_schema(table: pa.Schema, optional: Sequence[str] = ()) -> pa.Schema:
    """The columns of `completions/` in a job.

    Args:
        table: of its input.
        optional: which of the optional columns it has.
    """
    added = COMPLETION_COLUMNS | {name: OPTIONAL_COLUMNS[name] for name in optional}
    return pa.schema([(ROW_ID, pa.string()), *plain(table), *added.items()])


def completions_table(
    rows: UnitRows,
    outcomes: Outcomes,
    optional: Sequence[str] = (),
    token_text: Callable[[int], str] = str,
) -> pa.Table:
    """The unit's completed samples, in input order; no row if all failed.

    Args:
        rows: the unit as it was read.
        outcomes: of its rows.
        optional: which of the optional columns the job has.
        token_text: the text of a token.
    """
    places = [(i, s) for i, s, outcome in by_sample(outcomes) if isinstance(outcome, Finished)]
    finished = [outcome for _, _, outcome in by_sample(outcomes) if isinstance(outcome, Finished)]
    values: dict[str, list[object]] = {
        "completion": [f.text for f in finished],
        "finish_reason": [f.completion.finish_reason for f in finished],
        "prompt_tokens": [f.completion.prompt_tokens for f in finished],
        "output_tokens": [len(f.completion.output_ids) for f in finished],
    }
    for name in ("rounds", "drafted", "verified", "accepted", *RATIOS):
        values[name] = [getattr(f.completion.counts, name) for f in finished]
    if LOGPROBS in optional:
        values[LOGPROBS] = [_logprobs(f.completion.logprobs, token_text) for f in finished]
    if PROMPT_LOGPROBS in optional:
        prompts = [f.completion.prompt_logprobs for f in finished]
        values[PROMPT_LOGPROBS] = [_logprobs(prompt, token_text) for prompt in prompts]
    if OUTPUT_TOKEN_IDS in optional:
        values[OUTPUT_TOKEN_IDS] = [f.completion.output_ids for f in finished]
    if REASONING_TOKENS in optional:
        values[REASONING_TOKENS] = [f.message and f.message.reasoning_tokens for f in finished]
    if CONTENT in optional:
        messages = [f.message for f in finished]
        values[CONTENT] = [m and m.content for m in messages]
        values[REASONING] = [m and m.reasoning for m in messages]
        ids = [rows.row_id(i, s) for i, s in places]
        values[TOOL_CALLS] = [m and _called(m, id) for m, id in zip(messages, ids, strict=True)]
    if PARSED in optional:
        values[PARSED] = [f.parsed for f in finished]
    if LOGPROB_SUM in optional:
        told = [[t.logprob for t in f.completion.logprobs or ()] for f in finished]
        values[LOGPROB_SUM] = [*map(math.fsum, told)]
        values[PERPLEXITY] = [_perplexity(each) for each in told]
        values[SCORED_TOKENS] = [*map(len, told)]
    columns = {name: OPTIONAL_COLUMNS[name] for name in optional}
    return _table(rows, places, values, COMPLETION_COLUMNS | columns)


def _perplexity(logprobs: Sequence[float]) -> float | None:
    """The exponential of the mean negative log-probability; None of no token."""
    if not logprobs:
        return None
    try:
        return math.exp(-math.fsum(logprobs) / len(logprobs))
    except OverflowError:
        return math.inf


def _called(message: Message, row_id: str) -> list[dict[str, object]] | None:
    """A message's tool calls as chat APIs have them; None if there are none."""
    return [
        {
            # By it, the result of a call is sent back; made again, the row has the same.
            "id": "call_" + hashlib.sha256(f"{row_id}:{number}".encode()).hexdigest()[:24],
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for number, call in enumerate(message.tool_calls)
    ] or None


def _logprobs(
    told: Sequence[TokenLogprob | None] | None, text: Callable[[int], str]
) -> list[dict[str, object] | None] | None:
    """How likely each token was; None if that was not asked for, or nothing predicts the token."""
    if told is None:
        return None

    def one(token: int, logprob: float) -> dict[str, object]:
        return {"token": text(token), "token_id": token, "logprob": logprob}

    def whole(told: TokenLogprob) -> dict[str, object]:
        return {**one(told.token, told.logprob), "top": [one(*other) for other in told.top]}

    return [None if each is None else whole(each) for each in told]


RATIOS = ("acceptance_rate", "block_efficiency")
"""Properties of `Counts`; null where nothing was verified."""


def errors_table(rows: UnitRows, outcomes: Outcomes) -> pa.Table:
    """The unit's failed samples, in input order.

    Args:
        rows: the unit as it was read.
        outcomes: of its rows.
    """
    places = [(i, s) for i, s, outcome in by_sample(outcomes) if isinstance(outcome, Failed)]
    failed = [outcome for _, _, outcome in by_sample(outcomes) if isinstance(outcome, Failed)]
    values: dict[str, list[object]] = {
        "error_class": [f.error.error_class for f in failed],
        "error_message": [f.error.message for f in failed],
        "attempts": [f.attempts for f in failed],
    }
    values[RAW_LINE] = [_raw_line(rows, i) for i, _ in places]
    return _table(rows, places, values, ERROR_COLUMNS)


def _raw_line(rows: UnitRows, index: int) -> str | None:
    line = rows.bad_lines.get(index)
    return None if line is None else line.text


def _table(
    rows: UnitRows,
    places: list[tuple[int, int]],
    values: dict[str, list[object]],
    columns: dict[str, pa.DataType],
) -> pa.Table:
    ids = pa.array([rows.row_id(i, sample) for i, sample in places], pa.string())
    arrays, fields = [ids], [pa.field(ROW_ID, ids.type)]
    if rows.table.num_columns:
        table = taken(rows.table, [i for i, _ in places])
        arrays += table.columns
        fields += list(table.schema)
    arrays += [pa.array(values[name], type) for name, type in columns.items()]
    fields += [pa.field(name, type) for name, type in columns.items()]
    return pa.table(arrays, schema=pa.schema(fields))
