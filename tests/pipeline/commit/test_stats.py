"""Sums over units' records."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from pipeline.commit.stats import busy_seconds, stats_tables, summarise
from specdec.measure.speedup import SpeedupMeter
from tests.pipeline.commit.records import plain_record, record


def meter(speculative: float, control: float, rounds: int = 20) -> dict[str, Any]:
    """Rounds of four rows and seconds each; with speculation they commit twice as much."""
    result = SpeedupMeter()
    for i in range(rounds):
        result.book(4, speculative * (1 + 0.01 * (i % 3)), 8, control=False)
        result.book(4, control * (1 + 0.01 * (i % 3)), 4, control=True)
    return result.to_json()


def test_speedup_is_measured_over_units_and_per_unit_and_actor() -> None:
    records = [
        record("u", "a", speedup=meter(0.1, 0.1)),
        record("v", "b", speedup=meter(0.3, 0.1)),
        record("w", "b", speedup=meter(0.3, 0.1, rounds=2)),
    ]
    summary = summarise(records)
    low, high = summary["speedup_ci"]
    assert low < summary["speedup"] < high
    assert 2 / 3 < summary["speedup"] < 2
    assert summary["speedup_controls"] == 42
    tables = stats_tables(records)
    fast, slow, unknown = tables["units"].to_pylist()
    assert fast["speedup"] == pytest.approx(2)
    assert slow["speedup"] == pytest.approx(2 / 3)
    assert slow["speedup_low"] < slow["speedup"] < slow["speedup_high"]
    assert (unknown["speedup"], unknown["speedup_controls"]) == (None, 0)
    assert [a["speedup_controls"] for a in tables["actors"].to_pylist()] == [20, 22]


def test_columns_that_are_null_in_every_row_have_types() -> None:
    tables = stats_tables([record(counts=dict.fromkeys(plain_record()["counts"], 0))])
    for table in tables.values():
        assert not any(pa.types.is_null(column.type) for column in table.schema)
    assert tables["units"].schema.field("trace_file").type == pa.string()
    assert tables["units"].schema.field("speedup").type == pa.float64()


def test_calibration_by_input_and_context() -> None:
    def bins(judged: int, predicted: float, accepted: int) -> list[list[float]]:
        result = [[0.0, 0.0, 0.0] for _ in range(10)]
        result[int(predicted * 10)] = [judged, judged * predicted, accepted]
        return result

    records = [
        record("u", calibration={"128": bins(10, 0.55, 5), "256": bins(10, 0.95, 9)}),
        record("v", input="b.parquet", calibration={"128": bins(20, 0.35, 1)}),
    ]
    rows = {(row["by"], row["name"]): row for row in summarise(records)["calibration"]}
    assert list(rows) == [
        ("all", ""),
        ("input", "a.parquet"),
        ("input", "b.parquet"),
        ("context", "128"),
        ("context", "256"),
    ]
    assert rows["all", ""]["judged"] == 40
    assert rows["all", ""]["accepted"] == 15 / 40
    assert rows["all", ""]["ece"] == pytest.approx((0.5 + 0.5 + 6) / 40)
    assert rows["input", "b.parquet"]["predicted"] == pytest.approx(0.35)
    assert rows["context", "128"]["judged"] == 30
    assert stats_tables(records)["calibration"].to_pylist() == list(rows.values())


def test_acceptance_by_position() -> None:
    records = [
        # Of three candidates none, one and all were accepted; nothing behind a rejection is judged.
        record("u", outcomes=[(0, 0, 9), (3, 0, 4), (3, 1, 2), (3, 3, 1)]),
        record("v", outcomes=[(1, 1, 5)]),
    ]
    rows = summarise(records)["positions"]
    assert rows == [
        {"position": 1, "judged": 12, "accepted": 8},
        {"position": 2, "judged": 3, "accepted": 1},
        {"position": 3, "judged": 1, "accepted": 1},
    ]
    assert stats_tables(records)["positions"].to_pylist() == rows


def test_candidates_that_branch_by_depth_and_rank() -> None:
    """Positions count a place once, whichever of its children stands."""
    records = [
        record("u", outcomes=[(4, 2, 9)], nodes=[(1, 0, 9, 9, 9, 6), (1, 1, 9, 5, 2, 1)]),
        record("v", nodes=[(1, 0, 1, 1, 1, 0), (2, 0, 1, 0, 0, 0)]),
        record("w", outcomes=[(1, 1, 5)]),
    ]
    found = summarise(records)
    assert found["positions"][0] == {"position": 1, "judged": 15, "accepted": 12}
    names = ("depth", "rank", "drafted", "verified", "judged", "accepted")
    rows = [(1, 0, 10, 10, 10, 6), (1, 1, 9, 5, 2, 1), (2, 0, 1, 0, 0, 0)]
    assert found["nodes"] == [dict(zip(names, row, strict=True)) for row in rows]
    assert stats_tables(records)["nodes"].to_pylist() == found["nodes"]


def test_costs_are_an_actors_latest_and_fallen_heads_are_counted() -> None:
    records = [
        record("u", "a", finished=5.0, costs={"draft": [(1, 0.1)]}),
        record("v", "a", finished=9.0, costs={"draft": [(1, 0.2)]}, fell_back=True),
        record("w", "b", finished=9.0),
    ]
    assert summarise(records)["actors_fell_back"] == 1
    tables = stats_tables(records)
    assert [a["fell_back"] for a in tables["actors"].to_pylist()] == [True, False]
    assert tables["costs"].to_pylist() == [
        {"actor": "a", "kind": "draft", "tokens": 1, "seconds": 0.2}
    ]


def test_a_pause_between_runs_is_not_busy_time() -> None:
    runs = [(0.0, 4.0), (1.0, 2.0), (3.0, 5.0), (100.0, 103.0)]
    assert busy_seconds(record(started=s, finished=f) for s, f in runs) == 8.0


def test_the_summary_adds_up_and_derives_ratios_from_counts() -> None:
    summary = summarise([record("u"), record("v", started=10.0, finished=20.0)])
    assert (summary["rows"], summary["errors"]) == (4, 2)
    assert summary["errors_by_class"] == {"NullPrompt": 2}
    assert summary["tokens_per_second"] == 2.0
    assert summary["acceptance_rate"] == 20 / 50
    assert summary["block_efficiency"] == 40 / 20
    assert summary["phase_seconds"] == {"verify": 8.0, "idle": 2.0}
    assert summary["target_forwards"] == 24
    assert summary["speedup"] is summary["speedup_ci"] is summary["cost"] is None


def test_a_job_without_rows_has_a_summary() -> None:
    summary = summarise([])
    assert summary["rows"] == 0
    assert summary["tokens_per_second"] is None
    assert all(table.num_rows == 0 for table in stats_tables([]).values())


def test_tables_by_actor_and_phase() -> None:
    tables = stats_tables([record("u", "a"), record("v", "b"), record("w", "b")])
    assert tables["units"].num_rows == 3
    assert tables["actors"]["units"].to_pylist() == [1, 2]
    assert {"actor": "b", "phase": "verify", "seconds": 8.0} in tables["phases"].to_pylist()
