from __future__ import annotations

from dataclasses import replace

import pyarrow as pa

from pipeline.commit.schema import Failed, Finished, Outcomes
from pipeline.commit.trace import TRACE_SCHEMA, trace_table
from pipeline.errors import RowError
from pipeline.inputs.blocks import UnitRows
from pipeline.inputs.units import Piece, Unit
from specdec.request import Completion, RoundTrace

ROUNDS = (
    RoundTrace(
        *(20, 4, (5, 6, 7), (0.9, 0.5, 0.2), 2, 1, "after 3: too little for its cost"),
        sources=("prompt",),
    ),
    RoundTrace(22, 3, (5, 6, 7), (), 2, 1, "a tree", (-1, -1, 1), (0, 1), (1,)),
    RoundTrace(24, 3, (), (), 0, 0, "control round"),
)


def unit(name: str = "a.parquet", start: int = 0, rows: int = 3) -> Unit:
    return Unit.of(Piece(name, start, rows, "/x", "parquet", 0, 1))


def outcomes() -> Outcomes:
    """A row with two rounds, one that failed, one whose only token came with its prompt."""
    traced = Completion("x", 20, (5, 8, 9), "length", trace=ROUNDS)
    return [
        [Finished("abc", traced)],
        [Failed(RowError("NullPrompt", "null"), 1)],
        [Finished("a", replace(traced, trace=()))],
    ]


def text(token: int) -> str:
    return f"<{token}>"


def test_one_row_per_round_of_completed_rows() -> None:
    table = trace_table(UnitRows(unit(start=3), pa.table({"p": ["x"] * 3}), {}), outcomes(), text)
    assert table.schema.equals(TRACE_SCHEMA)
    first, tree, last = table.to_pylist()
    assert first == {
        "row_id": "a.parquet:3:0",
        "round": 0,
        "context": 20,
        "live": 4,
        "candidates": [5, 6, 7],
        "texts": ["<5>", "<6>", "<7>"],
        "predicted": [0.9, 0.5, 0.2],
        "submitted": 2,
        "accepted": 1,
        "reason": "after 3: too little for its cost",
        "parents": [],
        "kept": [],
        "path": [],
        "sources": ["prompt"],
    }
    assert (tree["parents"], tree["kept"], tree["path"]) == ([-1, -1, 1], [0, 1], [1])
    assert (last["round"], last["candidates"], last["reason"]) == (2, [], "control round")
