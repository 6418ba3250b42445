from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.inputs.job_table import job_table
from pipeline.inputs.json_values import see_lines
from pipeline.inputs.jsonl import BadLine, parse_row, to_table

SCALARS = st.sampled_from([None, True, 1, -(2**70), 2**63, 0.5, 1e300, "", "x", "\ud800", "é"])
VALUES = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=2),
    st.dictionaries(st.sampled_from(["", "k"]), st.one_of(SCALARS, st.lists(SCALARS, max_size=1))),
)
ROWS = st.lists(st.dictionaries(st.sampled_from("abc"), VALUES), max_size=6)


def lines(rows: list[Any]) -> list[bytes]:
    return [json.dumps(row).encode() + b"\n" for row in rows]


def table_of(rows: list[Any]) -> pa.Schema:
    seen = see_lines(lines(rows))
    return job_table({("jsonl", seen.schema()): "a.jsonl"}, seen, lambda _: None)


def kept(row: dict[str, Any], written: dict[str, Any], schema: pa.Schema) -> bool:
    """Whether a row of the table says all that its line said."""
    for name, value in row.items():
        field = schema.field(name)
        text = field.metadata and value is not None and not isinstance(value, str)
        if plain(json.loads(written[name]) if text else written[name]) != plain(value):
            return False
    return True


def plain(value: Any) -> Any:
    """Without the nulls that Arrow fills missing fields with."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [plain(v) for v in value]
    return (isinstance(value, bool), value)


@settings(deadline=None)  # the machine may be busy
@given(ROWS, ROWS)
def test_every_row_is_in_the_jobs_table_or_an_error(first: list[Any], second: list[Any]) -> None:
    schema = table_of([*first, *second])
    for rows in (first, second):
        parsed = [parse_row(line, schema) for line in lines(rows)]
        good = [row for row in parsed if not isinstance(row, BadLine)]
        table = to_table(good, schema)
        assert table.num_rows == len(good)
        assert table.column_names == schema.names
        assert table.schema.types == schema.types
        for row, written in zip(good, table.to_pylist(), strict=True):
            assert kept(row, written, schema)
        pq.write_table(table, pa.BufferOutputStream())
        assert all(
            line.error_class in ("MalformedLine", "MalformedValue")
            for line in parsed
            if isinstance(line, BadLine)
        )


@settings(deadline=None)  # the machine may be busy
@given(ROWS)
def test_arrows_reader_and_pythons_see_the_same(rows: list[Any]) -> None:
    """Lines by themselves, where Arrow reads most, and together with one that it cannot read."""
    alone = [see_lines([line]) for line in lines(rows)]
    together = see_lines([*lines(rows), b"no JSON\n"])
    for seen in alone[1:]:
        alone[0].add(seen)
    if alone:
        assert alone[0].schema() == together.schema()


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([None], pa.string()),
        ([None, 1], pa.int64()),
        ([1, 0.5], pa.float64()),
        ([2**63, 1], pa.uint64()),
        ([[], None], pa.list_(pa.string())),
        ([{"a": 1}, {"b": None}], pa.struct({"a": pa.int64(), "b": pa.string()})),
        ([[{"a": "x"}], [{"b": 1}]], pa.list_(pa.struct({"a": pa.string(), "b": pa.int64()}))),
        (["2026-01-01", "2026-01-02"], pa.string()),
    ],
)
def test_the_type_of_values(values: list[Any], kind: pa.DataType) -> None:
    (field,) = table_of([{"c": value} for value in values])
    assert field.type == kind
    assert field.metadata is None


@pytest.mark.parametrize(
    ("common", "stray", "why"),
    [
        ([{"role": "user"}], "hi", "c is text, where most rows have a list"),
        ([{"role": "user"}], [{"role": 7}], "c[0].role is a number, where most rows have text"),
        (1, True, "c is true or false, where most rows have a whole number"),
        (True, 1, "c is a number, where most rows have true or false"),
        (1, 2**70, "c: 1180591620717411303424 does not fit the column's type, int64"),
        (0.5, 2**53 + 1, "c: 9007199254740993 does not fit the column's type, double"),
        ("x", {"a": 1}, "c is an object, where most rows have text"),
    ],
)
def test_a_stray_value_is_its_rows_error_and_no_other_type(
    common: Any, stray: Any, why: str
) -> None:
    schema = table_of([{"c": common}, {"c": stray}, {"c": common}, {"c": None}])
    assert schema.equals(table_of([{"c": common}]), check_metadata=True)
    line = parse_row(json.dumps({"c": stray}).encode(), schema)
    assert isinstance(line, BadLine)
    assert (line.error_class, line.message) == ("MalformedValue", why)
    assert line.text == json.dumps({"c": stray})


@pytest.mark.parametrize(
    "values",
    [
        [1, "a", [{}], {"y": None}],
        [{}],
        [2**70, -1],
        # Both are right in chat messages and sampling parameters.
        [*[[{"content": "x"}]] * 9, [{"content": [{"type": "text", "text": "y"}]}]],
        [{"stop": "a"}, {"stop": "b"}, {"stop": ["c", "d"]}],
        [json.loads('{"a":' * 30 + "1" + "}" * 30)],
        [{str(i): 1 for i in range(3000)}],
    ],
)
def test_what_most_values_are_not_is_kept_as_text(values: list[Any]) -> None:
    rows = [{"c": value} for value in values]
    schema = table_of(rows)
    assert schema.field("c").type == pa.string()
    parsed = [parse_row(line, schema) for line in lines(rows)]
    texts = to_table(parsed, schema)["c"].to_pylist()  # type: ignore[arg-type]
    assert [
        v if isinstance(v, str) else json.loads(t) for t, v in zip(texts, values, strict=True)
    ] == values


def test_integers_among_fractions_are_fractions() -> None:
    schema = table_of([{"c": 1.5}, {"c": 2**53}])
    rows: list[Any] = [parse_row(line, schema) for line in lines([{"c": 2**53}, {"c": -1}])]
    assert to_table(rows, schema)["c"].to_pylist() == [2.0**53, -1.0]
