"""A record in the footer of its unit's file, written by this version or by an older one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import layout
from pipeline.commit.files import parquet_bytes
from pipeline.commit.footer import (
    FOOTER_KEY,
    Inconsistent,
    from_footer,
    from_plain,
    read_record,
    to_footer,
    to_plain,
)
from pipeline.commit.record import UnitFile, parts
from pipeline.commit.stats import stats_tables, summarise
from pipeline.config.job import S3Config
from pipeline.storage.folder import open_folder
from tests.pipeline.commit.records import plain_record, record

FLAT = Path(__file__).with_name("flat_record.json")
"""A unit that was committed and retried by the code of commit d013f91, whose records were flat."""


def test_a_record_survives_its_footer() -> None:
    assert from_footer(to_footer(record())) == record()
    retried = record(
        generation=1,
        retried=1,
        earlier=[plain_record()],
        errors={},
        errors_file=None,
        errors_sha256=None,
        trace_file="t",
        trace_sha256="1",
        trace_rounds=7,
        outcomes=[(3, 1, 2)],
        slowest=[("a.parquet:0:0", 1.5)],
        costs={"draft": [(1, 0.25)]},
        nodes=[(1, 0, 4, 4, 4, 3), (1, 1, 4, 2, 1, 1)],
    )
    assert from_footer(to_footer(retried)) == retried
    assert retried.files.trace == UnitFile("trace/t", 7, "1")
    assert retried.superseded_files == [UnitFile("_specbatch/history/e", 1, "0")]


def test_a_flat_record_is_read_and_stored_as_it_was() -> None:
    values: dict[str, Any] = json.loads(FLAT.read_text())
    read = from_plain(values)
    stored = json.loads(to_footer(read)[FOOTER_KEY])
    for kept in (stored, *stored["earlier"]):  # a unit was of one file
        assert kept.pop("files") == 1
        assert kept.pop("nodes") == []  # and nothing branched
        assert kept.pop("ranges") == [[values["input"], values["start"], values["rows"]]]
    assert stored == values
    assert list(to_plain(read))[:-3] == list(values)
    assert read.results.completions == values["completions"]
    assert read.results.counts.verified == values["counts"]["verified"]
    assert read.actor.id == values["actor"]
    assert read.work.phase_seconds == values["phase_seconds"]
    assert read.work.forward_seconds.keys() == values["costs"].keys()
    assert read.files.errors is not None and read.files.trace is not None
    assert read.files.errors.name == f"errors/{values['errors_file']}"
    assert read.files.trace.rows == values["trace_rounds"]
    assert read.retries.generation == 1
    first, second = parts(read)
    assert (first.rows + second.rows, second.rows) == (values["rows"], values["retried"])
    assert sum(part.results.completions for part in (first, second)) == values["completions"]


def test_a_record_of_a_version_before_samples_traces_and_costs() -> None:
    read = from_plain(plain_record())
    assert read.results.samples == read.rows
    assert read.files.trace is None
    summary = summarise([read])
    assert summary["speedup"] is summary["speedup_ci"] is None
    assert summary["calibration"] == []
    assert summary["positions"] == []
    for name in ("costs", "positions"):
        assert stats_tables([read])[name].num_rows == 0


def test_a_unit_of_several_files_is_under_the_first() -> None:
    joined = record(ranges=[["a.parquet", 0, 2], ["b.jsonl", 0, 1]])
    assert from_footer(to_footer(joined)) == joined
    assert joined.inputs == ["a.parquet", "b.jsonl"]
    (row,) = stats_tables([joined])["units"].to_pylist()
    assert (row["input"], row["start"], row["rows"], row["files"]) == ("a.parquet", 0, 3, 2)


@pytest.mark.parametrize("stored", [b"", b"{}", b"null", b"[1]", b'"text"', b'{"unit": "u"}'])
def test_what_is_no_record_is_no_units_file(tmp_path: Path, stored: bytes) -> None:
    output = open_folder(str(tmp_path), S3Config())
    table = pa.table({"row_id": pa.array([], pa.string())})
    output.put(layout.completions("u"), parquet_bytes(table, {FOOTER_KEY: stored}))
    with pytest.raises(Inconsistent, match=r"u\.parquet: not a file that specbatch wrote"):
        read_record(output, "u")


def test_a_footer_counts_the_rows_of_its_own_file(tmp_path: Path) -> None:
    output = open_folder(str(tmp_path), S3Config())
    table = pa.table({"row_id": ["a.parquet:0:0"]})
    output.put(layout.completions("u"), parquet_bytes(table, to_footer(record(completions=2))))
    with pytest.raises(Inconsistent, match="not those that its footer counts"):
        read_record(output, "u")
    output.put(layout.completions("u"), parquet_bytes(table, to_footer(record(completions=1))))
    assert pq.read_metadata(tmp_path / layout.completions("u")).num_rows == 1
    assert read_record(output, "u").unit == "u"
