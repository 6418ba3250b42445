"""Rounds kept on request (`speculation.trace`): the table that is written with their unit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import pyarrow as pa

from pipeline.commit.schema import Finished, Outcomes, by_sample
from pipeline.inputs.blocks import UnitRows
from pipeline.inputs.row_ids import ROW_ID

TRACE_SCHEMA = pa.schema(
    {
        ROW_ID: pa.string(),
        "round": pa.int64(),
        "context": pa.int64(),
        "live": pa.int64(),
        "candidates": pa.list_(pa.int64()),
        "texts": pa.list_(pa.string()),
        "predicted": pa.list_(pa.float64()),
        "submitted": pa.int64(),
        "accepted": pa.int64(),
        "reason": pa.string(),
        "parents": pa.list_(pa.int64()),
        "kept": pa.list_(pa.int64()),
        "path": pa.list_(pa.int64()),
        "sources": pa.list_(pa.string()),
    }
)
"""Columns of `trace/`: one row per round of a completed row."""


def trace_table(rows: UnitRows, outcomes: Outcomes, text: Callable[[int], str]) -> pa.Table:
    """The rounds of the unit's completed samples.

    Args:
        rows: the unit as it was read.
        outcomes: of its rows.
        text: of a token.
    """
    rounds = []
    for index, sample, outcome in by_sample(outcomes):
        if isinstance(outcome, Finished):
            name = rows.row_id(index, sample)
            for number, trace in enumerate(outcome.completion.trace):
                texts = [text(token) for token in trace.candidates]
                rounds.append({ROW_ID: name, "round": number, "texts": texts, **asdict(trace)})
    return pa.Table.from_pylist(rounds, schema=TRACE_SCHEMA)
