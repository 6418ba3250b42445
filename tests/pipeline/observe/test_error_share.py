from __future__ import annotations

import threading
from pathlib import Path

import pytest

from pipeline.config.job import JobConfig, S3Config
from pipeline.errors import TooManyErrors
from pipeline.observe.error_share import ErrorShare, too_many
from pipeline.observe.monitor import Posted
from pipeline.observe.run_ledger import RunLedger
from pipeline.storage.folder import open_folder


@pytest.mark.parametrize(
    ("failed", "completed", "most", "fails"),
    [
        (0, 0, 0.0, False),  # no rows at all
        (0, 5, 0.0, False),
        (1, 999, 0.0, True),
        (5, 5, 0.5, False),
        (6, 5, 0.5, True),
        (9, 1, 1.0, False),
        (9, 0, 1.0, True),
    ],
)
def test_which_jobs_fail(failed: int, completed: int, most: float, fails: bool) -> None:
    assert too_many(failed, completed, most) == fails


@pytest.mark.parametrize(
    ("begun", "failed", "stops"), [(1200, 600, False), (1200, 601, True), (999, 999, False)]
)
def test_rows_in_flight_count_as_good_and_the_first_few_say_nothing(
    tmp_path: Path, begun: int, failed: int, stops: bool
) -> None:
    values = {"input": {"paths": "x", "prompt_column": "p"}, "output": str(tmp_path)}
    values |= {"models": {"target": "t"}, "speculation": {"policy": "none"}}
    job = JobConfig.model_validate(values)
    ledger = RunLedger(open_folder(job.output, S3Config()), job)
    stop = threading.Event()
    it = ErrorShare(job.max_error_share, ledger, stop)
    it.look(None)  # the monitor does not answer
    it.look(Posted(None, (), begun, failed, 1, False))
    assert isinstance(ledger.stopped_by, TooManyErrors) == stops == stop.is_set()
