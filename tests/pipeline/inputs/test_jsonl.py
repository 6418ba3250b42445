from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given
from hypothesis import strategies as st

from pipeline.inputs.jsonl import jsonl_schema, to_table

SCALARS = st.sampled_from([None, True, 1, -(2**70), 0.5, 1e300, "", "x", "\ud800", "é"])
VALUES = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=2),
    st.dictionaries(st.sampled_from(["", "k"]), st.one_of(SCALARS, st.lists(SCALARS, max_size=1))),
)
ROWS = st.lists(st.dictionaries(st.sampled_from("abc"), VALUES), max_size=4)


@given(ROWS, ROWS)
def test_any_json_becomes_a_table_with_all_rows(first: list[Any], second: list[Any]) -> None:
    schema = jsonl_schema(json.dumps(row).encode() for row in first)
    table = to_table(second, schema)
    assert table.num_rows == len(second)
    assert set(schema.names) <= set(table.column_names)
    pq.write_table(table, pa.BufferOutputStream())
    assert {name for row in second for name in row} <= set(table.column_names)


def test_types_of_the_file_hold_where_they_can() -> None:
    schema = jsonl_schema([b'{"a": 1.5, "b": "x", "c": [1]}'])
    table = to_table([{"a": 1}, {"b": None}], schema)
    assert table.schema.equals(schema)
    assert table.to_pylist() == [
        {"a": 1.0, "b": None, "c": None},
        {"a": None, "b": None, "c": None},
    ]


def test_nothing_is_dropped_where_they_cannot() -> None:
    schema = jsonl_schema([b'{"m": {"role": "user"}, "n": 1}'])
    table = to_table([{"m": {"role": "user", "name": "Ann"}, "n": 1.5, "new": True}], schema)
    assert table.to_pylist() == [{"m": {"role": "user", "name": "Ann"}, "n": 1.5, "new": True}]


def test_values_without_a_common_type_become_json() -> None:
    table = to_table([{"a": [1]}, {"a": "x"}, {"a": {"b": 1}}], pa.schema([]))
    assert table["a"].to_pylist() == ["[1]", "x", '{"b": 1}']
