"""Charts of jobs in which nothing, or next to nothing, happened: drawn, and without a warning."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pytest

from jobs.reports import charts
from jobs.reports.charts import Chart
from jobs.reports.page import write_page
from jobs.reports.timeline import timeline
from pipeline import layout
from pipeline.commit.files import parquet_bytes
from pipeline.commit.footer import to_footer
from pipeline.config.job import S3Config
from pipeline.storage.folder import open_folder
from tests.pipeline.commit.records import record

pytestmark = pytest.mark.filterwarnings("error")

COUNTS = dict.fromkeys(("rounds", "drafted", "verified", "accepted", "committed"), 0)
FAILED = {"completions": 0, "errors": {"NullPrompt": 3}, "output_tokens": 0, "counts": COUNTS}
"""A unit of which no row was completed."""

TIMELINES = {
    "nothing": timeline([]),
    "no row completed": timeline([record(**FAILED)]),
    "no row completed by two actors": timeline([record(**FAILED), record(actor="b", **FAILED)]),
    "no time passed": timeline([record(started=5.0, finished=5.0)]),
    "one actor did nothing, later": timeline(
        [record(), record(actor="b", started=1e4, finished=1e4 + 5, **FAILED)]
    ),
}
NIGHTS = [datetime(2026, 1, 1, tzinfo=UTC) + timedelta(days=i) for i in range(3)]


def drawn(chart: Chart) -> None:
    ElementTree.fromstring(chart.svg)


@pytest.mark.parametrize("name", TIMELINES)
@pytest.mark.parametrize(
    ("figure", "least"), [("goodput", 0.0), ("block_efficiency", 0.95), ("acceptance_rate", 0.0)]
)
def test_over_time(name: str, figure: str, least: float) -> None:
    line = TIMELINES[name]
    names = {actor: actor for actor in line.actors}
    drawn(charts.over_time("title", "label", figure, line, names, least))


@pytest.mark.parametrize(
    "draw",
    [
        lambda: charts.shares("title", {}),
        lambda: charts.shares("title", {"idle": 0.0}),
        lambda: charts.by_actor("title", {}, "seconds"),
        lambda: charts.by_actor("title", {"A": {}, "B": {}}, "seconds"),
        lambda: charts.acceptance_by_position([]),
        lambda: charts.acceptance_by_position([{"position": 1, "judged": 1, "accepted": 0}]),
        lambda: charts.acceptance_lines({"A": [], "B": []}),
        lambda: charts.acceptance_lines({"first choices": []}, "Acceptance by choice"),
        lambda: charts.candidates({}),
        lambda: charts.candidates({0: 5}),
        lambda: charts.speed_by_batch([(1, None, 3.0), (2, None, None)]),
        lambda: charts.reliability("title", {}),
        lambda: charts.reliability("title", {"all": [[0.0, 0.0, 0.0]]}),
        lambda: charts.trend("title", NIGHTS[:1], [None], (), 1.0),
        lambda: charts.trend("title", NIGHTS, [0.0] * 3, (), 0.0),
        lambda: charts.trend("title", NIGHTS, [None, 1.0, 1.0], [None, [0.9, 1.1], None], 1.0),
    ],
)
def test_little_to_draw(draw: Callable[[], Chart]) -> None:
    drawn(draw())


def test_a_job_of_which_no_row_was_completed_has_a_page(
    write_job_output: Callable[..., str],
) -> None:
    output = write_job_output({})
    failed = record(errors_file=None, errors_sha256=None, **FAILED)
    ids = pa.table({"row_id": pa.array([], pa.string())})
    open_folder(output, S3Config()).put(
        layout.completions("u"), parquet_bytes(ids, to_footer(failed))
    )
    page = Path(write_page(output, S3Config())).read_text()
    assert "Block efficiency over time" in page
    assert "NullPrompt" in page
