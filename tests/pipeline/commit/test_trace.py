from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from jobs.cli import app
from pipeline.commit import manifest
from pipeline.commit.planned_inputs import INPUTS
from pipeline.commit.schema import Failed, Finished, Outcomes
from pipeline.commit.stats import FOOTER_KEY
from pipeline.commit.trace import TRACE_SCHEMA, read_rounds, trace_table
from pipeline.config.job import S3Config
from pipeline.errors import RowError, UserError
from pipeline.inputs.blocks import UnitRows
from pipeline.inputs.units import Unit, unit_id
from pipeline.storage.folder import Folder, open_folder
from specdec.request import Completion, RoundTrace
from tests.pipeline.commit.test_manifest import record

ROUNDS = (
    RoundTrace(20, 4, (5, 6, 7), (0.9, 0.5, 0.2), 2, 1, "after 3: too little for its cost"),
    RoundTrace(22, 3, (), (), 0, 0, "control round"),
)


def unit(name: str = "a.parquet", start: int = 0, rows: int = 3) -> Unit:
    return Unit(unit_id(name, start, rows), "/x", name, "parquet", start, rows, 0, 1)


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


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., Folder]:
    """Writes the output of a job over files of 6 and 3 rows, with some of its units committed."""

    def write(*units: Unit, traced: bool = True) -> Folder:
        folder = open_folder(str(tmp_path), S3Config())
        folder.put(manifest.JOB, b"{}")
        sizes = pa.table({"name": ["a.parquet", "a-.parquet"], "size": [1, 1], "rows": [6, 3]})
        folder.put(INPUTS, manifest.table_bytes(sizes))
        for each in units:
            rows = UnitRows(each, pa.table({"p": ["x"] * each.rows}), {})
            trace = f"{each.id}-0.parquet"
            folder.put(f"trace/{trace}", manifest.table_bytes(trace_table(rows, outcomes(), text)))
            committed = record(
                each.id,
                input=each.name,
                start=each.start,
                errors_file="e.parquet",
                trace_file=trace if traced else None,
            )
            ids = [f"{each.name}:{each.start + i}:0" for i in (0, 2)]
            file = tmp_path / "completions" / f"{each.id}.parquet"
            file.parent.mkdir(exist_ok=True)
            table = pa.table({"row_id": ids})
            pq.write_table(table.replace_schema_metadata({FOOTER_KEY: committed.to_json()}), file)
        return folder

    return write


def test_one_row_per_round_of_completed_rows() -> None:
    table = trace_table(UnitRows(unit(start=3), pa.table({"p": ["x"] * 3}), {}), outcomes(), text)
    assert table.schema.equals(TRACE_SCHEMA)
    first, second = table.to_pylist()
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
    }
    assert (second["round"], second["candidates"], second["reason"]) == (1, [], "control round")


def test_rounds_are_found_by_row_id(job: Callable[..., Folder]) -> None:
    # Both files' units have names that begin with "a-".
    folder = job(unit(), unit(start=3), unit("a-.parquet"))
    for name in ("a.parquet:0:0", "a.parquet:3:0", "a-.parquet:0:0"):
        assert [each["row_id"] for each in read_rounds(folder, name)] == [name] * 2
    assert read_rounds(folder, "a.parquet:2:0") == []


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a.parquet:1:0", r"not completed; .*errors/e\.parquet says why"),
        ("a.parquet:4:0", "not committed yet"),
        ("a.parquet:7:0", r"no such row; nearest: a\.parquet:5:0$"),
        ("a.parquet:2:1", r"nearest: a\.parquet:2:0$"),
        ("a.parquet:2", r"nearest: a\.parquet:2:0$"),
        ("b.parquet:2:0", r"nearest: .*a\.parquet:2:0"),
        ("nothing", "nearest: .*:0:0"),
        ("", "nearest: "),
        ("a.parquet:²:0", "nearest: "),
    ],
)
def test_rows_without_rounds(job: Callable[..., Folder], row: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_rounds(job(unit(), unit("a-.parquet")), row)


def test_rounds_that_were_not_kept(job: Callable[..., Folder]) -> None:
    with pytest.raises(UserError, match=r"speculation\.trace=true into another output"):
        read_rounds(job(unit(), traced=False), "a.parquet:0:0")


def test_the_command_says_how_rounds_are_kept(job: Callable[..., Folder]) -> None:
    output = job(unit(), traced=False).url
    result = CliRunner().invoke(app, ["explain", output, "--row", "a.parquet:0:0"])
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert result.stderr.startswith("error: ")
    assert "speculation.trace=true" in result.stderr


def test_a_stranger_among_the_completions(job: Callable[..., Folder]) -> None:
    folder = job(unit())
    folder.put("completions/mine.parquet", b"")
    rounds: list[dict[str, Any]] = read_rounds(folder, "a.parquet:0:0")
    assert len(rounds) == 2
