"""Jobs in a chain: what one wrote is the input of the next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.commit.schema import COMPLETION_COLUMNS, ERROR_COLUMNS
from pipeline.config.job import JobConfig, S3Config
from pipeline.errors import UserError
from pipeline.inputs.jsonl import RAW_LINE
from pipeline.inputs.listing import list_inputs
from pipeline.inputs.row_ids import ROW_ID
from pipeline.inputs.source import read_units
from pipeline.inputs.units import Unit, plan_files
from pipeline.layout import ADDED_COLUMNS
from pipeline.run.plan import plan_job
from tests.conftest import TinyModels
from tests.pipeline.small_jobs import rows_of, run


def job(target: str, source: Path, output: Path, template: str, **how: Any) -> dict[str, Any]:
    return {
        "input": {"paths": [str(source)], "template": template, **how},
        "output": str(output),
        "models": {"target": target},
        "sampling": {"max_new_tokens": 3, "seed": 5, "temperature": 1.0, "n": 2},
        "speculation": {"policy": "none"},
        "actors": {"num_cpus": 2},
    }


def earlier_rows() -> list[dict[str, Any]]:
    """What a job has written: two samples of each of two rows."""
    nothing = dict.fromkeys(COMPLETION_COLUMNS)
    return [
        {
            "row_id": f"in.parquet:{i}:{sample}",
            "q": "ab"[i],
            "n": i + 1,
            **nothing,
            "completion": f"draft {i}{sample}",
            "output_tokens": 3,
        }
        for i in range(2)
        for sample in range(2)
    ]


@pytest.mark.ray
def test_jobs_each_on_what_the_one_before_wrote(
    local_ray: None, tiny_models: TinyModels, tmp_path: Path
) -> None:
    drafts, verdicts = tmp_path / "drafts", tmp_path / "verdicts"
    written = [("row_id", pa.string()), ("q", pa.string()), ("n", pa.int64())]
    schema = pa.schema([*written, *COMPLETION_COLUMNS.items()])
    drafts.mkdir()
    pq.write_table(pa.Table.from_pylist(earlier_rows(), schema), drafts / "unit.parquet")
    asked = "{{ q }}: {{ draft_completion }}"
    run(job(tiny_models.target, drafts, verdicts, asked, prefix="draft_"))
    asked = "{{ draft_row_id }} {{ draft_completion }} {{ judge_completion }}"
    verdicts /= "completions"
    reviews = job(tiny_models.target, verdicts, tmp_path / "reviews", asked, prefix="judge_")
    plan = plan_job(JobConfig.model_validate(reviews))
    third = [
        row
        for unit in read_units(plan.units, plan.table, S3Config())
        for row in unit.table.to_pylist()
    ]

    first = {row["row_id"]: row for row in earlier_rows()}
    second = rows_of(verdicts.parent)
    assert (len(first), len(second), len(third)) == (4, 8, 8)
    for row in second.values():
        draft = first[row["draft_row_id"]]
        assert (row["q"], row["n"]) == (draft["q"], draft["n"])
        assert row["draft_completion"] == draft["completion"]
        assert row["draft_acceptance_rate"] is None
    for row in third:
        verdict = second[row["judge_row_id"]]
        assert row["draft_completion"] == verdict["draft_completion"]
        assert row["judge_completion"] == verdict["completion"]
        assert row["judge_finish_reason"] == verdict["finish_reason"]
    columns = set(pq.read_table(verdicts).column_names)
    assert columns >= {"q", "n", "row_id", *COMPLETION_COLUMNS}

    # Without a prefix, or with one that is taken, the message says what to do.
    for how, message in (
        ({}, r"'row_id' has the name of an output column.*input\.prefix"),
        ({"prefix": "draft_"}, r"two columns are named 'draft_.*'; take another input\.prefix"),
    ):
        values = job(tiny_models.target, verdicts, tmp_path / "more", "{{ q }}", **how)
        with pytest.raises(UserError, match=message):
            plan_job(JobConfig.model_validate(values))


def test_every_column_that_a_job_adds_can_be_renamed() -> None:
    assert {ROW_ID, RAW_LINE, *COMPLETION_COLUMNS, *ERROR_COLUMNS} == ADDED_COLUMNS


def test_lines_of_an_earlier_job_have_its_names_too(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"q": "x", "completion": "y", "attempts": 1}\n')
    files = list_inputs([str(tmp_path)], S3Config(), "draft_")
    (plan,) = plan_files(files, S3Config(), 10)
    names = ["q", "draft_completion", "draft_attempts"]
    assert plan.schema.names == names
    (rows,) = read_units([Unit.of(*plan.pieces)], plan.table, S3Config(), ADDED_COLUMNS)
    assert rows.table.to_pylist() == [dict(zip(names, ["x", "y", 1], strict=True))]
    assert not rows.bad_lines
