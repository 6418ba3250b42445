from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.job import S3Config
from pipeline.errors import UserError
from pipeline.inputs import source as source_module
from pipeline.inputs.blocks import UnitRows
from pipeline.inputs.formats.base import cut_groups
from pipeline.inputs.joining import bundled, plan_units
from pipeline.inputs.jsonl import BadLine
from pipeline.inputs.listing import list_inputs
from pipeline.inputs.row_ids import parse_row_id
from pipeline.inputs.source import UnitDatasource, read_units
from pipeline.inputs.units import (
    Piece,
    RowRange,
    Unit,
    check_columns,
    plan_files,
    unit_id,
)

S3 = S3Config()


@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.integers(0, 50), max_size=20), st.integers(1, 30))
def test_cuts_cover_every_row_once_in_order(groups: list[int], unit_rows: int) -> None:
    cuts = cut_groups(groups, unit_rows)
    position = 0
    for cut in cuts:
        assert cut.start == position
        assert 1 <= cut.rows <= unit_rows
        # skip and groups describe the same range as start and rows.
        assert sum(groups[: cut.offset]) + cut.skip == cut.start
        assert cut.start + cut.rows <= sum(groups[: cut.end])
        position += cut.rows
    assert position == sum(groups)


@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.integers(1, 30))
def test_small_row_groups_are_kept_whole(groups: list[int], unit_rows: int) -> None:
    for cut in cut_groups(groups, unit_rows):
        if cut.end - cut.offset > 1:
            assert cut.skip == 0
            assert cut.rows == sum(groups[cut.offset : cut.end])


def test_ids_are_stable_distinct_and_safe() -> None:
    # Outputs were begun with these.
    assert unit_id(RowRange("a/b.parquet", 0, 10)) == "a-b-000000000-d8f256ae14"
    names = ["a/b.parquet", "a-b.parquet", "a_b.jsonl", "../../b.parquet", "ü.parquet"]
    ids = {unit_id(RowRange(name, start, 10)) for name in names for start in (0, 10)}
    assert len(ids) == 2 * len(names)
    assert all(set(i) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") for i in ids)


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    table = pa.table({"i": list(range(1000)), "p": ["x"] * 1000})
    pq.write_table(table, folder / "a.parquet", row_group_size=300)
    pq.write_table(table.slice(0, 30), folder / "deep" / "small.parquet", row_group_size=7)
    lines = [f'{{"i": {i}, "p": "x"}}\n' for i in range(50)]
    (folder / "b.jsonl").write_text("\n".join(lines))
    (folder / "_SUCCESS").write_text("")
    (folder / ".hidden.parquet").write_text("not Parquet")
    return folder


@pytest.mark.parametrize("most_tasks", [2, 7, 1000])
@pytest.mark.parametrize("unit_rows", [1, 16, 250, 5000])
def test_reading_units_gives_every_row_once(
    inputs: Path, unit_rows: int, most_tasks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "_MOST_TASKS", most_tasks)
    plans = plan_files(list_inputs([str(inputs)], S3), S3, unit_rows)
    units = plan_units(plans, unit_rows)
    assert len({unit.id for unit in units}) == len(units)
    rows: dict[str, list[int]] = {plan.file.name: [] for plan in plans}
    source = UnitDatasource(bundled(units, 40), plans[0].table, S3)
    assert source.read_tasks <= most_tasks
    for task in source.get_read_tasks(1):
        for block in task():
            for read in UnitRows.from_block(block):
                assert read.table.num_rows == read.unit.rows <= unit_rows
                for index, value in enumerate(read.table["i"].to_pylist()):
                    name, row, _ = parse_row_id(read.row_id(index))
                    assert len(rows[name]) == row
                    rows[name].append(value)
    assert rows == {
        "a.parquet": list(range(1000)),
        "b.jsonl": list(range(50)),
        "deep/small.parquet": list(range(30)),
    }


def test_files_of_one_schema_share_it(inputs: Path, tmp_path: Path) -> None:
    table = pa.table({"i": [1], "p": ["x"]}).replace_schema_metadata({"pandas": "of this file"})
    pq.write_table(table, inputs / "z.parquet")
    plans = plan_files(list_inputs([str(inputs)], S3), S3, 100)
    assert [p.file.format for p in plans] == ["parquet", "jsonl", "parquet", "parquet"]
    assert len({id(plan.schema) for plan in plans}) == 1
    assert plans[0].schema.names == ["i", "p"]


def test_some_units_of_a_row_group(inputs: Path) -> None:
    (plan,) = plan_files(list_inputs([f"{inputs}/a.parquet"], S3), S3, 100)
    pending = [Unit.of(plan.pieces[number]) for number in (1, 2, 5)]
    source = UnitDatasource(bundled(pending, 100), plan.table, S3)
    assert source.read_tasks == 2
    blocks = [block for task in source.get_read_tasks(1) for block in task()]
    read = [each for block in blocks for each in UnitRows.from_block(block)]
    assert [r.table["i"][0].as_py() for r in read] == [u.pieces[0].start for u in pending]


def test_units_do_not_depend_on_where_the_input_is(inputs: Path, tmp_path: Path) -> None:
    before = plan_files(list_inputs([str(inputs)], S3), S3, 64)
    inputs.rename(tmp_path / "moved")
    after = plan_files(list_inputs([str(tmp_path / "moved")], S3), S3, 64)
    assert [u.id for u in plan_units(before, 64)] == [u.id for u in plan_units(after, 64)]


def test_same_names_in_two_folders_stay_apart(
    tmp_path: Path, write_rows: Callable[..., str]
) -> None:
    for folder in ("x", "y"):
        write_rows(f"{folder}/a.parquet", [{"p": folder}])
    files = list_inputs([str(tmp_path / "x"), str(tmp_path / "y")], S3)
    assert len({file.name for file in files}) == 2


def test_a_file_asked_for_twice_is_read_once(inputs: Path) -> None:
    patterns = [str(inputs), f"{inputs}/*.parquet", f"{inputs}/**/*.parquet"]
    assert len(list_inputs(patterns, S3)) == 3


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{}/nothing/*.parquet", "no files match this glob"),
        ("{}/gone.parquet", "no such file or folder"),
        ("{}/empty", "no files match this folder"),
        ("{}/notes.txt", "not one of .parquet"),
        ("gs://bucket/x", "gs:// is not supported"),
    ],
)
def test_bad_paths_are_named(tmp_path: Path, pattern: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError) as caught:
        list_inputs([pattern.format(tmp_path)], S3)
    assert message in str(caught.value)
    assert pattern.format(tmp_path) in str(caught.value)


def test_a_truncated_parquet_file_is_named(inputs: Path) -> None:
    file = inputs / "a.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"a\.parquet: not a readable Parquet file"):
        plan_files(list_inputs([str(inputs)], S3), S3, 10)


def test_a_missing_column_is_named_with_those_there_are(inputs: Path) -> None:
    plans = plan_files(list_inputs([str(inputs)], S3), S3, 10)
    with pytest.raises(UserError, match=r"a\.parquet: no column 'q'; its columns: i, p"):
        check_columns(plans, ["p", "q"])


def test_empty_files_have_no_units(tmp_path: Path, write_rows: Callable[..., str]) -> None:
    write_rows("a.jsonl", [])
    pq.write_table(pa.table({"p": pa.array([], pa.string())}), tmp_path / "b.parquet")
    plans = plan_files(list_inputs([str(tmp_path)], S3), S3, 10)
    assert [plan.pieces for plan in plans] == [(), ()]
    check_columns(plans, ["p"])


def test_malformed_lines_are_rows_of_nulls(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(
        b'{"p": "a"}\nnot json\n\n[1]\n{"p": "b", "new": 1}\n\xff\xfe\n{"p": "\\ud800"}'
    )
    (plan,) = plan_files(list_inputs([str(file)], S3), S3, 100)
    unit = Unit.of(*plan.pieces)
    (read,) = read_units([unit], plan.table, S3)
    assert unit.rows == 6
    assert read.table["p"].to_pylist() == ["a", None, None, "b", None, None]
    assert sorted(read.bad_lines) == [1, 2, 4, 5]
    assert read.bad_lines[1].text == "not json"


def test_unit_survives_its_json() -> None:
    piece = Piece("a.parquet", 5, 3, "/x/a.parquet", "parquet", 0, 1, 5)
    unit = replace(Unit.of(piece, replace(piece, name="b.parquet")), only=(1, 4), generation=2)
    assert Unit.from_json(unit.to_json()) == unit


def test_blocks_keep_types_exactly() -> None:
    unit = Unit.of(Piece("a.parquet", 0, 2, "u", "parquet", 0, 1))
    schema = pa.schema(
        [
            pa.field("d", pa.dictionary(pa.int8(), pa.string())),
            pa.field("t", pa.timestamp("us", tz="Europe/Rome"), metadata={"k": "v"}),
            pa.field("m", pa.map_(pa.string(), pa.decimal128(9, 2))),
            pa.field("f", pa.list_(pa.float16(), 2), nullable=False),
        ]
    )
    rows: list[dict[str, Any]] = [{"d": "a", "t": None, "m": [], "f": [1.0, 2.0]}] * 2
    table = pa.Table.from_pylist(rows, schema)
    line = BadLine("x", "MalformedLine", "why")
    block = UnitRows.to_block([UnitRows(unit, table, {1: line}), UnitRows(unit, table, {})])
    back, other = UnitRows.from_block(block)
    assert (block.num_rows, other.bad_lines) == (1, {})
    assert back.table.equals(table, check_metadata=True)
    assert back.bad_lines == {1: line}
