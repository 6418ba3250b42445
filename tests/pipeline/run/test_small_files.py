"""Jobs over many files of one row: they share units, or at least what an actor is handed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import layout
from pipeline.commit.files import parquet_bytes
from pipeline.commit.footer import read_records
from pipeline.commit.manifest import committed_ids
from pipeline.commit.record import UnitRecord
from pipeline.config.job import S3Config
from pipeline.outputs.rounds import read_rounds
from pipeline.outputs.verify import verify
from pipeline.run.run import RunMode
from pipeline.storage.folder import open_folder
from tests.conftest import TinyModels
from tests.pipeline.small_jobs import rows_of, run

pytestmark = pytest.mark.ray

FILES, BAD, UNIT_ROWS = 40, {4, 22, 24}, 16


def write(folder: Path, numbers: range) -> None:
    """A file of one row for each number, in both formats by turns; some have no prompt."""
    folder.mkdir(exist_ok=True)
    for i in numbers:
        row = {"i": i, "prompt": None if i in BAD else f"count to {i}"}
        if i % 2:
            (folder / f"{i:03}.jsonl").write_text(json.dumps(row) + "\n")
        else:
            types = pa.schema({"i": pa.int64(), "prompt": pa.string()})
            pq.write_table(pa.Table.from_pylist([row], types), folder / f"{i:03}.parquet")


def settings(models: TinyModels, inputs: Path, output: Path) -> dict[str, Any]:
    return {
        "input": {"paths": [str(inputs)], "prompt_column": "prompt"},
        "output": str(output),
        "models": {"target": models.target, "draft": models.draft, "deterministic": True},
        "sampling": {"max_new_tokens": 8, "temperature": 0},
        "speculation": {"policy": "fixed", "k": 2, "trace": True},
        "actors": {"num_cpus": 2, "slots": 16},
        "unit_rows": UNIT_ROWS,
    }


def records(output: Path) -> list[UnitRecord]:
    folder = open_folder(str(output), S3Config())
    return read_records(folder, committed_ids(folder))


def times(output: Path) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in (output / "completions").iterdir()}


def texts(output: Path) -> dict[str, str]:
    return {name: row["completion"] for name, row in rows_of(output).items()}


def test_small_files_share_units_through_the_life_of_an_output(
    local_ray: None, tiny_models: TinyModels, tmp_path: Path
) -> None:
    inputs, output = tmp_path / "in", tmp_path / "out"
    write(inputs, range(10, 10 + FILES))
    values = settings(tiny_models, inputs, output)
    result = run(values)
    good = FILES - 2
    assert (result.summary["rows"], result.summary["errors"], result.units_run) == (good, 2, 3)
    assert [(r.rows, len(r.inputs)) for r in records(output)] == [(16, 16), (16, 16), (8, 8)]
    # A file's rows are called after it, whatever unit they are in, and in either format.
    names = [f"{i:03}.{'jsonl' if i % 2 else 'parquet'}" for i in range(10, 10 + FILES)]
    assert {*rows_of(output), *rows_of(output, "errors")} == {f"{name}:0:0" for name in names}
    assert [row["i"] for row in rows_of(output, "errors").values()] == [22, 24]
    units = pq.read_table(output / "stats/units.parquet").to_pylist()
    assert [(u["input"], u["start"], u["files"]) for u in units][:2] == [
        ("010.parquet", 0, 16),
        ("026.parquet", 0, 16),
    ]
    rounds = read_rounds(open_folder(str(output), S3Config()), "025.jsonl:0:0")
    assert {each["row_id"] for each in rounds} == {"025.jsonl:0:0"}

    # What is missing after a job was killed is generated again, under the same names. Files that
    # are added lie among the others, and are joined with none of them.
    before, first = texts(output), times(output)
    lost = sorted(first)[1]
    lost.unlink()
    (output / layout.SUCCESS).unlink()
    write(inputs, range(10))
    (inputs / "017b.jsonl").write_text('{"i": 170, "prompt": "one more"}\n')
    assert run(values, mode=RunMode(extend=True)).units_run == 2
    assert first.pop(lost) < times(output)[lost]
    assert first.items() <= times(output).items()
    assert before.items() <= texts(output).items()
    (added,) = [record for record in records(output) if record.rows == 11]
    assert added.inputs[-2:] == ["009.jsonl", "017b.jsonl"]
    assert run(values).units_run == 0

    # Rows that failed are tried again, and no others; each unit stays one.
    second = times(output)
    assert run(values, mode=RunMode(only_failed=True)).units_run == 2
    changed = [file for file, t in times(output).items() if second[file] != t]
    assert len(changed) == 2
    retried = {r.ranges[0].name: r.retries.retried for r in records(output) if r.retries.retried}
    assert retried == {"000.parquet": 1, "010.parquet": 2}
    failed = rows_of(output, "errors")
    assert {name: row["attempts"] for name, row in failed.items()} == {
        f"{name}:0:0": 2 for name in ("004.parquet", "022.parquet", "024.parquet")
    }
    found = verify(str(output), S3Config())
    assert found.problems == []
    assert (found.rows_in, found.rows_out, found.rows_in_errors, found.units) == (51, 48, 3, 4)


@pytest.mark.slow
def test_an_output_of_one_unit_a_file_is_resumed_as_it_is_and_slots_are_full(
    local_ray: None, tiny_models: TinyModels, tmp_path: Path
) -> None:
    """As versions began it that joined nothing, and noted no steps."""
    inputs, output = tmp_path / "in", tmp_path / "out"
    write(inputs, range(26, 26 + UNIT_ROWS))
    values = settings(tiny_models, inputs, output)
    sizes = pa.table({"name": [file.name for file in sorted(inputs.iterdir())]})
    for column in ("size", "rows"):
        sizes = sizes.append_column(column, pa.array([1] * UNIT_ROWS))
    open_folder(str(output), S3Config()).put(layout.INPUTS, parquet_bytes(sizes))
    result = run(values)
    assert result.units_run == len(times(output)) == UNIT_ROWS
    assert result.summary["peak_live"] == UNIT_ROWS
    for file in sorted(times(output))[::2]:
        file.unlink()
    (output / layout.SUCCESS).unlink()
    # Files that are added are joined.
    write(inputs, range(8))
    assert run(values, mode=RunMode(extend=True)).units_run == UNIT_ROWS // 2 + 1
    assert run(values).units_run == 0
    assert verify(str(output), S3Config()).problems == []
