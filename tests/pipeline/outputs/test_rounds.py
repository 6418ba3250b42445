from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from jobs.cli import app
from pipeline import layout
from pipeline.commit.files import parquet_bytes
from pipeline.commit.footer import to_footer
from pipeline.commit.trace import trace_table
from pipeline.config.job import S3Config
from pipeline.errors import UserError
from pipeline.inputs.blocks import UnitRows
from pipeline.inputs.units import Unit
from pipeline.outputs.rounds import read_rounds
from pipeline.storage.folder import Folder, open_folder
from tests.pipeline.commit.records import record
from tests.pipeline.commit.test_trace import outcomes, text, unit


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., Folder]:
    """Writes the output of a job over files of 6 and 3 rows, with some of its units committed."""

    def write(*units: Unit, traced: bool = True) -> Folder:
        folder = open_folder(str(tmp_path), S3Config())
        folder.put(layout.JOB, b"{}")
        sizes = pa.table({"name": ["a.parquet", "a-.parquet"], "size": [1, 1], "rows": [6, 3]})
        folder.put(layout.INPUTS, parquet_bytes(sizes))
        for each in units:
            rows = UnitRows(each, pa.table({"p": ["x"] * each.rows}), {})
            trace = f"{each.id}-0.parquet"
            folder.put(
                f"{layout.TRACE}/{trace}", parquet_bytes(trace_table(rows, outcomes(), text))
            )
            committed = record(
                each.id,
                input=each.pieces[0].name,
                start=each.pieces[0].start,
                errors_file="e.parquet",
                trace_file=trace if traced else None,
            )
            ids = [rows.row_id(i) for i in (0, 2)]
            file = tmp_path / "completions" / f"{each.id}.parquet"
            file.parent.mkdir(exist_ok=True)
            table = pa.table({"row_id": ids})
            pq.write_table(table.replace_schema_metadata(to_footer(committed)), file)
        return folder

    return write


def test_rounds_are_found_by_row_id(job: Callable[..., Folder]) -> None:
    # Both files' units have names that begin with "a-".
    folder = job(unit(), unit(start=3), unit("a-.parquet"))
    for name in ("a.parquet:0:0", "a.parquet:3:0", "a-.parquet:0:0"):
        assert [each["row_id"] for each in read_rounds(folder, name)] == [name] * 3
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
    assert len(rounds) == 3
