"""The same rows in every format, and in folders that name columns."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from pipeline.config.job import S3Config
from pipeline.errors import UserError
from pipeline.inputs.listing import list_inputs
from pipeline.inputs.source import read_units
from pipeline.inputs.units import FilePlan, Unit, plan_files

S3 = S3Config()
TABLE = pa.table(
    {
        "id": [f"{i:03}" for i in range(40)],
        "text": [f'line {i},\n"quoted"\t{"x" * i}' for i in range(40)],
    }
)


def stream(table: pa.Table, path: Path) -> None:
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=9)


def separated(delimiter: str) -> Callable[[pa.Table, Path], None]:
    options = pa.csv.WriteOptions(delimiter=delimiter)
    return lambda table, path: pa.csv.write_csv(table, path, options)


def lines(table: pa.Table, path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))


WRITERS: dict[str, Callable[[pa.Table, Path], None]] = {
    "a.parquet": lambda table, path: pq.write_table(table, path, row_group_size=9),
    "a.jsonl": lines,
    "a.json": lines,
    "a.csv": separated(","),
    "a.tsv": separated("\t"),
    "a.feather": lambda table, path: pa.feather.write_feather(table, path, chunksize=9),
    "a.arrow": stream,
}


def planned(*paths: Path, unit_rows: int = 7, prefix: str | None = None) -> list[FilePlan]:
    return plan_files(list_inputs([str(path) for path in paths], S3, prefix), S3, unit_rows)


def rows_of(plans: list[FilePlan]) -> list[dict[str, Any]]:
    """All rows, each unit read by itself."""
    rows: list[dict[str, Any]] = []
    for plan in plans:
        for piece in plan.pieces:
            unit = Unit.of(piece)
            (read,) = read_units([unit], plan.table, S3)
            assert read.table.num_rows == unit.rows
            assert not read.bad_lines
            rows += read.table.to_pylist()
    return rows


@pytest.mark.parametrize("name", WRITERS)
def test_rows_are_the_same_in_every_format(tmp_path: Path, name: str) -> None:
    WRITERS[name](TABLE, tmp_path / name)
    (plan,) = planned(tmp_path / name)
    assert (plan.rows, plan.schema.names) == (40, ["id", "text"])
    assert len(plan.pieces) > 5
    assert rows_of([plan]) == TABLE.to_pylist()


def test_a_job_may_read_all_of_them(tmp_path: Path) -> None:
    for number, (name, write) in enumerate(WRITERS.items()):
        write(TABLE, tmp_path / f"{number}{name}")
    plans = planned(tmp_path / "*", unit_rows=100)
    assert rows_of(plans) == TABLE.to_pylist() * len(WRITERS)
    assert {str(plan.table) for plan in plans} == {"id: string\ntext: string"}


def test_what_datasets_saved_is_read_as_its_folder(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    saved = datasets.Dataset(TABLE).select(range(3, 40))
    saved.save_to_disk(tmp_path / "data", num_shards=2)
    loaded = datasets.load_from_disk(tmp_path / "data")
    loaded.map(lambda row: {"more": 1})  # leaves a file beside the data
    plans = planned(tmp_path / "data")
    assert len(plans) == 2
    assert rows_of(plans) == TABLE.to_pylist()[3:]


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.csv", "a.arrow"])
def test_folders_name_columns(tmp_path: Path, name: str) -> None:
    places = ["date=2026-11-28/n=1", "date=2026-11-29/n=__HIVE_DEFAULT_PARTITION__"]
    for place in places:
        (tmp_path / "in" / place).mkdir(parents=True)
        WRITERS[name](TABLE.slice(0, 2), tmp_path / "in" / place / name)
    plans = planned(tmp_path / "in")
    assert [plan.schema.names for plan in plans] == [["id", "text", "date", "n"]] * 2
    assert plans[0].table.field("n").type == pa.int32()
    expected = [
        {**row, "date": date, "n": n}
        for date, n in (("2026-11-28", 1), ("2026-11-29", None))
        for row in TABLE.slice(0, 2).to_pylist()
    ]
    assert rows_of(plans) == expected
    # A part of the table has the columns of all of it.
    assert rows_of(planned(tmp_path / "in" / "date=2026-11-28")) == expected[:2]
    assert rows_of(planned(tmp_path / "in" / "date=2026-11-28" / "*" / name)) == expected[:2]

    # A column that a file has, too, must say the same.
    folder = tmp_path / "in" / places[0]
    WRITERS[name](pa.table({"id": ["1"], "date": ["2026-11-28"]}), folder / name)
    assert rows_of(planned(folder)) == [{"id": "1", "date": "2026-11-28", "n": 1}]
    WRITERS[name](pa.table({"id": ["1"], "date": ["2026-11-30"]}), folder / name)
    with pytest.raises(UserError, match=r"column 'date' holds '2026-11-30', but the folder says"):
        rows_of(planned(folder))


@pytest.mark.parametrize("name", ["a.csv", "a.arrow"])
def test_an_earlier_jobs_columns_are_renamed(tmp_path: Path, name: str) -> None:
    table = pa.table({"q": ["x"], "completion": ["y"], "row_id": ["a:0:0"]})
    WRITERS[name](table, tmp_path / name)
    plans = planned(tmp_path / name, prefix="draft_")
    names = ["q", "draft_completion", "draft_row_id"]
    assert rows_of(plans) == [dict(zip(names, ["x", "y", "a:0:0"], strict=True))]
